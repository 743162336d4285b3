"""How a plan differs from one scheme everywhere, in a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dtmsearch.analysis.format import components as counted_components
from dtmsearch.core.schemes import uniform_parts

# Within this part of each other, bits are about as many: a zero point more or less.
_ABOUT = 0.05
# Kinds and layers that a sentence names.
_MOST_NAMED = 3
_Name = TypeVar("_Name", int, str)


@dataclass(frozen=True)
class Part:
    """A component with its scheme and bits per weight in a plan, and its bits under the scheme it is held against."""

    layer: int
    kind: str
    scheme: str
    bits: float
    uniform_bits: float


def difference_from_uniform(parts: Sequence[Part], scheme: str) -> str:
    """In how many components, and where most, a plan has more bits and fewer than `scheme` everywhere has; or than one
    scheme of weights and one of KV caches (`int8-channel+kv-fp8`)."""
    everywhere = {each.name for each in uniform_parts(scheme)}
    same = sum(part.scheme in everywhere for part in parts)
    if same == len(parts):
        return f"It is {scheme} everywhere."
    more = [part for part in parts if part.bits > part.uniform_bits * (1 + _ABOUT)]
    fewer = [part for part in parts if part.bits < part.uniform_bits * (1 - _ABOUT)]
    beside = len(parts) - same - len(more) - len(fewer)
    said = [
        f"{len(group)} {'has' if len(group) == 1 else 'have'} {word} bits ({_where(group, parts)})"
        for group, word in ((more, "more"), (fewer, "fewer"))
        if group
    ]
    said += [f"{beside} about as many by another scheme"] if beside else []
    said += [f"{same} the same scheme"] if same else []
    return f"Beside {scheme} everywhere, of its {counted_components(len(parts))} {_joined(said)}."


def _where(group: Sequence[Part], parts: Sequence[Part]) -> str:
    """The kinds and layers of which the largest part is in a group."""
    kinds = _most((part.kind for part in group), Counter(part.kind for part in parts))
    layers = _most((part.layer for part in group), Counter(part.layer for part in parts))
    noun = "layer" if len(layers) == 1 else "layers"
    return f"most in {_joined(kinds)}; {noun} {_joined(sorted(layers))}"


def _most(found: Iterable[_Name], all_of: Counter[_Name]) -> list[_Name]:
    counts = Counter(found)
    ordered = sorted(counts, key=lambda name: (-counts[name] / all_of[name], -counts[name], name))
    return ordered[:_MOST_NAMED]


def _joined(words: Sequence[object]) -> str:
    texts = [str(word) for word in words]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
