"""Between the loop and its log: what is durable and was not told yet, and the decisions that are recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dtmsearch.core.evaluation import Outcome
from dtmsearch.core.records import EvaluationRecord, Purpose, StepRecord
from dtmsearch.search.protocols import Ask, Decision, Observer, ResultLog


class Memory:
    """Outcomes that are durable and that the strategy has not been told: those of earlier sessions, read as they are
    asked for, and what this session writes. Nothing is known before it is durable."""

    def __init__(self, log: ResultLog) -> None:
        self._log = log
        self._recorded = iter(log.replay())
        self._held: dict[str, Outcome] = {}

    def __len__(self) -> int:
        """How many are held, of those that were read and written so far."""
        return len(self._held)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    def recall(self, request_ids: Iterable[str]) -> None:
        """Read on in the records until all of these are held; to the end where one is not recorded."""
        missing = set(request_ids) - self._held.keys()
        while missing and (outcome := next(self._recorded, None)) is not None:
            self._held[outcome.request_id] = outcome
            missing.discard(outcome.request_id)

    def write(self, records: Sequence[EvaluationRecord]) -> None:
        if records:
            self._log.append(records)
        self._held |= {record.outcome.request_id: record.outcome for record in records}

    def take(self, request_id: str) -> Outcome:
        """An outcome to tell. No request is asked twice, so it need not be held any longer."""
        return self._held.pop(request_id)


class Decisions:
    """The decisions of a search: new ones are recorded, replayed ones held against what was recorded."""

    def __init__(self, log: ResultLog, observer: Observer) -> None:
        self._log, self._observer = log, observer
        self._steps = list(log.decisions())
        self._seen = 0

    @property
    def wall_seconds(self) -> float:
        """Of the search up to the latest that is recorded."""
        return self._steps[-1].wall_seconds if self._steps else 0.0

    def record(self, decisions: Sequence[Decision], evaluations: int, wall_seconds: float) -> None:
        """Take note of all decisions so far, which were come to by so many evaluations in so long."""
        for decision in decisions[self._seen : len(self._steps)]:
            recorded = self._steps[decision.step]
            if recorded.plan_id != decision.plan.id:
                raise RuntimeError(
                    f"step {decision.step} of this run chose plan {recorded.plan_id}, but its records now give "
                    f"{decision.plan.id}: records are missing, or were made by another version. Use another run name"
                )
            self._observer.on_decision(decision, replayed=True)
            self._seen += 1
        new = decisions[len(self._steps) :]
        if not new:
            return
        steps = [_step_record(d, evaluations, wall_seconds) for d in new]
        self._log.decide(steps)
        self._steps += steps
        self._seen = len(self._steps)
        for decision in new:
            self._observer.on_decision(decision, replayed=False)


def record_of(
    ask: Ask,
    outcome: Outcome,
    purpose: Purpose,
    step: int | None = None,
    reused_from: str | None = None,
    label: str | None = None,
) -> EvaluationRecord:
    """What is recorded of an outcome."""
    perturbation = None if ask.perturbation is None else str(ask.perturbation)
    return EvaluationRecord(ask.request, outcome, purpose, step, perturbation, reused_from, label)


def _step_record(decision: Decision, evaluations: int, wall_seconds: float) -> StepRecord:
    return StepRecord(
        step=decision.step,
        plan_id=decision.plan.id,
        perturbation=None if decision.perturbation is None else str(decision.perturbation),
        score=decision.score,
        num_compressed=decision.size.num_compressed,
        share=decision.size.share,
        bits_per_weight=decision.size.bits_per_weight,
        sparsity=decision.size.sparsity,
        evaluations=evaluations,
        wall_seconds=wall_seconds,
        active_bits_per_weight=decision.size.active_bits_per_weight if decision.size.is_of_mixture else None,
    )
