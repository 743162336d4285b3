"""What every implementation of a protocol must do: a class of tests for each protocol, to be inherited."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from fakes import evaluate, toy_components

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import EvaluationRecord, StepRecord
from dtmsearch.search.protocols import Evaluator, ResultLog

_SCHEMES = [f"int{bits}-{grain}" for bits in range(2, 9) for grain in ("tensor", "channel", "g32", "g64")]


def make_request(number: int, extra_metrics: tuple[str, ...] = ("kl", "ppl")) -> EvalRequest:
    """A request for a plan of its own for each number below 168."""
    component = toy_components()[number % 6]
    plan = Plan.of({component.name: _SCHEMES[number // 6]})
    return EvalRequest(plan, "toy-reference", (0, 8), extra_metrics)


def make_record(number: int, outcome: Outcome | None = None) -> EvaluationRecord:
    request = make_request(number)
    return EvaluationRecord(request, outcome or evaluate(request), "search", step=0)


def make_records(*numbers: int) -> list[EvaluationRecord]:
    return [make_record(number) for number in numbers]


def make_step(step: int) -> StepRecord:
    return StepRecord(step, f"plan-{step}", None, 90.0 - step, step + 1, 0.1, 12.5, 0.0, 10 * step, 2.5)


def ids(items: Sequence[EvaluationRecord] | Sequence[Outcome]) -> list[str]:
    return [item.request.id if isinstance(item, EvaluationRecord) else item.request_id for item in items]


class ResultLogContract(ABC):
    """For `ResultLog`."""

    @abstractmethod
    def opened(self, place: Path, run: str) -> AbstractContextManager[ResultLog]:
        """The log of a run at a place, as one session has it; its records stay when the session ends."""

    def test_new_log_replays_nothing(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, "run") as log:
            assert list(log.replay()) == []

    def test_outcomes_are_replayed_in_recorded_order(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, "run") as log:
            for numbers in ((5, 1), (9,), (0, 3)):
                log.append(make_records(*numbers))
            assert ids(list(log.replay())) == ids(make_records(5, 1, 9, 0, 3))

    def test_outcomes_outlast_the_session(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, "run") as log:
            log.append(make_records(1, 2))
        with self.opened(tmp_path, "run") as log:
            assert ids(list(log.replay())) == ids(make_records(1, 2))

    def test_sessions_are_replayed_one_after_the_other(self, tmp_path: Path) -> None:
        for number in (7, 3, 5):
            with self.opened(tmp_path, "run") as log:
                log.append(make_records(number))
        with self.opened(tmp_path, "run") as log:
            assert ids(list(log.replay())) == ids(make_records(7, 3, 5))

    def test_values_are_replayed_bit_by_bit(self, tmp_path: Path) -> None:
        record = make_record(4)
        assert isinstance(record.outcome, EvalResult)
        with self.opened(tmp_path, "run") as log:
            log.append([record])
        with self.opened(tmp_path, "run") as log:
            (found,) = log.replay()
        assert isinstance(found, EvalResult)
        for name in ("fdt", "sdt", "dppl", "kl", "ppl"):
            np.testing.assert_array_equal(getattr(found, name), getattr(record.outcome, name), strict=True)

    def test_metric_that_was_not_measured_stays_none(self, tmp_path: Path) -> None:
        request = make_request(0, extra_metrics=())
        with self.opened(tmp_path, "run") as log:
            log.append([EvaluationRecord(request, evaluate(request), "search")])
        with self.opened(tmp_path, "run") as log:
            (found,) = log.replay()
        assert isinstance(found, EvalResult)
        assert (found.kl, found.ppl) == (None, None)

    def test_failure_is_replayed_as_it_was(self, tmp_path: Path) -> None:
        failure = EvalFailure(make_request(2).id, "nonfinite", "logits of prompt 3 are not finite")
        with self.opened(tmp_path, "run") as log:
            log.append([make_record(1), make_record(2, failure), make_record(3)])
        with self.opened(tmp_path, "run") as log:
            assert list(log.replay())[1] == failure

    def test_decisions_outlast_the_session_in_order(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, "run") as log:
            log.decide([make_step(0), make_step(1)])
        with self.opened(tmp_path, "run") as log:
            log.decide([make_step(2)])
        with self.opened(tmp_path, "run") as log:
            assert list(log.decisions()) == [make_step(0), make_step(1), make_step(2)]

    def test_another_run_has_no_share_in_the_replay(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, "other") as log:
            log.append(make_records(1))
        with self.opened(tmp_path, "run") as log:
            assert list(log.replay()) == []

    def test_result_of_another_run_is_found_with_its_run(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, "other") as log:
            log.append(make_records(1, 2, 3))
        with self.opened(tmp_path, "run") as log:
            found = log.recorded_elsewhere(ids(make_records(2, 8)))
        assert {i: (run, o.request_id) for i, (run, o) in found.items()} == {
            make_request(2).id: ("other", make_request(2).id)
        }

    def test_failure_of_another_run_is_not_found(self, tmp_path: Path) -> None:
        failure = EvalFailure(make_request(2).id, "out_of_memory", "no room")
        with self.opened(tmp_path, "other") as log:
            log.append([make_record(2, failure)])
        with self.opened(tmp_path, "run") as log:
            assert log.recorded_elsewhere([failure.request_id]) == {}

    def test_own_result_is_not_found_elsewhere(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, "run") as log:
            log.append(make_records(1))
            assert log.recorded_elsewhere(ids(make_records(1))) == {}


class EvaluatorContract:
    """For `Evaluator`. `evaluator` is one that answers by the toy formula, fresh for every test."""

    @staticmethod
    def arrivals(evaluator: Evaluator, count: int) -> list[Outcome]:
        arrived: list[Outcome] = []
        while len(arrived) < count:
            arrived += evaluator.poll(1.0)
        return arrived

    def test_nothing_arrives_unasked(self, evaluator: Evaluator) -> None:
        assert evaluator.poll(0.01) == []

    def test_every_request_is_answered_once(self, evaluator: Evaluator) -> None:
        asked = [make_request(number) for number in range(12)]
        evaluator.submit(asked)
        assert sorted(ids(self.arrivals(evaluator, 12))) == sorted(request.id for request in asked)

    def test_requests_may_follow_while_others_are_under_way(self, evaluator: Evaluator) -> None:
        evaluator.submit([make_request(number) for number in range(6)])
        evaluator.submit([make_request(number) for number in range(6, 9)])
        assert len(set(ids(self.arrivals(evaluator, 9)))) == 9

    def test_answers_are_those_of_the_model(self, evaluator: Evaluator) -> None:
        evaluator.submit([make_request(3)])
        (answer,) = self.arrivals(evaluator, 1)
        assert isinstance(answer, EvalResult) and answer.fdt.tolist() == evaluate(make_request(3)).fdt.tolist()
