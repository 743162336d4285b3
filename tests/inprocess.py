"""A whole run in this process: a replica in the place of the pool, trainings without processes of their own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from dtmsearch import config
from dtmsearch.config import SearchFile
from dtmsearch.core.evaluation import EvalRequest, Outcome, ReplicaSettings
from dtmsearch.core.prices import PriceBlock, PriceRequest
from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.training import main as training
from dtmsearch.workflows import evaluate as measuring
from dtmsearch.workflows.recover import Recovering


class InProcess(Replica):
    """A replica in the place of a pool of them."""

    metrics = SimpleNamespace(decided=lambda *_: None)
    waiting: Sequence[EvalRequest] = ()

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self.waiting = (*self.waiting, *requests)

    def poll(self, _timeout_seconds: float) -> list[Outcome]:
        now, self.waiting = self.waiting, ()
        return self.evaluate(now)

    def price_blocks(self, requests: Sequence[PriceRequest]) -> Iterator[PriceBlock]:
        return map(self.price, requests)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def _pool(file: SearchFile, where: Any, *_: object) -> InProcess:
    return InProcess(file.model_spec, ReplicaSettings(num_threads=1, weights_folder=where.weights_folder))


@contextmanager
def here() -> Iterator[None]:
    """Within, the verbs start no other process."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (
            importlib.import_module("dtmsearch.workflows.run"),
            measuring,
        ):  # by attribute the first is the verb
            patch.setattr(module, "pool_for", _pool)
        patch.setattr(Recovering, "_train_here", lambda _, folder: training.worker(str(folder / training.JOB_FILE)))
        yield


def run_here(file: Path, store: Path) -> None:
    with here():
        importlib.import_module("dtmsearch.workflows.run").run(config.load(str(file)), str(store))
