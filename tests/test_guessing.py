"""What replicas that idle do at a round's end: a wrong guess costs time, never a decision."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress

import pytest
from fakes import FakeEvaluator, Killed, KilledAfter, MemoryLog, evaluate, request_for, run_search, toy_components

from dtmsearch.core.evaluation import EvalRequest, Outcome
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.search.eta import Workload
from dtmsearch.search.memory import Memory
from dtmsearch.search.protocols import Strategy
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.speculation import Speculating
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.probe import Probe
from dtmsearch.search.strategies.task import Task


class Idling(FakeEvaluator):
    """Measures `slots` requests side by side, which end in an order drawn from `seed`; offers slots that are free."""

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__()
        self.slots = slots
        self._chance = random.Random(seed)
        self._guesses: list[EvalRequest] = []
        self._busy: list[EvalRequest] = []
        self.guessed: list[str] = []

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        under_way = {request.id for request in (*self._busy, *self._guesses)}
        super().submit([request for request in requests if request.id not in under_way])

    def num_idle(self) -> int:
        return max(self.slots - len(self._busy) - len(self._waiting) - len(self._guesses), 0)

    def submit_guesses(self, requests: Sequence[EvalRequest]) -> None:
        self._guesses += requests
        self.guessed += [request.id for request in requests]
        self.evaluated += [request.id for request in requests]

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        while len(self._busy) < self.slots and (self._waiting or self._guesses):
            self._busy.append((self._waiting or self._guesses).pop(0))
        self._chance.shuffle(self._busy)
        ended = [self._busy.pop() for _ in range(min(self._chance.randint(1, 3), len(self._busy)))]
        return [evaluate(request) for request in ended]


def beam(width: int = 3, budget: Budget = Budget(share=0.7)) -> Beam:
    space = SearchSpace(toy_components(4), ("int4-g32", "int8-channel"), budget=budget)
    return Beam(Task(space, request_for), TreeSettings(width=width))


def steps_of(log: MemoryLog) -> list[tuple[object, ...]]:
    return [(s.step, s.plan_id, s.perturbation, s.score, s.evaluations) for s in log.steps]


CALM = MemoryLog()
run_search(beam(), log=CALM)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slots", [4, 16, 64])
def test_guesses_change_no_decision(seed: int, slots: int) -> None:
    log = MemoryLog()
    run_search(beam(), Idling(slots, seed), log)
    assert steps_of(log) == steps_of(CALM)


@pytest.mark.parametrize("budget", [Budget(bits_per_weight=7.0), Budget(components=5)])
def test_guesses_change_no_decision_under_other_budgets(budget: Budget) -> None:
    calm, guessing = MemoryLog(), MemoryLog()
    run_search(beam(2, budget), log=calm)
    run_search(beam(2, budget), Idling(16), guessing)
    assert steps_of(guessing) == steps_of(calm)


@pytest.mark.parametrize("seed", range(5))
def test_guesses_cost_no_more_than_their_share(seed: int) -> None:
    evaluator = Idling(16, seed)
    run_search(beam(), evaluator)
    assert len(evaluator.evaluated) <= 1.15 * len(CALM.records)


def test_without_a_share_nothing_is_guessed() -> None:
    evaluator = Idling(16)
    run_search(beam(), evaluator, guess_share=0.0)
    assert evaluator.guessed == []


@pytest.mark.parametrize("seed", range(5))
def test_most_guesses_come_right(seed: int) -> None:
    evaluator, log = Idling(8, seed), MemoryLog()
    run_search(beam(), evaluator, log)
    wanted = {record.request.id for record in CALM.records}
    assert len(evaluator.guessed) > 10
    assert sum(request_id in wanted for request_id in evaluator.guessed) > len(evaluator.guessed) / 2


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_evaluated_twice(seed: int) -> None:
    evaluator = Idling(16, seed)
    run_search(beam(), evaluator)
    assert len(evaluator.evaluated) == len(set(evaluator.evaluated))


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_with_guesses_it_evaluates_nothing_that_is_recorded_again(seed: int) -> None:
    log, again = MemoryLog(), []
    for session in range(200):
        known = {record.request.id for record in log.records}
        evaluator = Idling(16, seed + session)
        with suppress(Killed):
            run_search(beam(), evaluator, KilledAfter(log, 11))
            break
        again += [i for i in evaluator.evaluated if i in known]
    assert (again, steps_of(log)) == ([], steps_of(CALM))


def test_what_another_run_measured_is_not_guessed() -> None:
    evaluator = Idling(16)
    run_search(beam(), evaluator, MemoryLog({"other": CALM}))
    wanted = {record.request.id for record in CALM.records}
    assert [i for i in evaluator.guessed if i in wanted] == []


class Meanwhile(MemoryLog):
    """Beside a run that measures what this one has guessed, a moment later."""

    def __init__(self) -> None:
        super().__init__()
        self._looked_for: set[str] = set()
        self._there = MemoryLog({"other": CALM})

    def recorded_elsewhere(self, request_ids: Sequence[str]) -> Mapping[str, tuple[str, Outcome]]:
        again = [i for i in request_ids if i in self._looked_for]
        self._looked_for |= set(request_ids)
        return self._there.recorded_elsewhere(again)


@pytest.mark.parametrize("seed", range(3))
def test_a_guess_that_another_run_answers_meanwhile_is_told_once(seed: int) -> None:
    log = Meanwhile()
    run_search(beam(), Idling(16, seed), log)
    recorded = [record.request.id for record in log.records]
    assert (steps_of(log), len(recorded)) == (steps_of(CALM), len(set(recorded)))


def test_the_last_round_guesses_nothing() -> None:
    evaluator = Idling(64)
    run_search(beam(budget=Budget(components=1)), evaluator)
    assert evaluator.guessed == []


def speculating(strategy: Strategy, log: MemoryLog) -> tuple[Speculating, Memory]:
    memory, work = Memory(log), Workload(lambda request: 1.0)
    return Speculating(Idling(16), strategy, log, memory, work, share=1.0), memory


def test_a_guess_that_comes_before_it_is_asked_for_is_written_and_held_and_given_to_nobody() -> None:
    strategy, log = beam(), MemoryLog()
    for ask in strategy.ask()[:-1]:
        strategy.tell(ask.request.id, evaluate(ask.request))
    evaluator, memory = speculating(strategy, log)
    outcomes = [outcome for _ in range(8) for outcome in evaluator.poll(0.0)]
    assert (outcomes, len(log.records) > 0, len(memory)) == ([], True, len(log.records))


def test_around_a_strategy_that_cannot_guess_requests_pass_through() -> None:
    request = request_for(beam().ask()[0].request.plan, Plan())
    evaluator, memory = speculating(Probe(Task(SearchSpace(toy_components(), ("nf4",)), request_for)), MemoryLog())
    evaluator.submit([request])
    assert ([outcome.request_id for outcome in evaluator.poll(0.0)], len(memory)) == ([request.id], 0)
