"""The strategies by the names that a search file gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dtmsearch.core import plugins
from dtmsearch.core.calibration import ExpertUse
from dtmsearch.core.strategy_settings import (
    RANK_BY,
    AutoSettings,
    EvolutionSettings,
    FisherSettings,
    FloatingSettings,
    KnapsackSettings,
    LocalSettings,
    McMoeSettings,
    SpdySettings,
    TreeSettings,
)
from dtmsearch.search.protocols import Strategy
from dtmsearch.search.solver.damage_model import WeightErrors
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.additive import Knapsack, Spdy
from dtmsearch.search.strategies.auto import Auto
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.evolution import Evolution, Local
from dtmsearch.search.strategies.floating import Floating
from dtmsearch.search.strategies.gradient_scores import GradientChanges, SquaredGradients
from dtmsearch.search.strategies.lazy import Lazy
from dtmsearch.search.strategies.mc_moe import McMoe
from dtmsearch.search.strategies.measuring import Costs, Discriminability, Domains, Ladder
from dtmsearch.search.strategies.orders import Orders
from dtmsearch.search.strategies.priced import Fisher, PricedAuto, TakePrices
from dtmsearch.search.strategies.probe import Probe
from dtmsearch.search.strategies.racing import Racing
from dtmsearch.search.strategies.rounds import RequestFactory
from dtmsearch.search.strategies.task import Task


@dataclass(frozen=True)
class SolverSettings:
    """What the strategies around the solver are given: how much each measures, and what is known without measuring: the
    weight errors, by what prices are taken, or how text uses experts; `trains`, whether rounds end in a training."""

    auto: AutoSettings = field(default_factory=AutoSettings)
    fisher: FisherSettings = field(default_factory=FisherSettings)
    knapsack: KnapsackSettings = field(default_factory=KnapsackSettings)
    spdy: SpdySettings = field(default_factory=SpdySettings)
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    floating: FloatingSettings = field(default_factory=FloatingSettings)
    local: LocalSettings = field(default_factory=LocalSettings)
    mc_moe: McMoeSettings = field(default_factory=McMoeSettings)
    errors: WeightErrors | None = None
    take: TakePrices | None = None
    uses: Sequence[ExpertUse] = ()
    trains: bool = False


@dataclass(frozen=True)
class StrategyInputs(Task):
    """What a strategy is made of: its task, and what else a search file says; each takes what it has a use for.

    `tree` says how those go that search down the tree of plans, `solver` what those around the solver are given;
    `options` is the search file's `search.options`, for strategies of other packages.
    """

    tree: TreeSettings = field(default_factory=TreeSettings)
    solver: SolverSettings = SolverSettings()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StrategyType:
    """A strategy by its name: how it is made (at its start: replay brings it to where a search was), whether it needs
    the weight errors of every component under every scheme, and whether it takes prices. One with both takes prices
    where they can be had, and needs the errors elsewhere. One that `needs_uses` is told how text uses experts; one that
    `only_measures` ends without a plan."""

    make: Callable[[StrategyInputs], Strategy]
    needs_errors: bool = False
    takes_prices: bool = False
    needs_uses: bool = False
    only_measures: bool = False


STRATEGIES: plugins.Registry[StrategyType] = plugins.Registry(plugins.STRATEGIES, "strategy")


def make_strategy(
    name: str, space: SearchSpace, request_for: RequestFactory, rank_by: str = RANK_BY, **settings: Any
) -> Strategy:
    """A strategy at its start. `settings` are fields of `StrategyInputs`. Raises `UserError` for an unknown name."""
    return STRATEGIES[name].make(StrategyInputs(space, request_for, rank_by, **settings))


def _beam(inputs: StrategyInputs, settings: TreeSettings) -> Beam:
    racing = None
    if settings.confidence < 1.0:
        # Where a component may be compressed more than once, rounds can share plans.
        remember = inputs.space.budget.limits_size
        how = settings.confidence, inputs.continuation_tokens, remember, settings.indifference
        racing = Racing(inputs.rank_by, settings.width, *how)
    return Beam(inputs, settings, racing)


def _by_errors(inputs: StrategyInputs, effort: AutoSettings) -> Auto:
    return Auto(inputs, inputs.solver.errors or {}, effort)


def _auto(inputs: StrategyInputs) -> Strategy:
    take, effort = inputs.solver.take, inputs.solver.auto
    # Of whole blocks second order says too little: they are measured alone, and in plans.
    return (
        _by_errors(inputs, effort) if take is None or inputs.space.shapes_blocks else PricedAuto(inputs, take, effort)
    )


STRATEGIES.add("probe", StrategyType(Probe, only_measures=True))
STRATEGIES.add("greedy", StrategyType(lambda i: _beam(i, replace(i.tree, width=1))))
STRATEGIES.add("beam", StrategyType(lambda i: _beam(i, i.tree)))
STRATEGIES.add("lazy_greedy", StrategyType(lambda i: Lazy(i, replace(i.tree, width=1))))
STRATEGIES.add("lazy_beam", StrategyType(lambda i: Lazy(i, i.tree)))
STRATEGIES.add("auto", StrategyType(_auto, needs_errors=True, takes_prices=True))
STRATEGIES.add("fisher", StrategyType(lambda i: Fisher(i, i.solver.take, i.solver.fisher), takes_prices=True))
STRATEGIES.add(
    "squared_gradients", StrategyType(lambda i: SquaredGradients(i, i.solver.take, i.solver.fisher), takes_prices=True)
)
STRATEGIES.add(
    "gradient_changes", StrategyType(lambda i: GradientChanges(i, i.solver.take, i.solver.fisher), takes_prices=True)
)
STRATEGIES.add(
    "sensitivity",
    StrategyType(lambda i: _by_errors(i, replace(i.solver.auto, rounds=0, polish_prompts=0)), needs_errors=True),
)
STRATEGIES.add("knapsack", StrategyType(lambda i: Knapsack(i, i.solver.knapsack)))
STRATEGIES.add("evolution", StrategyType(lambda i: Evolution(i, i.solver.evolution)))
STRATEGIES.add("floating", StrategyType(lambda i: Floating(i, i.solver.floating, i.solver.trains)))
STRATEGIES.add("local", StrategyType(lambda i: Local(i, i.solver.local)))
STRATEGIES.add(
    "spdy",
    StrategyType(lambda i: Spdy(i, i.solver.errors or {}, i.solver.spdy), needs_errors=True),
)
STRATEGIES.add("mc_moe", StrategyType(lambda i: McMoe(i, i.solver.uses, i.solver.mc_moe), needs_uses=True))
# Of studies: `search.options` says what they measure.
STRATEGIES.add("discriminability", StrategyType(lambda i: Discriminability(i, i.options), only_measures=True))
STRATEGIES.add("ladder", StrategyType(lambda i: Ladder(i, i.options), only_measures=True))
STRATEGIES.add("costs", StrategyType(lambda i: Costs(i, i.options), only_measures=True))
STRATEGIES.add("domains", StrategyType(lambda i: Domains(i, i.options), only_measures=True))
STRATEGIES.add("orders", StrategyType(lambda i: Orders(i, i.options), only_measures=True))
