"""Exchanges of dropped blocks for others: which are proposed, and what a search gains by them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Budget, Perturbation, Plan
from dtmsearch.core.schemes import DENSE, DROP
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.exchanges import Step, exchanges
from dtmsearch.search.strategies.floating import Floating
from dtmsearch.search.strategies.task import Task

LAYERS = 6
# An attention is a third of an MLP in size, as in many models.
WEIGHTS = {"self_attn": 64, "mlp": 192}
PARTS = [(layer, part) for layer in range(LAYERS) for part in WEIGHTS]
BLOCKS = tuple(
    Component(f"model.layers.{layer}.{part}", layer, "attention" if part == "self_attn" else part, (1, WEIGHTS[part]))
    for layer, part in PARTS
)
MATRICES = tuple(
    Component(f"model.layers.{layer}.{part}.w", layer, "up", (8, WEIGHTS[part] // 8)) for layer, part in PARTS
)


def dropping(*names: str) -> Plan:
    return Plan.of(dict.fromkeys(names, DROP))


def back(name: str, progress: float, added: float) -> Step:
    return Step(Perturbation(name, DENSE), -progress, added)


def forward(name: str, progress: float, added: float) -> Step:
    return Step(Perturbation(name, DROP), progress, added)


def test_several_small_blocks_are_exchanged_for_a_large_one_and_a_large_one_for_several() -> None:
    small = {"a": 1.0, "b": 0.5, "c": 0.7}
    taken = [back(name, 1 / 3, added) for name, added in small.items()]
    found = exchanges(dropping(*small), 0.0, taken, [forward("m", 1.0, 2.0)])
    assert found[0].plan == dropping("m") and found[0].between == Plan()
    ahead = [forward(name, 1 / 3, added) for name, added in small.items()]
    found = exchanges(dropping("m"), 0.0, [back("m", 1.0, 2.5)], ahead)
    assert [each.plan for each in found] == [dropping("a", "b", "c")]
    assert {edge.component for edge in found[0].forward} == set(small) and found[0].between == Plan()


def test_those_come_first_of_which_least_loss_is_believed_and_unknown_ones_last() -> None:
    taken = [back("a", 1.0, 1.0), back("b", 1.0, 3.0)]
    ahead = [forward("c", 1.0, 2.0), forward("d", 1.0, math.inf), forward("e", 1.0, 0.5)]
    found = [each.plan for each in exchanges(dropping("a", "b"), 0.0, taken, ahead)]
    assert found[:3] == [dropping("a", "e"), dropping("a", "c"), dropping("b", "e")]
    assert set(found[-2:]) == {dropping("a", "d"), dropping("b", "d")}


def test_no_more_progress_is_given_up_than_there_is_to_spare() -> None:
    taken = [back("a", 0.5, 1.0), back("b", 0.5, 1.0)]
    ahead = [forward("c", 0.3, 0.1)]
    assert exchanges(dropping("a", "b"), 0.0, taken, ahead) == []
    assert {each.plan for each in exchanges(dropping("a", "b"), 0.2, taken, ahead)} == {
        dropping("a", "c"),
        dropping("b", "c"),
    }


def landscape(seed: int) -> Callable[[Plan], float]:
    """Losses of what is dropped: what each block adds alone, and what those near each other add together, more or
    less."""
    chance = np.random.default_rng(seed)
    count = len(BLOCKS)
    alone = (0.3 + chance.exponential(1.0, count)) * np.tile([1.0, 2.5], LAYERS)
    apart = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    pairs: NDArray[np.float64] = np.triu(chance.normal(0.0, 0.7, (count, count)) * np.exp(-apart / 3), 1)

    def loss(plan: Plan) -> float:
        dropped = np.array([block.name in plan.dropped for block in BLOCKS], float)
        return max(0.01, float(alone @ dropped + dropped @ pairs @ dropped))

    return loss


def searched(loss: Callable[[Plan], float], rank_by: str = "kl", patience: int = 2) -> tuple[Plan, int]:
    """The plan that is found, and how many were measured; a loss of NaN is a plan that cannot be. By FDT all plans are
    alike."""

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "r", (0, 4), ("kl",), parent)

    def answered(request: EvalRequest) -> Outcome:
        found, fdt = np.full(4, loss(request.plan), np.float32), np.full(4, 50, np.int32)
        if np.isnan(found[0]):
            return EvalFailure(request.id, "invalid", "no such plan")
        return EvalResult(request.id, fdt, fdt, np.exp(found), kl=found, ppl=np.exp(found))

    budget = Budget(parameters=0.7)
    space = SearchSpace(MATRICES, (), budget=budget, blocks=BLOCKS)
    strategy = Floating(Task(space, request_for, rank_by), FloatingSettings(prompts=4, patience=patience))
    asked = 0
    while not strategy.done:
        for ask in strategy.ask():
            asked += 1
            strategy.tell(ask.request.id, answered(ask.request))
    assert strategy.best is not None and budget.reached(space.size(strategy.best))
    return strategy.best, asked


def test_exchanges_lead_to_better_plans() -> None:
    losses = [landscape(seed) for seed in range(20)]

    def found(patience: int) -> tuple[NDArray[np.float64], int]:
        plans, asked = zip(*(searched(loss, patience=patience) for loss in losses), strict=True)
        return np.array([loss(plan) for loss, plan in zip(losses, plans, strict=True)]), sum(asked)

    (exchanged, asked), (kept, asked_without) = found(2), found(0)
    assert (exchanged <= kept).all() and (exchanged < kept).sum() >= 5
    assert asked_without < asked <= 2 * asked_without


def test_where_all_plans_are_alike_exchanges_end() -> None:
    _, asked = searched(landscape(0), "fdt")
    assert asked <= 80


def test_plans_that_cannot_be_measured_are_passed_over() -> None:
    loss = landscape(1)
    whole, _ = searched(loss)
    bad = min(whole.dropped)
    plan, asked = searched(lambda plan: math.nan if bad in plan.dropped and len(plan.dropped) > 1 else loss(plan))
    assert bad not in plan.dropped and asked <= 80
