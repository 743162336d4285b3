"""A whole run in this process: a replica in the place of the pool, trainings without processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from dtmsearch import config
from dtmsearch.analysis.summary import RunSummary
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.config import SearchFile
from dtmsearch.core.evaluation import ReplicaSettings
from dtmsearch.model.replica.local_replicas import LocalReplicas
from dtmsearch.model.training import main as training
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.workflows.run import run


class InProcess(LocalReplicas):
    """As a search in this process has it, with trainings here too."""

    def __init__(self, file: SearchFile, where: PoolSettings) -> None:
        super().__init__(file.model_spec, ReplicaSettings(num_threads=1, weights_folder=where.weights_folder))

    def train(self, job: Path, stop_requested: Callable[[], bool]) -> int:
        (job.parent / training.STOP_FILE).unlink(missing_ok=True)
        return training.worker(str(job))


def here(file: SearchFile, where: PoolSettings) -> ModelEvaluator:
    """An `evaluator` of the verbs under which they start no other process."""
    return cast(ModelEvaluator, InProcess(file, where))


def run_here(file: Path, store: Path) -> RunSummary:
    return run(config.load(str(file)), str(store), evaluator=here)
