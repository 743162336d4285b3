"""All that is used of Ray that is private there, or that its releases have changed; no other module names it.
tests/test_compat.py says which name a release has broken.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError

from dtmsearch.core.library_versions import ForeignName

# Loggers that repeat what is said of a submission.
TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
# Ray's word for a job that ended before it began.
NO_ENVIRONMENT = "RUNTIME_ENV_SETUP_FAILURE"
# Tune would write a folder of files for each trial, and its own tables to our stdout.
QUIET_TUNE = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
_STARTUP_TIMEOUT = "timed out during startup"


def timed_out_at_start(error: Exception) -> bool:
    """Whether a local Ray did not start in its time: on a machine that is too busy, it raises the bare class."""
    return _STARTUP_TIMEOUT in str(error)


def dead_processes() -> list[str]:
    """Kinds of the processes, of the Ray that this process has started, that have died; none where it started none."""
    node = ray._private.worker._global_node
    return [] if node is None else [kind for kind, _ in node.dead_processes()]


def was_preempted(error: Exception) -> bool:
    """Whether an actor died because its node was taken away, with notice."""
    return isinstance(error, ActorDiedError) and bool(error.preempted)


def died_with_its_node(error: Exception) -> bool:
    """Whether an actor died because its node did, with or without notice."""
    return was_preempted(error) or "node has died" in str(error)


def _says(module: str, text: str) -> Callable[[], Any]:
    def find() -> object:
        return {True: module}[text in inspect.getsource(importlib.import_module(module))]

    return find


def _logs(module: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(module)


NAMES: tuple[ForeignName, ...] = (
    ForeignName("ray._private.worker._global_node", "see that a local Ray lives"),
    ForeignName("ray._private.node.Node.dead_processes", "see that a local Ray lives"),
    ForeignName("ray.exceptions.ActorDiedError.preempted", "blame no request for a preempted replica"),
    ForeignName("ray._private.node: its timeout", "report a slow start", _says("ray._private.node", _STARTUP_TIMEOUT)),
    *(ForeignName(name, "keep a logger quiet", _logs(name)) for name in TALKATIVE),
    ForeignName(
        f"ray.dashboard.modules.job.common.JobErrorType.{NO_ENVIRONMENT}",
        "tell why a job's environment could not be made",
    ),
    *(
        ForeignName(f"ray.tune: {variable}", "keep sweeps quiet", _says(module, variable))
        for variable, module in zip(QUIET_TUNE, ("ray.tune.constants", "ray.tune.experimental.output"), strict=True)
    ),
)
