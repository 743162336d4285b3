from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from fakes import (
    NUM_PROMPTS,
    FakeEvaluator,
    Killed,
    KilledAfter,
    MemoryLog,
    chance,
    failing,
    run_search,
    toy_components,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from solving import (
    BY_PRICES,
    LEVELS,
    SMALL,
    STRATEGIES,
    additive,
    additive_damage,
    alpha,
    equal_components,
    errors_of,
    request_for,
    space_with,
    strategy,
)

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Budget, Plan, PlanSize
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.strategy_settings import AutoSettings, LocalSettings
from dtmsearch.errors import SearchFailed
from dtmsearch.search.loop import search
from dtmsearch.search.min_fdt import ladder_of
from dtmsearch.search.protocols import Progress, Silent, Strategy
from dtmsearch.search.solver.choices import Choices
from dtmsearch.search.solver.neighbours import promising
from dtmsearch.search.solver.posterior import Posterior, Spread
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.solver_based import _settled
from dtmsearch.search.strategies.strategy_registry import SolverSettings, make_strategy

BUDGET = Budget(bits_per_weight=4.5)


def found(name: str, budget: Budget = BUDGET, evaluator: FakeEvaluator | None = None, **changes: object) -> Plan:
    plan = run_search(strategy(name, space_with(budget), **changes), evaluator or FakeEvaluator(additive))
    assert plan is not None
    return plan


@functools.cache
def all_plans() -> list[tuple[Plan, PlanSize, float]]:
    """Every plan there is, with its size and its mean FDT."""
    space = space_with(Budget())
    plans = (
        Plan.of({c.name: s for c, s in zip(space.components, schemes, strict=True)})
        for schemes in product(("dense", *LEVELS), repeat=len(space.components))
    )
    return [(plan, space.size(plan), fdt_of(plan)) for plan in plans]


@functools.cache
def best_by_trying(budget: Budget) -> Plan:
    return min((plan for plan, size, _ in all_plans() if budget.reached(size)), key=additive_damage)


@pytest.mark.parametrize("name", ["knapsack", *BY_PRICES, "sensitivity", "auto", "auto by prices"])
@pytest.mark.parametrize("budget", [BUDGET, Budget(size_mb=0.00831), Budget(share=0.6), Budget(components=4)])
def test_where_damages_add_up_the_plan_is_the_best_there_is(name: str, budget: Budget) -> None:
    assert additive_damage(found(name, budget)) == pytest.approx(additive_damage(best_by_trying(budget)))


def test_a_local_search_to_its_end_finds_the_best_plan_of_units_alike() -> None:
    everything = LocalSettings(rounds=10_000, children=40, prompts=8)
    plan = run_search(strategy("local", space_with(BUDGET), local=everything), FakeEvaluator(additive))
    assert plan is not None
    assert additive_damage(plan) == pytest.approx(additive_damage(best_by_trying(BUDGET)))


def test_correction_goes_on_while_much_is_in_doubt() -> None:
    def uneven(request: EvalRequest) -> EvalResult:
        """The same damages on average, but every prompt minds other components."""
        kl = [
            sum(
                alpha(c) * 4.0 ** (1 - parse_scheme(s).bits) * 2.0 * chance("minds", prompt, c)
                for c, s in request.plan.entries
            )
            for prompt in range(*request.prompts)
        ]
        return replace(additive(request), kl=np.array(kl, np.float32))

    def rounds(answer: Callable[[EvalRequest], EvalResult]) -> int:
        log = MemoryLog()
        effort = AutoSettings(probe_prompts=2, rounds=12, prompts=2, plans=6, polish_prompts=0)
        run_search(strategy("auto", space_with(BUDGET, equal_components(16)), auto=effort), FakeEvaluator(answer), log)
        # A plan that leads is decided on once a round, and once more at the end.
        return len(log.steps) - 1

    assert rounds(additive) < rounds(uneven)


def test_correction_forwards_no_more_prompts_than_it_may() -> None:
    def forwarded(corrected: int, polished: int) -> int:
        asked: list[EvalRequest] = []

        def answer(request: EvalRequest) -> EvalResult:
            asked.append(request)
            return additive(request)

        effort = AutoSettings(2, rounds=5, prompts=2, plans=3, correction_prompts=corrected, polish_prompts=polished)
        run_search(strategy("auto", space_with(BUDGET, equal_components(16)), auto=effort), FakeEvaluator(answer))
        return sum(end - first for first, end in (request.prompts for request in asked))

    none = forwarded(0, 0)
    # Up to three plans more are compared in the end.
    assert 0 < forwarded(40, 0) - none <= 40 + 3 * NUM_PROMPTS
    assert 0 < forwarded(0, 400) - none <= 400 + 3 * NUM_PROMPTS


def test_the_most_promising_switches_are_those_of_least_mean_less_deviation() -> None:
    choices = Choices(space_with(BUDGET))
    random = np.random.default_rng(3)
    damages = [np.array([0.0, *np.sort(random.random(len(LEVELS)))[::-1]]) for _ in choices.units]
    errors = [np.array([0.0, *(4.0**-bits for bits in range(2, 7))])] * len(damages)
    names = [["dense", *["int"] * len(LEVELS)]] * len(damages)
    posterior = Posterior.of(damages, errors, names, Spread(0.3, 0.2, 0.1, 0.1))
    leader = choices.solve([damage[::-1] for damage in damages]).options
    options = product(*(range(len(schemes)) for schemes in choices.schemes))
    near = [o for o in options if 0 < sum(a != b for a, b in zip(o, leader, strict=True)) <= 2 and choices.meets(o)]
    believed = posterior.differences(near, leader)
    order = np.argsort(believed.means - np.sqrt(believed.variances))
    assert promising(choices, posterior, leader, {leader}, 5) == [near[at] for at in order[:5]]
    assert promising(choices, posterior, leader, {leader, near[order[0]]}, 1) == [near[order[1]]]


def test_switches_find_what_sums_over_units_do_not_see() -> None:
    """Two neighbours under few bits each are far worse together than each alone."""

    def together(plan: Plan) -> float:
        bits = [parse_scheme(plan.scheme_of(c.name)).bits or 8 for c in equal_components(16)]
        return 0.05 * sum(a <= 3 and b <= 3 for a, b in pairwise(bits))

    def answer(request: EvalRequest) -> EvalResult:
        found = additive(request)
        return replace(found, kl=None if found.kl is None else (found.kl + together(request.plan)).astype(np.float32))

    def loss(polish_prompts: int) -> float:
        effort = AutoSettings(probe_prompts=2, rounds=1, prompts=2, plans=3, polish_prompts=polish_prompts)
        space = space_with(Budget(bits_per_weight=3.5), equal_components(16))
        plan = run_search(strategy("auto", space, auto=effort), FakeEvaluator(answer))
        assert plan is not None
        return additive_damage(plan) + together(plan)

    assert loss(polish_prompts=2_000) < 0.9 * loss(polish_prompts=0)


@pytest.mark.parametrize("name", ["spdy", "evolution"])
def test_searching_is_better_than_uniform(name: str) -> None:
    budget = Budget(bits_per_weight=space_with(BUDGET).size(space_with(BUDGET).uniform("int3-channel")).bits_per_weight)
    plan = found(name, budget)
    assert additive_damage(plan) < additive_damage(space_with(budget).uniform("int3-channel"))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("order", ["as asked", "backwards"])
def test_the_order_of_answers_changes_nothing(name: str, order: str) -> None:
    def turned(waiting: list[EvalRequest]) -> list[EvalRequest]:
        return waiting[::-1] if order == "backwards" else sorted(waiting, key=lambda request: request.id)

    logs = MemoryLog(), MemoryLog()
    run_search(strategy(name, space_with(BUDGET, toy_components())), log=logs[0])
    run_search(strategy(name, space_with(BUDGET, toy_components())), FakeEvaluator(order=turned, per_poll=3), logs[1])
    assert [step.plan_id for step in logs[1].steps] == [step.plan_id for step in logs[0].steps] != []


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_killed_again_and_again_ends_as_if_it_had_not_been(name: str) -> None:
    undisturbed, log = MemoryLog(), MemoryLog()
    expected = run_search(strategy(name, space_with(BUDGET, toy_components())), log=undisturbed)
    evaluated: list[str] = []
    while True:
        evaluator = FakeEvaluator(per_poll=1)
        try:
            plan = run_search(
                strategy(name, space_with(BUDGET, toy_components())), evaluator, KilledAfter(log, num_records=7)
            )
            break
        except Killed:
            evaluated += evaluator.evaluated
    ids = [record.request.id for record in log.records]
    assert plan == expected
    assert (len(ids), sorted(ids)) == (len(set(ids)), sorted(r.request.id for r in undisturbed.records))


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_the_budget_is_never_exceeded(name: str, data: st.DataObject) -> None:
    rule, low, high = data.draw(
        st.sampled_from([("bits_per_weight", 2.6, 15.0), ("size_mb", 0.0064, 0.04), ("share", 0.05, 1.0)])
    )
    budget = Budget(**{rule: data.draw(st.floats(low, high))})
    tied = data.draw(st.sampled_from([(), (("q", "k"),)]))
    space = space_with(budget, toy_components(), tied=tied)
    searched = strategy(name, space)
    plan = run_search(searched)
    leaders = [decision.plan for decision in searched.decisions]
    assert plan is not None
    assert all(budget.reached(space.size(each)) for each in (plan, *leaders))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_that_may_take_no_time_has_a_plan_within_the_budget(name: str) -> None:
    space = space_with(BUDGET)
    plan = run_search(strategy(name, space), FakeEvaluator(additive), limit_seconds=0.0)
    assert plan is not None and BUDGET.reached(space.size(plan))


@pytest.mark.parametrize("name", STRATEGIES)
def test_tied_components_share_a_scheme(name: str) -> None:
    plan = run_search(strategy(name, space_with(BUDGET, toy_components(), tied=(("q", "k"),))))
    assert plan is not None
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        assert plan.scheme_of(f"{attention}.q_proj") == plan.scheme_of(f"{attention}.k_proj")


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_cannot_be_measured_is_not_chosen(name: str) -> None:
    def answer(request: EvalRequest) -> Outcome:
        if request.plan.scheme_of("model.layers.0.mlp.up_proj") == "int2-channel":
            return EvalFailure(request.id, "nonfinite", "two bits are too few here")
        return additive(request)

    budget = Budget(bits_per_weight=3.5)
    plan = found(name, budget, FakeEvaluator(answer))
    assert plan.scheme_of("model.layers.0.mlp.up_proj") != "int2-channel"


def test_a_search_of_which_nothing_can_be_measured_says_so() -> None:
    with pytest.raises(SearchFailed, match="without what cannot be measured"):
        run_search(strategy("auto", space_with(BUDGET)), FakeEvaluator(failing({"layers": "nonfinite"})))


@pytest.mark.parametrize("name", ["auto", "auto by prices"])
def test_who_watches_sees_the_stage_and_the_best_plan_beside_the_best_uniform_one(name: str) -> None:
    class Watching(Silent):
        def __init__(self) -> None:
            self.progress: list[Progress] = []

        def on_progress(self, progress: Progress) -> None:
            self.progress.append(progress)

    # By budget int4 everywhere is the rival; every prompt of the fake answers alike.
    space, watching = space_with(Budget(bits_per_weight=4.6)), Watching()
    plan = search(strategy(name, space), FakeEvaluator(additive), MemoryLog(), watching)
    assert plan is not None
    stages = {each.stage for each in watching.progress}
    # Where damages add up, prices hold, and there is nothing to correct.
    assert stages >= {"last comparison", "first plan by prices" if name == "auto by prices" else "round 1 of at most 2"}
    against = watching.progress[-1].against_uniform
    assert against is not None and against.metric == "kl" and against.scheme == "int4-channel"
    uniform = space.uniform("int4-channel")
    assert (against.plan, against.uniform) == pytest.approx([kl_of(plan), kl_of(uniform)])


def kl_of(plan: Plan) -> float:
    outcome = additive(replace(request_for(plan, Plan()), extra_metrics=("kl",)))
    assert outcome.kl is not None
    return float(outcome.kl.mean())


def test_uniform_is_the_answer_where_nothing_is_better() -> None:
    space = space_with(Budget(bits_per_weight=4.25), equal_components(1))
    plan = run_search(strategy("auto", space), FakeEvaluator(additive))
    assert plan == space.uniform("int4-channel")


def test_errors_that_are_missing_are_named() -> None:
    space = space_with(BUDGET)
    errors = errors_of(space)
    del errors["model.layers.3.mlp.up_proj", "int5-channel"]
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.up_proj under int5-channel"):
        make_strategy("auto", space, request_for, solver=type(SMALL)(errors=errors))


def test_a_capacity_is_what_the_budget_compares_with() -> None:
    space = space_with(Budget(bits_per_weight=0.1 + 4.2))
    (rule,) = Choices(space).rules
    num_weights = sum(c.num_weights for c in space.components)
    assert rule.capacity / num_weights <= 0.1 + 4.2 < (rule.capacity + 1) / num_weights


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_search_will_ask_for_is_foreseen_within_a_factor_of_three(name: str) -> None:
    searched, log = strategy(name, space_with(BUDGET, toy_components())), MemoryLog()
    searched.ask()
    expected = searched.expected_evaluations()
    run_search(strategy(name, space_with(BUDGET, toy_components())), log=log)
    assert expected is not None
    assert expected / 3 <= len(log.records) <= 3 * expected


def fdt_of(plan: Plan) -> float:
    return float(additive(request_for(plan, Plan())).fdt.mean())


@pytest.mark.parametrize("min_fdt", [60.0, 80.0, 95.0])
def test_the_smallest_plan_that_keeps_an_fdt_is_found(min_fdt: float) -> None:
    space = space_with(Budget())
    plan = run_search(minimal(space, min_fdt), FakeEvaluator(additive))
    assert plan is not None
    least = min(size.stored_bits for _, size, fdt in all_plans() if fdt >= min_fdt)
    assert fdt_of(plan) >= min_fdt
    assert space.size(plan).stored_bits <= 1.06 * least


def test_plans_above_the_smallest_are_larger_and_larger() -> None:
    space = space_with(Budget())
    auto = minimal(space, 60.0)
    best = run_search(auto, FakeEvaluator(additive))
    ladder = ladder_of(auto)
    sizes = [space.size(plan).stored_bits for plan in ladder]
    assert (ladder[-1], sizes) == (best, sorted(sizes, reverse=True))
    assert sizes[0] > 1.5 * sizes[-1]


def test_a_budget_ends_the_search_for_a_smaller_plan() -> None:
    space = space_with(Budget(bits_per_weight=6.0))
    plan = run_search(minimal(space, 20.0), FakeEvaluator(additive))
    assert plan is not None
    assert space.size(plan).bits_per_weight == pytest.approx(6.0, abs=0.5)


def minimal(space: SearchSpace, min_fdt: float) -> Strategy:
    settings = SolverSettings(errors=errors_of(space))
    return make_strategy("auto", space, request_for, "kl", min_fdt=min_fdt, continuation_tokens=100, solver=settings)


def test_a_local_search_ends_only_when_no_switch_is_better_on_all_prompts() -> None:
    """The first prompts speak against every swap that is better on all of them."""

    def misleading(request: EvalRequest) -> EvalResult:
        found = additive(request)
        return replace(found, kl=np.where(np.arange(*request.prompts) < 2, -found.kl, 9 * found.kl).astype(np.float32))

    searching = LocalSettings(rounds=10_000, children=40, prompts=2)
    plan = run_search(strategy("local", space_with(BUDGET), local=searching), FakeEvaluator(misleading))
    assert plan is not None
    assert additive_damage(plan) == pytest.approx(additive_damage(best_by_trying(BUDGET)))


def test_one_prompt_tells_no_plans_apart() -> None:
    assert not _settled(np.array([3.0]), np.array([1.0]))
