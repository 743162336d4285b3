"""`auto` by prices where these are no guide: two plans are gone on from, side by side."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from fakes import CONTINUATION_TOKENS, FakeEvaluator, Killed, KilledAfter, MemoryLog, run_search, toy_components
from numpy.typing import NDArray
from solving import SMALL, additive, additive_damage, request_for, space_with, take_from

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.prices import PriceKind
from dtmsearch.core.strategy_settings import AutoSettings
from dtmsearch.search.protocols import Strategy
from dtmsearch.search.solver.choices import Choices
from dtmsearch.search.solver.fisher_form import Forces
from dtmsearch.search.strategies.priced import PricedAuto, _Way
from dtmsearch.search.strategies.strategy_registry import StrategyInputs, make_strategy

SPACE = space_with(Budget(bits_per_weight=4.3), toy_components())


def damaged(request: EvalRequest, by: float) -> EvalResult:
    """KL of the additive model, and `by` more where anything is compressed."""
    known = additive(request)
    assert known.kl is not None
    return replace(known, kl=(known.kl + (by if request.plan.entries else 0.0)).astype(np.float32))


def ruined(request: EvalRequest) -> EvalResult:
    """Whatever is compressed, most is lost: plans are alike beside it."""
    return damaged(request, 3.0)


def search_over(slopes: list[Plan], correction_prompts: int = 4_000) -> Strategy:
    own = take_from(SPACE)

    def take(kind: PriceKind, around: Plan, samples: tuple[int, int]) -> NDArray[np.float32]:
        if kind == "slope":
            slopes.append(around)
        return own(kind, around, samples)

    settings = replace(SMALL, take=take, auto=replace(SMALL.auto, rounds=4, correction_prompts=correction_prompts))
    return make_strategy("auto", SPACE, request_for, "kl", continuation_tokens=CONTINUATION_TOKENS, solver=settings)


def test_where_a_uniform_plan_costs_as_much_as_that_of_prices_half_way_is_gone_on_from_too() -> None:
    slopes: list[Plan] = []
    plan = run_search(search_over(slopes), FakeEvaluator(ruined))
    within = [SPACE.budget.reached(SPACE.size(each)) for each in slopes]
    assert within[:2] == [True, False] and all(within[2:])
    assert plan is not None and SPACE.budget.reached(SPACE.size(plan))


@pytest.mark.parametrize("most", [0, 150, 250, 4_000])
def test_two_ways_forward_no_more_prompts_than_rounds_may(most: int) -> None:
    slopes: list[Plan] = []
    taken = list[tuple[int, int]]()

    def noted(request: EvalRequest) -> EvalResult:
        taken.append(request.prompts)
        return ruined(request)

    run_search(search_over(slopes, correction_prompts=most), FakeEvaluator(noted))
    rounds = [(first, end) for first, end in taken if first > 0 and end - first == 2 * SMALL.auto.prompts]
    assert sum(end - first for first, end in rounds) + 4 * 2 * len(slopes) <= most
    assert bool(slopes) == (most > 0)


def test_where_half_way_cannot_be_measured_the_plan_that_leads_is_gone_on_from_alone() -> None:
    def beyond_fails(request: EvalRequest) -> Outcome:
        within = not request.plan.entries or SPACE.budget.reached(SPACE.size(request.plan))
        return ruined(request) if within else EvalFailure(request.id, "nonfinite", "beyond the budget")

    slopes: list[Plan] = []
    plan = run_search(search_over(slopes), FakeEvaluator(beyond_fails))
    assert slopes and all(SPACE.budget.reached(SPACE.size(each)) for each in slopes)
    assert plan is not None and SPACE.budget.reached(SPACE.size(plan))


@pytest.mark.parametrize("by", [0.0, 0.01, 0.9])
def test_where_prices_are_a_guide_or_nothing_is_ruined_one_plan_is_gone_on_from(by: float) -> None:
    slopes: list[Plan] = []
    run_search(search_over(slopes), FakeEvaluator(lambda request: damaged(request, by)))
    assert len(slopes) <= 4
    assert all(SPACE.budget.reached(SPACE.size(each)) for each in slopes)


def test_the_way_that_is_ahead_leads_and_one_that_is_far_behind_is_left() -> None:
    decided = StrategyInputs(SPACE, request_for, "kl", continuation_tokens=CONTINUATION_TOKENS)
    search = PricedAuto(decided, take_from(SPACE), AutoSettings())
    choices, none = Choices(SPACE), Forces((), ())
    plans = [(k,) * len(choices.units) for k in (1, 2, 3, 4)]
    measured = dict(zip(plans, (2.05, 2.4, 2.0, 2.1), strict=True))
    ((each, _), *_) = search._schedule.side_by_side()
    script = search._foremost([_Way(plan, 9.0, none) for plan in plans], each)
    trials = next(script)
    assert Counter(trial.prompts for trial in trials) == {each.plans_on: 4}
    answers = [replace(additive(request_for(t.plan, Plan())), kl=np.full(32, measured[p], np.float32), request_id="")
               for t, p in zip(trials, plans, strict=True)]  # fmt: skip
    with pytest.raises(StopIteration) as ended:
        script.send(answers)
    assert [way.leader for way in ended.value.value] == [plans[2], plans[0], plans[3]]
    assert search.best == choices.plan(plans[2])


def test_a_search_side_by_side_that_is_killed_again_and_again_ends_as_if_it_had_not_been() -> None:
    undisturbed, log = MemoryLog(), MemoryLog()
    expected = run_search(search_over([]), FakeEvaluator(ruined), undisturbed)
    for _ in range(100):
        try:
            plan = run_search(search_over([]), FakeEvaluator(ruined), KilledAfter(log, num_records=7))
            break
        except Killed:
            continue
    assert plan == expected
    assert [r.request.id for r in log.records] == [r.request.id for r in undisturbed.records]
    assert [step.plan_id for step in log.steps] == [step.plan_id for step in undisturbed.steps]


def test_half_of_the_way_to_a_budget_is_its_hardest_part_of_half_the_damage() -> None:
    choices = Choices(space_with(Budget(bits_per_weight=3.0), toy_components()))
    damages = [
        np.array([additive_damage(choices.plan([0] * u + [k] + [0] * (len(choices.units) - u - 1))) for k in range(6)])
        for u in range(len(choices.units))
    ]
    whole = choices.solve(damages)
    half = choices.on_the_way(damages, 0.5)
    damage, bits = choices.plan(half), choices.cost(choices.bits, half)
    assert 0.4 * whole.loss < additive_damage(damage) <= 0.5 * whole.loss
    assert bits > choices.cost(choices.bits, whole.options) and not choices.meets(half)
    assert choices.within(damages, bits).loss == pytest.approx(additive_damage(damage))  # none of its size is better
