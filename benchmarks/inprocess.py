"""A search in this process, for benchmarks of strategies: one replica, nothing written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, ModelSpec, Outcome, Reference
from dtmsearch.core.evaluation import ReplicaSettings as Settings
from dtmsearch.core.records import EvaluationRecord, StepRecord
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.protocols import Decision, Progress

_BATCH = 64


class Measuring:
    """An `Evaluator` over a replica, which gets what waits in batches; counts what it measured."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._waiting: list[EvalRequest] = []
        self.evaluations = 0
        self.prompts = 0

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self._waiting += requests
        self.evaluations += len(requests)
        self.prompts += sum(request.prompts[1] - request.prompts[0] for request in requests)

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        now, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
        return self._replica.evaluate(now)


class Forgetful:
    """A `ResultLog` that keeps nothing, and an observer that looks away."""

    def replay(self) -> Iterable[Outcome]:
        return []

    def recorded_elsewhere(self, request_ids: Sequence[str]) -> Mapping[str, tuple[str, Outcome]]:
        return {}

    def append(self, records: Sequence[EvaluationRecord]) -> None: ...

    def decisions(self) -> Sequence[StepRecord]:
        return []

    def decide(self, steps: Sequence[StepRecord]) -> None: ...

    def on_progress(self, progress: Progress) -> None: ...

    def on_decision(self, decision: Decision, replayed: bool) -> None: ...

    def on_note(self, text: str) -> None: ...


def load(model: str, dtype: str) -> Replica:
    return Replica(ModelSpec(model, dtype=dtype), Settings())


def reference(replica: Replica, text: str, count: int, prompt_tokens: int, continuation_tokens: int) -> Reference:
    """A reference over a text file, in use by the replica."""
    texts = [Path(text).read_text(encoding="utf-8")]
    prompts, _ = replica.cut_prompts(texts, count, prompt_tokens, continuation_tokens, 0)
    made = replica.make_reference(prompts)
    replica.use(made)
    return made


def result(outcome: Outcome) -> EvalResult:
    if isinstance(outcome, EvalFailure):
        raise RuntimeError(f"{outcome.kind}: {outcome.message}")
    return outcome
