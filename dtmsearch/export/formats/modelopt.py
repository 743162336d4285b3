"""`modelopt`: FP8, NVFP4 and MXFP8 as NVIDIA's Model-Optimizer stores them, several in one model, for TensorRT-LLM's
PyTorch backend and whatever else reads its `hf_quant_config.json` (vLLM, SGLang).

The codes are those of `compressed-tensors`; scales of tensors are the inverse of its. No reader of this format runs
without a GPU, so what is written is held against its own arithmetic alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtmsearch.core.components import Component
from dtmsearch.core.fusion import untied_groups
from dtmsearch.core.holders import VLLM_TOGETHER
from dtmsearch.core.schemes import SCALE_BITS, Scheme
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.export.writer import write_quantized
from dtmsearch.model.compress.number_rounding import NumberCodes, calibrated_scale
from dtmsearch.model.compress.packing import number_bytes

NAME = "modelopt"
CONFIG_FILE = "hf_quant_config.json"
# Our schemes, and what the format calls them.
ALGORITHMS = {
    "fp8-tensor": "FP8",
    "fp8-channel": "FP8_PER_CHANNEL_PER_TOKEN",
    "nvfp4": "NVFP4",
    "nvfp4a16": "W4A16_NVFP4",
    "mxfp8": "MXFP8",
}
# Of scales e8m0: exponents are counted from it.
_BIAS = 127
_MIXED = "MIXED_PRECISION"
_NOTE = (
    "Written by the format's rules and not loaded by an engine: TensorRT-LLM and vLLM read it on NVIDIA GPUs alone. "
    "`compressed-tensors` holds the same codes, and is measured again when it is written"
)


def write_modelopt(job: Job, folder: Path) -> Written:
    """Raises `UserError` for schemes that the format does not have, for components that are no linear layers of the
    files, and for plans that split what engines run as one matrix."""
    check_modelopt(job)

    def parts_of(component: Component, weight: Tensor) -> tuple[Mapping[str, Tensor], dict[str, int]]:
        scheme = job.plan.scheme(component.name)
        codes = job.compressor.number_codes(component.name, weight, scheme)
        floats = codes.scales.numel() if codes.rounding.scale == "float" else 0
        return _parts(job, component, scheme, codes), {"scales of 32 bits": floats * (32 - SCALE_BITS)}

    written = write_quantized(job, folder, parts_of, None)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(settings_of(job), indent=2) + "\n", encoding="utf-8")
    return Written(written.files, written.tensor_bytes, written.extra_bits, [_NOTE])


def check_modelopt(job: Job) -> None:
    """Raises `UserError` with what stands in the way."""
    named = job.manifest.by_name
    foreign = [f"{name}: {s.name}" for name, s in job.plan.parsed.items() if s.name not in ALGORITHMS]
    if foreign:
        raise refuse(NAME, f"it stores {', '.join(ALGORITHMS)}", foreign)
    misfits = [f"{name}: {s.misfit(named[name].shape)}" for name, s in job.plan.parsed.items() if _misfits(job, name)]
    if misfits:
        raise refuse(NAME, "of shapes that the schemes do not have", misfits)
    other = [name for name in job.plan.schemes if name not in job.linear or named[name].stacked]
    if other:
        raise refuse(NAME, "it stores linear layers only", other)
    untied = untied_groups(job.plan, job.manifest.components)
    if untied:
        lines = [", ".join(f"{c.name}: {job.plan.scheme_of(c.name)}" for c in group) for group in untied]
        raise refuse(NAME, VLLM_TOGETHER.replace("vLLM runs", "engines run"), [*lines, "search with `fused: true`"])


def _misfits(job: Job, name: str) -> bool:
    return job.plan.scheme(name).misfit(job.manifest.by_name[name].shape) is not None


def _parts(job: Job, component: Component, scheme: Scheme, codes: NumberCodes) -> dict[str, Tensor]:
    """The tensors of one component, by the ending of their names."""
    rounding, scales = codes.rounding, codes.scales
    if rounding.number == "e2m1":
        parts = {"weight": number_bytes(codes.values, rounding.number), "weight_scale": scales.to(torch.float8_e4m3fn)}
        parts["weight_scale_2"] = 1 / codes.tensor_scale
    elif rounding.scale == "e8m0":
        parts = {"weight_scale": (torch.log2(scales) + _BIAS).to(torch.uint8)}
    else:
        parts = {"weight_scale": scales.reshape(() if rounding.grain == "tensor" else -1).float()}
    if rounding.bits == 8:
        parts["weight"] = codes.values.to(torch.float8_e4m3fn)
    if scheme.needs_largest_inputs:
        assert scheme.activations is not None
        scale = calibrated_scale(job.compressor.largest_input(component.name), scheme.activations)
        parts["input_scale"] = 1 / scale if scheme.activations.has_tensor_scale else scale
    return parts


def settings_of(job: Job) -> dict[str, Any]:
    """What `hf_quant_config.json` says: one algorithm, or that of each layer."""
    algorithms = {name: ALGORITHMS[scheme.name] for name, scheme in job.plan.parsed.items()}
    counts = Counter(algorithms.values())
    layers = {name: {"quant_algo": algorithm} | _group(algorithm) for name, algorithm in algorithms.items()}
    found: dict[str, Any] = {
        "quant_algo": next(iter(counts)) if len(counts) == 1 else _MIXED,
        "kv_cache_quant_algo": None,
        "exclude_modules": list(job.unquantized),
    }
    found |= _group(found["quant_algo"]) if len(counts) == 1 else {"quantized_layers": layers}
    return {"producer": {"name": "modelopt"}, "quantization": found}


def _group(algorithm: str) -> dict[str, int]:
    return {"group_size": 16} if "NVFP4" in algorithm else {"group_size": 32} if algorithm == "MXFP8" else {}
