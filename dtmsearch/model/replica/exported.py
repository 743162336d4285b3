"""A checkpoint folder as its users load it, measured against a reference.

`python -m dtmsearch.model.replica.exported JOB` runs it.

A process of its own, so that nothing of what wrote the folder is left in memory. JOB is a JSON file written by
`write_job`; the answer, per prompt, is JSON on stdout.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from dtmsearch.core.checkpoint_files import read_header, read_model_config, weight_files
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.decoding import Decoding
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.number_formats import Rounding
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.bitsandbytes_layers import run_row_by_row, runs_by_token
from dtmsearch.model.compress.number_rounding import round_inputs
from dtmsearch.model.compress.quantization_arguments import CACHE_ARGUMENTS, rounding_of
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.forward.whole_body import WholeBody
from dtmsearch.model.modules import kv_caches
from dtmsearch.model.modules.compat import decompressed, keep_scales, tied_parameters
from dtmsearch.model.modules.empty import without_values
from dtmsearch.model.modules.fingerprints import tokenizer_fingerprint
from dtmsearch.model.modules.loading import load_model, load_tokenizer, loader
from dtmsearch.model.replica.replica import LoadedModel, Replica
from dtmsearch.model.sources.library_formats import group_of
from dtmsearch.model.sources.stored import settings_of
from dtmsearch.model.sources.unquantized import StoredCheckpoint, is_read_here
from dtmsearch.model.weights.checkpoint import Checkpoint

_SCALES_OF_CACHES = (".k_scale", ".v_scale")
# An expert's part in the files.
_OF_AN_EXPERT = re.compile(r"\.experts\.\d+\.")


class ServedReplica(Replica):
    """A replica of a folder that nothing but `AutoModelForCausalLM` has had a hand in; it takes no plan. `repacked`:
    also where bitsandbytes packs 4-bit weights anew."""

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, repacked: bool = False) -> None:
        self._repacked = repacked
        super().__init__(spec, settings)

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        transformers_logging.disable_progress_bar()
        folder = Path(spec.path)
        if is_read_here(settings_of(read_model_config(folder)) or {}):
            load: Callable[..., Any] = _model_as_read
        elif any(
            (
                _has_packed_zeros(folder),
                _has_packed_experts(folder),
                _loses_by_loading(folder, spec),
                _has_packed_embeddings(folder, spec.trust_remote_code),
                rounds_caches(folder),
            )
        ):
            load = decompressed_model
        else:
            load = partial(_plain_model, self._repacked)
        model = load(folder, spec, self._device).eval().requires_grad_(False)
        round_as_engines_do(model, folder)
        if rounds_caches(folder):
            kv_caches.attach(model, spec.attention, parse_scheme("kv-fp8"))
        return self._as_loaded(model, folder, spec)

    def _make_body(self, model: Any, known_as: Hashable) -> Body:
        return WholeBody(model)

    def _as_loaded(self, model: Any, folder: Path, spec: ModelSpec) -> LoadedModel:
        with torch.no_grad():  # some weights are unpacked when the model first runs as a whole
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self._device), use_cache=False)
        num_layers = model.config.get_text_config().num_hidden_layers
        nothing = ModelManifest(str(folder), None, spec.dtype, num_layers, "", ())
        tokenizer = load_tokenizer(folder, spec)
        fingerprint = tokenizer_fingerprint(folder, tokenizer)
        return LoadedModel(model, tokenizer, nothing, Checkpoint(weight_files(folder)), fingerprint)


def round_as_engines_do(model: Any, folder: Path) -> None:
    """Let components that a folder of compressed-tensors gives rounded inputs round them as was measured: in 32 bits
    whatever the model's dtype, as engines' kernels do. That library's own forward pass rounds scales and quotients to
    the model's dtype, and has 127.5 steps of 8-bit integers where engines have 127."""
    if not rounds_inputs(folder):
        return
    settings = settings_of(read_model_config(folder)) or {}
    held = {name: path for path in weight_files(folder) for name in read_header(path)}
    modules = dict(model.named_modules())
    for name in _quantized_modules(held):
        group = group_of(name, settings)
        if group is None or not group.get("input_activations"):
            continue
        if name not in modules:
            raise UserError(f"{folder} has what {name} reads rounded, and the model has no module of that name")
        rounding = rounding_of(group["input_activations"])
        modules[name].quantization_enabled = False  # what the library would do itself
        modules[name].register_forward_pre_hook(_rounding(rounding, _calibrated(name, rounding, held)))


def rounds_inputs(folder: Path) -> bool:
    """Whether a folder of compressed-tensors has what some layers read rounded."""
    return any(group.get("input_activations") for group in _groups(folder))


def _quantized_modules(tensors: Iterable[str]) -> list[str]:
    """The modules that compressed-tensors' tensors belong to."""
    return [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]


def _calibrated(module: str, rounding: Rounding, held: Mapping[str, Path]) -> Tensor | None:
    """The scale of a module's inputs that is calibrated."""
    ending = "input_global_scale" if rounding.has_tensor_scale else "input_scale"
    if not rounding.static:
        return None
    with safe_open(held[f"{module}.{ending}"], framework="pt") as file:
        scale: Tensor = file.get_tensor(f"{module}.{ending}")
    return scale


def _rounding(rounding: Rounding, scale: Tensor | None) -> Callable[..., tuple[Tensor]]:
    def hook(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        given = None if scale is None else scale.to(arguments[0].device)
        return (round_inputs(arguments[0], rounding, given),)

    return hook


def _plain_model(repacked: bool, folder: Path, spec: ModelSpec, device: torch.device) -> Any:
    """As a user loads it; but unless it shall be `repacked`, bitsandbytes is kept from rounding the scales of its 4-bit
    weights once more, which it does on CPUs with AVX512-BF16, as the search kept it. Each sequence runs by itself where
    LLM.int8() would take outliers of the others in its batch for its own."""
    trust = spec.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("quant_method") == "fp8":  # kernels for FP8 would round activations, too
        quantization["dequantize"] = True
    model = loader(config).from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=spec.attention,
        device_map=str(device),
        trust_remote_code=trust,
    )
    for module in model.modules():
        if not repacked:
            keep_scales(module)
        if not runs_by_token(module):
            run_row_by_row(module)
    return model


def _model_as_read(folder: Path, spec: ModelSpec, device: torch.device) -> Any:
    """By this package's own reading of a format that nothing installed runs."""
    with tempfile.TemporaryDirectory(prefix="dtmsearch-unquantized-") as scratch:
        StoredCheckpoint(folder).write(Path(scratch), spec.dtype)
        return load_model(Path(scratch), spec, device)


def _has_packed_zeros(folder: Path) -> bool:
    """Whether it has what transformers cannot load: compressed-tensors' packed zero points."""
    headers = (read_header(path) for path in weight_files(folder))
    return any(name.endswith(".weight_zero_point") and kind == "I32" for h in headers for name, (kind, _) in h.items())


def rounds_caches(folder: Path) -> bool:
    """Whether keys and values are kept rounded where a folder of compressed-tensors is served, as `kv-fp8` has them: in
    e4m3, by a scale of 1. Not so of other formats, and where the files hold scales of their own."""
    settings = settings_of(read_model_config(folder)) or {}
    given = settings.get("kv_cache_scheme")
    if settings.get("quant_method") != "compressed-tensors" or not isinstance(given, dict):
        return False
    held = (name for path in weight_files(folder) for name in read_header(path))
    is_plain = {key: given.get(key) for key in CACHE_ARGUMENTS} == CACHE_ARGUMENTS
    return is_plain and not any(name.endswith(_SCALES_OF_CACHES) for name in held)


def _has_packed_embeddings(folder: Path, trust: bool) -> bool:
    """Whether embeddings are packed, as vLLM looks them up: transformers asks them for the weight that they lack."""
    modules = [module for path in weight_files(folder) for module in _quantized_modules(read_header(path))]
    if not modules:
        return False
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with without_values():
        embedding = (model := loader(config).from_config(config, trust_remote_code=trust)).get_input_embeddings()
    return any(module is embedding and name in modules for name, module in model.named_modules())


def _has_packed_experts(folder: Path) -> bool:
    """Whether experts are in the files as engines look for them, each by itself and packed: transformers would put
    them together as if all had one scheme."""
    headers = (read_header(path) for path in weight_files(folder))
    return any(_OF_AN_EXPERT.search(module) for header in headers for module in _quantized_modules(header))


def _loses_by_loading(folder: Path, spec: ModelSpec) -> bool:
    """Whether transformers would hold less than the files do: it gives scales of FP8 and of integers beside rounded
    inputs the model's dtype, where engines keep 32 bits; and it unpacks NVFP4 and MX to bfloat16, which a model in 32
    bits does not run with."""
    groups = [group["weights"] for group in _groups(folder) if _is_by_number(group)]
    if spec.dtype == "float32":
        return any(weights.get("scale_dtype") for weights in groups)
    headers = (read_header(path) for path in weight_files(folder))
    wide = any(name.endswith(".weight_scale") and kind == "float32" for h in headers for name, (kind, _) in h.items())
    return wide and bool(groups)


def _groups(folder: Path) -> list[dict[str, Any]]:
    """The groups of a folder of compressed-tensors; of others none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = config.get("quantization_config") or {}
    return list((settings.get("config_groups") or {}).values())


def _is_by_number(group: Mapping[str, Any]) -> bool:
    """Whether a group's weights are floating-point codes, or integers beside rounded inputs."""
    return bool(group.get("weights")) and (group["weights"]["type"] == "float" or bool(group.get("input_activations")))


def decompressed_model(folder: Path, spec: ModelSpec, device: torch.device) -> Any:
    """A folder of compressed-tensors as an unquantized model, by that library's own decompression."""
    from compressed_tensors.quantization import QuantizationConfig

    trust = spec.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    quantization = QuantizationConfig.model_validate(config.quantization_config)
    del config.quantization_config
    state = {name: tensor for path in weight_files(folder) for name, tensor in load_file(path, str(device)).items()}
    settings = settings_of(read_model_config(folder)) or {}
    groups = {m: (group_of(m, settings) or {"targets": []})["targets"] for m in _quantized_modules(state)}
    for scheme in quantization.config_groups.values():
        for module in (name for name, targets in groups.items() if targets == scheme.targets):
            parts = [name for name in state if name.startswith(f"{module}.weight")]
            own = {name.removeprefix(f"{module}."): state.pop(name) for name in parts}
            if own["weight_scale"].dtype.itemsize > 1:  # of floats
                # As loading does it: multiplied in the dtype of the scales, codes would lose what the model's dtype
                # holds. Engines multiply FP8, and integers beside rounded inputs, in 32 bits.
                in_32 = scheme.weights.type == "float" or scheme.input_activations is not None
                own["weight_scale"] = own["weight_scale"].to(torch.float32 if in_32 else getattr(torch, spec.dtype))
            state[f"{module}.weight"] = decompressed(own, scheme)
            for name in [name for name in state if name.startswith(f"{module}.input_")]:
                del state[name]  # the scales of inputs
    options = {"dtype": getattr(torch, spec.dtype), "attn_implementation": spec.attention}
    if _has_packed_experts(folder):  # which transformers puts together by names of files
        with tempfile.TemporaryDirectory(prefix="dtmsearch-unpacked-") as scratch:
            save_file(
                {name: tensor.contiguous() for name, tensor in state.items()}, Path(scratch) / "model.safetensors"
            )
            config.save_pretrained(scratch)
            return loader(config).from_pretrained(scratch, config=config, **options).to(device)
    model = loader(config).from_config(config, trust_remote_code=trust, **options).to(device)
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    assert not unexpected and set(missing) <= tied_parameters(model), (missing, unexpected)
    return model


def measure(spec: ModelSpec, settings: ReplicaSettings, reference: Reference, repacked: bool = False) -> EvalResult:
    """The folder at `spec.path` against a reference of the base model; `repacked` as bitsandbytes has 4-bit weights on
    this CPU without our doing. Raises `UserError` when it cannot be measured
    in the reference's numeric mode."""
    replica = ServedReplica(spec, settings, repacked)
    replica.use(reference)
    request = EvalRequest(Plan(), reference.id, (0, reference.num_prompts))
    outcome = replica.evaluate([request])[0]
    if not isinstance(outcome, EvalResult):
        raise UserError(f"{spec.path} could not be measured: {outcome.kind}: {outcome.message}")
    return outcome


def write_job(
    folder: Path, spec: ModelSpec, settings: ReplicaSettings, reference: Reference, repacked: bool = False
) -> Path:
    """A job for this module's process, its files in `folder`."""
    arrays = folder / "reference.npz"
    np.savez(arrays, text=reference.text, continuation=reference.continuation, agrees=reference.agrees)
    job = folder / "job.json"
    values = {
        "spec": {key: value for key, value in asdict(spec).items() if key != "decoding"},  # the reference has its own
        "settings": asdict(settings),
        "repacked": repacked,
        "arrays": str(arrays),
        "reference": {"id": reference.id, "manifest_id": reference.manifest_id},
        "mode": asdict(reference.mode),
        "suppressed": list(reference.suppressed),
        "decoding": str(reference.decoding),
    }
    job.write_text(json.dumps(values), encoding="utf-8")
    return job


def _read_job(job: Mapping[str, Any]) -> tuple[ModelSpec, ReplicaSettings, Reference, bool]:
    with np.load(job["arrays"]) as arrays:
        mode, suppressed, decoding = job["mode"], tuple(job["suppressed"]), Decoding.parse(job["decoding"])
        reference = Reference(
            **job["reference"], mode=NumericMode(**mode), **dict(arrays), suppressed=suppressed, decoding=decoding
        )
    return ModelSpec(**job["spec"]), ReplicaSettings(**job["settings"]), reference, job["repacked"]


def main(path: str) -> None:
    """Measure an exported model as a job file says, and print FDT, SDT and DPPL by prompt as JSON."""
    result = measure(*_read_job(json.loads(Path(path).read_text(encoding="utf-8"))))
    values = {"fdt": result.fdt.tolist(), "sdt": result.sdt.tolist(), "dppl": result.dppl.tolist()}
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
