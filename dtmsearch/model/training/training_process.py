"""A training in a process beside the one that asks for it, which hears of stops by a file."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dtmsearch.model.training.main import LOG_FILE, STOP_FILE, STOPPED

# What runs as the process of a training.
TRAINING_MODULE = "dtmsearch.model.training.main"
_POLL_SECONDS = 0.2
# A training that is interrupted has this long to write its checkpoint.
_PATIENCE_SECONDS = 120.0


def train_apart(job: Path, stop_requested: Callable[[], bool]) -> int:
    """Train the job of a file; see `ModelEvaluator.train` in `dtmsearch.search.evaluator`."""
    command = [sys.executable, "-m", TRAINING_MODULE, str(job)]
    stop = job.parent / STOP_FILE
    stop.unlink(missing_ok=True)
    with (job.parent / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 (our own module)
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if stop_requested():
                stop.touch()  # it ends after a step, of several processes after some
        # Where accelerate has started several processes, theirs is not the code that is seen here.
        return STOPPED if stop_requested() else process.returncode
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
