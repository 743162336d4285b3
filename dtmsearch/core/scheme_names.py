"""The names of schemes: their grammar, which differ only in an amount, and which is nearest to a name that is none."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache

BITSANDBYTES_BLOCK = 64
# name -> bits of a code and weights that share a scale (None: a row)
BITSANDBYTES: dict[str, tuple[int, int | None]] = {
    "w8a8": (8, None),
    "llm-int8": (8, None),
    "nf4": (4, BITSANDBYTES_BLOCK),
    "fp4": (4, BITSANDBYTES_BLOCK),
}
# Other names of schemes: what a person may write for one.
ALIASES = {"bnb-w8a8": "w8a8"}
SALIENCIES = ("magnitude", "wanda", "sparsegpt", "random")
# Of inputs: no matrix has more.
_COUNT = "[1-9][0-9]{0,8}"
# A share is written in one way only, for two names would be two schemes.
# Random pruning may name what its mask is drawn by, so that there are many of one share: random-0.001-s17.
_PRUNING = re.compile(rf"({'|'.join(SALIENCIES)})-(?:(0\.[0-9]{{0,16}}[1-9])|({_COUNT}):({_COUNT}))(-s(?:0|{_COUNT}))?")
_ROUNDING = re.compile(rf"(gptq-)?int([2-8])-(?:(tensor|channel)|g({_COUNT}))(-asym)?")
# Schemes whose columns are scaled first: what stands before the name of one that is not.
AWQ, SMOOTH = "awq-", "smooth-"
# Of schemes that AutoRound rounds by.
AUTOROUND = "autoround-"
_SIBLING_SHARES = tuple(f"0.{hundredths:02}".rstrip("0") for hundredths in range(5, 100, 5))


def quantized_parts(name: str) -> tuple[int, str, int, bool] | None:
    """Of `int4-g32-asym`, `gptq-int3-channel`, ...: bits, granularity, group size (0 without groups), and whether there
    are zero points."""
    match = _ROUNDING.fullmatch(name)
    if match is None:
        return None
    _, width, whole, group, asymmetric = match.groups()
    return int(width), whole or "group", int(group or 0), asymmetric is not None


def scaled_base(name: str, prefix: str) -> str | None:
    """Of `awq-int4-g128` the scheme that rounds the scaled columns, `int4-g128`; None for a name without the prefix."""
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def pruned_parts(name: str) -> tuple[str, float, tuple[int, int] | None] | None:
    """Of `wanda-0.5` the saliency and the share; of `wanda-2:4` 0 for it, and how many of how many are kept."""
    match = _PRUNING.fullmatch(name)
    if match is None:
        return None
    saliency, share, kept, of, seed = match.groups()
    if seed is not None and saliency != "random":
        return None
    if share is not None:
        return saliency, float(share), None
    return (saliency, 0.0, (int(kept), int(of))) if int(kept) < int(of) else None


def other_widths(name: str) -> tuple[str, ...]:
    """The names of a quantizing scheme in every number of bits."""
    at = name.index("int") + len("int")
    return tuple(f"{name[:at]}{bits}{name[at + 1 :]}" for bits in range(2, 9))


def other_shares(name: str) -> tuple[str, ...]:
    """The names of a pruning scheme with every twentieth as the share, itself among them; of N:M with every N."""
    parts = pruned_parts(name)
    assert parts is not None
    saliency, _, pattern = parts
    if pattern is not None:
        return tuple(f"{saliency}-{kept}:{pattern[1]}" for kept in range(1, pattern[1]))
    return tuple(dict.fromkeys((*(f"{saliency}-{share}" for share in _SIBLING_SHARES), name)))


def nearest(name: str, further: tuple[str, ...]) -> str:
    """The scheme that a name which is none may have meant, among those of this grammar and `further` ones."""
    first, plus, second = name.partition("+")
    if not plus:
        return _alike(name, (*BITSANDBYTES, *_quantizing_examples(), *_pruning_examples(), *further))
    if pruned_parts(first) is not None:  # the wrong way round
        first, second = second, first
    return f"{_alike(first, _quantizing_examples())}+{_alike(second, _pruning_examples())}"


def _alike(name: str, known: tuple[str, ...]) -> str:
    return name if name in known else difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]


@lru_cache(maxsize=1)
def _quantizing_examples() -> tuple[str, ...]:
    grains = ("tensor", "channel", "g32", "g64", "g128")
    names = [f"int{bits}-{grain}{asym}" for bits in range(2, 9) for grain in grains for asym in ("", "-asym")]
    without_tensor = [name for name in names if "-tensor" not in name]
    further = (f"{prefix}{name}" for prefix in (AWQ, AUTOROUND) for name in without_tensor)
    return (*names, *(f"gptq-{name}" for name in names), *further)


@lru_cache(maxsize=1)
def _pruning_examples() -> tuple[str, ...]:
    return tuple(f"{s}-{amount}" for s in SALIENCIES for amount in (*_SIBLING_SHARES, "2:4", "4:8", "1:4"))
