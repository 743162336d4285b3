"""Folders for TensorRT-LLM: codes and scales by ModelOpt's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exports import Measured, measured_plan
from safetensors.torch import load_file
from tiny import llama_config, write_model

from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.errors import UserError
from dtmsearch.model.replica.replica import Replica

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
PLAN = {
    **dict.fromkeys((f"{ATTENTION}.{part}_proj" for part in "qkv"), "nvfp4a16"),
    f"{ATTENTION}.o_proj": "fp8-channel",
    **dict.fromkeys((f"{MLP}.gate_proj", f"{MLP}.up_proj"), "fp8-tensor"),
    f"{MLP}.down_proj": "mxfp8",
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("modelopt")
    config = llama_config(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    return measured_plan(write_model(folder / "model", config), folder / "store", PLAN)


def restored(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """A matrix by the format's own arithmetic."""
    weight, scale = parts["weight"], parts["weight_scale"]
    if weight.dtype == torch.uint8:
        codes = torch.stack((weight & 15, weight >> 4), -1).flatten(-2).long()
        values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
        return values * (scale.float() * parts["weight_scale_2"]).repeat_interleave(16, 1)
    if scale.dtype == torch.uint8:
        return weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    return weight.float() * (scale.reshape(-1, 1) if scale.ndim else scale)


def test_the_files_hold_the_measured_weights(mixed: Measured, tmp_path: Path) -> None:
    mixed.export("modelopt", tmp_path / "out", check=False)
    state = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads(next((mixed.store.parent / "model").glob("config.json")).read_text())
    assert "quantization_config" not in config
    replica = Replica(ModelSpec(str(mixed.store.parent / "model"), dtype="float32"), ReplicaSettings(num_threads=1))
    weights = replica._weights
    for name, scheme in PLAN.items():
        parts = {key.removeprefix(f"{name}."): part for key, part in state.items() if key.startswith(f"{name}.")}
        if scheme == "fp8-tensor":  # its inputs would have to be calibrated here
            assert parts["weight_scale"].shape == parts["input_scale"].shape == ()
            continue
        with weights.perturbed(Plan.of({name: scheme})):
            expected = weights.module(name).weight.clone()
        torch.testing.assert_close(restored(parts), expected.float(), rtol=2**-8, atol=0)


def test_the_configuration_names_the_algorithm_of_each_layer(mixed: Measured, tmp_path: Path) -> None:
    mixed.export("modelopt", tmp_path / "out", check=False)
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "MIXED_PRECISION"
    assert said["quantized_layers"][f"{ATTENTION}.q_proj"] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert said["quantized_layers"][f"{MLP}.up_proj"] == {"quant_algo": "FP8"}
    assert not set(said["exclude_modules"]) & set(PLAN)


def test_what_the_format_does_not_have_is_refused(tmp_path: Path) -> None:
    plan = {f"{ATTENTION}.o_proj": "int4-g32"}
    measured = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", plan)
    with pytest.raises(UserError, match="it stores fp8-tensor"):
        measured.export("modelopt", tmp_path / "out", check=False)
    assert not list(tmp_path.rglob("*.partial"))
