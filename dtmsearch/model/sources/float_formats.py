"""FP8 with scales of blocks, rows or whole matrices (`fp8`: DeepSeek, Qwen, GLM), also with experts in FP4, and MXFP4
(`mxfp4`: gpt-oss)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import mxfp4_values
from dtmsearch.model.sources.stored import Headers, Read, StoredFormat, StoredWeight, register

# What the name of a weight's scales adds to the weight's, or has in its last part's place.
_SCALE_NAMES = ("{}_scale_inv", "{}_scale", "{module}scale", "{module}qscale_weight")
_FP8 = ("float8_e4m3fn", "float8_e5m2")
# Of the dtypes of two FP4 codes in a byte.
_FP4 = ("I8", "F4")
# The values of e2m1, by code: a sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _scale_of(name: str, headers: Headers) -> str | None:
    module = name.removesuffix("weight")
    named = (pattern.format(name, module=module) for pattern in _SCALE_NAMES)
    return next((scale for scale in named if scale != name and scale in headers), None)


def _fp8_weights(headers: Headers, settings: Mapping[str, Any], read: Read) -> Iterable[StoredWeight]:
    given = settings.get("weight_block_size")
    block = (int(given[0]), int(given[1])) if given else None
    for name, (dtype, shape) in headers.items():
        is_fp4 = dtype in _FP4
        if dtype not in _FP8 and not is_fp4:
            continue
        scale = _scale_of(name, headers)
        if scale is None:
            if is_fp4:
                raise UserError(f"{name} holds 4-bit codes, but the checkpoint has no scales of it")
            continue  # of 8 bits without a scale: numbers as they stand
        whole = (*shape[:-1], 2 * shape[-1]) if is_fp4 else shape
        _spans(whole, headers[scale][1], None if is_fp4 else block, name)
        yield StoredWeight(name, whole, (name, scale), partial(_scaled, name, scale, None if is_fp4 else block))


def _spans(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None, name: str) -> list[int]:
    """The rows and columns that a scale is of. Blocks at the lower and right edge may be cut."""
    if not scales or set(scales) == {1}:
        return list(shape[-2:])
    if len(shape) > 2 and len(scales) < len(shape):  # of stacked matrices, a scale each
        if scales != shape[:-2]:
            raise UserError(f"{name} is {list(shape)} and its scales are {list(scales)}: these are of no blocks of it")
        return list(shape[-2:])
    grid = [*scales[-2:], 1][:2] if len(scales) < 2 else list(scales[-2:])
    spans = []
    for size, parts, length in zip(shape[-2:], grid, block or (0, 0), strict=True):
        if length and ceil(size / length) == parts:
            spans.append(length)
        elif size % parts == 0:
            spans.append(size // parts)
        else:
            raise UserError(f"{name} is {list(shape)} and its scales are {list(scales)}: these are of no blocks of it")
    return spans


def _scaled(name: str, scale: str, block: tuple[int, int] | None, parts: Mapping[str, Tensor]) -> Tensor:
    """code x scale of its block, in float32."""
    codes, scales = parts[name], parts[scale]
    values = _e2m1(codes) if codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) else codes.float()
    factors = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    rows, cols = _spans(tuple(values.shape), tuple(scales.shape), block, name)
    if values.ndim > 2 and factors.shape == values.shape[:-2]:  # of stacked matrices, a scale each
        factors = factors.reshape(*factors.shape, 1, 1)
    elif factors.ndim < 2:
        factors = factors.reshape(-1, 1)
    factors = factors.repeat_interleave(rows, -2)[..., : values.shape[-2], :]
    return values.mul_(factors.repeat_interleave(cols, -1)[..., : values.shape[-1]])


def _e2m1(packed: Tensor) -> Tensor:
    """Two values a byte, the first in the lower half."""
    pairs = packed.contiguous().view(torch.uint8)
    table = torch.tensor(_E2M1)
    return torch.stack((table[(pairs & 15).long()], table[(pairs >> 4).long()]), -1).flatten(-2)


def _says_fp8(settings: Mapping[str, Any]) -> str:
    block = settings.get("weight_block_size")
    return f"FP8 in blocks of {block[0]} x {block[1]}" if block else "FP8"


_BLOCKS, _SCALES = "_blocks", "_scales"


def _mxfp4_weights(headers: Headers, settings: Mapping[str, Any], read: Read) -> Iterable[StoredWeight]:
    for blocks, (_, shape) in headers.items():
        name = blocks.removesuffix(_BLOCKS)
        if name == blocks or f"{name}{_SCALES}" not in headers:
            continue
        # [experts, outputs, groups, bytes of a group], which the model keeps as [experts, inputs, outputs].
        experts, outputs, groups, size = shape
        scales = f"{name}{_SCALES}"
        yield StoredWeight(name, (experts, groups * size * 2, outputs), (blocks, scales), partial(_mx, blocks, scales))


def _mx(blocks: str, scales: str, parts: Mapping[str, Tensor]) -> Tensor:
    return mxfp4_values(parts[blocks], parts[scales])


register(
    StoredFormat(
        *("fp8", _fp8_weights, _says_fp8, {}),
        dropped=(".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".output_scale", ".q_scale"),
    )
)
register(StoredFormat("mxfp4", _mxfp4_weights, lambda settings: "MXFP4 in groups of 32", {}))
