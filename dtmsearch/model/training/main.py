"""A training in a process of its own, `python -m dtmsearch.model.training.main JOB`, or in a worker of a cluster.

The job is a JSON file in the training's folder; beside it the result appears, or a file that says what went wrong.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtmsearch import config
from dtmsearch.config import texts
from dtmsearch.errors import UserError

JOB_FILE, FAILURE_FILE, LOG_FILE = "job.json", "failure.json", "log.txt"
# Where no signal reaches, this file in the training's folder asks it to stop.
STOP_FILE = "stop"
_DONE, STOPPED, _FAILED = 0, 3, 1
# How a process knows that accelerate has started it, and for which driver.
_LAUNCHED = "DTMSEARCH_TRAINING_LAUNCHED"


def main(arguments: Sequence[str]) -> int:
    """Train one job: 0 done, 3 stopped with its checkpoint kept, 1 failed, as the failure file says."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    job = Path(arguments[0])
    if _wants_launching():
        from dtmsearch.model.modules.compat import LAUNCHER

        os.environ[_LAUNCHED] = str(os.getppid())
        launch = ["-m", LAUNCHER, "--module", "dtmsearch.model.training.main", str(job)]
        os.execv(sys.executable, [sys.executable, *launch])  # noqa: S606 (our own module)
    return worker(str(job))


def _wants_launching() -> bool:
    """Whether accelerate is to start several processes: it is configured, or there are several GPUs."""
    import torch

    from dtmsearch.model.modules.compat import is_configured

    if _LAUNCHED in os.environ or "RANK" in os.environ:
        return False
    return torch.cuda.device_count() > 1 or is_configured()


def worker(job_path: str) -> int:
    """One process of a training; the first of several does the writing."""
    job = Path(job_path)
    content: dict[str, Any] = json.loads(job.read_text(encoding="utf-8"))
    stopping = _Stopping(job.parent / STOP_FILE)
    with _alone(job.parent), stopping.listening():
        return _train(job, content, stopping)


def _train(job: Path, content: dict[str, Any], stopping: _Stopping) -> int:
    from dtmsearch.model.training.recipe import Recipe
    from dtmsearch.model.training.train_loop import Training, TrainingDiverged, TrainingStopped, train
    from dtmsearch.model.weights.trained import write_whole

    file = config.parse(content["config"], str(job), Path(content["config_folder"]))
    base = None if content["base"] is None else Path(content["base"])
    training = Training(file.model_spec, job.parent, Path(content["weights_folder"]), base)
    try:
        recipe = Recipe(**content["recipe"])
        train(training, texts.read_texts(file, recipe.files), recipe, stopping.requested)
    except TrainingStopped:
        return STOPPED
    except (TrainingDiverged, UserError) as error:  # in every process alike
        kind = "diverged" if isinstance(error, TrainingDiverged) else "invalid"
        said = json.dumps({"kind": kind, "message": str(error)})
        write_whole(job.parent / FAILURE_FILE, lambda path: path.write_text(said, encoding="utf-8"))
        return _FAILED
    return _DONE


class _Stopping:
    """Whether somebody wants this process to end: by a signal, or because whoever started it is gone."""

    def __init__(self, file: Path) -> None:
        self._file, self._asked = file, False
        self._parent = os.getppid()
        self._driver = int(os.environ.get(_LAUNCHED, self._parent))  # not the parent where accelerate is between them

    def requested(self) -> bool:
        return self._asked or os.getppid() != self._parent or not _runs(self._driver) or self._file.exists()

    @contextmanager
    def listening(self) -> Iterator[None]:
        def note(_signal: int, _frame: object) -> None:
            self._asked = True

        if threading.current_thread() is not threading.main_thread():  # a cluster's worker: signals are not for it
            yield
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for a process that is still at this training: one whose driver was killed ends after its present step."""
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
