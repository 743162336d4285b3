from __future__ import annotations

import random
from typing import Literal

import numpy as np
import pytest
from fakes import (
    CONTINUATION_TOKENS,
    FakeEvaluator,
    Killed,
    KilledAfter,
    MemoryLog,
    chance,
    failing,
    request_for,
    run_search,
    toy_components,
)

from dtmsearch.core.evaluation import EvalRequest, EvalResult
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import SearchFailed
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.lazy import Lazy
from dtmsearch.search.strategies.task import Task

BUDGETS = [Budget(), Budget(components=7), Budget(bits_per_weight=6.0)]


def space(budget: Budget = Budget(), num_layers: int = 4) -> SearchSpace:
    return SearchSpace(toy_components(num_layers), ("int8-channel", "nf4"), budget=budget)


def lazy(
    width: int = 1,
    budget: Budget = Budget(),
    metric: str = "kl",
    audit: float = 0.0,
    expand: Literal["all"] | int = "all",
    min_fdt: float | None = None,
) -> Lazy:
    task = Task(space(budget), request_for, metric, min_fdt, CONTINUATION_TOKENS)
    return Lazy(task, TreeSettings(width=width, expand=expand, audit=audit))


def leaders(search: Lazy | Beam, evaluator: FakeEvaluator | None = None, log: MemoryLog | None = None) -> list[str]:
    run_search(search, evaluator, log)
    return [decision.plan.id for decision in search.decisions]


def additive(request: EvalRequest) -> EvalResult:
    """Damages that add up: what was measured once holds for ever."""
    harm = sum(chance(c, s) for c, s in request.plan.entries)
    ones = np.ones(request.prompts[1] - request.prompts[0])
    fdt = (CONTINUATION_TOKENS - 3 * harm * ones).astype(np.int32)
    return EvalResult(request.id, fdt, (harm * ones).astype(np.int32), ones, (harm * ones).astype(np.float32), ones)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("width", [1, 3])
def test_where_damages_add_up_lazy_decides_as_the_beam(width: int, budget: Budget) -> None:
    beam = Beam(Task(space(budget), request_for, "kl"), TreeSettings(width=width))
    assert leaders(lazy(width, budget), FakeEvaluator(additive)) == leaders(beam, FakeEvaluator(additive))


def test_where_damages_add_up_greedy_measures_one_child_a_step() -> None:
    evaluator = FakeEvaluator(additive)
    search = lazy()
    steps = len(leaders(search, evaluator))
    assert len(evaluator.evaluated) == 24 + steps - 1


def test_while_the_order_holds_the_guesses_are_what_is_asked_next() -> None:
    search, asked, guessed = lazy(), [], []
    while not search.done:
        guessed.append([ask.request.id for ask in search.guesses()])
        asks = search.ask()
        asked.append([ask.request.id for ask in asks])
        for ask in asks:
            search.tell(ask.request.id, additive(ask.request))
    path = [ids[0] for ids in asked[2:]]
    assert guessed[1] == path


def test_where_damages_interact_lazy_measures_more_and_says_that_the_order_was_wrong() -> None:
    search = lazy()
    leaders(search)
    assert search.count.wrong_rounds > 0 and search.count.measured > search.count.rounds


@pytest.mark.parametrize("metric", ["fdt", "sdt", "dppl", "ppl", "kl"])
def test_every_metric_is_lazy_to_the_end(metric: str) -> None:
    search, beam = lazy(metric=metric), Beam(Task(space(), request_for, metric), TreeSettings(width=1))
    leaders(search), leaders(beam)
    assert search.best is not None and beam.best is not None
    assert len(search.best) == len(beam.best)


def test_an_audit_of_everything_is_the_beam() -> None:
    beam = Beam(Task(space(Budget(components=6)), request_for, "kl"), TreeSettings(width=2))
    assert leaders(lazy(2, Budget(components=6), audit=1.0)) == leaders(beam)


def test_an_audit_measures_about_its_share_of_the_rest() -> None:
    search = lazy(audit=0.2)
    leaders(search)
    rest = search.count.children - (search.count.measured - search.count.audited)
    assert 0.1 * rest < search.count.audited < 0.35 * rest


def test_an_audit_states_the_regret_that_it_found() -> None:
    names = [component.name for component in toy_components(4)]
    gift = max(names, key=lambda name: min(chance(name, scheme) for scheme in ("int8-channel", "nf4")))

    def surprise(request: EvalRequest) -> EvalResult:
        """The most harmful component turns out harmless as soon as another is compressed."""
        alone = len(request.plan) == 1 or gift not in request.plan.schemes
        kept = request.plan if alone else Plan.of({c: s for c, s in request.plan.entries if c != gift})
        result = additive(EvalRequest(kept, request.reference_id, request.prompts, request.extra_metrics))
        return EvalResult(request.id, result.fdt, result.sdt, result.dppl, result.kl, result.ppl)

    search = lazy(audit=1.0, budget=Budget(components=2))
    leaders(search, FakeEvaluator(surprise))
    assert search.count.missed >= 1 and search.count.regret > 0
    assert f"{search.count.missed} were better than the choice, by at most" in search.remarks[0]


def test_at_the_start_a_child_a_step_is_expected_after_the_first_round() -> None:
    assert lazy(expand=1).expected_evaluations() == 24 + 11


def test_at_the_end_what_was_asked_for_is_expected() -> None:
    search, evaluator = lazy(), FakeEvaluator()
    leaders(search, evaluator)
    assert search.expected_evaluations() == len(evaluator.evaluated)


def test_expand_bounds_what_a_round_measures() -> None:
    search = lazy(expand=1)
    leaders(search)
    assert search.count.measured == search.count.rounds


def test_the_order_of_the_answers_changes_nothing() -> None:
    def shuffled(waiting: list[EvalRequest]) -> list[EvalRequest]:
        return random.Random(len(waiting)).sample(waiting, len(waiting))

    usual = leaders(lazy(3, audit=0.1))
    assert leaders(lazy(3, audit=0.1), FakeEvaluator(order=shuffled, per_poll=3)) == usual


@pytest.mark.parametrize("budget", BUDGETS)
def test_killed_anywhere_and_resumed_it_ends_alike_and_records_nothing_twice(budget: Budget) -> None:
    undisturbed = leaders(lazy(2, budget, audit=0.05))
    log, found = MemoryLog(), []
    for _ in range(1_000):
        try:
            found = leaders(lazy(2, budget, audit=0.05), log=KilledAfter(log, 9))
            break
        except Killed:
            pass
    assert found == undisturbed
    assert len({r.request.id for r in log.records}) == len(log.records)


def test_what_failed_is_not_tried_again_while_there_is_another() -> None:
    evaluator = FakeEvaluator(failing({"layers.0.self_attn.q_proj": "nonfinite"}))
    search = lazy(budget=Budget(components=11))
    leaders(search, evaluator)
    assert "model.layers.0.self_attn.q_proj" not in search.decisions[-1].plan.schemes


def test_a_round_in_which_all_fail_says_so() -> None:
    with pytest.raises(SearchFailed, match="all 24 candidates of round 0 failed"):
        leaders(lazy(), FakeEvaluator(failing({"model": "invalid"})))


def test_below_min_fdt_the_last_plan_above_it_is_the_best() -> None:
    search = lazy(metric="fdt", min_fdt=60.0)
    leaders(search)
    assert search.best == search.decisions[-1].plan and search.decisions[-1].summary.fdt_mean >= 60.0


def test_a_budget_that_the_dense_model_meets_asks_for_nothing() -> None:
    evaluator = FakeEvaluator()
    assert run_search(lazy(budget=Budget(size_mb=1.0)), evaluator) == Plan() and evaluator.evaluated == []
