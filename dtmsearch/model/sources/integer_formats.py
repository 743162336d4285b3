"""GPTQ (`gptq`, its versions 1 and 2) and AWQ (`awq`, the layout `gemm`): packed integers with scales and zero points
of groups. Their libraries run on GPUs only or must be compiled; weight = (code - zero point) x scale is computed here,
in float32, which rounds to what theirs give in the dtype of the scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from dtmsearch.errors import UserError
from dtmsearch.model.sources.stored import Headers, Read, StoredFormat, StoredWeight, register

_WORD_BITS = 32
_GPTQ_BITS = (2, 3, 4, 8)
_PARTS = ("qweight", "qzeros", "scales")
# Where AWQ's kernels want the eight codes of a word: the place of each in order of outputs.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The codes of words of 32 bits along a dimension, from the lowest bits on; a code may lie in two words."""
    words = words.movedim(dim, -1).long() & (2**_WORD_BITS - 1)
    count = words.shape[-1] * _WORD_BITS // bits
    first = torch.arange(count) * bits
    word, shift = first // _WORD_BITS, first % _WORD_BITS
    above = (word + 1).clamp(max=words.shape[-1] - 1)
    codes = (words[..., word] >> shift) | (words[..., above] << (_WORD_BITS - shift))
    narrow: Tensor = (codes & (2**bits - 1)).to(torch.int16)
    return narrow.movedim(-1, dim)


def _modules(headers: Headers) -> Iterable[tuple[str, dict[str, str]]]:
    """Module -> its tensors by the last parts of their names."""
    for name in headers:
        module, _, last = name.rpartition(".")
        if last == "qweight":
            names = {part: f"{module}.{part}" for part in (*_PARTS, "g_idx") if f"{module}.{part}" in headers}
            lacking = [part for part in _PARTS if part not in names]
            if lacking:
                raise UserError(f"{module} has packed weights, but the checkpoint has no {', '.join(lacking)} of it")
            yield module, names


def _bits_of(headers: Headers, names: Mapping[str, str], usual: int) -> int:
    """By the shapes, for modules may differ from what the configuration says of most."""
    words, outputs = headers[names["qzeros"]][1][1], headers[names["scales"]][1][1]
    for bits in (usual, *_GPTQ_BITS):
        if ceil(outputs * bits / _WORD_BITS) == words:
            return bits
    raise UserError(f"{names['qzeros']} holds zero points of no width that is read: {', '.join(map(str, _GPTQ_BITS))}")


def _gptq_weights(headers: Headers, settings: Mapping[str, Any], read: Read) -> Iterable[StoredWeight]:
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if layout not in ("gptq", "gptq_v2") or settings.get("pack_dtype", "int32") != "int32":
        raise UserError(f"of GPTQ's layouts those that are read are gptq and gptq_v2 in words of int32; got {layout}")
    one = 1 if layout == "gptq" else 0
    group = int(settings.get("group_size", -1))
    for module, names in _modules(headers):
        rows = headers[names["qweight"]][1][0]
        outputs = headers[names["scales"]][1][1]
        bits = _bits_of(headers, names, int(settings.get("bits", 4)))
        inputs = headers[names["g_idx"]][1][0] if "g_idx" in names else rows * _WORD_BITS // bits
        make = partial(_gptq, names, bits, one, group if group > 0 else inputs)
        yield StoredWeight(f"{module}.weight", (outputs, inputs), tuple(names.values()), make)


def _gptq(names: Mapping[str, str], bits: int, one: int, group: int, parts: Mapping[str, Tensor]) -> Tensor:
    """Version 1 stores zero points less one, of which 0 becomes the largest code. Words may be filled up behind the
    last input or output."""
    scales = parts[names["scales"]].float()
    codes = unpacked(parts[names["qweight"]], bits, 0)
    zeros = (unpacked(parts[names["qzeros"]], bits, 1)[:, : scales.shape[1]] + one) % (1 << bits)
    groups = parts[names["g_idx"]].long() if "g_idx" in names else torch.arange(len(codes)) // group
    return ((codes[: len(groups)] - zeros[groups]).float() * scales[groups]).t().contiguous()


def _awq_weights(headers: Headers, settings: Mapping[str, Any], read: Read) -> Iterable[StoredWeight]:
    layout, bits = str(settings.get("version", "gemm")).lower(), int(settings.get("bits", settings.get("w_bit", 4)))
    if layout != "gemm" or bits != 4:
        raise UserError(f"of AWQ's layouts the one that is read is gemm, in 4 bits; got {layout}, {bits} bits")
    for module, names in _modules(headers):
        inputs, words = headers[names["qweight"]][1]
        parts = tuple(names[part] for part in _PARTS)
        outputs = words * len(_AWQ_PLACES)
        yield StoredWeight(f"{module}.weight", (outputs, inputs), parts, partial(_awq, names))


def _awq(names: Mapping[str, str], parts: Mapping[str, Tensor]) -> Tensor:
    codes, zeros = (_in_order(unpacked(parts[names[part]], 4, 1)) for part in ("qweight", "qzeros"))
    scales = parts[names["scales"]].float()
    group = len(codes) // len(scales)
    values = (codes - zeros.repeat_interleave(group, 0)).float() * scales.repeat_interleave(group, 0)
    return values.t().contiguous()


def _in_order(codes: Tensor) -> Tensor:
    return codes.reshape(len(codes), -1, len(_AWQ_PLACES))[..., list(_AWQ_PLACES)].flatten(1)


def _says(name: str, settings: Mapping[str, Any]) -> str:
    bits, group = settings.get("bits", settings.get("w_bit", 4)), settings.get("group_size", -1)
    return f"{name} in {bits} bits, {'rows' if group in (None, -1) else f'groups of {group}'}"


register(StoredFormat("gptq", _gptq_weights, partial(_says, "GPTQ"), {}))
register(StoredFormat("awq", _awq_weights, partial(_says, "AWQ"), {}))
