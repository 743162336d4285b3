"""The strategies by the names that a search file gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from dtmsearch.search.loop import Strategy
from dtmsearch.search.solver.damage_model import WeightErrors
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.additive import Knapsack, Spdy, SpdySearch
from dtmsearch.search.strategies.auto import Auto, Effort
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.evolution import Evolution, Local, Stages, Switching
from dtmsearch.search.strategies.lazy import Lazy
from dtmsearch.search.strategies.priced import Fisher, PricedAuto, TakePrices
from dtmsearch.search.strategies.probe import Probe
from dtmsearch.search.strategies.racing import Racing
from dtmsearch.search.strategies.rounds import RequestFactory

# Strategies that need the weight errors of every component under every scheme.
NEED_ERRORS = frozenset({"sensitivity", "auto", "spdy"})
# Strategies that take prices.
TAKE_PRICES = frozenset({"fisher"})


@dataclass(frozen=True)
class SolverSettings:
    """What the strategies around the solver are given: how much each measures, and what is known without measuring: the
    weight errors, or by what prices are taken."""

    auto: Effort = field(default_factory=Effort)
    knapsack_prompts: int = 256
    spdy: SpdySearch = field(default_factory=SpdySearch)
    evolution: Stages = field(default_factory=Stages)
    local: Switching = field(default_factory=Switching)
    fisher_samples: int = 512
    errors: WeightErrors | None = None
    take: TakePrices | None = None


def make_strategy(
    name: str,
    space: SearchSpace,
    request_for: RequestFactory,
    rank_by: str = "fdt",
    width: int = 10,
    expand: Literal["all"] | int = "all",
    min_fdt: float | None = None,
    confidence: float = 1.0,
    indifference: float = 0.0,
    continuation_tokens: int = 0,
    audit: float = 0.0,
    seed: int = 0,
    solver: SolverSettings = SolverSettings(),
) -> Strategy:
    """A strategy at its start; each takes of the settings what it has a use for. A new strategy is a line here."""
    errors = solver.errors or {}

    def racing(keep: int) -> Racing | None:
        if confidence == 1.0:
            return None
        # Where a component may be compressed more than once, rounds can share plans.
        remember = space.budget.limits_size
        return Racing(rank_by, keep, confidence, continuation_tokens, remember, indifference)

    def lazy(keep: int) -> Lazy:
        return Lazy(space, request_for, rank_by, keep, expand, min_fdt, audit, seed, continuation_tokens)

    def auto(effort: Effort) -> Auto:
        return Auto(space, request_for, errors, rank_by, effort, seed, min_fdt, continuation_tokens)

    def priced(take: TakePrices) -> PricedAuto:
        return PricedAuto(space, request_for, take, rank_by, solver.auto, seed, min_fdt, continuation_tokens)

    def fisher() -> Fisher:
        return Fisher(space, request_for, solver.take, rank_by, solver.fisher_samples, continuation_tokens, seed)

    makers: dict[str, Callable[[], Strategy]] = {
        "probe": lambda: Probe(space, request_for, rank_by),
        "greedy": lambda: Beam(space, request_for, rank_by, 1, expand, min_fdt, racing(1)),
        "beam": lambda: Beam(space, request_for, rank_by, width, expand, min_fdt, racing(width)),
        "lazy_greedy": lambda: lazy(1),
        "lazy_beam": lambda: lazy(width),
        "knapsack": lambda: Knapsack(space, request_for, rank_by, solver.knapsack_prompts, seed),
        "sensitivity": lambda: auto(replace(solver.auto, rounds=0, polish_prompts=0)),
        "auto": lambda: auto(solver.auto) if solver.take is None else priced(solver.take),
        "fisher": fisher,
        "spdy": lambda: Spdy(space, request_for, errors, rank_by, solver.spdy, seed),
        "evolution": lambda: Evolution(space, request_for, rank_by, solver.evolution, seed),
        "local": lambda: Local(space, request_for, rank_by, solver.local, seed),
    }
    return makers[name]()
