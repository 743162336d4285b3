"""`compressed-tensors`: codes with their scales, several schemes in one model, each in the format that the library of
that name has for it (integers `pack-quantized`, FP8 `float-quantized`, ...), read by transformers with that library and
by vLLM.

What stands in the files is the search's own rounding: codes are packed as they are, nothing is rounded anew.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtmsearch.core.components import Component
from dtmsearch.core.engine_rules import CUTS_CACHES, ENGINES, where_note
from dtmsearch.core.holders import (
    LINEAR_ONLY,
    STACKED_IN_FILES,
    SYMMETRIC_EXPERTS,
    TIED,
    embedding_obstacle,
    engine_obstacle,
    is_packed,
    packed_obstacle,
)
from dtmsearch.core.schemes import Scheme, parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.export.component_weights import component_codes
from dtmsearch.export.folding import folds_of
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.export.loaded import merges_experts, unmerged_names, unmerged_tensors
from dtmsearch.export.packed_tensors import empty_parts, extra_bits_of, kept_parts, packed_parts, rows_of
from dtmsearch.export.writer import write_quantized
from dtmsearch.model.compress.quantization_arguments import CACHE_ARGUMENTS, inputs_arguments, weights_arguments
from dtmsearch.model.modules.loading import loading_obstacle
from dtmsearch.model.sources.library_formats import group_of

NAME = "compressed-tensors"
# The library's formats, by numbers and their scales.
_NUMBER_FORMATS = {
    "e4m3 float": "float-quantized",
    "e4m3 e8m0": "mxfp8-quantized",
    "e2m1 e4m3": "nvfp4-pack-quantized",
    "e2m1 e8m0": "mxfp4-pack-quantized",
    "e2m3 e8m0": "mxfp6-pack-quantized",
    "int8 float": "int-quantized",
    "int4 float": "pack-quantized",
}
_OTHER_INPUTS = (
    "What was measured rounds inputs in 32 bits, as engines do. transformers runs compressed-tensors' emulation: in a "
    "model of 32 bits the same, but for 8-bit integers (127.5 steps, where engines have 127); in 16 bits it rounds "
    "scales and quotients, too"
)
_UNPACKED = "transformers unpacks NVFP4 and MX to bfloat16: load this folder with dtype=bfloat16, not in 32 bits"


def write_packed(job: Job, folder: Path) -> Written:
    """Raises `UserError` for schemes that the format does not know, or that the job's runtime has no kernel for."""
    check_packed(job)
    folds = folds_of(job, NAME)
    settings = _quantization_config(job)
    merged = job.runtime == "transformers" and _rehearsed(job, settings)
    if not merged:
        job.require_places()

    def parts_of(component: Component, weight: Tensor) -> tuple[Mapping[str, Tensor], dict[str, int]]:
        if job.plan.scheme(component.name).is_source:
            kept = kept_parts(job, component)
            bits = 8 * sum(part.numel() * part.element_size() for part in kept.values())
            return kept, {"shapes": bits - component.source_bits}
        codes = folds.applied_to_codes(component.name, component_codes(job, component, weight))
        parts = packed_parts(job, component, codes)
        return parts, extra_bits_of(job, component, codes)

    notes = _notes(job)
    if merged or not _experts_of(job):
        written = write_quantized(
            job, folder, parts_of, settings, _unmerged(job) if merged else None, kept_as=folds.applied
        )
        return replace(written, notes=(*written.notes, *notes))
    extra: Counter[str] = Counter()
    written = write_quantized(job, folder, parts_of, settings, _by_expert(job, extra), kept_as=folds.applied)
    summed = Counter(written.extra_bits) + extra
    held = {what: bits for what, bits in summed.items() if bits}
    return replace(written, extra_bits=held, notes=(*written.notes, *notes))


def _notes(job: Job) -> list[str]:
    """What who loads the folder should know."""
    schemes = list({scheme.name: scheme for scheme in job.plan.parsed.values()}.values())
    notes = []
    if job.cache_scheme:
        notes.append(
            "Keys and values are kept in e4m3 with a scale of 1: vLLM takes it from this folder's kv_cache_scheme, and "
            "says that it finds no calibrated scales (--kv-cache-dtype fp8 says the same)."
        )
    if job.cache_scheme and job.runtime == "vllm-cpu":
        notes.append(CUTS_CACHES)
    if needs := where_note(job.runtime, frozenset(scheme.name for scheme in schemes)):
        notes.append(needs)
    if job.runtime == "transformers" and any(scheme.activations is not None for scheme in schemes):
        notes.append(_OTHER_INPUTS)
    in_16 = any(scheme.weights is not None and scheme.weights.scale != "float" for scheme in schemes)
    if job.runtime == "transformers" and in_16 and job.dtype == torch.float32:
        notes.append(_UNPACKED)
    return notes


def _rehearsed(job: Job, settings: Mapping[str, Any]) -> bool:
    """Whether parameters that the loader puts together of several tensors are to bear their own names, as those of
    experts always do: it is tried without values what transformers makes of either. Raises `UserError` where it loads
    neither."""
    ways = (True,) if merges_experts(job) else (False, True)
    reasons = [loading_obstacle(job.folder, job.empty, settings, dict(_empty_tensors(job, way))) for way in ways]
    for way, reason in zip(ways, reasons, strict=True):
        if not reason:
            return way
    raise UserError(
        f"{NAME} cannot hold this plan for transformers, which loads no {type(job.empty).__name__} whose layers are "
        f"packed: {reasons[0]}. `dense` holds the plan"
    )


def _empty_tensors(job: Job, merged: bool) -> Iterator[tuple[str, Tensor]]:
    """What would be written, names and tensors without values."""
    named = unmerged_names(job) if merged else {name: (name, shape) for name, shape in job.shapes.items()}
    for own, (name, shape) in named.items():
        module = own.removesuffix(".weight")
        inside = job.manifest.by_name[module] if module in job.plan.schemes else None
        component = inside if merged else job.component(own)
        if component is None:
            yield name, torch.empty(shape, dtype=job.dtype, device="meta")
            continue
        start = name.removesuffix(".weight") if merged else component.name
        for ending, part in empty_parts(job, component).items():
            yield f"{start}.{ending}", part


def _experts_of(job: Job) -> dict[str, tuple[str, ...]]:
    """The plan's matrices of experts that the files hold each by itself, with their tensors there."""
    made = (name for name, scheme in job.plan.parsed.items() if not scheme.is_source)
    return {name: job.tensors_of(name) for name in made if job.manifest.by_name[name].apart}


def _by_expert(job: Job, extra: Counter[str]) -> Iterator[tuple[str, Component | None, Tensor]]:
    """The checkpoint's tensors with every expert's matrices as engines look for them: what the model has as one, gate
    and up, in two parts of the same codes. Adds to `extra` what these hold beyond the plan's arithmetic, in bits."""
    experts = _experts_of(job)
    firsts = {tensors[0]: name for name, tensors in experts.items()}
    later = {tensor for tensors in experts.values() for tensor in tensors[1:]}
    for name, tensor in job.tensors():
        if name in later:
            continue
        if name not in firsts:
            component = job.component(name)
            yield (name if component is None else component.name), component, tensor
            continue
        component = job.manifest.by_name[firsts[name]]
        tensors = experts[component.name]
        codes = component_codes(job, component, torch.cat([job.read(part) for part in tensors]))
        first = 0
        for part in tensors:
            rows = job.shapes[part][0]
            own = rows_of(codes, first, rows)
            piece = replace(component, shape=(rows, component.shape[1]))
            first += rows
            extra.update(extra_bits_of(job, piece, own))
            for ending, made in packed_parts(job, piece, own).items():
                yield f"{part.removesuffix('.weight')}.{ending}", None, made


def _unmerged(job: Job) -> Iterator[tuple[str, Component | None, Tensor]]:
    """The tensors of a mixture of experts, whose stacks stay whole."""
    for own, name, tensor in unmerged_tensors(job):
        module = own.removesuffix(".weight")
        component = job.manifest.by_name[module] if module in job.plan.schemes else None
        yield (name.removesuffix(".weight") if component else name), component, tensor


def check_packed(job: Job) -> None:
    """Raises `UserError` with every component whose scheme the format or the job's runtime does not know."""
    rules = ENGINES[job.runtime]
    if rules.instead:
        raise UserError(f"{NAME} is nothing for {rules.says}: {rules.instead}")
    named = job.manifest.by_name
    reasons = {name: _obstacle(job, named[name], scheme) for name, scheme in job.plan.parsed.items()}
    offending = [
        f"{name}: {job.plan.scheme_of(name)}: {why}{_repair(job, named[name])}" for name, why in reasons.items() if why
    ]
    if offending:
        raise refuse(NAME, f"not for --runtime {job.runtime}", offending)
    formats = {_format(job, scheme) for scheme in job.plan.parsed.values() if not scheme.is_source}
    if len(formats) > 1 and not rules.mixes:
        counts = Counter(_format(job, scheme) for scheme in job.plan.parsed.values() if not scheme.is_source)
        held = ", ".join(f"{form} ({number} components)" for form, number in counts.most_common())
        raise refuse(NAME, f"{rules.says} takes one format in a model", [held, "repair: search with schemes of one"])


def _repair(job: Job, component: Component) -> str:
    """What to say of the smallest scheme that the runtime takes in a component's place."""
    scheme = job.plan.scheme(component.name)
    if engine_obstacle(job.runtime, scheme, component.shape) is None or packed_obstacle(scheme, component.shape):
        return ""
    bits = 8 * job.dtype.itemsize
    other = ENGINES[job.runtime].repair(scheme, component.shape, bits)
    if other is None:
        return ""
    more = parse_scheme(other).stored_bits(component.shape, bits) - scheme.stored_bits(component.shape, bits)
    return f"; the smallest that it takes here is {other} ({more / component.num_weights:+.2f} bits per weight)"


def _obstacle(job: Job, component: Component, scheme: Scheme) -> str | None:
    """Why a component cannot be written, if so."""
    if scheme.is_source:
        is_ours = job.stored is not None and job.stored.settings.get("quant_method") == NAME and component.source_bits
        if is_ours and len(job.tensors_of(component.name)) == 1 and component.name in job.linear:
            return None
        return f"the base model comes as {job.manifest.source}, whose bytes {NAME} does not hold"
    obstacle = engine_obstacle(job.runtime, scheme, component.shape)
    if obstacle is None and job.fuses and component.stacked:
        if component.apart:
            return SYMMETRIC_EXPERTS if scheme.asymmetric else None
        return STACKED_IN_FILES
    if obstacle is None and component.name == job.embedding:
        return _embedding_obstacle(job, scheme)
    if obstacle is None and (component.transposed or component.name not in job.linear):
        return LINEAR_ONLY
    if obstacle is None and job.fuses and component.name in job.manifest.routers:
        return "it builds what routes tokens to experts, or weighs one, without quantization"
    return obstacle


def _embedding_obstacle(job: Job, scheme: Scheme) -> str | None:
    """Why the tokens' embedding cannot be written under a scheme that a linear layer could be."""
    if job.is_tied:
        return TIED
    return embedding_obstacle(scheme) or ENGINES[job.runtime].embeddings


def _quantization_config(job: Job) -> dict[str, Any]:
    """One group of modules for each scheme; what is in none is ignored by name."""
    by_scheme: dict[Scheme, list[str]] = {}
    own: dict[str, dict[str, Any]] = {}  # the base model's own groups, by their content
    mixtures = _mixtures(job) if job.fuses else {}
    compressed = {job.manifest.by_name[name].mixture for name in _experts_of(job)} if mixtures else set()
    for name, scheme in job.plan.parsed.items():
        mixture = job.manifest.by_name[name].mixture
        if mixture in mixtures and not scheme.is_source:  # all its experts have one scheme
            targets = by_scheme.setdefault(scheme, [])
            pattern = _all_experts(mixtures[mixture])
            targets += [] if pattern in targets else [pattern]
        elif scheme.is_source:
            assert job.stored is not None
            group = group_of(name, job.stored.settings)
            assert group is not None
            own.setdefault(json.dumps(group, sort_keys=True), group | {"targets": []})["targets"].append(name)
        else:
            by_scheme.setdefault(scheme, []).append(name)
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": weights_arguments(scheme),
            "input_activations": inputs_arguments(scheme),
            "output_activations": None,
            "format": _format(job, scheme),
        }
        for number, (scheme, names) in enumerate(by_scheme.items())
    }
    groups |= {f"group_{len(groups) + number}": group for number, group in enumerate(own.values())}
    formats = {group["format"] for group in groups.values()}
    named = job.manifest.by_name
    ignored = [name for name in job.unquantized if not (name in named and named[name].mixture in mixtures)]
    ignored += _beside_experts(job, mixtures.values())
    ignored += [_all_experts(block) for mixture, block in mixtures.items() if mixture not in compressed]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys(ignored)),
        "kv_cache_scheme": CACHE_ARGUMENTS if job.cache_scheme else None,
        "global_compression_ratio": None,
    }


def _mixtures(job: Job) -> dict[str, str]:
    """The mixtures whose experts the files hold each by itself, with the module around the experts as files name it."""
    found: dict[str, str] = {}
    for component in job.manifest.components:
        if component.apart and component.mixture not in found:
            found[component.mixture] = job.tensors_of(component.name)[0].rpartition(".experts.")[0]
    return found


def _all_experts(block: str) -> str:
    """A pattern of all names that an engine may have for the parts of experts: vLLM asks for `experts.0.gate_proj` even
    where files say w1."""
    return rf"re:{re.escape(block)}\.experts\..*"


def _beside_experts(job: Job, blocks: Iterable[str]) -> Iterator[str]:
    """What routes tokens to the experts of mixtures, by the names of the files, where those are not the model's."""
    starts = tuple(f"{block}." for block in blocks)
    for name, shape in job.shapes.items():
        module = name.removesuffix(".weight")
        is_matrix = len(shape) == 2 and module != name and name.startswith(starts) and ".experts." not in name
        if is_matrix and module not in job.plan.schemes and module not in job.manifest.by_name:
            yield module


def _format(job: Job, scheme: Scheme) -> str:
    if scheme.weights is not None:
        number = scheme.weights.number
        return _NUMBER_FORMATS[f"{number} {scheme.weights.scale}"]
    return "pack-quantized" if is_packed(scheme, job.runtime) else "naive-quantized"
