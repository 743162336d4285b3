"""A training by Ray Train's workers: two processes on a local Ray, stopped, continued, and one of them killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from gate import Gate
from local_ray import start_ray
from processes import PATIENCE_SECONDS, below
from safetensors.torch import load_file
from test_recover import PRUNED, RECIPE, prepared
from tiny import TEXT, write_model

from dtmsearch.cluster.train import train_on_cluster
from dtmsearch.model.training.checkpoints import checkpoints
from dtmsearch.model.training.main import JOB_FILE, STOP_FILE
from dtmsearch.model.training.train_loop import Training, train
from dtmsearch.model.weights.trained import MASKS_FILE, unpack_masks

pytestmark = [
    pytest.mark.timeout(2 * PATIENCE_SECONDS),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),  # of its own settings, on import
]

_RECIPE = replace(RECIPE, masked_steps=40, lr=3e-3, checkpoint_steps=10, repair_tokens=64)
_SEARCH = """
run: toy
model: {path: MODEL, dtype: float32}
prompts: {files: [text.txt], count: 4, prompt_tokens: 8, continuation_tokens: 8}
search: {strategy: sparsity, rounds: [30]}
"""


@dataclass(frozen=True)
class Trained:
    """What two workers came to, and what one process makes of the same training."""

    training: Training
    stopped: bool
    stopped_at: int
    killed: list[int]
    result: dict[str, Any]
    alone: dict[str, Any]


def write_job(training: Training, folder: Path) -> Path:
    (folder / "text.txt").write_text(TEXT)
    job = {
        "config": _SEARCH.replace("MODEL", training.spec.path),
        "config_folder": str(folder),
        "base": None,
        "weights_folder": str(training.weights_folder),
        "recipe": asdict(_RECIPE),
    }
    (training.folder / JOB_FILE).write_text(json.dumps(job))
    return training.folder / JOB_FILE


def step_of(training: Training) -> int:
    return max((int(path.name.partition("-")[2]) for path in checkpoints(training.folder)), default=0)


def kill_a_worker(training: Training, step: int, killed: list[int], gate: Gate) -> None:
    """Once the training's checkpoint is beyond a step, where it waits; what replaces the worker may go on."""
    while step_of(training) <= step:
        time.sleep(0.01)
    killed.append(below(os.getpid(), "RayTrainWorker")[-1])
    os.kill(killed[0], signal.SIGKILL)
    gate.open()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with pytest.MonkeyPatch.context() as patched:
        yield two_workers(tmp_path_factory.mktemp("cluster"), patched)


def two_workers(folder: Path, patched: pytest.MonkeyPatch) -> Trained:
    model = write_model(folder / "model")
    training, alone = prepared(model, folder / "two" / "t"), prepared(model, folder / "one" / "t")
    job, stop_file = write_job(training, folder), training.folder / STOP_FILE
    killed: list[int] = []
    gate = Gate(folder / "gate")
    for name, value in (gate.environment | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}).items():
        patched.setenv(name, value)
    start_ray(num_cpus=2)
    try:
        gate.bound("steps", 10)
        stopped = train_on_cluster(str(job), str(stop_file), lambda: step_of(training) >= 10, 2, "gated:worker")
        stopped_at = step_of(training)
        gate.bound("steps", stopped_at + 10)
        killer = threading.Thread(target=kill_a_worker, args=(training, stopped_at, killed, gate), daemon=True)
        killer.start()
        train_on_cluster(str(job), str(stop_file), lambda: False, 2, "gated:worker")
    finally:
        ray.shutdown()
    result = json.loads((training.folder / "result.json").read_text())
    by_one_process = train(alone, [TEXT], replace(_RECIPE, checkpoint_steps=_RECIPE.num_steps))
    return Trained(training, stopped, stopped_at, killed, result, by_one_process)


def test_a_wish_to_stop_reaches_the_workers_and_leaves_a_checkpoint(trained: Trained) -> None:
    assert trained.stopped and 10 <= trained.stopped_at < _RECIPE.num_steps


def test_a_worker_that_is_killed_is_replaced_and_the_training_ends(trained: Trained) -> None:
    assert (len(trained.killed), len(trained.result["losses"])) == (1, _RECIPE.num_steps)


def test_workers_share_every_batch_and_read_no_row_twice(trained: Trained) -> None:
    """The mean loss of every step is that of the whole batch in one process."""
    assert np.allclose(trained.result["losses"], trained.alone["losses"], rtol=0.02)


def test_masks_hold_bitwise_in_all_workers(trained: Trained) -> None:
    weights = load_file(trained.training.weights_folder / f"{trained.result['weights_id']}.safetensors")
    masks = unpack_masks(trained.training.folder / MASKS_FILE)
    assert all(torch.equal(weights[f"{name}.weight"] != 0, masks[name]) for name in PRUNED)
