"""The tensors by which `compressed-tensors` holds one component, by the ending of their names: codes, scales, zero
points, shapes; without values, too, and what they take beyond the plan's arithmetic."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dtmsearch.core.components import Component
from dtmsearch.core.holders import is_packed, packing_bits
from dtmsearch.core.number_formats import Rounding
from dtmsearch.core.schemes import SCALE_BITS, Scheme
from dtmsearch.export.job import Job
from dtmsearch.model.compress.number_rounding import NumberCodes, calibrated_scale
from dtmsearch.model.compress.packing import number_bytes
from dtmsearch.model.compress.rounding import Codes
from dtmsearch.model.modules.compat import packed_to_int32

# Of scales e8m0: exponents are counted from it.
_BIAS = 127
_SCALES, _BYTES, _PADDING = "scales of 32 bits", "codes and zero points in whole bytes", "padding to words of 32 bits"


def kept_parts(job: Job, component: Component) -> dict[str, Tensor]:
    """What the base model's own files hold of a component, by the ending of their names."""
    assert job.stored is not None
    weight = next(weight for weight in job.stored.weights if weight.name in job.tensors_of(component.name))
    return {part.rpartition(".")[2]: job.stored.read(part) for part in weight.parts}


def packed_parts(job: Job, component: Component, codes: Codes | NumberCodes) -> dict[str, Tensor]:
    """The tensors of one component, by the ending of their names."""
    scheme = job.plan.scheme(component.name)
    if isinstance(codes, NumberCodes):
        return _number_parts(codes) | _input_parts(job, component, scheme)
    scales = codes.scales.reshape(-1) if codes.scales.numel() == 1 else codes.scales
    signed, zeros = _signed(codes.codes, codes), None if codes.zeros is None else _signed(codes.zeros, codes)
    parts = {"weight_scale": scales.to(codes.scale_dtype)}
    if not is_packed(scheme, job.runtime):
        assert zeros is not None
        return parts | {"weight": signed, "weight_zero_point": zeros.reshape(scales.shape)}
    parts |= {"weight_packed": packed_to_int32(signed, codes.bits), "weight_shape": torch.tensor(component.shape)}
    if zeros is not None:
        parts["weight_zero_point"] = packed_to_int32(zeros, codes.bits, packed_dim=0).contiguous()
    return parts


def _number_parts(codes: NumberCodes) -> dict[str, Tensor]:
    number, scales = codes.rounding.number, codes.scales
    if codes.rounding.scale == "e8m0":
        scales = (torch.log2(scales) + _BIAS).to(torch.uint8)
    elif codes.rounding.scale == "e4m3":
        scales = scales.to(torch.float8_e4m3fn)
    else:
        scales = (scales.reshape(-1) if codes.rounding.grain == "tensor" else scales).to(codes.scale_dtype)
    parts = {"weight_scale": scales}
    if codes.rounding.has_tensor_scale:
        parts["weight_global_scale"] = codes.tensor_scale.reshape(1)
    if number == "int4":
        shape = torch.tensor(codes.values.shape)
        return parts | {"weight_packed": packed_to_int32(codes.values.to(torch.int8), 4), "weight_shape": shape}
    if number in ("e4m3", "int8"):
        return parts | {"weight": codes.values.to(torch.int8 if number == "int8" else torch.float8_e4m3fn)}
    return parts | {"weight_packed": number_bytes(codes.values, number)}


def _input_parts(job: Job, component: Component, scheme: Scheme) -> dict[str, Tensor]:
    """What is calibrated of how a component's inputs are rounded."""
    if not scheme.needs_largest_inputs:
        return {}
    assert scheme.activations is not None
    largest = job.compressor.largest_input(component.name)
    return {_input_scale(scheme.activations): calibrated_scale(largest, scheme.activations).reshape(1)}


def _input_scale(activations: Rounding) -> str:
    """What the scale of all inputs is called."""
    return "input_global_scale" if activations.has_tensor_scale else "input_scale"


def _signed(values: Tensor, codes: Codes) -> Tensor:
    """Codes or zero points around zero, as the library counts them."""
    if codes.zeros is None:
        return values
    middle = 2 ** (codes.bits - 1)
    return values.to(torch.int16).sub_(middle).to(torch.int8)


def rows_of(codes: Codes | NumberCodes, first: int, rows: int) -> Codes | NumberCodes:
    """The codes of some rows of a matrix."""
    if isinstance(codes, NumberCodes):
        whole = len(codes.scales) < len(codes.values)
        scales = codes.scales if whole else codes.scales[first : first + rows]
        return replace(codes, values=codes.values[first : first + rows], scales=scales)

    def cut(values: Tensor) -> Tensor:
        return values[first : first + rows] if len(values) == len(codes.codes) else values

    zeros = None if codes.zeros is None else cut(codes.zeros)
    return replace(codes, codes=cut(codes.codes), scales=cut(codes.scales), zeros=zeros)


def empty_parts(job: Job, component: Component) -> dict[str, Tensor]:
    """The same without values, whatever the codes."""
    scheme = job.plan.scheme(component.name)
    if scheme.is_source:
        return kept_parts(job, component)
    if scheme.weights is not None:
        return _empty_number_parts(scheme, scheme.weights, component.shape)
    rows, cols = component.shape
    assert scheme.bits is not None
    is_whole, packed = scheme.granularity == "tensor", is_packed(scheme, job.runtime)
    scales = (1,) if is_whole else (rows, scheme.num_scales(component.shape) // rows)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight_scale": (scales, job.scale_dtype)}
    if packed:
        shapes["weight_packed"] = (rows, -(-cols * scheme.bits // 32)), torch.int32
        shapes["weight_shape"] = (2,), torch.int64
    else:
        shapes["weight"] = (rows, cols), torch.int8
    if scheme.asymmetric:
        words = (-(-rows * scheme.bits // 32), scales[-1]) if packed else scales
        shapes["weight_zero_point"] = words, torch.int32 if packed else torch.int8
    return {ending: torch.empty(shape, dtype=dtype, device="meta") for ending, (shape, dtype) in shapes.items()}


def _empty_number_parts(scheme: Scheme, weights: Rounding, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The shapes of `_number_parts` and `_input_parts`."""
    rows, cols = shape
    size = weights.size or 1
    grids = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, cols // size),
        "block": (-(-rows // size), -(-cols // size)),
    }
    dtype = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn, "float": torch.float32}[weights.scale]
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight_scale": (grids[weights.grain], dtype)}
    if weights.has_tensor_scale:
        shapes["weight_global_scale"] = (1,), torch.float32
    if weights.number == "int4":
        shapes |= {"weight_packed": ((rows, -(-cols // 8)), torch.int32), "weight_shape": ((2,), torch.int64)}
    elif weights.bits == 8:
        shapes["weight"] = shape, torch.int8 if weights.number == "int8" else torch.float8_e4m3fn
    else:
        shapes["weight_packed"] = (rows, cols * weights.bits // 8), torch.uint8
    if scheme.activations is not None and scheme.activations.static:
        shapes[_input_scale(scheme.activations)] = (1,), torch.float32
    return {ending: torch.empty(own, dtype=kind, device="meta") for ending, (own, kind) in shapes.items()}


def extra_bits_of(job: Job, component: Component, codes: Codes | NumberCodes) -> dict[str, int]:
    """What the files hold of a component beyond the plan's arithmetic."""
    scheme = job.plan.scheme(component.name)
    if isinstance(codes, NumberCodes):
        floats = codes.scales.numel() if codes.rounding.scale == "float" else 0
        wider = {_SCALES: floats * (8 * codes.scale_dtype.itemsize - SCALE_BITS)}
        if not codes.rounding.packs_in_words:
            return wider
        return wider | {_PADDING: packing_bits(scheme, component.shape, job.runtime), "shapes": 128}
    scale_bits = codes.scales.numel() * (8 * codes.scale_dtype.itemsize - SCALE_BITS)
    packing = packing_bits(scheme, component.shape, job.runtime)
    if not is_packed(scheme, job.runtime):
        return {_SCALES: scale_bits, _BYTES: packing}
    return {_SCALES: scale_bits, _PADDING: packing, "shapes": 128}
