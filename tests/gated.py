"""Searches and trainings that wait for a test's word, so that a fault finds them at work on a machine of any speed.

A `Gate` is a folder whose files say how far they may go. In the process under test, this module stands in for what
evaluates (`GatedReplica`) and for what trains (`worker`, or `python -m gated JOB`).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from dtmsearch.model.replica.local_replicas import _REQUESTS_PER_CALL as _AT_ONCE
from dtmsearch.model.replica.local_replicas import LocalReplicas
from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.training import main as training
from dtmsearch.model.training.checkpoints import checkpoints

VARIABLE = "DTMSEARCH_TEST_GATE"
# Seconds that an evaluation takes longer here: a machine of another speed, under which tests must hold as well.
SLOWED_VARIABLE = "DTMSEARCH_TEST_SLOWED"


class Gate:
    """How far the process under test may go: evaluate plans of so many components, so many evaluations, train so many
    steps. What no file bounds goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        return {VARIABLE: str(self.folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def bound(self, what: str, value: int) -> None:
        """`what`: components (of the plans that are evaluated), evaluations (of a process; of those that it begins at
        once a few more) or steps (of a training)."""
        partial = self.folder / f"{what}.new"
        partial.write_text(str(value))
        partial.replace(self.folder / what)

    def open(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def allows(self, what: str, value: int) -> bool:
        try:
            return value <= int((self.folder / what).read_text())
        except FileNotFoundError:
            return True


def _gate() -> Gate | None:
    return Gate(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None


class GatedReplica(Replica):
    """Evaluates nothing that its gate forbids, until it allows it."""

    num_evaluated = 0

    def must_wait(self, requests) -> bool:  # type: ignore[no-untyped-def]
        gate, most = _gate(), max((len(request.plan) for request in requests), default=0)
        if gate is None:
            return False
        return not (gate.allows("components", most) and gate.allows("evaluations", self.num_evaluated + 1))

    def evaluate(self, requests):  # type: ignore[no-untyped-def]
        while self.must_wait(requests):
            time.sleep(0.01)
        self.num_evaluated += len(requests)
        time.sleep(float(os.environ.get(SLOWED_VARIABLE, "0")) * len(requests))
        return super().evaluate(requests)


class GatedReplicas(LocalReplicas):
    """The same in the driver's own process, which while it waits hears that it is to stop."""

    def poll(self, timeout_seconds):  # type: ignore[no-untyped-def]
        if self._replica.must_wait(self._waiting[:_AT_ONCE]):
            time.sleep(0.01)
            return []
        return super().poll(timeout_seconds)


class _Stopping(training._Stopping):
    """Asked before every step: waits once a checkpoint is as far as its gate allows, unless it is to stop."""

    def requested(self) -> bool:
        gate = _gate()
        while not super().requested():
            found = checkpoints(self._file.parent)
            step = int(found[-1].name.rpartition("-")[2]) if found else 0
            if gate is None or gate.allows("steps", step + 1):
                return False
            time.sleep(0.01)
        return True


def worker(job: str) -> int:
    """A training's process."""
    training._Stopping = _Stopping  # type: ignore[misc]
    return training.worker(job)


def command(arguments: list[str]) -> int:
    """The command line over gated replicas and trainings."""
    from dtmsearch.cli import main
    from dtmsearch.cluster import pool
    from dtmsearch.model.replica import local_replicas
    from dtmsearch.model.training import training_process

    pool.REPLICA_CLASS = "gated:GatedReplica"
    local_replicas.LocalReplicas, local_replicas.Replica = GatedReplicas, GatedReplica  # type: ignore[misc]
    training_process.TRAINING_MODULE = "gated"
    return main(arguments)


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1]))
