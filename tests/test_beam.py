from __future__ import annotations

import pytest
from fakes import (
    CONTINUATION_TOKENS,
    FakeEvaluator,
    MemoryLog,
    evaluate,
    failing,
    request_for,
    run_search,
    toy_components,
)
from golden_trees import CASES, FOLDER, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, Outcome
from dtmsearch.core.metric_registry import BUILT_IN
from dtmsearch.core.metrics import rank_key, summarize
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import SearchFailed
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task


def literal_beam(space: SearchSpace, metric: str, width: int) -> list[Plan]:
    """The leaders of a beam search, written as the paper tells it."""
    kept, leaders = [Plan()], []
    while not (leaders and space.budget.reached(space.size(leaders[-1]))):
        children = [plan.with_(edge) for plan in kept for edge in space.perturbations(plan)]
        distinct = list({plan.id: plan for plan in reversed(children)}.values())[::-1]
        if not distinct:
            break
        scores = {plan.id: rank_key(summarize(evaluate(request_for(plan, Plan()))), metric) for plan in distinct}
        kept = sorted(distinct, key=lambda plan: (scores[plan.id], children.index(plan)))[:width]
        leaders.append(kept[0])
    return leaders


@pytest.mark.parametrize("name", CASES)
def test_the_tree_is_the_recorded_one(name: str) -> None:
    assert tree(name) == (FOLDER / f"{name}.json").read_text()


@settings(max_examples=40)
@given(
    metric=st.sampled_from(sorted(BUILT_IN)),
    width=st.integers(1, 5),
    schemes=st.lists(st.sampled_from(["int8-channel", "int4-g32", "nf4"]), min_size=1, max_size=2, unique=True),
    tied=st.sampled_from([(), (("q", "k"),)]),
    budget=st.sampled_from([Budget(), Budget(share=0.5), Budget(components=3), Budget(bits_per_weight=10.0)]),
)
def test_the_leaders_are_those_of_a_literal_beam_search(
    metric: str, width: int, schemes: list[str], tied: tuple[tuple[str, ...], ...], budget: Budget
) -> None:
    space = SearchSpace(toy_components(), tuple(schemes), tied, budget=budget)
    beam = Beam(Task(space, request_for, metric), TreeSettings(width=width))
    run_search(beam)
    assert [decision.plan for decision in beam.decisions] == literal_beam(space, metric, width)


def test_the_search_ends_as_soon_as_the_leader_meets_the_budget() -> None:
    beam = Beam(Task(SearchSpace(toy_components(), ("nf4",), budget=Budget(components=3)), request_for))
    run_search(beam)
    assert [decision.size.num_compressed for decision in beam.decisions] == [1, 2, 3]


def test_without_a_budget_everything_is_compressed() -> None:
    space = SearchSpace(toy_components(), ("nf4",))
    assert run_search(Beam(Task(space, request_for))) == space.uniform("nf4")


def test_a_budget_that_the_dense_model_meets_asks_for_nothing() -> None:
    evaluator = FakeEvaluator()
    run_search(Beam(Task(SearchSpace(toy_components(), ("nf4",), budget=Budget(size_mb=1.0)), request_for)), evaluator)
    assert evaluator.evaluated == []


def test_a_budget_that_the_dense_model_meets_gives_the_dense_plan() -> None:
    assert (
        run_search(Beam(Task(SearchSpace(toy_components(), ("nf4",), budget=Budget(size_mb=1.0)), request_for)))
        == Plan()
    )


def test_below_min_fdt_the_last_plan_above_it_is_the_best() -> None:
    space = SearchSpace(toy_components(), ("nf4",))
    unbounded, bounded = Beam(Task(space, request_for)), Beam(Task(space, request_for, min_fdt=60.0))
    run_search(unbounded)
    above = [decision.plan for decision in unbounded.decisions if decision.summary.fdt_mean >= 60.0]
    assert run_search(bounded) == above[-1]


def test_no_decision_is_recorded_for_a_leader_below_min_fdt() -> None:
    beam = Beam(Task(SearchSpace(toy_components(), ("nf4",)), request_for, min_fdt=60.0))
    run_search(beam)
    assert min(decision.summary.fdt_mean for decision in beam.decisions) >= 60.0


def test_when_every_first_step_falls_below_min_fdt_the_dense_plan_is_the_best() -> None:
    beam = Beam(Task(SearchSpace(toy_components(), ("nf4",)), request_for, min_fdt=float(CONTINUATION_TOKENS)))
    assert run_search(beam) == Plan()


def test_a_plan_that_several_parents_lead_to_is_asked_once_with_the_best_ranked_one() -> None:
    beam = Beam(Task(SearchSpace(toy_components(1), ("nf4",)), request_for), TreeSettings(width=2))
    for ask in beam.ask():
        beam.tell(ask.request.id, evaluate(ask.request))
    leader = beam.decisions[0].plan
    assert [ask.request.parent for ask in beam.ask()][:2] == [leader, leader]


def test_no_request_is_asked_twice_even_where_rounds_share_plans() -> None:
    evaluator = FakeEvaluator()
    space = SearchSpace(toy_components(), ("int8-channel", "int4-channel"), budget=Budget(bits_per_weight=5.0))
    run_search(Beam(Task(space, request_for), TreeSettings(width=4)), evaluator)
    assert len(evaluator.evaluated) == len(set(evaluator.evaluated))


def test_the_first_round_measures_everything_whatever_is_expanded() -> None:
    beam = Beam(Task(SearchSpace(toy_components(), ("nf4", "int8-channel")), request_for), TreeSettings(expand=1))
    assert len(beam.ask()) == 12


def test_expanding_one_perturbation_follows_the_latest_known_ranking() -> None:
    space = SearchSpace(toy_components(), ("nf4",))
    beam = Beam(Task(space, request_for), TreeSettings(width=1, expand=1))
    first = beam.ask()
    by_fdt = sorted(first, key=lambda ask: -evaluate(ask.request).fdt.mean())
    for ask in first:
        beam.tell(ask.request.id, evaluate(ask.request))
    assert [ask.perturbation for ask in beam.ask()] == [by_fdt[1].perturbation]


def test_a_failed_candidate_is_left_out_of_the_ranking() -> None:
    components = toy_components()
    space = SearchSpace(components, ("nf4",), budget=Budget(components=5))
    plan = run_search(Beam(Task(space, request_for)), FakeEvaluator(failing({"0.mlp": "nonfinite"})))
    assert plan is not None
    assert set(plan.schemes) == {c.name for c in components} - {"model.layers.0.mlp.up_proj"}


def test_a_perturbation_that_failed_ranks_behind_those_that_were_measured() -> None:
    beam = Beam(Task(SearchSpace(toy_components(), ("nf4",)), request_for), TreeSettings(width=1, expand=4))
    answer = failing({"0.mlp": "nonfinite"})
    for ask in beam.ask():
        beam.tell(ask.request.id, answer(ask.request))
    assert "model.layers.0.mlp.up_proj" not in {ask.perturbation.component for ask in beam.ask() if ask.perturbation}


def test_when_all_candidates_fail_the_search_says_how_often_and_why() -> None:
    beam = Beam(Task(SearchSpace(toy_components(), ("nf4",)), request_for))
    evaluator = FakeEvaluator(failing({"attn": "nonfinite", "mlp": "out_of_memory"}))
    with pytest.raises(
        SearchFailed,
        match=r"all 6 candidates of round 0 failed \(4 nonfinite, 2 out_of_memory\).*q_proj=nf4: attn cannot be",
    ):
        run_search(beam, evaluator)


def test_a_later_round_in_which_all_fail_ends_the_search_by_name() -> None:
    def answer(request: EvalRequest) -> Outcome:
        return EvalFailure(request.id, "replica_lost", "gone") if len(request.plan) == 2 else evaluate(request)

    beam = Beam(Task(SearchSpace(toy_components(1), ("nf4",)), request_for))
    with pytest.raises(SearchFailed, match="round 1"):
        run_search(beam, FakeEvaluator(answer))


def test_the_expected_evaluations_of_an_untied_search_are_exact_for_width_one() -> None:
    beam = Beam(Task(SearchSpace(toy_components(), ("nf4",)), request_for), TreeSettings(width=1))
    assert beam.expected_evaluations() == 6 + 5 + 4 + 3 + 2 + 1


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("budget", [Budget(share=0.5), Budget(components=7), Budget(bits_per_weight=9.0)])
@pytest.mark.parametrize("expand", ["all", 3])
def test_the_expected_evaluations_come_to_those_made(width: int, budget: Budget, expand: int) -> None:
    log, evaluator = MemoryLog(), FakeEvaluator()
    beam = Beam(
        Task(SearchSpace(toy_components(4), ("int8-channel",), budget=budget), request_for, "fdt"),
        TreeSettings(width=width, expand=expand),
    )
    early = beam.expected_evaluations()
    run_search(beam, evaluator, log)
    made = len(evaluator.evaluated)
    assert (beam.expected_evaluations(), early) == (made, pytest.approx(made, rel=0.5))
