"""AbsMax rounding of a weight matrix: codes and scales by the scheme's granularity, kept as such or given back as a
dense matrix. Both come from one computation, so that what is exported is what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtmsearch.core.schemes import Scheme


@dataclass(frozen=True)
class Codes:
    """A rounded matrix as what is stored of it: `(codes - zeros) * scales`, one scale for `block` inputs of a row.

    `codes` [rows, cols] are int8 around zero or, with zero points, uint8 from zero. `scales` are float32 and `zeros`
    uint8 (None for symmetric schemes), both [rows, blocks]; [1, 1] where one scale serves the whole matrix. Every scale
    is a number of `scale_dtype`, in which it is stored.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int
    bits: int
    scale_dtype: torch.dtype = torch.float32

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [rows, cols] that `round_weight` gives."""
        cols = self.codes.shape[1]
        values = self.codes.float()
        if self.zeros is not None:
            values -= self._per_weight(self.zeros.float(), cols)
        return values.mul_(self._per_weight(self.scales, cols)).to(dtype)

    def _per_weight(self, per_block: Tensor, cols: int) -> Tensor:
        return per_block.repeat_interleave(min(self.block, cols), dim=1)[:, :cols] if self.block < cols else per_block


def round_weight(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """`weight` [rows, cols] after rounding and back, in its own dtype; arithmetic in float32.

    Symmetric in 8 bits: scale = max|w| / 127, codes round(w / scale), half to even, clamped to +-127 (LLM.int8(), arXiv
    2208.07339). Symmetric in fewer bits, where every code counts: scale = max|w| / ((2^bits - 1) / 2), codes from
    -2^(bits-1) to 2^(bits-1) - 1, as GPTQ and compressed-tensors have them. Asymmetric: 2^bits - 1 steps between the
    smallest and the largest weight (zero counted among them, so that the zero point fits `bits` bits).
    Scales are rounded to `scale_dtype` before any code is computed with them; see `stored_scales`.
    """
    parts = [_restored(*_quantized(block, scheme, scale_dtype)) for block in _blocks(weight.float(), scheme)]
    return _joined(parts, weight.shape[0], scheme).reshape(weight.shape).to(weight.dtype)


def round_codes(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> Codes:
    """The codes of which `round_weight` gives the dense matrix."""
    parts = [_quantized(block, scheme, scale_dtype) for block in _blocks(weight.float(), scheme)]
    rows, cols = weight.shape
    code_dtype = torch.uint8 if scheme.asymmetric else torch.int8
    scale_rows = 1 if scheme.granularity == "tensor" else rows
    zeros = [zero.to(torch.uint8) for _, _, zero in parts if zero is not None]
    return Codes(
        codes=_joined([codes.to(code_dtype) for codes, _, _ in parts], rows, scheme).reshape(rows, cols),
        scales=_joined([scale for _, scale, _ in parts], scale_rows, scheme),
        zeros=_joined(zeros, scale_rows, scheme) if zeros else None,
        block=scheme.group_size if scheme.granularity == "group" else cols,
        bits=scheme.bits,
        scale_dtype=scale_dtype,
    )


def _blocks(values: Tensor, scheme: Scheme) -> list[Tensor]:
    """`values` [rows, cols] as matrices of which every row has a scale of its own."""
    if scheme.granularity == "tensor":
        return [values.reshape(1, -1)]
    if scheme.granularity == "channel":
        return [values]
    cols = values.shape[1]
    whole = cols - cols % scheme.group_size
    parts = [values[:, :whole].reshape(-1, scheme.group_size)] if whole else []
    return parts + ([values[:, whole:]] if whole < cols else [])


def _joined(parts: Sequence[Tensor], rows: int, scheme: Scheme) -> Tensor:
    """What was made of each of `_blocks`, side by side again: [rows, anything]."""
    if scheme.granularity != "group":
        return parts[0]
    return (
        torch.cat([part.reshape(rows, -1) for part in parts], dim=1) if len(parts) > 1 else parts[0].reshape(rows, -1)
    )


def _quantized(values: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (as float32), scales and zero points [rows, 1] of `values`, each row with a scale of its own."""
    if not scheme.asymmetric:
        low_code, top_code = code_range(scheme)
        scale = stored_scales(values.abs().amax(dim=1, keepdim=True) / scale_steps(scheme), scale_dtype)
        return (values / scale).round_().clamp_(low_code, top_code), scale, None
    steps = 2**scheme.bits - 1
    low = values.amin(dim=1, keepdim=True).clamp_(max=0.0)
    high = values.amax(dim=1, keepdim=True).clamp_(min=0.0)
    scale = stored_scales((high - low) / steps, scale_dtype)
    zero = (-low / scale).round_().clamp_(max=steps)
    return (values / scale).round_().add_(zero).clamp_(0, steps), scale, zero


def _restored(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The weights that codes stand for; overwrites `codes`."""
    return (codes if zero is None else codes.sub_(zero)).mul_(scale)


def code_range(scheme: Scheme) -> tuple[int, int]:
    """The smallest and the largest code: all 2^bits of them, but +-127 in symmetric 8 bits."""
    if scheme.asymmetric:
        return 0, 2**scheme.bits - 1
    return (-127 if scheme.bits == 8 else -(2 ** (scheme.bits - 1))), 2 ** (scheme.bits - 1) - 1


def row_scales(weight: Tensor, scheme: Scheme) -> Tensor:
    """The scales that `weight` [rows, cols] asks for, one after the other, as they are before they are stored."""
    found = []
    for block in _blocks(weight.float(), scheme):
        low, high = block.amin(dim=1).clamp_(max=0.0), block.amax(dim=1).clamp_(min=0.0)
        found.append((high - low if scheme.asymmetric else torch.maximum(high, -low)) / scale_steps(scheme))
    return torch.cat(found)


def scale_steps(scheme: Scheme) -> float:
    """How many scales the largest absolute weight (asymmetric: the span of the weights) is."""
    low, high = code_range(scheme)
    return high if scheme.asymmetric else (high - low) / 2


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales`, none of them negative, as `dtype` holds them, in the dtype that they come in.

    Below the normal numbers of `dtype` they are rounded up: to the nearest, such a scale might be far too small for
    its weights, or zero. Where all weights are zero the scale is one, so that they stay zero.
    """
    held = scales.to(dtype).to(scales.dtype)
    tiny = torch.finfo(dtype).tiny
    spacing = tiny * torch.finfo(dtype).eps
    if spacing > 0 and dtype != scales.dtype:
        held = torch.where(scales < tiny, torch.ceil(scales / spacing) * spacing, held)
    return torch.where(held > 0, held, torch.ones_like(held))
