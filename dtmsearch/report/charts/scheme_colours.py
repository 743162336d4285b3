"""The colour of a scheme: the same on every chart of every page, since it follows from the scheme alone.

The fewer bits per weight, the lighter; what bits are stored as (groups, rows, GPTQ, bitsandbytes, pruned) has a hue.
Charts tell schemes apart by characters and names beside, for readers without colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from dtmsearch.core.schemes import DENSE, Scheme, uniform_parts
from dtmsearch.report.charts.drawing import DENSE_COLOUR
from dtmsearch.report.facts import bits_of

# Lightness (OKLab, 0 to 1) of a scheme of 1 bit or fewer, and of one of 9 or more: both can be seen on white and on
# the dark page.
_LIGHTEST, _DARKEST = 0.86, 0.42
_FEWEST, _MOST = 1.0, 9.0
_CHROMA = 0.12
# Degrees.
_HUES = {"group": 250.0, "channel": 175.0, "tensor": 130.0, "block": 65.0}
_GPTQ, _AUTOROUND, _BITSANDBYTES, _PRUNED, _OTHER, _ASYMMETRIC = 305.0, 340.0, 60.0, 15.0, 100.0, 18.0


def colour_of(scheme: str) -> str:
    """`#rrggbb`; grey for what is not compressed; of a scheme of weights beside one of KV caches
    (`int8-channel+kv-fp8`) the former's. Raises `ValueError` for an unknown scheme."""
    parsed = uniform_parts(scheme)[0]
    if parsed.is_unquantized:
        return DENSE_COLOUR
    place = (min(max(bits_of(parsed.name), _FEWEST), _MOST) - _FEWEST) / (_MOST - _FEWEST)
    return _hex(_LIGHTEST + place * (_DARKEST - _LIGHTEST), _CHROMA, _hue(parsed))


def ink_on(scheme: str) -> str:
    """Black or white, whichever is read on the scheme's colour: by its luminance (WCAG 2.1)."""
    code = colour_of(scheme)
    linear = [_linear(int(code[at : at + 2], 16) / 255) for at in (1, 3, 5)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def by_bits(schemes: Iterable[str]) -> list[str]:
    """Unquantized first, then from many bits to few."""
    return sorted(set(schemes), key=lambda scheme: (scheme != DENSE, -bits_of(scheme), scheme))


def colours(schemes: Iterable[str]) -> Mapping[str, str]:
    """Scheme -> colour, in order of bits."""
    return {scheme: colour_of(scheme) for scheme in by_bits(schemes)}


def _hue(scheme: Scheme) -> float:
    if scheme.pruning is not None or scheme.is_dropped or scheme.width is not None:
        return _PRUNED
    if scheme.needs_hessians:
        hue = _AUTOROUND if scheme.is_tuned else _GPTQ
    else:
        hue = _BITSANDBYTES if scheme.kind.as_module else _HUES.get(scheme.granularity, _OTHER)
    return hue + (_ASYMMETRIC if scheme.asymmetric else 0.0)


def _hex(lightness: float, chroma: float, hue: float) -> str:
    """OKLCH to sRGB (B. Ottosson, A perceptual color space for image processing, 2020); of a colour that a screen lacks
    the one of less chroma."""
    while True:
        channels = _srgb(lightness, chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue)))
        if all(-1e-6 <= channel <= 1 + 1e-6 for channel in channels) or chroma <= 0.0:
            break
        chroma = max(chroma - 0.005, 0.0)
    return "#" + "".join(f"{round(255 * min(max(_gamma(c), 0.0), 1.0)):02x}" for c in channels)


def _srgb(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    """Linear channels."""
    x = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    y = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    z = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * x - 3.3077115913 * y + 0.2309699292 * z,
        -1.2684380046 * x + 2.6097574011 * y - 0.3413193965 * z,
        -0.0041960863 * x - 0.7034186147 * y + 1.7076147010 * z,
    )


def _gamma(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
