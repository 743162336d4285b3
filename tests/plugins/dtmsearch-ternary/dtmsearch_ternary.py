"""Ternary weights for dtmsearch: `ternary-gK`, each weight -1, 0 or 1 times a scale for K inputs of a row.

By arXiv 1605.04711, section 2.1: weights below 0.7 of the mean absolute weight become zero, and the scale is the mean
absolute weight of the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from dtmsearch.core.schemes import Scheme, SchemeFamily

_NAME = re.compile(r"ternary-g([1-9][0-9]*)")
CODE_BITS, SCALE_BITS = 2, 16


def parse(name: str) -> Scheme | None:
    match = _NAME.fullmatch(name)
    return None if match is None else Scheme(name, "ternary", CODE_BITS, "group", int(match[1]))


def stored_bits(scheme: Scheme, shape: tuple[int, int], dense_bits: int) -> int:
    return shape[0] * shape[1] * CODE_BITS + scheme.num_scales(shape) * SCALE_BITS


def make(weight: Any, scheme: Scheme, mean_squares: Callable[[], Any]) -> Any:
    import torch

    parts = []
    for group in weight.float().split(scheme.group_size, dim=1):
        size = group.abs()
        kept = size > 0.7 * size.mean(dim=1, keepdim=True)
        scale = (size * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)
        parts.append(group.sign() * kept * scale.half().float())
    return torch.cat(parts, dim=1).to(weight.dtype)


FAMILY = SchemeFamily("ternary", parse, 1, stored_bits, make, examples=("ternary-g64",))
