"""Exports of plans over trained weights: of a search that trains between its rounds, and of `recover` after it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exports import in_process
from inprocess import here, run_here
from processes import forking_python, tiny_search
from safetensors.torch import load_file, save_file
from tiny import llama_config, write_model

from dtmsearch.cli import main
from dtmsearch.config import load
from dtmsearch.errors import UserError
from dtmsearch.model.weights.trained import unpack_masks
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.evaluate import evaluate, recover
from dtmsearch.workflows.export import Exported, export

RUN = "tiny"
RECOVERY = {"files": ["train.txt"], "masked_steps": 3, "unmasked_steps": 1, "batch_tokens": 64, "sequence_tokens": 16}


@dataclass(frozen=True)
class Trained:
    """A search that trained between its rounds, and the weights that it ended with."""

    file: Path
    store: Path
    weights_id: str

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.store / "weights" / f"{self.weights_id}.safetensors")

    def export(self, to: str, out: Path, source: str = RUN, weights: str | None = None) -> Exported:
        return export(source, to, out, str(self.store), weights=weights)


def planned(searched: Trained, folder: Path, scheme: str) -> Path:
    """A plan file over the weights that the search ended with: its components under another scheme."""
    searched.export("json", folder / "json")
    path = folder / "json" / "plan.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schemes": dict.fromkeys(content["schemes"], scheme)}))
    return path


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    search = {"strategy": "sparsity", "rounds": [30, 20], "prune": "wanda", "recovery": RECOVERY}
    file, store = tiny_search(folder, search=search, prompts__count=16), folder / "store"
    run_here(file, store)
    return Trained(file, store, ResultStore(store).weights_id(RUN))


@pytest.fixture(scope="module")
def again(searched: Trained) -> str:
    """The weights that one more training of the search's plan came to."""
    return recover(RUN, str(searched.store), ["unmasked_steps=0"], evaluator=here).weights_id


def test_a_plan_without_dropped_or_cut_blocks_has_nothing_to_repair(searched: Trained) -> None:
    with pytest.raises(UserError, match="the plan has neither: give repair_tokens=0"):
        recover(RUN, str(searched.store), ["unmasked_steps=0", "repair_tokens=64"], evaluator=here)


@pytest.mark.process
def test_a_trained_model_measures_as_recorded_in_a_fresh_process(
    searched: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", forking_python())
    exported = searched.export("dense", tmp_path / "out")
    assert exported.check is not None and exported.check.equal and exported.weights_id == searched.weights_id


def test_its_tensors_are_the_trained_ones_with_what_the_plan_prunes_at_zero(
    searched: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    plan = searched.export("dense", tmp_path / "out").plan
    written, trained = load_file(tmp_path / "out" / "model.safetensors"), searched.weights
    pruned = {f"{name}.weight" for name in plan.schemes}
    assert all(torch.equal(written[name], trained[name]) for name in trained.keys() - pruned)
    assert all(((written[n] == trained[n]) | (written[n] == 0)).all() and (written[n] == 0).any() for n in pruned)


def test_weights_trained_under_masks_are_exported_with_their_zeros(
    searched: Trained, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    check = searched.export("dense", tmp_path / "out", weights=again).check
    written = load_file(tmp_path / "out" / "model.safetensors")
    [result] = [p for p in searched.store.glob("trainings/*/result.json") if again in p.read_text()]
    masks = unpack_masks(result.parent / "masks.safetensors")
    assert check is not None and check.equal and again != searched.weights_id
    assert masks and all(((written[f"{name}.weight"] != 0) == kept).all() for name, kept in masks.items())


def test_a_plan_file_names_its_weights_and_is_exported_over_them(
    searched: Trained, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    searched.export("json", tmp_path / "json", weights=again)
    check = searched.export("dense", tmp_path / "out", str(tmp_path / "json" / "plan.json")).check
    assert check is not None and check.equal
    weight = "model.norm.weight"
    trained = load_file(searched.store / "weights" / f"{again}.safetensors")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[weight], trained[weight])


def test_a_plan_file_is_evaluated_over_its_weights(searched: Trained, tmp_path: Path) -> None:
    searched.export("json", tmp_path / "json")
    found = [
        evaluate(load(str(searched.file)), plan, str(searched.store), evaluator=here).summary
        for plan in (str(tmp_path / "json" / "plan.json"), RUN)
    ]
    assert found[0] == found[1] is not None


def test_what_was_trained_can_be_quantized_and_packed(
    searched: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    plan = planned(searched, tmp_path, "int8-channel")
    evaluate(load(str(searched.file)), str(plan), str(searched.store), evaluator=here)
    check = searched.export("compressed-tensors", tmp_path / "out", str(plan)).check
    written = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert check is not None and check.equal and torch.equal(written, searched.weights["model.norm.weight"])


def test_the_card_and_the_summary_name_the_weights(
    searched: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(monkeypatch)
    assert main(["export", RUN, "--to", "dense", "--out", str(tmp_path / "out"), "--store", str(searched.store)]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert [searched.weights_id in text for text in (card, capsys.readouterr().out)] == [True, True]


def test_the_base_models_own_weights_can_be_asked_for(
    searched: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    with pytest.raises(ValueError, match="holds no measurement of this plan to hold"):
        searched.export("dense", tmp_path / "out", weights="")


def test_formats_that_cannot_hold_all_that_was_trained_say_so(searched: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"norms and biases were trained[^$]*\n  trained weights"):
        searched.export("evopress", tmp_path / "out")


def test_weights_that_are_not_there_are_named(searched: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no trained weights at .*nowhere\.safetensors"):
        searched.export("dense", tmp_path / "out", weights="nowhere")


def test_weights_of_another_model_are_refused(searched: Trained, tmp_path: Path) -> None:
    other = load_file(write_model(tmp_path / "other", llama_config(hidden_size=16)) / "model.safetensors")
    save_file({n: w for n, w in other.items() if "layers" in n}, searched.store / "weights" / "other.safetensors")
    with pytest.raises(ValueError, match="weights other cannot be put into the files of"):
        export(RUN, "dense", tmp_path / "out", str(searched.store), weights="other", check=False)


def test_matrices_solved_for_trained_weights_are_not_kept(searched: Trained, tmp_path: Path) -> None:
    plan = planned(searched, tmp_path, "sparsegpt-0.5")
    with pytest.raises(ValueError, match=r"no matrices solved for the trained weights[^$]*\n  .*_proj: sparsegpt"):
        export(str(plan), "dense", tmp_path / "out", str(searched.store), check=False)
