"""Schemes: how a component is compressed. A scheme's name is its whole identity.

Holds the grammar of the names and the arithmetic of stored sizes; the tensors are rounded in
`dtmsearch.model.compress`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

DENSE = "dense"
SCALE_BITS = 16
BITSANDBYTES_BLOCK = 64

# name -> bits of a code and weights that share a scale (None: a row)
_BITSANDBYTES: dict[str, tuple[int, int | None]] = {
    "w8a8": (8, None),
    "llm-int8": (8, None),
    "nf4": (4, BITSANDBYTES_BLOCK),
    "fp4": (4, BITSANDBYTES_BLOCK),
}
_ROUNDING = re.compile(r"int([2-8])-(?:(tensor|channel)|g([1-9][0-9]*))(-asym)?")


@dataclass(frozen=True)
class Scheme:
    """A parsed scheme.

    `family` is `dense`, `rounding` (weight-only AbsMax) or `bitsandbytes`; `bits` of a code; `granularity` is what
    shares one scale: `tensor`, `channel` (an output row), `group` (`group_size` inputs of a row) or `block`
    (`group_size` consecutive weights of the flattened matrix); `asymmetric` schemes store a zero point with each scale.
    """

    name: str
    family: str
    bits: int
    granularity: str
    group_size: int = 0
    asymmetric: bool = False

    def num_scales(self, shape: tuple[int, int]) -> int:
        rows, cols = shape
        per_granularity = {
            "none": 0,
            "tensor": 1,
            "channel": rows,
            "group": rows * ceil(cols / self.group_size) if self.group_size else 0,
            "block": ceil(rows * cols / self.group_size) if self.group_size else 0,
        }
        return per_granularity[self.granularity]

    def stored_bits(self, shape: tuple[int, int], dense_bits: int) -> int:
        """Bits that a matrix of `shape` takes: codes, 16 for each scale, `bits` for each zero point."""
        num_weights = shape[0] * shape[1]
        if self.family == DENSE:
            return num_weights * dense_bits
        per_scale = SCALE_BITS + (self.bits if self.asymmetric else 0)
        return num_weights * self.bits + self.num_scales(shape) * per_scale


@lru_cache(maxsize=4096)
def parse_scheme(name: str) -> Scheme:
    """The scheme of a name. Raises `ValueError` that names the nearest scheme when there is none of that name."""
    if name == DENSE:
        return Scheme(DENSE, DENSE, 0, "none")
    if name in _BITSANDBYTES:
        bits, block = _BITSANDBYTES[name]
        return Scheme(name, "bitsandbytes", bits, "block" if block else "channel", block or 0)
    match = _ROUNDING.fullmatch(name)
    if match is None:
        raise ValueError(_unknown(name))
    width, whole, group, asymmetric = match.groups()
    return Scheme(name, "rounding", int(width), whole or "group", int(group or 0), asymmetric is not None)


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, list(_examples()), n=1, cutoff=0.0)
    return (
        f"unknown scheme {name!r}; the nearest is {nearest[0]!r}. Schemes are {DENSE}, {', '.join(_BITSANDBYTES)}, and "
        "intN-tensor, intN-channel, intN-gK (N from 2 to 8 bits, K inputs to a group), with or without -asym"
    )


@lru_cache(maxsize=1)
def _examples() -> tuple[str, ...]:
    grains = ("tensor", "channel", "g32", "g64", "g128")
    rounding = (f"int{bits}-{grain}{asym}" for bits in range(2, 9) for grain in grains for asym in ("", "-asym"))
    return (DENSE, *_BITSANDBYTES, *rounding)


def siblings(name: str) -> tuple[str, ...]:
    """Schemes of the same granularity at every bit width, the scheme itself among them; only itself if it has none."""
    scheme = parse_scheme(name)
    if scheme.family != "rounding":
        return (name,)
    return tuple(f"int{bits}{name[4:]}" for bits in range(2, 9))
