"""One replica in this process that answers as a pool of them does: searches of small models, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from dtmsearch.core.calibration import Calibration, InputStatistics, PackedMatrix
from dtmsearch.core.evaluation import MOST_TOGETHER, EvalRequest, ModelSpec, Outcome, ReplicaSettings
from dtmsearch.core.prices import PriceBlock, PriceRequest
from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.training.training_process import train_apart

# Evaluations of one call: between calls the search writes what it has, and looks whether it is to stop.
_REQUESTS_PER_CALL = 8


class LocalReplicas:
    """Whatever a pool answers and this class does not define, its only replica answers."""

    num_replicas = 1

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings = ReplicaSettings()) -> None:
        self._replica = Replica(spec, settings)
        self._waiting: list[EvalRequest] = []
        self._solved: dict[str, dict[tuple[str, str], PackedMatrix]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._replica, name)

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self._waiting += requests

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        """Outcomes of the next few requests, in the order in which they were submitted."""
        most = MOST_TOGETHER if self._replica.states_kept == "together" else _REQUESTS_PER_CALL
        now, self._waiting = self._waiting[:most], self._waiting[most:]
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

    def train(self, job: Path, stop_requested: Callable[[], bool]) -> int:
        """Train in a process of its own, which gets the memory of the device."""
        self._replica.release_memory()
        return train_apart(job, stop_requested)

    def decided(self, fdt_mean: float, bits_per_weight: float) -> None:
        """There is no cluster to show it to."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
