"""A training on a cluster: Ray Train's workers, one a GPU, or one a node where there are none. Knows no torch of its
own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

# A training whose workers die goes on from its last checkpoint this many times.
_MOST_DEATHS = 8
_POLL_SECONDS = 0.5
_WORKER = "dtmsearch.model.training.main:worker"


def _work(settings: dict[str, Any]) -> None:
    """What a worker runs: Ray Train has set up the process group that accelerate finds."""
    import importlib

    module, _, function = settings["worker"].partition(":")
    getattr(importlib.import_module(module), function)(settings["job"])


def train_on_cluster(
    job: str,
    stop_file: str,
    stop_requested: Callable[[], bool],
    num_workers: int | None = None,
    worker: str = _WORKER,
) -> bool:
    """Train a job with all GPUs of the cluster; its files must lie where all nodes see them. Returns when workers end,
    whatever they came to: whether they were asked to stop; the job's folder says the rest. Workers that die are
    replaced, and the training goes on from its last checkpoint. `worker` is what each runs (module:function)."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    scaling = ScalingConfig(num_workers=num_workers or num_gpus or num_nodes, use_gpu=num_gpus > 0)
    running = RunConfig(storage_path=str(Path(job).parent), failure_config=FailureConfig(max_failures=_MOST_DEATHS))
    told = {"job": job, "worker": worker}
    trainer = TorchTrainer(_work, train_loop_config=told, scaling_config=scaling, run_config=running)
    Path(stop_file).unlink(missing_ok=True)
    with _passed_on(stop_requested, Path(stop_file)):
        trainer.fit()
    return Path(stop_file).exists()


@contextmanager
def _passed_on(stop_requested: Callable[[], bool], stop_file: Path) -> Iterator[None]:
    """Have a wish to stop written where workers see it."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            if stop_requested():
                stop_file.touch()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
