"""A run's trainings: in processes of their own, stopped and continued, found again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from gate import Gate
from inprocess import InProcess
from safetensors.torch import load_file
from tiny import TEXT, write_model

from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.config import SearchFile, parse, recovery_of, texts
from dtmsearch.core.evaluation import ReplicaSettings
from dtmsearch.core.identity import identity
from dtmsearch.core.plan import Plan
from dtmsearch.core.training_settings import RecoverySettings
from dtmsearch.errors import RecoveryDiverged, SearchStopped
from dtmsearch.model.replica.local_replicas import LocalReplicas
from dtmsearch.model.training import training_process
from dtmsearch.model.training.checkpoints import checkpoints
from dtmsearch.model.training.recipe import Recipe
from dtmsearch.model.training.train_loop import Training, train
from dtmsearch.model.weights.trained import MASKS_FILE, unpack_masks
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.protocols import Silent, TrainRequest
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.recover import Recovering, _failure, named_by
from dtmsearch.workflows.session import Session

DOWN = "model.layers.1.mlp.down_proj"
PLAN = Plan.of({DOWN: "magnitude-0.5", "model.layers.0.self_attn.k_proj": "drop"})
TRAINING = TrainRequest(0, PLAN, "")
NOBODY: Any = (None, None, None)
SEARCH = """
run: toy
model: {path: model, dtype: float32}
prompts: {files: [text.txt], count: 4, prompt_tokens: 8, continuation_tokens: 8}
search:
  strategy: sparsity
  rounds: [30]
  recovery: {files: [text.txt], masked_steps: STEPS, unmasked_steps: 0, batch_tokens: 64, sequence_tokens: 16,
             checkpoint_steps: 2}
"""


def search_file(folder: Path, steps: int) -> SearchFile:
    write_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return parse(SEARCH.replace("STEPS", str(steps)), "search.yaml", folder)


@contextmanager
def recovering(
    file: SearchFile, stop_requested: Callable[[], bool] = lambda: False, apart: bool = False
) -> Iterator[Recovering]:
    """Trainings for a store beside the file, with a replica in this process for a pool; they run here, or `apart` in a
    process of their own."""
    results = ResultStore(file.folder / "store")
    settings = ReplicaSettings(num_threads=1, weights_folder=results.weights_folder)
    where = PoolSettings(weights_folder=results.weights_folder)
    replicas = LocalReplicas(file.model_spec, settings) if apart else InProcess(file, where)
    pool, section = cast(ModelEvaluator, replicas), file.search.recovery
    assert section is not None
    with results.writer("toy") as writer:
        session = Session(file, results, writer, pool, pool.manifest(), Silent(), stop_requested)
        yield Recovering(session, section)


@pytest.mark.process
def test_a_training_stopped_in_its_process_goes_on_to_the_weights_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from processes import forking_python  # the other tests of this file start no process

    file = search_file(tmp_path, 20)
    root = tmp_path / "store" / "trainings"
    gate = Gate(tmp_path / "gate")
    gate.bound("steps", 2)  # it is at work when it hears of the stop
    monkeypatch.setattr(training_process, "TRAINING_MODULE", "gated")
    monkeypatch.setattr(sys, "executable", forking_python())
    for name, value in gate.environment.items():
        monkeypatch.setenv(name, value)
    with (
        recovering(file, lambda: any(checkpoints(path) for path in root.glob("*")), apart=True) as trainings,
        pytest.raises(SearchStopped),
    ):
        trainings(TRAINING)
    [folder] = [path for path in root.iterdir() if path.name != "texts"]
    stopped_at = int(checkpoints(folder)[-1].name.partition("-")[2])
    with recovering(file) as trainings:
        weights_id = trainings(TRAINING)
    job = json.loads((folder / "job.json").read_text())
    for name in ("start.safetensors", "masks.safetensors"):
        (tmp_path / "whole").mkdir(exist_ok=True)
        (tmp_path / "whole" / name).write_bytes((folder / name).read_bytes())
    whole = Training(file.model_spec, tmp_path / "whole", tmp_path / "weights")
    undisturbed = train(whole, texts.read_files(file, job["recipe"]["files"]), Recipe(**job["recipe"]))
    assert (0 < stopped_at < 20, weights_id) == (True, undisturbed["weights_id"])


def test_a_stopped_training_is_no_failed_one_whatever_code_its_launcher_ends_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nuntil [ -e "${3%job.json}stop" ]; do sleep 0.05; done; exit 1\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    with recovering(search_file(tmp_path, 2), lambda: True, apart=True) as trainings, pytest.raises(SearchStopped):
        trainings(TRAINING)


def test_a_training_that_is_in_the_store_is_found_and_its_weights_keep_the_masks(tmp_path: Path) -> None:
    file = search_file(tmp_path, 2)
    with recovering(file) as trainings:
        first = trainings(TRAINING)
        [result] = (tmp_path / "store" / "trainings").glob("*/result.json")
        written_at = result.stat().st_mtime_ns
        assert (trainings(TRAINING), result.stat().st_mtime_ns) == (first, written_at)
    trained = load_file(tmp_path / "store" / "weights" / f"{first}.safetensors")
    kept = unpack_masks(result.parent / MASKS_FILE)[DOWN]
    assert ((trained[f"{DOWN}.weight"] != 0) == kept).all() and kept.float().mean() == 0.5
    assert ResultStore(tmp_path / "store").weights_id("toy") == first


def test_a_fit_that_changed_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Session, "note", lambda _, line: told.append(line))
    with recovering(search_file(tmp_path, 2)) as trainings:
        trainings._recovery = replace(trainings._recovery, repair_tokens=64)
        trainings(replace(TRAINING, plan=Plan.of({DOWN: "magnitude-0.5"})))  # of which no whole columns go
    assert [line for line in told if line.startswith("nothing was fitted")]


def test_a_loss_that_is_no_number_can_be_resumed_from(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text(json.dumps({"kind": "diverged", "message": "the loss is nan"}))
    assert isinstance(_failure(tmp_path, 1), RecoveryDiverged)


def test_a_training_that_dies_shows_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("loading\nKilled by the kernel\n")
    assert "ended with code -9" in str(_failure(tmp_path, -9)) and "Killed by the kernel" in str(_failure(tmp_path, -9))


def test_a_bucket_cannot_hold_trainings(tmp_path: Path) -> None:
    from pyarrow import fs

    file = search_file(tmp_path, 2)
    bucket = ResultStore("store", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    section = file.search.recovery
    assert section is not None
    with pytest.raises(ValueError, match="is a bucket: give --store a folder that every node sees"):
        Recovering(Session(file, bucket, *NOBODY, Silent()), section)


def test_recover_takes_the_files_settings_and_overrides(tmp_path: Path) -> None:
    section = recovery_of(search_file(tmp_path, 2), ["lr=0.5", "masked_steps=7"])
    assert (section.lr, section.masked_steps, section.batch_tokens) == (0.5, 7, 64)


def test_compressed_training_text_is_read(tmp_path: Path) -> None:
    import pyarrow as pa

    file = search_file(tmp_path, 2)
    with pa.CompressedOutputStream(str(tmp_path / "more.txt.zst"), "zstd") as stream:
        stream.write(TEXT.encode())
    assert texts.read_files(file, ["more.txt.zst"]) == [TEXT]


def test_a_training_without_hidden_states_is_named_as_before_there_were_any() -> None:
    plain = RecoverySettings(("text.txt",))
    assert set(named_by(replace(plain, distill_hidden=0.5))) - set(named_by(plain)) == {"distill_hidden"}
    assert identity(named_by(plain)) == "bcb61b76c973836557a2d4edcca6b2eb"
