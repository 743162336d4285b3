"""Solved matrices as few bytes: codes bit by bit, masks a bit a weight. What is packed here is what is measured."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtmsearch.core.calibration import PackedMatrix
from dtmsearch.core.number_formats import WIDTHS, Number
from dtmsearch.model.compress.gptq import Solved
from dtmsearch.model.compress.rounding import Codes

_NOTHING: NDArray[np.uint8] = np.empty(0, np.uint8)


def pack(component: str, scheme: str, solved: Solved, dtype: torch.dtype) -> PackedMatrix:
    """A solved matrix of a model in `dtype`."""
    codes = solved.codes
    if codes is None:
        assert solved.weight is not None and solved.kept is not None
        weight = solved.weight.to(dtype)
        shape, kept = (weight.shape[0], weight.shape[1]), solved.kept
        mask, values = _pack_bits(kept.to(torch.uint8), 1), _bytes(weight[kept])
        bits = weight.element_size() * 8
        return PackedMatrix(component, scheme, shape, bits, 0, "", values, _NOTHING, _NOTHING, mask)
    shape = (codes.codes.shape[0], codes.codes.shape[1])
    scales = codes.scales.to(codes.scale_dtype)
    return PackedMatrix(
        component,
        scheme,
        shape,
        bits=codes.bits,
        block=codes.block,
        scale_dtype=str(scales.dtype).removeprefix("torch."),
        codes=_pack_bits(_unsigned(codes), codes.bits),
        scales=_bytes(scales),
        zeros=_NOTHING if codes.zeros is None else _bytes(codes.zeros),
        mask=_NOTHING,
    )


def unpack(packed: PackedMatrix, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix [rows, cols] that a model in `dtype` computes with."""
    if not packed.mask.size:
        return packed_codes(packed, device).dense(dtype)
    rows, cols = packed.shape
    kept = _unpack_bits(packed.mask, 1, rows * cols, device).bool().reshape(rows, cols)
    weight = torch.zeros(rows, cols, dtype=dtype, device=device)
    weight[kept] = _on(packed.codes, device).view(dtype)
    return weight


def packed_codes(packed: PackedMatrix, device: torch.device) -> Codes:
    """The codes of a quantized matrix."""
    rows, cols = packed.shape
    unsigned = _unpack_bits(packed.codes, packed.bits, rows * cols, device).reshape(rows, cols)
    dtype: torch.dtype = getattr(torch, packed.scale_dtype)
    scales = _on(packed.scales, device).view(dtype).float()
    scales = scales.reshape(-1, -(-cols // packed.block))
    if packed.zeros.size:
        zeros = _on(packed.zeros, device).reshape(scales.shape)
        return Codes(unsigned, scales, zeros, packed.block, packed.bits, dtype)
    return Codes(_signed(unsigned, packed.bits), scales, None, packed.block, packed.bits, dtype)


def number_bytes(values: Tensor, number: Number) -> Tensor:
    """Floating-point codes [rows, cols] of fewer than 8 bits, given as the numbers that they are, without gaps, the
    lowest bit first: [rows, bytes]. A code is a sign, then the place among the numbers that are not negative."""
    bits = WIDTHS[number]
    mantissa = 1 if number == "e2m1" else 3
    size = values.abs().float()
    exponent = ((size.view(torch.int32) >> 23) - 127).clamp_(min=0)
    # Of a binade above the lowest, whose numbers are as far apart as those of the one below it.
    code = (size * torch.exp2((mantissa - exponent).float())).int() + exponent * (1 << mantissa)
    code = code | (torch.signbit(values).int() << (bits - 1))
    packed = torch.from_numpy(_pack_bits(code.to(torch.uint8), bits))
    return packed.reshape(len(values), -1)


# Codes around zero are counted from -(2^(bits-1) - 1), the lowest one of all, -2^(bits-1), coming last: so a matrix of
# a time when that one was never used reads the same.


def _unsigned(codes: Codes) -> Tensor:
    if codes.zeros is not None:
        return codes.codes
    last = 2**codes.bits - 1
    counted: Tensor = (codes.codes.int() + last // 2) & last
    return counted.to(torch.uint8)


def _signed(unsigned: Tensor, bits: int) -> Tensor:
    last = 2**bits - 1
    counted: Tensor = ((unsigned.int() + 1) & last) - (last // 2 + 1)
    return counted.to(torch.int8)


def _pack_bits(values: Tensor, bits: int) -> NDArray[np.uint8]:
    """Unsigned bytes below 2^bits without gaps, the lowest bit first."""
    flat = values.reshape(-1, 1)
    spread = ((flat >> torch.arange(bits, dtype=torch.uint8, device=flat.device)) & 1).reshape(-1)
    spread = torch.nn.functional.pad(spread, (0, -len(spread) % 8)).reshape(-1, 8)
    packed = torch.zeros(len(spread), dtype=torch.uint8, device=flat.device)
    for place in range(8):
        packed |= spread[:, place] << place
    return _bytes(packed)


def _unpack_bits(packed: NDArray[np.uint8], bits: int, count: int, device: torch.device) -> Tensor:
    """`count` unsigned bytes out of what `_pack_bits` made of them."""
    places = torch.arange(8, dtype=torch.uint8, device=device)
    spread = ((_on(packed, device).unsqueeze(1) >> places) & 1).reshape(-1)[: count * bits].reshape(count, bits)
    values = spread[:, 0].clone()
    for place in range(1, bits):
        values |= spread[:, place] << place
    return values


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return array


def _on(array: NDArray[np.uint8], device: torch.device) -> Tensor:
    """The bytes on a device; copied, for they may be a read-only view."""
    return torch.from_numpy(np.array(array)).to(device)
