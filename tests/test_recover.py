"""Training under masks, on models of a few thousand weights and a few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LONG_TEXT as TEXT
from tiny import write_model

from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.model.modules.loading import load_model
from dtmsearch.model.training.batches import batch_rows
from dtmsearch.model.training.checkpoints import checkpoints
from dtmsearch.model.training.learner import Learner, _states_read, accelerator_for
from dtmsearch.model.training.recipe import Recipe
from dtmsearch.model.training.train_loop import Training, TrainingDiverged, TrainingStopped, train
from dtmsearch.model.weights.trained import MASKS_FILE, START_FILE, pack_masks, unpack_masks

PRUNED = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
RECIPE = Recipe(("text.txt",), 6, 0, batch_tokens=64, sequence_tokens=16, lr=1e-2, checkpoint_steps=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def prepared(model: Path, folder: Path) -> Training:
    """A training whose start has half of two components pruned."""
    own = load_file(model / "model.safetensors")
    kept = {name: own[f"{name}.weight"].abs() > own[f"{name}.weight"].abs().median() for name in PRUNED}
    folder.mkdir(parents=True)
    save_file({f"{name}.weight": own[f"{name}.weight"] * mask for name, mask in kept.items()}, folder / START_FILE)
    pack_masks(kept, folder / MASKS_FILE)
    return Training(ModelSpec(str(model), dtype="float32"), folder, folder.parent / "weights")


def weights(training: Training, result: dict[str, object]) -> dict[str, torch.Tensor]:
    return load_file(training.weights_folder / f"{result['weights_id']}.safetensors")


def stop_at(step: int):
    """Turns true after so many questions, one at each step."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= step


def test_masks_hold_bitwise_through_training(model: Path, tmp_path: Path) -> None:
    training = prepared(model, tmp_path / "t")
    trained, masks = weights(training, train(training, [TEXT], RECIPE)), unpack_masks(training.folder / MASKS_FILE)
    assert all(torch.equal(trained[f"{n}.weight"] != 0, masks[n]) for n in PRUNED)


def test_what_is_not_pruned_learns(model: Path, tmp_path: Path) -> None:
    training = prepared(model, tmp_path / "t")
    losses = train(training, [TEXT], replace(RECIPE, masked_steps=30))["losses"]
    assert losses[-1] < losses[0] - 0.5


def test_steps_without_the_mask_let_pruned_weights_grow(model: Path, tmp_path: Path) -> None:
    training = prepared(model, tmp_path / "t")
    trained = weights(training, train(training, [TEXT], replace(RECIPE, masked_steps=2, unmasked_steps=2)))
    assert all((trained[f"{n}.weight"] != 0).float().mean() > 0.9 for n in PRUNED)


def test_embeddings_and_the_head_stay_the_base_models(model: Path, tmp_path: Path) -> None:
    training = prepared(model, tmp_path / "t")
    trained = weights(training, train(training, [TEXT], RECIPE))
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & trained.keys() and "model.norm.weight" in trained


@pytest.mark.parametrize("stopped_at", [1, 3, 5])
@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, masked_steps=3, unmasked_steps=3, accumulate=2)])
def test_a_training_that_is_stopped_goes_on_to_the_same_weights(
    model: Path, tmp_path: Path, stopped_at: int, recipe: Recipe
) -> None:
    whole, parts = prepared(model, tmp_path / "a" / "t"), prepared(model, tmp_path / "b" / "t")
    with pytest.raises(TrainingStopped):
        train(parts, [TEXT], recipe, stop_at(stopped_at))
    assert train(parts, [TEXT], recipe)["weights_id"] == train(whole, [TEXT], recipe)["weights_id"]


def test_a_training_that_is_killed_goes_on_from_its_last_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = prepared(model, tmp_path / "a" / "t"), prepared(model, tmp_path / "b" / "t")
    learn = Learner.learn

    def dying(learner: Learner, step: int, parts: list[torch.Tensor]) -> torch.Tensor:
        if step == 5:
            raise KeyboardInterrupt
        return learn(learner, step, parts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Learner, "learn", dying)
        train(parts, [TEXT], RECIPE)
    assert [path.name for path in checkpoints(parts.folder)] == ["checkpoint-2", "checkpoint-4"]
    assert train(parts, [TEXT], RECIPE)["weights_id"] == train(whole, [TEXT], RECIPE)["weights_id"]


def test_a_finished_training_is_not_repeated(model: Path, tmp_path: Path) -> None:
    training = prepared(model, tmp_path / "t")
    first = train(training, [TEXT], RECIPE)
    assert train(training, ["another text"], RECIPE) == first


def test_a_checkpoint_that_violates_its_mask_is_refused(model: Path, tmp_path: Path) -> None:
    training = prepared(model, tmp_path / "t")
    with pytest.raises(TrainingStopped):
        train(training, [TEXT], RECIPE, stop_at(3))
    state = checkpoints(training.folder)[-1] / "state.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(state).items()}, state)
    with pytest.raises(ValueError, match=r"checkpoint-3 violates its mask: \d+ weights of model.layers.0"):
        train(training, [TEXT], RECIPE)


def test_a_text_shorter_than_a_batch_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 1 rows of 16 tokens, but one batch takes 4"):
        train(prepared(model, tmp_path / "t"), [TEXT[:20]], RECIPE)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = prepared(model, tmp_path / "t")
    learn = Learner.learn

    def failing(learner: Learner, step: int, parts: list[torch.Tensor]) -> torch.Tensor:
        return learn(learner, step, parts) * (float("nan") if step == 4 else 1.0)

    monkeypatch.setattr(Learner, "learn", failing)
    with pytest.raises(TrainingDiverged, match=r"the loss is nan at step 4.*Lower search.recovery.lr"):
        train(training, [TEXT], RECIPE)
    assert [path.name for path in checkpoints(training.folder)] == ["checkpoint-2", "checkpoint-4"]


def test_distillation_pulls_towards_the_base_model(model: Path, tmp_path: Path) -> None:
    training = prepared(model, tmp_path / "t")
    losses = train(training, [TEXT], replace(RECIPE, masked_steps=20, lr=1e-3, distill=1.0))["losses"]
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_has_every_state_that_is_read(model: Path, tmp_path: Path) -> None:
    training = prepared(model, tmp_path / "t")
    recipe, start = replace(RECIPE, distill=1.0, distill_hidden=3.0), training.folder / START_FILE
    kept = {f"{name}.weight": mask for name, mask in unpack_masks(training.folder / MASKS_FILE).items()}
    learner = Learner(accelerator_for(recipe), recipe, training.spec, model, [start], kept)
    rows = torch.arange(3, 35).reshape(2, 16)
    base, cut = (load_model(model, training.spec, torch.device("cpu")) for _ in range(2))
    cut.load_state_dict(load_file(start), strict=False)
    with torch.no_grad():
        own, wanted = (each(input_ids=rows, output_hidden_states=True) for each in (cut, base))
        found = learner._loss(rows)
    logs = [each.logits[:, :-1].log_softmax(-1) for each in (own, wanted)]
    loss = float((logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean())
    pairs = [(own.hidden_states[at], wanted.hidden_states[at]) for at in (1, 2, 3)]
    away = [float(((a - b).square().sum(-1) / b.square().sum(-1)).mean()) for a, b in pairs]
    assert float(found) == pytest.approx(loss + 3.0 * sum(away) / 3, rel=1e-4)


def test_hidden_states_are_compared_where_a_layer_that_is_left_reads_them(model: Path) -> None:
    loaded = load_model(model, ModelSpec(str(model), dtype="float32"), torch.device("cpu"))
    matrices = [n for n, p in loaded.named_parameters() if n.startswith("model.layers.1.") and p.ndim > 1]
    gone = {name: torch.zeros(2, 2, dtype=torch.bool) for name in matrices}
    assert _states_read(loaded, {}) == [1, 2, 3]
    assert _states_read(loaded, gone) == [2, 3]  # what layer 1 would read, nothing does
    assert _states_read(loaded, dict([*gone.items()][1:])) == [1, 2, 3]


def test_parts_of_a_batch_make_the_same_step(model: Path, tmp_path: Path) -> None:
    whole, parts = prepared(model, tmp_path / "a" / "t"), prepared(model, tmp_path / "b" / "t")
    losses = [train(whole, [TEXT], RECIPE)["losses"], train(parts, [TEXT], replace(RECIPE, accumulate=4))["losses"]]
    assert np.allclose(*losses, atol=1e-4)


def test_checkpointing_changes_no_loss(model: Path, tmp_path: Path) -> None:
    plain, saving = prepared(model, tmp_path / "a" / "t"), prepared(model, tmp_path / "b" / "t")
    losses = [
        train(plain, [TEXT], RECIPE)["losses"],
        train(saving, [TEXT], replace(RECIPE, checkpointing=True))["losses"],
    ]
    assert np.allclose(*losses, atol=1e-5)


def test_masks_are_a_bit_each_and_read_back(tmp_path: Path) -> None:
    masks = {"a": torch.rand(5, 7) > 0.5, "b": torch.ones(64, 128, dtype=torch.bool)}
    pack_masks(masks, tmp_path / "masks")
    assert all(torch.equal(unpack_masks(tmp_path / "masks")[name], mask) for name, mask in masks.items())
    assert (tmp_path / "masks").stat().st_size < 64 * 128 / 8 + 400


def test_every_row_is_read_once_an_epoch() -> None:
    rows = np.concatenate([batch_rows(step, 3, 10, seed=1) for step in range(10)])
    assert [sorted(rows[start : start + 10].tolist()) for start in (0, 10, 20)] == [list(range(10))] * 3


def test_epochs_differ_in_order() -> None:
    assert batch_rows(0, 10, 10, 0).tolist() != batch_rows(1, 10, 10, 0).tolist()


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    recipe = replace(RECIPE, masked_steps=100, lr=1.0, warmup_steps=10)
    assert [round(recipe.lr_at(step), 2) for step in (0, 9, 10, 55, 99)] == [0.1, 1.0, 1.0, 0.55, 0.1]


def test_the_result_says_what_was_done(model: Path, tmp_path: Path) -> None:
    training = prepared(model, tmp_path / "t")
    train(training, [TEXT], RECIPE)
    result = json.loads((training.folder / "result.json").read_text())
    assert (result["steps"], result["tokens"], len(result["losses"])) == (6, 384, 6)
