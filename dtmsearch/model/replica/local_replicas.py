"""One replica in this process that answers as a pool of them does: searches of small models, without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

from dtmsearch.core.calibration import Calibration, InputStatistics, PackedMatrix
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Outcome, ReplicaSettings
from dtmsearch.core.prices import PriceBlock, PriceRequest
from dtmsearch.model.replica.replica import Replica

# Evaluations of one call: between calls the search writes what it has, and looks whether it is to stop.
_REQUESTS_PER_CALL = 8


class LocalMetrics:
    """Counts nothing: there is no cluster to show it to."""

    def decided(self, *_: float) -> None: ...


class LocalReplicas:
    """Whatever a pool answers and this class does not define, its only replica answers."""

    num_replicas = 1

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings = ReplicaSettings()) -> None:
        self._replica = Replica(spec, settings)
        self._waiting: list[EvalRequest] = []
        self._solved: dict[str, dict[tuple[str, str], PackedMatrix]] = {}
        self.metrics = LocalMetrics()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._replica, name)

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self._waiting += requests

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        """Outcomes of the next few requests, in the order in which they were submitted."""
        now, self._waiting = self._waiting[:_REQUESTS_PER_CALL], self._waiting[_REQUESTS_PER_CALL:]
        return self._replica.evaluate(now)

    def use_calibration(self, calibration: Calibration, statistics: InputStatistics) -> None:
        self._replica.use_calibration(calibration, statistics)

    def use_solved(self, calibration_id: str, matrices: Iterable[PackedMatrix]) -> None:
        held = self._solved.setdefault(calibration_id, {})
        held |= {(packed.component, packed.scheme): packed for packed in matrices}
        self._replica.use_solved(calibration_id, lambda component, scheme: held.get((component, scheme)))

    def solve(
        self, calibration_id: str, parts: Sequence[Sequence[tuple[str, str]]]
    ) -> Iterator[Sequence[PackedMatrix]]:
        """Solve (component, scheme) pairs; yields a part as it is done."""
        for part in parts:
            yield self._replica.solve(calibration_id, part)

    def price_blocks(self, requests: Sequence[PriceRequest]) -> Iterator[PriceBlock]:
        """Take prices, a request after the other; yields a block as it is done."""
        return map(self._replica.price, requests)

    def rest(self) -> None:
        """Let go of memory while something else needs it, such as a training."""
        self._replica.release_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
