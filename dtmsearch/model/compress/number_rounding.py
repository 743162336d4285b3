"""Rounding to the number formats that engines serve: weights as codes with scales, and what components read.

All arithmetic is in float32, as in the engines' kernels, whatever the model's dtype. FP8 by torch's own cast; e2m1 and
e2m3 by their steps; scales by OCP Microscaling Formats 1.0 section 6.3, with the rounding of the largest value that
compressed-tensors and vLLM have, and by NVIDIA's two levels for NVFP4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dtmsearch.core.number_formats import LARGEST, Number, Rounding
from dtmsearch.core.schemes import Scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.rounding import stored_scales
from dtmsearch.model.modules.matrices import is_matrix

_E4M3 = torch.float8_e4m3fn
_LARGEST_E4M3 = LARGEST["e4m3"]
# compressed-tensors' smallest scale of a group beside a tensor's: where all values are zero.
_LEAST_E4M3_SCALE = 0.125
# Of e8m0: exponents are counted from it.
_BIAS = 127
# The power of two of a number format's largest value, and the bits after which a largest value is rounded up to the
# next power: 6 = 1.5 x 2^2 and anything from 1.75 x 2^2 on would be cut too far.
_EXPONENT: dict[Number, int] = {"e2m1": 2, "e2m3": 2, "e4m3": 8}
_ROUNDED_AFTER: dict[Number, int] = {"e2m1": 1, "e2m3": 3, "e4m3": 1}
_MANTISSA = 23
_EXPONENT_BITS = 0xFF << _MANTISSA
# Bits of the mantissa, by which the steps of a format follow from a value's exponent.
_STEPS: dict[Number, int] = {"e2m1": 1, "e2m3": 3}


def tensor_scale_of(largest: Tensor) -> Tensor:
    """The scale of a tensor whose largest absolute value this is, by which those of its groups are divided: what brings
    it to the largest code times the largest scale of a group."""
    found = _LARGEST_E4M3 * LARGEST["e2m1"] / largest.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(found.isfinite(), found, torch.ones_like(found))


@dataclass(frozen=True)
class NumberCodes:
    """A rounded matrix [rows, cols] as what is stored of it.

    `values` are the codes as the numbers that they stand for, float32. `scales` are float32 numbers of the width in
    which they are stored, one for each place of `Rounding.num_scales`: [rows, groups], [rows, 1], [1, 1], or a grid of
    blocks. `tensor_scale` is what scales are divided by, 1 but for NVFP4. `scale_dtype` is what float scales are
    stored in.
    """

    values: Tensor
    scales: Tensor
    tensor_scale: Tensor
    rounding: Rounding
    scale_dtype: torch.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [rows, cols] that the codes stand for."""
        factors = self.scales / self.tensor_scale if self.rounding.has_tensor_scale else self.scales
        dense = self.values * spread(factors, self.rounding, self.values.shape[-1])[: len(self.values)]
        if self.rounding.has_tensor_scale:  # those who decompress it hold it in bfloat16
            dense = dense.to(torch.bfloat16)
        return dense.to(dtype)


def weight_codes(
    weight: Tensor, rounding: Rounding, largest: Tensor, scale_dtype: torch.dtype = torch.float32
) -> NumberCodes:
    """The codes of `weight` [rows, cols]. `largest` is the largest absolute weight of it and of those that an engine
    runs as one matrix with it, which share the scale of a tensor."""
    values = weight.float()
    one = torch.ones((), device=values.device)
    tensor_scale = tensor_scale_of(largest.to(values.device).float()) if rounding.has_tensor_scale else one
    if rounding.grain == "tensor":
        scales = (largest.to(values.device).float() / _steps(rounding)).reshape(1, 1)
    else:
        scales = _raw_scales(_largest(values, rounding), rounding, tensor_scale)
    if rounding.scale == "float":
        scales = stored_scales(scales, scale_dtype)
    factors = spread(scales / tensor_scale if rounding.has_tensor_scale else scales, rounding, values.shape[1])
    codes = to_number(values / factors[: len(values)], rounding.number)
    return NumberCodes(codes, scales, tensor_scale, rounding, scale_dtype)


def calibrated_scale(largest: Tensor, rounding: Rounding) -> Tensor:
    """The scale of a whole tensor of inputs, of which this is the largest absolute value that calibration text has."""
    return tensor_scale_of(largest) if rounding.has_tensor_scale else largest / LARGEST[rounding.number]


def round_inputs(values: Tensor, rounding: Rounding, calibrated: Tensor | None = None) -> Tensor:
    """What a component reads, [..., cols], after rounding and back, in its own dtype. `calibrated` is the scale of the
    tensor (`calibrated_scale`), for what is `static`."""
    given = values.float()
    if rounding.grain == "tensor":
        assert calibrated is not None
        scale = calibrated.clamp_min(torch.finfo(torch.float32).eps)
        return to_number(given / scale, rounding.number).mul_(scale).to(values.dtype)
    if rounding.grain == "token":
        scale = given.abs().amax(dim=-1, keepdim=True).div_(LARGEST[rounding.number])
        scale = scale.clamp_min_(torch.finfo(torch.float32).eps)
        return to_number(given / scale, rounding.number).mul_(scale).to(values.dtype)
    groups = given.unflatten(-1, (-1, rounding.size))
    if rounding.scale in ("float16", "signed"):
        return _as_ggml_rounds(groups, rounding).flatten(-2).to(values.dtype)
    tensor_scale = torch.ones((), device=values.device)
    if rounding.has_tensor_scale:
        assert calibrated is not None
        tensor_scale = calibrated
    scale = _raw_scales(groups.abs().amax(dim=-1, keepdim=True), rounding, tensor_scale)
    if rounding.has_tensor_scale:
        scale = scale / tensor_scale
    elif rounding.scale == "float":
        scale = scale.clamp_min_(torch.finfo(torch.float32).eps)
    return to_number(groups / scale, rounding.number).mul_(scale).flatten(-2).to(values.dtype)


def _as_ggml_rounds(groups: Tensor, rounding: Rounding) -> Tensor:
    """Blocks [..., size] of float32 as llama.cpp's products read them: `quantize_row_q8_0_ref` and
    `quantize_row_q8_K_ref` of ggml-quants.c, to the bit. Vector code of its own rounds halves the other way, or has the
    last bit of a factor otherwise."""
    if rounding.scale == "float16":
        scale = groups.abs().amax(dim=-1, keepdim=True).div_(LARGEST["int8"])
        factor = torch.where(scale > 0, 1 / scale, 0.0)
        scaled = groups * factor
        whole = scaled.trunc()
        away = (scaled - whole).abs() >= 0.5  # exact: halves go away from zero
        return (whole + torch.copysign(away.float(), scaled)) * scale.half().float()
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    factor = torch.where(largest != 0, -LARGEST["int8"] / largest, 0.0)
    scale = torch.where(largest != 0, 1 / factor, 0.0)
    return (groups * factor).round_().clamp_(max=LARGEST["int8"]) * scale


def to_number(values: Tensor, number: Number) -> Tensor:
    """float32 values as the nearest of a format, to the even code half way, beyond the largest cut to it."""
    most = LARGEST[number]
    if number == "e4m3":
        return values.clamp(-most, most).to(_E4M3).float()
    if number == "int8" or number == "int4":
        least = -most if number == "int8" else -most - 1
        return values.round().clamp_(least, most)
    # The mantissa's bits say how fine a binade is divided; below 1 steps are those of the lowest one. A step is a power
    # of two, made of its exponent's bits alone: few passes over memory, which is what this takes on a GPU.
    exponent = values.contiguous().view(torch.int32).bitwise_and(_EXPONENT_BITS)
    step = exponent.clamp_(min=_BIAS << _MANTISSA).sub_(_STEPS[number] << _MANTISSA).view(torch.float32)
    return (values / step).round_().mul_(step).clamp_(-most, most)


def spread(scales: Tensor, rounding: Rounding, cols: int) -> Tensor:
    """Scales as they are multiplied with a matrix: [rows, cols], or what broadcasts to it."""
    if rounding.grain == "block":
        return scales.repeat_interleave(rounding.size, 0).repeat_interleave(rounding.size, 1)[:, :cols]
    if rounding.grain == "group":
        return scales.repeat_interleave(min(rounding.size, cols), 1)[:, :cols]
    return scales


def largest_of(weight: Tensor) -> Tensor:
    """The largest absolute weight, float32."""
    return weight.abs().amax().float()


def _largest(values: Tensor, rounding: Rounding) -> Tensor:
    """The largest absolute value in each place that has a scale."""
    rows, cols = values.shape
    if rounding.grain == "channel":
        largest: Tensor = values.abs().amax(dim=1, keepdim=True)
        return largest
    padded_rows = -rows % rounding.size if rounding.grain == "block" else 0
    sizes = nn.functional.pad(values.abs(), (0, -cols % rounding.size, 0, padded_rows))
    groups: Tensor = sizes.unflatten(1, (-1, rounding.size)).amax(dim=2)
    return groups.unflatten(0, (-1, rounding.size)).amax(dim=1) if rounding.grain == "block" else groups


def _steps(rounding: Rounding) -> float:
    """How many scales the largest value is: of 4-bit integers 7.5, as all their 16 codes are used."""
    return 7.5 if rounding.number == "int4" else LARGEST[rounding.number]


def _raw_scales(largest: Tensor, rounding: Rounding, tensor_scale: Tensor) -> Tensor:
    """Scales of places by their largest values, as numbers of their format, but floats as they come."""
    if rounding.scale == "e8m0":
        return _power_of_two(largest, rounding.number)
    scales = largest / _steps(rounding)
    if rounding.scale == "e4m3":
        scales = (scales * tensor_scale).clamp_(max=_LARGEST_E4M3).to(_E4M3).float()
        return torch.where(scales > 0, scales, torch.full_like(scales, _LEAST_E4M3_SCALE))
    return scales


def _power_of_two(largest: Tensor, number: Number) -> Tensor:
    """The scale e8m0 of values up to `largest`: its power of two, rounded up where little is missing, over that of the
    format's largest value."""
    half = 1 << (_MANTISSA - _ROUNDED_AFTER[number] - 1)
    exponent = ((largest.contiguous().view(torch.int32) + half) >> _MANTISSA) - _EXPONENT[number]
    return torch.exp2((exponent.clamp_(0, 254) - _BIAS).float())


class RoundsInputs(nn.Module):
    """A linear layer with other weights [outputs, inputs], which rounds what it reads; where `columns` were scaled by
    powers of two [inputs] before they were rounded, what it reads over these.

    On every device the rounded values are multiplied in the model's dtype: the products of codes that GPUs have for
    FP8 and FP4 differ from it by the order of sums and, in 16 bits, by the rounding of what is multiplied
    (docs/formats.md has figures).
    """

    def __init__(
        self,
        linear: nn.Module,
        weight: Tensor,
        rounding: Rounding,
        calibrated: Tensor | None,
        columns: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.rounding, self.calibrated = rounding, calibrated
        self.columns = None if columns is None else columns.to(weight)

    def forward(self, values: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if self.columns is None:
            rounded = round_inputs(values.detach(), self.rounding, self.calibrated)
        else:
            rounded = round_inputs(values.detach() / self.columns, self.rounding, self.calibrated) * self.columns
        if values.requires_grad:  # rounding has no slope: gradients go through as if there were none
            rounded = values + (rounded - values).detach()
        return nn.functional.linear(rounded, self.weight, self.bias)  # type: ignore[arg-type]


def inputs_rounding(component: str, module: nn.Module, scheme: Scheme, cols: int) -> Rounding | None:
    """How what a component of `cols` inputs reads is rounded under a scheme; None where it stays as it is, as under
    llama.cpp's types in what is no layer of its own: stacks of experts, embeddings. Raises `UserError` where `module`,
    the component's own, is no linear layer and the scheme needs one."""
    if scheme.activations is not None and not isinstance(module, nn.Linear):
        raise UserError(f"{scheme.name} needs a linear layer; {component} is {type(module).__name__}")
    return scheme.inputs(cols) if is_matrix(module) else None
