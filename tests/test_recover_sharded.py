"""Training under masks where accelerate cuts parameters up (FSDP), in a world of one process on a CPU.

accelerate itself takes FSDP for accelerators only; the fixture tells it otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from test_recover import PRUNED, RECIPE, prepared, stop_at, weights
from tiny import TEXT, write_model

from dtmsearch.model.training.train_loop import TrainingStopped, train
from dtmsearch.model.weights.trained import MASKS_FILE, unpack_masks

_RECIPE = replace(RECIPE, masked_steps=12, lr=3e-3, accumulate=2, clip=0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sharding(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Within, accelerate shards what it prepares."""
    starts = AcceleratorState.__init__

    def sharding(state: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
        starts(state, *arguments, **settings)
        if fsdp_plugin is not None:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    monkeypatch.setattr(AcceleratorState, "__init__", sharding)
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_VERSION", "2")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield monkeypatch
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.destroy_process_group()


def test_sharded_training_comes_to_the_losses_of_one_process(model: Path, tmp_path: Path, sharding: Any) -> None:
    sharded, whole = prepared(model, tmp_path / "a" / "t"), prepared(model, tmp_path / "b" / "t")
    losses = train(sharded, [TEXT], _RECIPE)["losses"]
    sharding.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert np.allclose(losses, train(whole, [TEXT], _RECIPE)["losses"], atol=1e-4)


def test_masks_hold_bitwise_and_a_stopped_training_goes_on(model: Path, tmp_path: Path, sharding: Any) -> None:
    whole, parts = prepared(model, tmp_path / "a" / "t"), prepared(model, tmp_path / "b" / "t")
    with pytest.raises(TrainingStopped):
        train(parts, [TEXT], _RECIPE, stop_at(5))
    results = [train(training, [TEXT], _RECIPE) for training in (whole, parts)]
    trained, masks = weights(whole, results[0]), unpack_masks(whole.folder / MASKS_FILE)
    assert results[0]["weights_id"] == results[1]["weights_id"]
    assert all(torch.equal(trained[f"{name}.weight"] != 0, masks[name]) for name in PRUNED)


def test_parameters_that_are_flattened_are_refused(model: Path, tmp_path: Path, sharding: Any) -> None:
    sharding.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="set fsdp_version: 2"):
        train(prepared(model, tmp_path / "t"), [TEXT], _RECIPE)
