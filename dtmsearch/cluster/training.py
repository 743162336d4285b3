"""A training on a cluster: Ray Train's workers, one a GPU, or one on a processor. Knows no torch of its own."""

from __future__ import annotations

from typing import Any

import ray


def _work(settings: dict[str, Any]) -> None:
    """What a worker runs: Ray Train has set up the process group that accelerate finds."""
    import importlib

    worker = importlib.import_module("dtmsearch.training").worker
    worker(settings["job"])


def train_on_cluster(job: str, folder: str) -> None:
    """Train a job with all GPUs of the cluster; its files must lie where all nodes see them. Returns when workers end,
    whatever they came to: the folder says."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    scaling = ScalingConfig(num_workers=max(1, num_gpus), use_gpu=num_gpus > 0)
    TorchTrainer(
        _work, train_loop_config={"job": job}, scaling_config=scaling, run_config=RunConfig(storage_path=folder)
    ).fit()
