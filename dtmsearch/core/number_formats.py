"""How numbers are rounded in the formats that engines serve: which numbers there are, and what shares a scale."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

Number = Literal["int4", "int8", "e2m1", "e2m3", "e4m3"]
Grain = Literal["tensor", "channel", "token", "group", "block"]
# Of a scale as it is stored: a float of the width that scales have in a file, or 8 bits beside one float32 for the
# tensor (`e4m3`), or a power of two (`e8m0`). llama.cpp's two kinds of blocks of 8-bit integers: codes by the scale in
# 32 bits, which is kept in 16 (`float16`); or the value of largest size, with its sign, is -127 scales (`signed`).
ScaleNumber = Literal["float", "e4m3", "e8m0", "float16", "signed"]

WIDTHS: dict[Number, int] = {"int4": 4, "int8": 8, "e2m1": 4, "e2m3": 6, "e4m3": 8}
# The largest value of a number format. OCP Microscaling Formats (MX) 1.0, sections 5.3.1 to 5.3.3; OCP 8-bit Floating
# Point 1.0, table 1.
LARGEST: dict[Number, float] = {"int4": 7.0, "int8": 127.0, "e2m1": 6.0, "e2m3": 7.5, "e4m3": 448.0}


@dataclass(frozen=True)
class Rounding:
    """Numbers of a format with scales, of weights [rows, cols] or of what a component reads [tokens, cols].

    One scale serves a `tensor`, an output row (`channel`), a `token`, a `group` of `size` inputs, or a `block` of
    `size` rows and inputs. `static`: what would follow from all tokens, the scale of a tensor, is calibrated; all
    other scales of activations follow from the token's own values.
    """

    number: Number
    grain: Grain
    size: int = 0
    scale: ScaleNumber = "float"
    static: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return WIDTHS[self.number]

    @property
    def has_tensor_scale(self) -> bool:
        """Whether there is a float32 for the whole tensor beside the scales of groups."""
        return self.scale == "e4m3"

    @property
    def shares_scale(self) -> bool:
        """Whether parts that an engine runs as one matrix share a scale, that of the whole tensor."""
        return self.grain == "tensor" or self.has_tensor_scale

    @property
    def packs_in_words(self) -> bool:
        """Whether codes are packed in words of 32 bits, and not a byte each or without gaps."""
        return self.number == "int4"

    def num_scales(self, shape: tuple[int, int]) -> int:
        """Scales of a matrix, without that of the tensor where groups have their own."""
        rows, cols = shape
        if self.grain == "block":
            return ceil(rows / self.size) * ceil(cols / self.size)
        return {"tensor": 1, "channel": rows, "token": rows, "group": rows * ceil(cols / (self.size or 1))}[self.grain]

    def misfit(self, cols: int) -> str | None:
        """Why so many inputs cannot be rounded so, None where they can. Groups of integers may be short at the end."""
        if self.size and not self.number.startswith("int") and cols % self.size:
            what = "blocks" if self.grain == "block" else "groups"
            return f"its {what} of {self.size} want inputs in a multiple of {self.size}, and {cols} is none"
        return None
