"""What every strategy is given: where to search, how to ask, and what counts."""

from __future__ import annotations

from dataclasses import dataclass

from dtmsearch.core.strategy_settings import RANK_BY
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.rounds import RequestFactory


@dataclass(frozen=True)
class Task:
    """A search to be made. `request_for` (plan, parent) makes the request of an evaluation; `rank_by` is the metric
    that ranks; of a search for the smallest plan `min_fdt` is the mean FDT that it keeps, at most
    `continuation_tokens`. What is random is drawn by `seed`."""

    space: SearchSpace
    request_for: RequestFactory
    rank_by: str = RANK_BY
    min_fdt: float | None = None
    continuation_tokens: int = 0
    seed: int = 0
