"""The sparsity search on a toy model, whose damage is a formula of each component's pruned share."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from fakes import CONTINUATION_TOKENS, FakeEvaluator, MemoryLog, chance, request_for, run_search, toy_components
from hypothesis import given
from hypothesis import settings as settings_of_test
from hypothesis import strategies as st

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Plan
from dtmsearch.errors import SearchFailed
from dtmsearch.search.protocols import TrainRequest
from dtmsearch.search.solver.allocation import gaussian_pruning_error
from dtmsearch.search.solver.pruned_units import fitted_schemes, scheme_name, share_of, units_of
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.sparsity import Sparsity, SparsitySettings
from dtmsearch.search.strategies.task import Task

SPACE = SearchSpace(toy_components(4), ("magnitude-0.5",))
TASK = Task(SPACE, request_for, continuation_tokens=100)
TOTAL = sum(component.num_weights for component in SPACE.components)


def sensitivity(component: str) -> float:
    return 10 ** (3 * chance(component) - 2)


def answer(request: EvalRequest) -> EvalResult:
    """Damage adds up; training halves it."""
    harm = sum(sensitivity(c) * gaussian_pruning_error(share_of(s)) for c, s in request.plan.entries)
    harm *= 0.5 if request.weights_id else 1.0
    prompts = np.arange(*request.prompts)
    spread = np.array([0.5 + chance("prompt", int(p)) for p in prompts])
    fdt = np.floor(CONTINUATION_TOKENS * np.exp(-3 * harm * spread)).astype(np.int32)
    kl = (harm * spread).astype(np.float32)
    return EvalResult(request.id, fdt, (CONTINUATION_TOKENS - fdt) // 2, np.exp(kl), kl, np.exp(kl))


def settings(allocate: str = "sensitivity", *rounds: float, **changes: object) -> SparsitySettings:
    return SparsitySettings(rounds=rounds or (30.0,), allocate=allocate, **changes)  # type: ignore[arg-type]


def searched(strategy: Sparsity, log: MemoryLog | None = None, calls: list[tuple[int, str, str]] | None = None) -> Plan:
    plan = run_search(strategy, FakeEvaluator(answer), log, trainer=trainer([] if calls is None else calls))
    assert plan is not None
    return plan


def harm(plan: Plan) -> float:
    return sum(sensitivity(c) * gaussian_pruning_error(share_of(s)) for c, s in plan.entries)


ALLOCATIONS = ["sensitivity", "knapsack", "fdt75", "fdt_mean", "sdt", "kl", "uniform"]


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize("prune", ["magnitude", "wanda"])
def test_every_round_meets_its_target_within_one_weight_row(allocate: str, prune: str) -> None:
    strategy = Sparsity(TASK, settings(allocate, 20.0, 15.0, prune=prune))
    searched(strategy)
    short = [
        target * TOTAL - decision.size.pruned_weights
        for target, decision in zip((0.2, 0.35), strategy.decisions, strict=True)
    ]
    # Uniform gives every component the same share, each rounded as its scheme rounds.
    slack = 96 if allocate != "uniform" else TOTAL / 100
    assert all(-slack * (allocate == "uniform") - 1e-6 <= missing <= slack for missing in short)


@pytest.mark.parametrize("allocate", ["sensitivity", "knapsack", "fdt_mean", "kl"])
def test_what_is_measured_beats_the_uniform_plan(allocate: str) -> None:
    assert harm(searched(Sparsity(TASK, settings(allocate)))) < harm(SPACE.uniform("magnitude-0.3"))


def test_a_round_asks_two_probes_of_every_component_then_its_plan() -> None:
    log = MemoryLog()
    searched(Sparsity(TASK, settings("fdt75", 20.0)), log)
    assert [len(record.request.plan) for record in log.records[:-1]] == [1] * 24 and len(log.records) == 25


def test_a_round_that_adds_much_is_probed_again_over_the_plan_of_its_first_part() -> None:
    log = MemoryLog()
    strategy = Sparsity(TASK, settings("sensitivity", 50.0))
    plan = searched(strategy, log)
    halfway = log.records[24].request.plan
    assert [len(record.request.plan) for record in log.records] == [1] * 24 + [12] * 26
    assert all(len(record.request.plan.diff(halfway)) <= 1 for record in log.records[24:49])
    assert [round(SPACE.size(p).sparsity, 2) for p in (halfway, plan)] == [0.25, 0.5]
    assert [decision.plan for decision in strategy.decisions] == [plan]


@pytest.mark.parametrize(("points", "probings"), [(25.0, 1), (25.1, 2), (50.0, 2), (75.0, 3)])
def test_stages_add_no_more_than_their_points(points: float, probings: int) -> None:
    stages = settings("sensitivity", points)
    assert (stages.stages(0), settings("fdt75", points).stages(0)) == (probings, 1)
    assert stages.stage_target(0, probings - 1) == points / 100


def test_as_many_evaluations_are_asked_as_were_expected() -> None:
    log = MemoryLog()
    strategy = Sparsity(TASK, settings("sensitivity", 40.0, 10.0, trains=True))
    expected = strategy.expected_evaluations()
    searched(strategy, log)
    assert len(log.records) == expected


def test_the_published_probes_add_half_and_one_and_a_half_of_the_target() -> None:
    asks = Sparsity(TASK, settings("fdt75", 20.0)).ask()
    assert [ask.perturbation and ask.perturbation.scheme for ask in asks[:2]] == ["magnitude-0.1", "magnitude-0.3"]


def test_shares_never_fall_from_round_to_round() -> None:
    strategy = Sparsity(TASK, settings("fdt_mean", 20.0, 20.0, 20.0))
    searched(strategy)
    shares = [[share_of(d.plan.scheme_of(c.name)) for c in SPACE.components] for d in strategy.decisions]
    assert all(b >= a - 1e-5 for before, after in pairwise(shares) for a, b in zip(before, after, strict=True))


def test_a_cap_holds() -> None:
    plan = searched(Sparsity(TASK, settings("sensitivity", 50.0, cap=0.6)))
    assert max(share_of(scheme) for _, scheme in plan.entries) <= 0.6


def test_without_a_cap_a_component_may_vanish() -> None:
    assert "drop" in searched(Sparsity(TASK, settings("sensitivity", 90.0))).schemes.values()


def test_a_plateau_is_said() -> None:
    def robust(request: EvalRequest) -> EvalResult:
        result = answer(request)
        return EvalResult(request.id, np.full_like(result.fdt, 100), result.sdt, result.dppl, result.kl)

    strategy = Sparsity(TASK, settings("fdt75", 20.0))
    run_search(strategy, FakeEvaluator(robust))
    assert "the published allocation would have pruned 10.0% of the weights beyond it" in strategy.remarks[0]


def test_uniform_probes_nothing() -> None:
    log = MemoryLog()
    assert searched(Sparsity(TASK, settings("uniform", 30.0)), log) == SPACE.uniform("magnitude-0.3")
    assert len(log.records) == 1


def test_owl_spares_layers_with_outliers() -> None:
    outliers = {0: 0.3, 1: 0.1, 2: 0.1, 3: 0.0}
    plan = searched(Sparsity(TASK, settings("owl", 50.0), outliers=outliers))
    by_layer = [share_of(plan.scheme_of(f"model.layers.{layer}.mlp.up_proj")) for layer in range(4)]
    assert by_layer[0] < by_layer[1] == by_layer[2] < by_layer[3]


def test_tied_components_get_one_share() -> None:
    space = SearchSpace(toy_components(3), ("magnitude-0.5",), tied=(("q", "k"),))
    plan = searched(Sparsity(replace(TASK, space=space), settings("fdt_mean", 30.0)))
    shares = [[plan.scheme_of(f"model.layers.{n}.self_attn.{k}_proj") for k in "qk"] for n in range(3)]
    assert all(q == k for q, k in shares)


def trainer(calls: list[tuple[int, str, str]]):
    def train(request: TrainRequest) -> str:
        calls.append((request.number, request.plan.id, request.weights_id))
        return f"trained-{request.number}"

    return train


def test_each_round_trains_on_from_the_weights_of_the_round_before() -> None:
    calls: list[tuple[int, str, str]] = []
    searched(Sparsity(TASK, settings("fdt_mean", 20.0, 10.0, trains=True)), calls=calls)
    assert [(number, weights) for number, _, weights in calls] == [(0, ""), (1, "trained-0")]


def test_a_training_is_asked_for_once_the_pruned_model_is_decided_and_nothing_else_meanwhile() -> None:
    strategy = Sparsity(TASK, settings("uniform", 20.0, trains=True))
    [ask] = strategy.ask()
    assert strategy.training() is None
    strategy.tell(ask.request.id, answer(ask.request))
    [decision] = strategy.decisions
    assert (strategy.training(), strategy.ask()) == (TrainRequest(0, decision.plan, ""), [])
    strategy.tell_trained("trained")
    assert [ask.request.weights_id for ask in strategy.ask()] == ["trained"]


def test_the_pruned_model_is_recorded_before_it_is_trained() -> None:
    log, recorded = MemoryLog(), []

    def train(request: TrainRequest) -> str:
        recorded.append(len(log.steps))
        return "trained"

    run_search(
        Sparsity(TASK, settings("uniform", 20.0, 10.0, trains=True)),
        FakeEvaluator(answer),
        log,
        trainer=train,
    )
    assert recorded == [1, 3]


def test_probes_after_training_are_of_the_trained_weights() -> None:
    log = MemoryLog()
    searched(Sparsity(TASK, settings("fdt_mean", 20.0, 10.0, trains=True)), log)
    assert [record.request.weights_id for record in log.records[24:27]] == ["", "trained-0", "trained-0"]


def test_the_pruned_and_the_trained_model_of_a_round_are_both_decisions() -> None:
    strategy = Sparsity(TASK, settings("uniform", 20.0, 10.0, trains=True))
    searched(strategy)
    first, second, third, fourth = strategy.decisions
    assert first.plan == second.plan != third.plan == fourth.plan and second.score > first.score


def test_weights_count_in_the_identity_of_an_evaluation_and_none_do_not() -> None:
    request = request_for(Plan(), Plan())
    trained = EvalRequest(request.plan, request.reference_id, request.prompts, request.extra_metrics, weights_id="w")
    assert trained.id != request.id


@pytest.mark.parametrize("stop_after", [1, 24, 25, 26, 49, 50, 51, 60, 77])
def test_a_search_that_is_killed_anywhere_goes_on_where_it_was(stop_after: int) -> None:
    whole = MemoryLog()
    make = lambda: Sparsity(TASK, settings("sensitivity", 40.0, 10.0, trains=True))  # noqa: E731
    plan = searched(make(), whole)
    cut = MemoryLog()
    cut.records = list(whole.records[:stop_after])
    evaluator = FakeEvaluator(answer)
    assert run_search(make(), evaluator, cut, trainer=trainer([])) == plan
    assert len(evaluator.evaluated) == len(whole.records) - stop_after


@settings_of_test(max_examples=5)
@given(st.randoms(use_true_random=False))
def test_the_order_of_answers_changes_nothing(random) -> None:
    def shuffled(waiting: list[EvalRequest]) -> list[EvalRequest]:
        random.shuffle(waiting)
        return waiting

    strategy = Sparsity(TASK, settings("sensitivity", 20.0, 10.0))
    plan = run_search(strategy, FakeEvaluator(answer, shuffled))
    assert plan == searched(Sparsity(TASK, settings("sensitivity", 20.0, 10.0)))


def test_a_component_that_cannot_be_probed_is_left_alone() -> None:
    def fails(request: EvalRequest) -> Outcome:
        broken = len(request.plan) == 1 and "0.mlp" in request.plan.entries[0][0]
        return EvalFailure(request.id, "nonfinite", "it broke") if broken else answer(request)

    plan = run_search(Sparsity(TASK, settings("sensitivity", 20.0)), FakeEvaluator(fails))
    assert plan is not None and plan.scheme_of("model.layers.0.mlp.up_proj") == "dense"


def test_a_plan_that_cannot_be_measured_ends_the_search() -> None:
    def fails(request: EvalRequest) -> Outcome:
        return answer(request) if len(request.plan) == 1 else EvalFailure(request.id, "nonfinite", "it broke")

    with pytest.raises(SearchFailed, match="the model of round 1 cannot be measured: it broke"):
        run_search(Sparsity(TASK, settings("sensitivity", 20.0)), FakeEvaluator(fails))


@pytest.mark.parametrize(("share", "name"), [(0.0, "dense"), (0.5, "magnitude-0.5"), (1.0, "drop")])
def test_shares_have_one_name(share: float, name: str) -> None:
    assert (scheme_name("magnitude", share), share_of(name)) == (name, share)


@given(st.lists(st.floats(0, 1), min_size=12, max_size=12), st.sampled_from(["magnitude", "wanda", "sparsegpt"]))
def test_fitted_schemes_stay_below_the_wanted_number_by_less_than_a_step(shares: list[float], prune: str) -> None:
    units = units_of(SPACE)
    wanted = int(sum(share * unit.num_weights for share, unit in zip(shares, units, strict=True)))
    schemes = fitted_schemes(shares, units, prune, wanted)
    pruned = sum(unit.pruned(scheme) for unit, scheme in zip(units, schemes, strict=True))
    assert 0 <= wanted - pruned <= max(max(component.shape) for component in SPACE.components)


def test_a_scheme_of_a_unit_counts_all_its_components() -> None:
    pair = Component("a", 0, "a", (4, 4)), Component("b", 0, "b", (2, 4))
    space = SearchSpace(pair, ("magnitude-0.5",), tied=(("a", "b"),))
    assert units_of(space)[0].pruned("magnitude-0.5") == 12


@pytest.mark.parametrize("allocate", ["uniform", "sensitivity", "fdt75"])
def test_no_request_is_asked_twice(allocate: str) -> None:
    """The second round adds less than a weight of any component: its plan is that of the first."""
    asked = FakeEvaluator(answer)
    run_search(Sparsity(TASK, settings(allocate, 30.0, 1e-3)), asked)
    assert len(asked.evaluated) == len(set(asked.evaluated))


def test_a_round_whose_plan_is_known_is_decided_all_the_same() -> None:
    strategy = Sparsity(TASK, settings("uniform", 30.0, 1e-7))
    searched(strategy)
    assert [decision.plan.id for decision in strategy.decisions] == [strategy.decisions[0].plan.id] * 2
