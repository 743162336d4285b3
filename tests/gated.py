"""Searches and trainings that wait for a test's word, so that a fault finds them at work on a machine of any speed.

A `Gate` is a folder whose files say how far they may go. In the process under test, this module stands in for what
evaluates (`GatedReplica`) and for what trains (`worker`, or `python -m gated JOB`).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.training import main as training
from dtmsearch.model.training.checkpoints import checkpoints

VARIABLE = "DTMSEARCH_TEST_GATE"


class Gate:
    """How far the process under test may go: evaluate plans of so many components, train so many steps. What no file
    bounds goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        return {VARIABLE: str(self.folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def bound(self, what: str, value: int) -> None:
        """`what`: components (of the plans that are evaluated) or steps (of a training)."""
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
    """Evaluates no plan of more components than its gate allows, until it does."""

    def evaluate(self, requests):  # type: ignore[no-untyped-def]
        gate, most = _gate(), max((len(request.plan) for request in requests), default=0)
        while gate is not None and not gate.allows("components", most):
            time.sleep(0.01)
        return super().evaluate(requests)


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


def command() -> int:
    """The command line over gated replicas and trainings."""
    from dtmsearch.cli import main
    from dtmsearch.cluster import pool
    from dtmsearch.model.training import training_process

    pool.REPLICA_CLASS = "gated:GatedReplica"
    training_process.TRAINING_MODULE = "gated"
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1]))
