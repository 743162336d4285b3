"""What was proved of a model in this process: the same model, computing in the same way, is not proved again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from dtmsearch.model.forward.call_trace import Watched
from dtmsearch.model.modules.blocks import Returned

_T = TypeVar("_T")
CacheKind = Literal["ours", "its own", "none"]
_MOST = 32


@dataclass(frozen=True)
class ProvedPass:
    """Of a model's passes: whether its head runs by itself, where they may be cut, what each layer returns, and whether
    it generates with our cache, its own, or none."""

    head_apart: bool
    cuts: frozenset[int]
    returned: tuple[Returned, ...]
    cache: CacheKind


@dataclass(frozen=True)
class ProvedReuse:
    """Of its layers: how they call what is in them, components that may run on some positions only, and layers that
    give the same with recorded outputs."""

    watched: Watched
    in_part: frozenset[str]
    reusing: frozenset[int]


class Proved(Generic[_T]):
    """Proofs by what a model is and how it computes; of one that is known as None nothing is kept."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _T] = {}

    def of(self, known_as: Hashable) -> _T | None:
        """What was proved of a model; None where nothing was."""
        return self._known.get(known_as)

    def keep(self, known_as: Hashable, found: _T) -> None:
        """Keep it, of a few models."""
        if known_as is not None:
            while len(self._known) >= _MOST:
                del self._known[next(iter(self._known))]
            self._known[known_as] = found
