from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from fakes import FakeEvaluator, Killed, KilledAfter, MemoryLog, chance, damage, failing, run_search, toy_components

from dtmsearch.core.evaluation import EvalRequest, EvalResult
from dtmsearch.core.plan import Budget, Perturbation, Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import SearchFailed
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.racing import Racing, block_ends
from dtmsearch.search.strategies.task import Task

NUM_PROMPTS = 200
TOKENS = 100


def request_for(plan: Plan, parent: Plan) -> EvalRequest:
    return EvalRequest(plan, "toy-reference", (0, NUM_PROMPTS), ("kl",), parent)


def noisy(request: EvalRequest) -> EvalResult:
    """Values that scatter over prompts, around means that follow the toy model's damage."""
    harm = damage(request.plan)
    draws = np.array([[chance(request.plan.id, p), chance("prompt", p)] for p in range(*request.prompts)])
    waiting = -np.log1p(-draws).sum(axis=1) / 2  # mean 1, more than half of it the plan's own
    lost = np.minimum(TOKENS, np.floor(12 * harm * waiting)).astype(np.int32)
    kl = (0.01 * harm * waiting).astype(np.float32)
    return EvalResult(request.id, TOKENS - lost, lost // 3, np.exp(kl), kl)


def beam(
    width: int = 2,
    confidence: float | None = 0.99,
    metric: str = "fdt",
    budget: Budget = Budget(components=5),
    schemes: Sequence[str] = ("int8-channel", "nf4"),
) -> Beam:
    racing = None
    if confidence is not None:
        racing = Racing(metric, width, confidence, TOKENS, remember=budget.limits_size)
    space = SearchSpace(toy_components(3), tuple(schemes), budget=budget)
    return Beam(Task(space, request_for, metric), TreeSettings(width=width), racing=racing)


def leaders(search: Beam, evaluator: FakeEvaluator | None = None, log: MemoryLog | None = None) -> list[str]:
    run_search(search, evaluator or FakeEvaluator(noisy), log)
    return [decision.plan.id for decision in search.decisions]


def prompts_measured(log: MemoryLog) -> int:
    return sum(r.request.prompts[1] - r.request.prompts[0] for r in log.records if r.outcome.provenance.attempts)


@pytest.mark.parametrize("metric", ["fdt", "sdt", "kl"])
@pytest.mark.parametrize("width", [1, 3])
def test_a_racing_beam_decides_as_one_that_measures_everything(metric: str, width: int) -> None:
    assert leaders(beam(width, 0.999, metric)) == leaders(beam(width, None, metric))


def test_in_a_hundred_races_the_same_is_best_as_when_all_is_measured_for_a_quarter_of_it() -> None:
    generator = np.random.default_rng(0)
    means = np.sort(generator.uniform(0.5, 3.0, 40))
    same, measured = 0, 0
    for _ in range(100):
        losses = generator.exponential(size=(40, 400)) * means[:, None]
        best, read = race(losses)
        same += best == losses.mean(axis=1).argmin()
        measured += read
    assert same >= 99
    assert measured <= 100 * 40 * 400 / 4


def race(kl: np.ndarray, indifference: float = 0.0) -> tuple[int, int]:
    """The best row of [candidates, prompts], and how many of its values the race read."""
    names = [f"c{i}" for i in range(len(kl))]
    read = 0
    running = Racing("kl", 1, 0.99, TOKENS, indifference=indifference).round(
        0,
        [(Plan(), Perturbation(name, "nf4")) for name in names],
        lambda plan, parent: EvalRequest(plan, "values", (0, kl.shape[1]), ("kl",)),
    )
    while not running.complete:
        for ask in running.ask():
            values = kl[names.index(ask.request.plan.entries[0][0])][slice(*ask.request.prompts)]
            nothing = np.zeros(len(values), np.int32)
            read += len(values) if ask.answer is None else 0
            answer = EvalResult(ask.request.id, nothing, nothing, nothing + np.float32(1), values)
            running.tell(ask.request.id, ask.answer or answer)
    return names.index(running.ranked("kl")[0][0].plan.entries[0][0]), read


def test_racing_measures_less() -> None:
    raced, everything = MemoryLog(), MemoryLog()
    leaders(beam(1), log=raced)
    leaders(beam(1, None), log=everything)
    assert prompts_measured(raced) < 0.6 * prompts_measured(everything)


def test_decisions_rest_on_all_prompts() -> None:
    search = beam()
    leaders(search)
    assert {decision.summary.num_prompts for decision in search.decisions} == {NUM_PROMPTS}


def test_decisions_score_what_a_measurement_of_all_prompts_would() -> None:
    raced, everything = beam(1, 0.999), beam(1, None)
    leaders(raced), leaders(everything)
    assert [d.summary for d in raced.decisions] == [d.summary for d in everything.decisions]


def test_what_blocks_make_up_is_recorded_as_one_evaluation_and_not_measured() -> None:
    log, evaluator = MemoryLog(), FakeEvaluator(noisy)
    leaders(beam(), evaluator, log)
    whole = [r for r in log.records if r.request.prompts == (0, NUM_PROMPTS)]
    assert whole and not {r.request.id for r in whole} & set(evaluator.evaluated)
    assert {r.purpose for r in whole} == {"search"}


def test_what_was_measured_on_some_of_the_prompts_is_not_recorded_as_a_search_s_evaluation() -> None:
    log = MemoryLog()
    leaders(beam(), log=log)
    parts = [r for r in log.records if r.request.prompts != (0, NUM_PROMPTS)]
    assert parts and {r.purpose for r in parts} == {"race"}


def test_the_order_of_the_answers_changes_nothing() -> None:
    def shuffled(waiting: list[EvalRequest]) -> list[EvalRequest]:
        return random.Random(len(waiting)).sample(waiting, len(waiting))

    usual, other = MemoryLog(), MemoryLog()
    leaders(beam(), FakeEvaluator(noisy), usual)
    leaders(beam(), FakeEvaluator(noisy, shuffled, per_poll=3), other)
    assert [s.plan_id for s in usual.steps] == [s.plan_id for s in other.steps]
    assert {r.request.id for r in usual.records} == {r.request.id for r in other.records}


@pytest.mark.parametrize("budget", [Budget(components=4), Budget(bits_per_weight=11.0)])
def test_killed_anywhere_and_resumed_nothing_is_measured_again(budget: Budget) -> None:
    undisturbed = leaders(beam(budget=budget))
    log, evaluated = MemoryLog(), []
    for session in range(1_000):
        evaluator = FakeEvaluator(noisy)
        try:
            found = leaders(beam(budget=budget), evaluator, KilledAfter(log, 40 + session))
        except Killed:
            found = []
        # The driver dies over the one that it was about to write.
        evaluated += [i for i in evaluator.evaluated if i in {r.request.id for r in log.records}]
        if found:
            break
    assert found == undisturbed
    assert len([r.request.id for r in log.records]) == len({r.request.id for r in log.records})


def test_rounds_that_share_plans_decide_as_without_racing() -> None:
    budget = Budget(bits_per_weight=9.0)
    assert leaders(beam(2, 0.999, budget=budget)) == leaders(beam(2, None, budget=budget))


def test_rounds_that_share_plans_measure_none_twice() -> None:
    evaluator = FakeEvaluator(noisy)
    leaders(beam(3, budget=Budget(bits_per_weight=9.0)), evaluator)
    assert len(evaluator.evaluated) == len(set(evaluator.evaluated))


def test_a_candidate_that_fails_leaves() -> None:
    def answer(request: EvalRequest) -> object:
        broken = failing({"layers.0.self_attn.q_proj": "nonfinite"})(request)
        return noisy(request) if isinstance(broken, EvalResult) else broken

    search = beam(1)
    leaders(search, FakeEvaluator(answer))  # type: ignore[arg-type]
    assert all("layers.0.self_attn.q_proj" not in d.plan.schemes for d in search.decisions)


def test_a_round_in_which_all_fail_says_so() -> None:
    with pytest.raises(SearchFailed, match="all 18 candidates of round 0 failed"):
        leaders(beam(1), FakeEvaluator(failing({"model": "invalid"})))


def test_indifference_saves_and_costs_no_more_than_it_says() -> None:
    generator = np.random.default_rng(0)
    losses = generator.exponential(size=(20, 400)) * (1.0 + 0.01 * np.arange(20)[:, None])
    (_, everything), (best, read) = race(losses), race(losses, indifference=0.3)
    means = losses.mean(axis=1)
    assert means[best] <= means.min() + 0.3
    assert read < 0.5 * everything


def test_few_prompts_are_one_block() -> None:
    assert block_ends(10) == [10]


def test_blocks_grow_to_all_prompts() -> None:
    ends = block_ends(1_000)
    assert ends == sorted(set(ends)) and ends[0] == 16 and ends[-1] == 1_000


def test_the_remark_tells_what_was_left_out_and_how_sure_that_is() -> None:
    search = beam(1)
    leaders(search)
    (remark,) = search.remarks
    assert "candidates left early in 5 rounds" in remark and "at least 0.99 over the order of the prompts" in remark


def test_metrics_without_a_bound_do_not_race() -> None:
    with pytest.raises(ValueError, match="fdt, sdt, kl, got ppl"):
        Racing("ppl", 1, 0.99, TOKENS)
