"""NumericMode: in which numbers and by which kernels a model runs. Near ties between tokens flip between modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# What a model computes in where nothing is said.
DTYPE: Final = "bfloat16"
ATTENTION: Final = "sdpa"
SCALE_DTYPE: Final = "float32"

_WAYS = {"eager": False, "compiled": True}
_SCALES = "-scales"


@dataclass(frozen=True)
class NumericMode:
    """The parts of a reference's identity that are not text and not weights.

    `dtype` is that of weights and activations, `device` a type (`cpu`, `cuda`), `attention` the implementation that
    transformers is asked for. Scales of rounded weights are those that `scale_dtype` can hold.
    """

    dtype: str
    device: str
    attention: str
    compiled: bool = False
    scale_dtype: str = SCALE_DTYPE

    def __str__(self) -> str:
        """`float32/cpu/sdpa/eager`, with `/float16-scales` where scales are not float32. Identities hold this text."""
        way = "compiled" if self.compiled else "eager"
        scales = "" if self.scale_dtype == "float32" else f"/{self.scale_dtype}{_SCALES}"
        return f"{self.dtype}/{self.device}/{self.attention}/{way}{scales}"

    @staticmethod
    def parse(text: str) -> NumericMode:
        """The mode of a text that `str` made of one. Raises `ValueError` for any other text."""
        rest, scale_dtype = text, "float32"
        if text.endswith(_SCALES):
            rest, _, scale_dtype = text.removesuffix(_SCALES).rpartition("/")
        dtype, _, rest = rest.partition("/")
        device, _, rest = rest.partition("/")
        attention, _, way = rest.rpartition("/")
        if not (dtype and device and attention) or way not in _WAYS:
            raise ValueError(f"{text!r} is no numeric mode; one reads float32/cpu/sdpa/eager")
        return NumericMode(dtype, device, attention, _WAYS[way], scale_dtype)

    def differences(self, other: NumericMode) -> list[str]:
        """What another mode has otherwise: `dtype float32, not bfloat16`, one line a part."""
        return [
            f"{name.replace('_', ' ')} {theirs}, not {own}"
            for name, own in vars(self).items()
            if (theirs := getattr(other, name)) != own
        ]
