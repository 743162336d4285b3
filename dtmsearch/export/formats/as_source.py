"""`source`: the format that a quantized base model comes in. What the plan leaves as it is keeps the base model's own
bytes; what it changes lies beside them unquantized, as a loader of that format is told by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dtmsearch.core.holders import source_obstacle, source_refusal
from dtmsearch.errors import UserError
from dtmsearch.export.component_weights import component_dense
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.export.writer import ShardWriter, copy_other_files
from dtmsearch.model.sources.unquantized import StoredCheckpoint, is_read_here

_FP8_NOTE = (
    "It was measured with its weights unquantized (`FineGrainedFP8Config(dequantize=True)`). Kernels for FP8 round "
    "what its layers read as well, which was not measured."
)
_READ_NOTE = (
    "What runs {method} for transformers (gptqmodel) is not installed where it was written: its check has read the "
    "files as the search did, (code - zero point) x scale."
)
# Where a format's configuration names the layers that are not quantized.
_LEFT_OUT = {
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "compressed-tensors": "ignore",
}
# GPTQ has patterns of names with settings of their own; one that begins so is of layers that are not quantized.
_PATTERNS, _NOT = "dynamic", "-:"


def write_as_source(job: Job, folder: Path) -> Written:
    """Raises `UserError` where the base model does not come quantized, or in a format that is not written here."""
    stored = job.stored
    if stored is None and job.manifest.source:
        raise UserError(f"source does not write {job.manifest.source}: `dense` holds its values")
    if stored is None:
        raise UserError(
            f"source is the format of a quantized base model, and {job.manifest.model} does not come quantized: "
            "`dense` writes it"
        )
    changed = {name: scheme for name, scheme in job.plan.parsed.items() if not scheme.is_source}
    method = str(stored.settings.get("quant_method"))
    why = source_refusal(job.manifest.source, job.plan)
    if why is not None:
        raise refuse("source", f"{why}; `dense` holds them", [f"{n}: {s.name}" for n, s in changed.items()])
    more = [f"{n}: {s.name}" for n, s in changed.items() if source_obstacle(s, job.manifest.by_name[n].shape)]
    if more:
        raise refuse("source", "these schemes round activations as well", more)
    if job.trained is not None:
        raise UserError(f"source keeps the base model's bytes, which the trained weights {job.weights_id} replace")
    job.require_places()
    torn = _torn(job, set(changed))
    if torn:
        raise refuse(
            "source", "the base model's files hold these in one tensor with others that the plan changes", torn
        )
    writer = ShardWriter(folder, job)
    rewritten: list[str] = []
    for name, tensor in _tensors(job, stored, set(changed), rewritten):
        writer.add(name, tensor)
    files = writer.close()
    modules = [_module_of(name) for name in rewritten]
    copy_other_files(job, folder, _settings(stored.settings, _LEFT_OUT.get(method), modules))
    extra = 8 * writer.tensor_bytes - job.plan_bits
    further = {"what the base model's format stores otherwise": extra} if extra else {}
    notes = [_FP8_NOTE] if method == "fp8" else []
    if is_read_here(stored.settings):
        notes.append(_READ_NOTE.format(method=method.upper()))
    return Written(files, writer.tensor_bytes, further, notes)


def _tensors(
    job: Job, stored: StoredCheckpoint, changed: set[str], rewritten: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the base model's own files but those of changed components, which come unquantized. Names of
    weights that were quantized before are added to `rewritten`."""
    places = {tensor for name in changed for tensor in job.tensors_of(name)}
    quantized = {weight.name for weight in stored.weights}
    for name in stored.plain:
        if name not in places:
            tensor = stored.read(name)
            # A loader of quantized models leaves the rest in the dtype that it stands in.
            yield name, tensor.to(job.dtype_of(name)) if tensor.is_floating_point() else tensor
    for weight in stored.weights:
        if weight.name not in places:
            yield from ((part, stored.read(part)) for part in weight.parts)
    for name, tensor in job.rewritten(lambda component, weight: component_dense(job, component, weight)):
        if name in places:
            rewritten += [name] if name in quantized else []
            yield name, tensor


def _torn(job: Job, changed: set[str]) -> list[str]:
    """Components under `source` in a tensor of which others change: experts of one stack."""
    places = {tensor for name in changed for tensor in job.tensors_of(name)}
    kept = (name for name, scheme in job.plan.parsed.items() if scheme.is_source)
    return [name for name in kept if not places.isdisjoint(job.tensors_of(name))]


def _module_of(tensor: str) -> str:
    """The module that a loader is told to leave out for a tensor: of a stack of experts the one that holds it."""
    return tensor.removesuffix(".weight") if tensor.endswith(".weight") else tensor.rpartition(".")[0]


def _settings(settings: Mapping[str, Any], key: str | None, modules: list[str]) -> dict[str, Any]:
    """A base model's quantization settings with further layers left out."""
    found = dict(settings)
    if key is not None and modules:
        found[key] = list(dict.fromkeys((*(found.get(key) or ()), *modules)))
    if found.get("quant_method") == "gptq" and modules:
        own: dict[str, dict[str, Any]] = {f"{_NOT}^{re.escape(module)}$": {} for module in modules}
        found[_PATTERNS] = own | dict(found.get(_PATTERNS) or {})
    if "config_groups" in found:  # a name that is targeted by itself goes before one that is left out
        found["config_groups"] = {
            name: {**group, "targets": [target for target in group["targets"] if target not in modules]}
            for name, group in found["config_groups"].items()
        }
        found["config_groups"] = {name: group for name, group in found["config_groups"].items() if group["targets"]}
    return found
