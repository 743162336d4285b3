"""Formats as engines serve them: floating-point codes (FP8, NVFP4, MX) and integers beside rounded activations.

Every name is one format of compressed-tensors: how weights are rounded, and how what a component reads is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dtmsearch.core.number_formats import Rounding

TENSOR_SCALE_BITS = 32


@dataclass(frozen=True)
class Served:
    """What a scheme's name stands for. `activations` is None where they stay as they are."""

    weights: Rounding
    activations: Rounding | None = None

    def stored_bits(self, shape: tuple[int, int], float_scale_bits: int) -> int:
        """Codes, and scales of so many bits where they are floats, else of 8; 32 bits for the scale of a tensor beside
        those of groups, and for that of activations which is calibrated."""
        per_scale = float_scale_bits if self.weights.scale == "float" else 8
        wholes = self.weights.has_tensor_scale + (self.activations is not None and self.activations.static)
        codes = shape[0] * shape[1] * self.weights.bits
        return codes + self.weights.num_scales(shape) * per_scale + wholes * TENSOR_SCALE_BITS


_INT8_BY_TOKEN = Rounding("int8", "token")
_FP8_BY_TOKEN = Rounding("e4m3", "token")
_NVFP4 = Rounding("e2m1", "group", 16, "e4m3")
_MXFP4, _MXFP6 = Rounding("e2m1", "group", 32, "e8m0"), Rounding("e2m3", "group", 32, "e8m0")
_MXFP8 = Rounding("e4m3", "group", 32, "e8m0")
# Family -> its formats by name; of integers in groups these are examples.
SERVED: dict[str, dict[str, Served]] = {
    "fp8": {
        "fp8-channel": Served(Rounding("e4m3", "channel"), _FP8_BY_TOKEN),
        "fp8-block128": Served(Rounding("e4m3", "block", 128), Rounding("e4m3", "group", 128)),
        "fp8-tensor": Served(Rounding("e4m3", "tensor"), Rounding("e4m3", "tensor", static=True)),
    },
    "nvfp4": {
        "nvfp4": Served(_NVFP4, Rounding("e2m1", "group", 16, "e4m3", static=True)),
        "nvfp4a16": Served(_NVFP4),
    },
    "microscaling": {
        "mxfp4": Served(_MXFP4, _MXFP4),
        "mxfp4a16": Served(_MXFP4),
        "mxfp6": Served(_MXFP6, _MXFP8),
        "mxfp6a16": Served(_MXFP6),
        "mxfp8": Served(_MXFP8, _MXFP8),
        "mxfp8a16": Served(_MXFP8),
    },
    "integers": {
        "w8a8-channel": Served(Rounding("int8", "channel"), _INT8_BY_TOKEN),
        "w4a8-g128": Served(Rounding("int4", "group", 128), _INT8_BY_TOKEN),
        "w4afp8": Served(Rounding("int4", "group", 128), _FP8_BY_TOKEN),
    },
}
_W4A8 = re.compile("w4a8-(?:(channel)|g([1-9][0-9]{0,8}))")


def served_format(family: str, name: str) -> Served | None:
    """What a name stands for in a family; None where it is none of it."""
    found = SERVED[family].get(name)
    match = _W4A8.fullmatch(name) if found is None and "w4a8-g128" in SERVED[family] else None
    if match is None:
        return found
    weights = Rounding("int4", "channel") if match[1] else Rounding("int4", "group", int(match[2]))
    return Served(weights, _INT8_BY_TOKEN)


@dataclass(frozen=True)
class CacheFormat:
    """How keys or values are kept: bits of a code, and whether every row, a token's head, has a scale of its own."""

    bits: int
    scale_of_row: bool
    engine_name: str


CACHE_SCALE_BITS = 32
# Scheme -> what vLLM calls it (`--kv-cache-dtype`). Its 4 bits are of rotated rows, ours of rows as they are.
CACHES: dict[str, CacheFormat] = {
    "kv-fp8": CacheFormat(8, False, "fp8"),
    "kv-int8": CacheFormat(8, True, "int8_per_token_head"),
    "kv-int4": CacheFormat(4, True, "int4_per_token_head"),
}
