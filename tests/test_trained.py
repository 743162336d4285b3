"""A replica on trained weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import replica, values, with_reference, write_model

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import Variant
from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.weights.trained import MASKS_FILE, START_FILE, unpack_masks

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
PRUNED = Plan.of({QUERY: "magnitude-0.5", DOWN: "drop"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A folder of weights that holds `moved`: all layers' weights, each a little off."""
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    moved = {n: w + 0.05 * torch.randn_like(w) for n, w in weights.items() if "layers" in n}
    save_file(moved, tmp_path_factory.mktemp("weights") / "moved.safetensors")
    return next(iter(tmp_path_factory.getbasetemp().glob("weights*")))


def on_weights(folder: Path, trained: Path) -> Replica:
    settings = ReplicaSettings(num_threads=1, weights_folder=str(trained))
    return Replica(ModelSpec(str(folder), dtype="float32"), settings)


def request(reference_id: str, plan: Plan, weights_id: str = "", parent: Plan = Plan()) -> EvalRequest:
    return EvalRequest(plan, reference_id, (0, 6), ("kl", "ppl"), parent, weights_id=weights_id)


def test_trained_weights_measure_as_a_model_made_of_them(folder: Path, trained: Path, tmp_path: Path) -> None:
    model = on_weights(folder, trained)
    reference = with_reference(model)
    found = values(model.evaluate([request(reference.id, PRUNED, "moved")])[0])
    whole = write_model(tmp_path / "whole")
    save_file(
        load_file(folder / "model.safetensors") | load_file(trained / "moved.safetensors"), whole / "model.safetensors"
    )
    other = replica(whole)
    other.use(reference)
    expected = values(other.evaluate([request(reference.id, PRUNED)])[0])
    assert [found[0], found[1], found[2], found[4]] == [expected[0], expected[1], expected[2], expected[4]]


def test_the_base_model_is_back_after_trained_weights(folder: Path, trained: Path) -> None:
    model = on_weights(folder, trained)
    reference = with_reference(model)
    before = values(model.evaluate([request(reference.id, PRUNED)])[0])
    model.evaluate([request(reference.id, PRUNED, "moved")])
    assert (values(model.evaluate([request(reference.id, PRUNED)])[0]), model.canary(reference.id)) == (before, 0.0)


def test_weights_in_one_call_do_not_mix(folder: Path, trained: Path) -> None:
    model = on_weights(folder, trained)
    reference = with_reference(model)
    asked = [request(reference.id, plan, w, parent=PRUNED) for plan in (PRUNED, Plan()) for w in ("", "moved")]
    alone = [values(model.evaluate([one])[0]) for one in asked]
    assert [values(outcome) for outcome in model.evaluate(asked)] == alone


def test_divergence_is_measured_from_the_base_model(folder: Path, trained: Path) -> None:
    model = on_weights(folder, trained)
    reference = with_reference(model)
    dense = values(model.evaluate([request(reference.id, Plan(), "moved")])[0])
    assert min(dense[3]) > 0.0


def test_missing_weights_are_named(folder: Path, trained: Path) -> None:
    model = on_weights(folder, trained)
    outcome = model.evaluate([request(with_reference(model).id, PRUNED, "nowhere")])[0]
    assert "there are no trained weights at" in getattr(outcome, "message", "")


def test_what_a_training_starts_from_is_what_was_measured(folder: Path, trained: Path, tmp_path: Path) -> None:
    model = on_weights(folder, trained)
    with_reference(model)
    model.save_pruned(Variant(PRUNED, "moved"), str(tmp_path))
    start, masks = load_file(tmp_path / START_FILE), unpack_masks(tmp_path / MASKS_FILE)
    own = load_file(trained / "moved.safetensors")[f"{QUERY}.weight"]
    assert torch.equal(start[f"{QUERY}.weight"], own * masks[QUERY]) and masks[QUERY].float().mean() == 0.5
    assert not masks[DOWN].any()


def test_a_quantized_plan_cannot_be_trained_under_masks(folder: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is under int8-channel, but only pruned components"):
        on_weights(folder, trained).save_pruned(Variant(Plan.of({QUERY: "int8-channel"})), str(tmp_path))


def test_a_request_without_weights_keeps_its_identity() -> None:
    plain = request("reference", PRUNED)
    assert (replace(plain, weights_id="w").id != plain.id, replace(plain, weights_id="").id == plain.id) == (True, True)
