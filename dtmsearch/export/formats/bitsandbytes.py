"""`bitsandbytes`: a checkpoint whose compressed components are that library's own tensors, which transformers loads.

What it holds is what the search measured: the same modules, saved. The loader has one configuration for a model, so
what one model may mix is limited; `check_modules` says by what.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dtmsearch.core.components import Component
from dtmsearch.core.holders import LINEAR_ONLY, bitsandbytes_kinds, bitsandbytes_obstacle
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.export.writer import write_quantized
from dtmsearch.model.compress.bitsandbytes_layers import OUTLIER_THRESHOLD, compressed_module

NAME = "bitsandbytes"
_REPACKED = (
    "What was measured multiplies with the scales of this file, as GPUs and most CPUs do. On CPUs with AVX512-BF16 "
    "bitsandbytes packs 4-bit weights anew when they are first used: scales and inputs are rounded to bfloat16, and "
    "layers whose rows are no multiple of 32 end in an error. To keep it from that, set `support_avx512bf16_for_cpu = "
    "False` on every `Linear4bit` after loading"
)


def write_modules(job: Job, folder: Path) -> Written:
    """Raises `UserError` for plans that transformers' loader cannot rebuild."""
    check_modules(job)

    def parts_of(component: Component, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
        parts = _saved(job, component, weight)
        return parts, _extra_bits(job, component, parts)

    written = write_quantized(job, folder, parts_of, _quantization_config(job))
    job.require_places()
    in_4_bits = any(scheme not in OUTLIER_THRESHOLD for _, scheme in job.plan.entries)
    return replace(written, notes=(*written.notes, _REPACKED)) if in_4_bits else written


def check_modules(job: Job) -> None:
    """Raises `UserError` with every component that stands in the way."""
    shapes = {name: job.manifest.by_name[name].shape for name in job.plan.schemes}
    why = {name: bitsandbytes_obstacle(scheme, shapes[name]) for name, scheme in job.plan.parsed.items()}
    foreign = [f"{name}: {job.plan.scheme_of(name)}" for name, reason in why.items() if reason]
    if foreign:
        raise refuse(NAME, next(reason for reason in why.values() if reason), foreign)
    other = [name for name in job.plan.schemes if name not in job.linear]
    if other:
        raise refuse(NAME, LINEAR_ONLY, other)
    by_kind = bitsandbytes_kinds(job.plan)
    if len(by_kind) > 1:
        rarest = min(by_kind.values(), key=len)
        needs = ", ".join(f"{kind} ({len(names)} components)" for kind, names in by_kind.items())
        reason = (
            "transformers loads a model in 8 bits or in 4 bits, and with one outlier threshold; this plan needs "
            f"{needs}. It could hold the plan without"
        )
        raise refuse(NAME, reason, rarest)


def _saved(job: Job, component: Component, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that the module of a component saves, by the ending of their names."""
    scheme = job.plan.scheme(component.name)
    linear = nn.Linear(component.shape[1], component.shape[0], bias=False, device="meta")
    if component.transposed:
        weight = weight.t().contiguous()
    state = compressed_module(linear, weight, scheme).state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _extra_bits(job: Job, component: Component, parts: dict[str, Tensor]) -> dict[str, int]:
    """What the files hold of a component beyond the plan's arithmetic: tables."""
    scheme = job.plan.scheme(component.name)
    written = sum(8 * part.numel() * part.element_size() for part in parts.values())
    other = written - scheme.bits_of(component, 8 * job.dtype.itemsize)
    return {"tables of codes and their descriptions": other}


def _quantization_config(job: Job) -> dict[str, Any]:
    schemes = {scheme for _, scheme in job.plan.entries}
    common = {"quant_method": NAME, "llm_int8_skip_modules": _skipped(job)}
    if schemes & OUTLIER_THRESHOLD.keys():
        threshold = OUTLIER_THRESHOLD[schemes.pop()]
        return common | {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": threshold}
    return common | {
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": min(schemes, default="nf4"),  # of new weights; saved ones bring their own
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(job.dtype).removeprefix("torch."),
    }


def _skipped(job: Job) -> list[str]:
    """Names for the loader's skip list, which takes a name also as a regular expression and as an ending: each must be
    whole, so that it hits no compressed module."""
    skipped = [re.escape(name) for name in _linear_names(job) if name not in job.plan.schemes]
    return [f"{name}$" for name in skipped]


def _linear_names(job: Job) -> Sequence[str]:
    # A tied head is a module, though it has no tensor of its own.
    return [*job.linear, *([] if "lm_head" in job.linear else ["lm_head"])]
