"""Searches and trainings that wait for a test's word, so that a fault finds them at work on a machine of any speed.

A `Gate` is a folder whose files say how far they may go. In the process under test, this module stands in for what
evaluates (`GatedReplica`, or `ToyReplica` where a test is not about the model) and for what trains (`worker`, or
`python -m gated JOB`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace
from typing import IO

from gate import at_speed, gate_here
from toy import ToyReplicas

from dtmsearch.model.replica.local_replicas import _REQUESTS_PER_CALL as _AT_ONCE
from dtmsearch.model.replica.local_replicas import LocalReplicas
from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.training import main as training
from dtmsearch.model.training.checkpoints import checkpoints


class GatedReplica(Replica):
    """Evaluates nothing that its gate forbids, until it allows it."""

    num_evaluated = 0

    def must_wait(self, requests) -> bool:  # type: ignore[no-untyped-def]
        gate, most = gate_here(), max((len(request.plan) for request in requests), default=0)
        if gate is None:
            return False
        return not (gate.allows("components", most) and gate.allows("evaluations", self.num_evaluated + 1))

    def evaluate(self, requests):  # type: ignore[no-untyped-def]
        while self.must_wait(requests):
            time.sleep(0.01)
        self.num_evaluated += len(requests)
        with at_speed():
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

    _asked_at: float | None = None

    def requested(self) -> bool:
        with at_speed(0.0 if self._asked_at is None else time.perf_counter() - self._asked_at):
            stop = self._requested()
        self._asked_at = time.perf_counter()
        return stop

    def _requested(self) -> bool:
        gate = gate_here()
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


class ForkedTraining:
    """As a `subprocess.Popen` of a training's command, but a fork of this process, which has imported torch already."""

    def __init__(self, command: list[str], stdout: IO[bytes], stderr: IO[bytes], stdin: int) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for stream, to in ((stdout, 1), (stderr, 2)):
                    os.dup2(stream.fileno(), to)
                code = worker(command[-1])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a training", timeout)
            time.sleep(0.01)
        return code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


# What a module that starts a training by `subprocess` has in its place.
_FORKING = SimpleNamespace(Popen=ForkedTraining, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)


def command(arguments: list[str]) -> int:
    """The command line over gated replicas and trainings."""
    from dtmsearch.cli import main
    from dtmsearch.cluster import pool
    from dtmsearch.model.replica import local_replicas
    from dtmsearch.model.training import training_process

    pool.REPLICA_CLASS = "gated:GatedReplica"
    local_replicas.LocalReplicas, local_replicas.Replica = GatedReplicas, GatedReplica  # type: ignore[misc]
    training_process.subprocess = _FORKING  # type: ignore[assignment]
    return main(arguments)


def toy_command(arguments: list[str]) -> int:
    """The command line over toy replicas, on Ray or in its own process, that are gated too."""
    from dtmsearch.cli import main
    from dtmsearch.cluster import pool
    from dtmsearch.model.replica import local_replicas

    pool.REPLICA_CLASS = "toy:ToyReplica"
    local_replicas.LocalReplicas = ToyReplicas  # type: ignore[misc,assignment]
    return main(arguments)


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1]))
