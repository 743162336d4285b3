from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest
from contracts import EvaluatorContract
from fakes import (
    FakeEvaluator,
    Killed,
    KilledAfter,
    MemoryLog,
    evaluate,
    failing,
    request_for,
    run_search,
    toy_components,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dtmsearch.core.evaluation import EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.records import EvaluationRecord, StepRecord
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import SearchStopped
from dtmsearch.search.loop import InProcess, SearchStalled, measure, search
from dtmsearch.search.protocols import Ask, Decision, Progress, Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.probe import Probe
from dtmsearch.search.strategies.task import Task


def small_beam() -> Beam:
    """Three components, two schemes, bits counted: 2 of 4 rounds share plans with the one before."""
    space = SearchSpace(toy_components(1), ("int8-channel", "int4-channel"), budget=Budget(bits_per_weight=5.5))
    return Beam(Task(space, request_for), TreeSettings(width=2))


def decided(log: MemoryLog) -> list[tuple[int, str, str | None, float, int]]:
    """What must be equal between an interrupted search and an uninterrupted one."""
    return [(s.step, s.plan_id, s.perturbation, s.score, s.evaluations) for s in log.steps]


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), per_poll=st.integers(1, 7))
def test_any_order_of_answers_gives_the_same_decisions(seed: int, per_poll: int) -> None:
    def shuffled(waiting: list[EvalRequest]) -> list[EvalRequest]:
        return random.Random(seed).sample(waiting, len(waiting))

    plain, other = MemoryLog(), MemoryLog()
    run_search(small_beam(), log=plain)
    run_search(small_beam(), FakeEvaluator(order=shuffled, per_poll=per_poll), other)
    assert decided(other) == decided(plain)


@given(order=st.permutations(range(6)))
def test_any_order_of_telling_a_round_gives_the_same_next_round(order: list[int]) -> None:
    plain, other = small_beam(), small_beam()
    asks = plain.ask()
    other.ask()
    for ask, number in zip(asks, order, strict=True):
        plain.tell(ask.request.id, evaluate(ask.request))
        other.tell(asks[number].request.id, evaluate(asks[number].request))
    assert other.ask() == plain.ask()


def test_killed_after_any_record_and_resumed_on_other_replicas_it_decides_the_same() -> None:
    whole = MemoryLog()
    run_search(small_beam(), log=whole)
    for num_records in range(len(whole.records)):
        log = MemoryLog()
        with pytest.raises(Killed):
            run_search(small_beam(), FakeEvaluator(per_poll=2), KilledAfter(log, num_records))
        run_search(small_beam(), FakeEvaluator(order=lambda waiting: waiting[::-1], per_poll=3), log)
        assert decided(log) == decided(whole), f"killed after {num_records} records"


def test_killed_after_any_record_and_resumed_it_evaluates_nothing_again() -> None:
    whole = MemoryLog()
    run_search(small_beam(), log=whole)
    for num_records in range(len(whole.records)):
        log, evaluator = MemoryLog(), FakeEvaluator()
        with pytest.raises(Killed):
            run_search(small_beam(), log=KilledAfter(log, num_records))
        recorded = {outcome.request_id for outcome in log.replay()}
        run_search(small_beam(), evaluator, log)
        assert recorded.isdisjoint(evaluator.evaluated), f"killed after {num_records} records"


def test_killed_again_and_again_it_ends_with_the_same_plan() -> None:
    log, plan = MemoryLog(), None
    while plan is None:
        try:
            plan = run_search(small_beam(), log=KilledAfter(log, 2))
        except Killed:
            continue
    assert plan == run_search(small_beam())


def test_killed_between_an_outcome_and_the_decision_it_completes_the_decision_is_made_up_for() -> None:
    class KilledAtDecision(KilledAfter):
        def decide(self, steps: Sequence[StepRecord]) -> None:
            raise Killed

    whole, log = MemoryLog(), MemoryLog()
    run_search(small_beam(), log=whole)
    with pytest.raises(Killed):
        run_search(small_beam(), log=KilledAtDecision(log, 1000))
    run_search(small_beam(), log=log)
    assert decided(log) == decided(whole)


def test_a_finished_search_run_again_evaluates_nothing() -> None:
    log, evaluator = MemoryLog(), FakeEvaluator()
    run_search(small_beam(), log=log)
    run_search(small_beam(), evaluator, log)
    assert evaluator.evaluated == []


def test_a_finished_search_run_again_records_nothing() -> None:
    log = MemoryLog()
    run_search(small_beam(), log=log)
    before = (list(log.records), list(log.steps))
    run_search(small_beam(), log=log)
    assert (log.records, log.steps) == before


def test_recorded_failures_are_not_evaluated_again() -> None:
    log, evaluator = MemoryLog(), FakeEvaluator()
    beam = Beam(Task(SearchSpace(toy_components(), ("nf4",), budget=Budget(components=5)), request_for))
    again = Beam(Task(SearchSpace(toy_components(), ("nf4",), budget=Budget(components=5)), request_for))
    run_search(beam, FakeEvaluator(failing({"0.mlp": "nonfinite"})), log)
    run_search(again, evaluator, log)
    assert evaluator.evaluated == []


def test_an_outcome_that_could_not_be_written_is_not_told() -> None:
    told: list[str] = []

    class Listening(Beam):
        def tell(self, request_id: str, outcome: Outcome) -> None:
            told.append(request_id)
            super().tell(request_id, outcome)

    with pytest.raises(Killed):
        run_search(
            Listening(Task(SearchSpace(toy_components(), ("nf4",)), request_for)), log=KilledAfter(MemoryLog(), 3)
        )
    assert len(told) == 3


def test_every_outcome_is_written_before_it_is_told() -> None:
    log, unwritten = MemoryLog(), []

    class Checking(Beam):
        def tell(self, request_id: str, outcome: Outcome) -> None:
            if request_id not in {o.request_id for o in log.replay()}:
                unwritten.append(request_id)
            super().tell(request_id, outcome)

    run_search(Checking(Task(SearchSpace(toy_components(), ("nf4",)), request_for)), log=log)
    assert unwritten == []


@pytest.mark.usefixtures("quick_collections")
def test_what_was_told_is_let_go() -> None:
    class Forgetful(MemoryLog):
        def append(self, records: Sequence[EvaluationRecord]) -> None:
            pass

    results: list[weakref.ref[EvalResult]] = []

    def remembered(request: EvalRequest) -> EvalResult:
        result = evaluate(request)
        results.append(weakref.ref(result))
        return result

    held: list[int] = []

    class Counting(Silent):
        def on_decision(self, decision: Decision, replayed: bool) -> None:
            gc.collect()
            held.append(sum(reference() is not None for reference in results))

    search(small_beam(), FakeEvaluator(remembered), Forgetful(), Counting())
    assert max(held) <= 1


def test_nothing_in_flight_nothing_to_ask_and_not_done_is_an_error() -> None:
    class Quiet(Beam):
        def ask(self) -> list[Ask]:
            return []

    with pytest.raises(SearchStalled, match="round 0"):
        run_search(Quiet(Task(SearchSpace(toy_components(), ("nf4",)), request_for)))


def test_a_strategy_that_forgets_its_last_round_stalls_rather_than_ends() -> None:
    class Forgetting(Beam):
        def ask(self) -> list[Ask]:
            return super().ask() if self.step < 2 else []

    with pytest.raises(SearchStalled, match="round 2"):
        run_search(Forgetting(Task(SearchSpace(toy_components(), ("nf4",)), request_for)))


def test_a_stop_request_stops_the_search() -> None:
    with pytest.raises(SearchStopped):
        run_search(small_beam(), stop_requested=lambda: True)


def test_a_stopped_search_resumes_to_the_same_decisions() -> None:
    whole, log, polls = MemoryLog(), MemoryLog(), iter(range(100))
    run_search(small_beam(), log=whole)
    with pytest.raises(SearchStopped):
        run_search(small_beam(), log=log, stop_requested=lambda: next(polls) == 9)
    run_search(small_beam(), log=log)
    assert decided(log) == decided(whole)


def test_a_search_out_of_time_returns_the_plan_it_has_come_to() -> None:
    log = MemoryLog()
    with pytest.raises(Killed):
        run_search(small_beam(), log=KilledAfter(log, 12))
    assert run_search(small_beam(), log=log, limit_seconds=0.0) == _plan_of(log.steps[-1])


def _plan_of(step: StepRecord) -> Plan:
    beam = small_beam()
    run_search(beam)
    return next(decision.plan for decision in beam.decisions if decision.plan.id == step.plan_id)


def test_the_time_of_earlier_sessions_counts() -> None:
    log, evaluator = MemoryLog(), FakeEvaluator()
    with pytest.raises(Killed):
        run_search(small_beam(), log=KilledAfter(log, 12))
    log.steps[-1] = StepRecord(**{**vars(log.steps[-1]), "wall_seconds": 3600.0})
    run_search(small_beam(), evaluator, log, limit_seconds=3599.0)
    assert len(log.records) == 12


def test_a_search_that_ran_out_of_time_before_its_first_decision_has_no_plan() -> None:
    assert run_search(small_beam(), limit_seconds=0.0) is None


def test_what_another_run_measured_is_not_evaluated_again() -> None:
    first, evaluator = MemoryLog(), FakeEvaluator()
    run_search(small_beam(), log=first)
    run_search(small_beam(), evaluator, MemoryLog({"first": first}))
    assert evaluator.evaluated == []


def test_what_another_run_measured_is_recorded_with_its_source() -> None:
    first = MemoryLog()
    run_search(small_beam(), log=first)
    second = MemoryLog({"first": first})
    run_search(small_beam(), log=second)
    assert [record.reused_from for record in second.records] == ["first"] * len(first.records)


def test_what_another_run_measured_leads_to_the_same_decisions() -> None:
    first = MemoryLog()
    with pytest.raises(Killed):
        run_search(small_beam(), log=KilledAfter(first, 9))
    whole, second = MemoryLog(), MemoryLog({"first": first})
    run_search(small_beam(), log=whole)
    run_search(small_beam(), log=second)
    assert decided(second) == decided(whole)


class Doubling(FakeEvaluator):
    """Gives every outcome twice at once, again later, and outcomes that nobody asked for."""

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        fresh = super().poll(timeout_seconds)
        stray = evaluate(request_for(Plan.of({"nowhere": "nf4"}), Plan()))
        self._past = [*getattr(self, "_past", []), *fresh]
        return [stray, *fresh, *fresh, *self._past]


def test_outcomes_that_come_twice_or_unasked_change_no_decision() -> None:
    plain, log = MemoryLog(), MemoryLog()
    run_search(small_beam(), log=plain)
    run_search(small_beam(), Doubling(), log)
    assert decided(log) == decided(plain)


def test_outcomes_that_come_twice_or_unasked_are_recorded_once_or_never() -> None:
    evaluator, log = Doubling(per_poll=2), MemoryLog()
    run_search(small_beam(), evaluator, log)
    assert sorted(record.request.id for record in log.records) == sorted(evaluator.evaluated)


def test_records_that_contradict_recorded_decisions_are_an_error() -> None:
    log = MemoryLog()
    run_search(small_beam(), log=log)
    log.steps[1] = StepRecord(**{**vars(log.steps[1]), "plan_id": "another"})
    with pytest.raises(RuntimeError, match="step 1 of this run chose plan another"):
        run_search(small_beam(), log=log)


def test_a_record_names_the_round_that_asked_and_the_edge() -> None:
    log = MemoryLog()
    run_search(Beam(Task(SearchSpace(toy_components(1), ("nf4",)), request_for), TreeSettings(width=1)), log=log)
    assert [(record.step, record.perturbation) for record in log.records][:4] == [
        (0, "model.layers.0.self_attn.q_proj=nf4"),
        (0, "model.layers.0.self_attn.k_proj=nf4"),
        (0, "model.layers.0.mlp.up_proj=nf4"),
        (1, "model.layers.0.self_attn.q_proj=nf4"),
    ]


class Watching(Silent):
    def __init__(self) -> None:
        self.decisions: list[tuple[int, bool]] = []
        self.progress: list[Progress] = []

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        self.decisions.append((decision.step, replayed))

    def on_progress(self, progress: Progress) -> None:
        self.progress.append(progress)


def test_the_observer_hears_every_decision_once_and_whether_it_was_replayed() -> None:
    log, watching = MemoryLog(), Watching()
    with pytest.raises(Killed):
        run_search(small_beam(), log=KilledAfter(log, 12))
    num_replayed = len(log.steps)
    search(small_beam(), FakeEvaluator(), log, watching)
    assert watching.decisions == [(step, step < num_replayed) for step in range(len(log.steps))]


def test_progress_counts_recorded_outcomes_apart() -> None:
    log, watching = MemoryLog(), Watching()
    with pytest.raises(Killed):
        run_search(small_beam(), log=KilledAfter(log, 12))
    search(small_beam(), FakeEvaluator(), log, watching)
    last = watching.progress[-1]
    assert (last.evaluations, last.replayed, last.in_flight) == (len(log.records), 12, 0)


class Waits:
    """An evaluator that hands over three outcomes in every `polls`th poll, and the clock by which a poll takes 1 s."""

    def __init__(self, polls: int) -> None:
        self.inner, self.polls, self.now = FakeEvaluator(per_poll=3), polls, 0.0

    def monotonic(self) -> float:
        return self.now

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self.inner.submit(requests)

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        self.now += 1.0
        return self.inner.poll(timeout_seconds) if self.now % self.polls == 0 else []


def time_left(polls: int, cost_of: Callable[[EvalRequest], float]) -> list[float | None]:
    """What is said to be left of a probe of six components, second by second."""
    waits, watching = Waits(polls), Watching()
    probe = Probe(Task(SearchSpace(toy_components(), ("nf4",)), request_for))
    with patch("dtmsearch.search.eta.time", waits):
        search(probe, waits, MemoryLog(), watching, cost_of=cost_of)
    return [progress.seconds_left for progress in watching.progress]


def test_the_time_left_goes_by_cost_and_not_by_count() -> None:
    costs = {c.name: 4.0 - 3.0 * c.layer for c in toy_components()}  # the lower layer costs four times the upper
    assert time_left(1, lambda request: sum(costs[name] for name in request.plan.schemes)) == [None, 0.25, 0.0]


def test_the_time_left_goes_on_while_outcomes_are_waited_for() -> None:
    assert time_left(4, lambda request: 1.0) == [None, None, None, None, 4.0, 3.0, 2.0, 1.0, 0.0]


def named_requests() -> dict[str, EvalRequest]:
    return {
        scheme: request_for(Plan.uniform(toy_components(), scheme), Plan())
        for scheme in ("nf4", "int8-channel", "int4-g32")
    }


def test_measuring_answers_every_name() -> None:
    outcomes = measure(named_requests(), FakeEvaluator(), MemoryLog(), "validation")
    assert {name: o.request_id for name, o in outcomes.items()} == {n: r.id for n, r in named_requests().items()}


def test_measuring_again_takes_the_records() -> None:
    log, evaluator = MemoryLog(), FakeEvaluator()
    measure(named_requests(), FakeEvaluator(), log, "validation")
    measure(named_requests(), evaluator, log, "validation")
    assert evaluator.evaluated == []


def test_measuring_takes_what_another_run_measured() -> None:
    first, evaluator = MemoryLog(), FakeEvaluator()
    measure(named_requests(), FakeEvaluator(), first, "validation")
    measure(named_requests(), evaluator, MemoryLog({"first": first}), "validation")
    assert evaluator.evaluated == []


def test_measuring_records_purpose_and_label() -> None:
    log = MemoryLog()
    measure(named_requests(), FakeEvaluator(), log, "evaluate")
    assert {(record.purpose, record.label) for record in log.records} == {("evaluate", n) for n in named_requests()}


def test_measuring_records_an_outcome_that_comes_twice_once() -> None:
    log = MemoryLog()
    measure(named_requests(), Doubling(per_poll=3), log, "validation")
    assert len(log.records) == 3


def test_two_names_of_one_request_are_both_answered() -> None:
    request = named_requests()["nf4"]
    outcomes = measure({"plan": request, "uniform:nf4": request}, FakeEvaluator(), MemoryLog(), "validation")
    assert {name: o.request_id for name, o in outcomes.items()} == {"plan": request.id, "uniform:nf4": request.id}


def test_measuring_can_be_stopped() -> None:
    with pytest.raises(SearchStopped):
        measure(named_requests(), FakeEvaluator(), MemoryLog(), "validation", stop_requested=lambda: True)


def test_the_evaluator_in_process_answers_everything() -> None:
    in_process = InProcess(lambda requests: [evaluate(request) for request in requests])
    plan = search(small_beam(), in_process, MemoryLog(), Silent())
    assert plan == run_search(small_beam())


class TestInProcess(EvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> InProcess:
        return InProcess(lambda requests: [evaluate(request) for request in requests])


class TestFake(EvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> FakeEvaluator:
        return FakeEvaluator()
