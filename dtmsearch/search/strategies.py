"""The strategies by the names that a search file gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from dtmsearch.search.beam import Beam
from dtmsearch.search.lazy import Lazy
from dtmsearch.search.probe import Probe
from dtmsearch.search.racing import Racing
from dtmsearch.search.rounds import RequestFactory
from dtmsearch.search.scheduler import Strategy
from dtmsearch.search.space import SearchSpace


def make_strategy(
    name: str,
    space: SearchSpace,
    request_for: RequestFactory,
    rank_by: str = "fdt",
    width: int = 10,
    expand: Literal["all"] | int = "all",
    min_fdt: float | None = None,
    confidence: float = 1.0,
    continuation_tokens: int = 0,
    audit: float = 0.0,
    seed: int = 0,
) -> Strategy:
    """A strategy at its start; each takes of the settings what it has a use for. A new strategy is a line here."""

    def racing(keep: int) -> Racing | None:
        if confidence == 1.0:
            return None
        # Where a component may be compressed more than once, rounds can share plans.
        return Racing(rank_by, keep, confidence, continuation_tokens, remember=space.budget.limits_size)

    def lazy(keep: int) -> Lazy:
        return Lazy(space, request_for, rank_by, keep, expand, min_fdt, audit, seed, continuation_tokens)

    makers: dict[str, Callable[[], Strategy]] = {
        "probe": lambda: Probe(space, request_for, rank_by),
        "greedy": lambda: Beam(space, request_for, rank_by, 1, expand, min_fdt, racing(1)),
        "beam": lambda: Beam(space, request_for, rank_by, width, expand, min_fdt, racing(width)),
        "lazy_greedy": lambda: lazy(1),
        "lazy_beam": lambda: lazy(width),
    }
    return makers[name]()
