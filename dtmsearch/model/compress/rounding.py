"""AbsMax rounding of a weight matrix: codes and scales by the scheme's granularity, given back as a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from dtmsearch.plans.schemes import Scheme


def round_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """`weight` [rows, cols] after rounding and back, in its own dtype; arithmetic in float32.

    Symmetric: scale = max|w| / (2^(bits-1) - 1), codes round(w / scale) half to even. Asymmetric: 2^bits - 1 steps
    between the smallest and the largest weight (zero counted among them, so that the zero point fits `bits` bits).
    """
    values = weight.float()
    if scheme.granularity == "tensor":
        rounded = _round_rows(values.reshape(1, -1), scheme).reshape(values.shape)
    elif scheme.granularity == "channel":
        rounded = _round_rows(values, scheme)
    else:
        rounded = _round_groups(values, scheme)
    return rounded.to(weight.dtype)


def _round_groups(values: Tensor, scheme: Scheme) -> Tensor:
    rows, cols = values.shape
    whole = cols - cols % scheme.group_size
    groups = values[:, :whole].reshape(-1, scheme.group_size)
    parts = [_round_rows(groups, scheme).reshape(rows, whole)] if whole else []
    if whole < cols:
        parts.append(_round_rows(values[:, whole:], scheme))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _round_rows(values: Tensor, scheme: Scheme) -> Tensor:
    """Each row of `values` with a scale of its own."""
    if scheme.asymmetric:
        return _round_asymmetric(values, scheme.bits)
    top = 2 ** (scheme.bits - 1) - 1
    scale = _positive(values.abs().amax(dim=1, keepdim=True) / top)
    return (values / scale).round_().clamp_(-top, top).mul_(scale)


def _round_asymmetric(values: Tensor, bits: int) -> Tensor:
    steps = 2**bits - 1
    low = values.amin(dim=1, keepdim=True).clamp_(max=0.0)
    high = values.amax(dim=1, keepdim=True).clamp_(min=0.0)
    scale = _positive((high - low) / steps)
    zero = (-low / scale).round_()
    return (values / scale).round_().add_(zero).clamp_(0, steps).sub_(zero).mul_(scale)


def _positive(scale: Tensor) -> Tensor:
    """A scale of one where all weights are zero, so that they stay zero."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
