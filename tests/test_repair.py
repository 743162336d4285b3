"""What is left of a pruned model, fitted by least squares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_of_models import tiny_model
from safetensors.torch import load_file, save_file
from tiny import LONG_TEXT as TEXT
from tiny import replica, with_reference, write_model
from transformers import GPT2Config

from dtmsearch.console.plan_text import recovered_text
from dtmsearch.core.evaluation import EvalRequest, ModelSpec
from dtmsearch.core.metrics import Summary
from dtmsearch.core.plan import Plan
from dtmsearch.core.training_settings import RecoverySettings
from dtmsearch.core.variant import Variant
from dtmsearch.errors import UserError
from dtmsearch.model.modules.loading import load_model
from dtmsearch.model.training.recipe import Recipe
from dtmsearch.model.training.repair import Repair, Sums, fitted_change
from dtmsearch.model.training.train_loop import REPAIRED_FILE, Training, train
from dtmsearch.model.weights.trained import MASKS_FILE, START_FILE, overlay, pack_masks
from dtmsearch.workflows.evaluate import RecoveredModel

GONE = ("model.layers.1.self_attn", "model.layers.1.mlp")
ROWS = torch.randint(1, 257, (64, 24), generator=torch.Generator().manual_seed(0))


def sums(read: torch.Tensor, lacks: torch.Tensor) -> Sums:
    found = Sums()
    found.add(read, lacks)
    return found


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_map_is_found_again_where_it_may_be() -> None:
    true = noise(6, 4, seed=0)
    true[4:] = 0.0
    read = [noise(200, 6, seed=seed) for seed in (1, 2)]
    change, left = fitted_change(*(sums(x, x @ true) for x in read), torch.arange(4))
    assert change is not None
    torch.testing.assert_close(change.float(), true, atol=0.01, rtol=0.0)
    assert left < 1e-4 and not bool(change[4:].any())


def test_what_follows_from_nothing_that_is_read_leaves_the_matrix_as_it_is() -> None:
    halves = [sums(noise(20, 16, seed=seed), noise(20, 4, seed=seed + 10)) for seed in (1, 2)]
    assert fitted_change(*halves, torch.arange(16))[0] is None


def masks_of(model: Any, gone: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Zero all that lies in some blocks of a model; the masks of it."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(f"{block}." for block in gone)):
            parameter.data.zero_()
            if name.endswith("weight") and parameter.ndim == 2:
                found[name] = torch.zeros_like(parameter, dtype=torch.bool)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def loaded(folder: Path) -> Any:
    return load_model(folder, ModelSpec(str(folder), dtype="float32"), "cpu").eval()


@torch.inference_mode()
def states(model: Any, layer: int, rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows, output_hidden_states=True).hidden_states[layer]


def test_states_behind_dropped_blocks_come_nearer_to_the_base_models_on_other_rows(folder: Path) -> None:
    model, base = loaded(folder), loaded(folder)
    kept = masks_of(model, GONE)
    other = torch.randint(1, 257, (16, 24), generator=torch.Generator().manual_seed(1))
    before = float((states(model, 2, other) - states(base, 2, other)).square().mean())
    changed = Repair(model, base, ROWS, kept).run()
    assert list(changed) == ["model.layers.0.mlp.down_proj.weight"]
    assert float((states(model, 2, other) - states(base, 2, other)).square().mean()) < 0.9 * before
    untouched = dict(base.named_parameters())
    own = {n: p for n, p in model.named_parameters() if n not in changed and n not in kept}
    assert all(torch.equal(p, untouched[n]) for n, p in own.items())


def test_the_fit_is_the_least_squares_one(folder: Path) -> None:
    """Of the matrix before a dropped layer, by numpy over the same rows, damped alike."""
    model, base = loaded(folder), loaded(folder)
    kept = masks_of(model, GONE)
    seen: list[torch.Tensor] = []
    down = base.model.layers[0].mlp.down_proj
    with torch.inference_mode():
        hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
        lacks = (states(base, 2, ROWS) - states(base, 1, ROWS)).flatten(0, 1).double()
        hook.remove()
    read = seen[0]
    found = Repair(model, base, ROWS, kept).run()["model.layers.0.mlp.down_proj.weight"] - down.weight
    hessian = read.T @ read
    errors = []
    for damping in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
        errors.append(float((torch.linalg.solve(damped, read.T @ lacks).T - found).abs().max()))
    assert min(errors) < 1e-4


def test_a_cut_block_is_fitted_over_the_columns_that_stay(folder: Path) -> None:
    model, base = loaded(folder), loaded(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    parameter = dict(model.named_parameters())[name]
    mask = torch.ones_like(parameter, dtype=torch.bool)
    mask[:, 24:] = False
    parameter.data *= mask
    changed = Repair(model, base, ROWS, {name: mask}).run()
    assert list(changed) == [name] and not bool(changed[name][:, 24:].any())
    assert not torch.equal(changed[name][:, :24], dict(base.named_parameters())[name][:, :24])


def test_zeros_of_the_files_own_close_no_column(folder: Path) -> None:
    """Weights that are zero in any case lie in the mask as pruned ones do, and stay what they are."""
    model, base = loaded(folder), loaded(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    mask = torch.ones_like(dict(model.named_parameters())[name], dtype=torch.bool)
    mask[:, 24:] = False
    mask[3, 5] = False
    for each in (model, base):
        dict(each.named_parameters())[name].data[3, 5] = 0.0
    dict(model.named_parameters())[name].data *= mask
    changed = Repair(model, base, ROWS, {name: mask}).run()
    assert list(changed) == [name] and not bool(changed[name][~mask].any())


def test_nothing_to_fit_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, base = loaded(folder), loaded(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    scattered = {name: dict(model.named_parameters())[name] > 0}
    assert Repair(model, base, ROWS, scattered).run() == {}
    assert Repair(model, base, ROWS, masks_of(model, ("model.layers.0.self_attn",))).run() == {}
    assert caplog.text.count("nothing is fitted") == 2


def test_a_block_that_does_something_to_its_last_product_stays_as_it_is() -> None:
    """Of Qwen2-MoE the shared expert ends in a matrix, which a gate then weighs."""
    model, base = (tiny_model("qwen2_moe").float().eval() for _ in range(2))
    base.load_state_dict(model.state_dict())
    kept = masks_of(model, ("model.layers.1.self_attn",))
    assert Repair(model, base, ROWS.clamp(max=200), kept).run() == {}


def test_a_factor_behind_the_last_matrix_is_seen(folder: Path) -> None:
    model, base = loaded(folder), loaded(folder)
    kept = masks_of(model, GONE)
    for each in (model, base):
        each.model.layers[0].mlp.register_forward_hook(lambda _, args, output: output * 3.0)
    assert Repair(model, base, ROWS, kept).run() == {}


@pytest.mark.parametrize(
    ("family", "fitted"),
    [
        ("llama", "model.layers.0.mlp.down_proj.weight"),
        ("granite", "model.layers.0.mlp.down_proj.weight"),
        ("gpt2", "transformer.h.0.mlp.c_proj.weight"),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"),
        ("cohere", "model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_families_whose_layers_add_their_blocks(family: str, fitted: str) -> None:
    """One after the other, with a factor, with transposed matrices, and side by side, where the block beside what is
    gone makes up for it: on rows that nothing was fitted to, too."""
    model, base = (tiny_model(family).float().eval() for _ in range(2))
    base.load_state_dict(model.state_dict())
    prefix = next(n for n, m in model.named_modules() if n.endswith(".1") and n.count(".") < 3)
    names = dict(model.get_submodule(prefix).named_children())
    attention = next(name for name in ("self_attn", "attention", "attn") if name in names)
    kept = masks_of(model, (f"{prefix}.{attention}",))
    rows = torch.randint(1, 200, (320, 24), generator=torch.Generator().manual_seed(0))
    other = torch.randint(1, 200, (16, 24), generator=torch.Generator().manual_seed(1))
    before = float((states(model, -1, other) - states(base, -1, other)).square().mean())
    assert list(Repair(model, base, rows, kept).run()) == [fitted]
    assert float((states(model, -1, other) - states(base, -1, other)).square().mean()) < 0.97 * before


def test_a_family_whose_layers_do_more_is_refused() -> None:
    model, base = (tiny_model("gemma2").float().eval() for _ in range(2))
    with pytest.raises(UserError, match="layer 0 of Gemma2ForCausalLM does more than add what its blocks give"):
        Repair(model, base, ROWS.clamp(max=200), masks_of(model, GONE)).run()


def test_what_is_no_parameter_is_named(folder: Path, tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}, tmp_path / "start.safetensors")
    with pytest.raises(UserError, match=r"experts\.0\.up_proj\.weight is no parameter of its own"):
        overlay(loaded(folder), tmp_path / "start.safetensors")


@pytest.mark.parametrize(("after", "told"), [(0.2, False), (0.4, True)])
def test_a_repair_that_does_harm_is_told(after: float, told: bool) -> None:
    before = Summary(64, 27.5, 20.0, 31.0, 32.0, 0.25, 2.1, 26.4, 0.3)
    text = recovered_text(RecoveredModel("small", "4f0c", "weights/4f0c", before, replace(before, kl=after)))
    assert ("its KL was less before" in text) == told


RECIPE = Recipe(("text.txt",), 0, 0, batch_tokens=64, sequence_tokens=16, lr=1e-2, repair_tokens=512)


def prepared(folder: Path, where: Path) -> Training:
    own = load_file(folder / "model.safetensors")
    names = [n.removesuffix(".weight") for n in own if n.startswith(tuple(f"{block}." for block in GONE))]
    where.mkdir(parents=True)
    save_file({f"{name}.weight": torch.zeros_like(own[f"{name}.weight"]) for name in names}, where / START_FILE)
    pack_masks({name: torch.zeros_like(own[f"{name}.weight"], dtype=torch.bool) for name in names}, where / MASKS_FILE)
    return Training(ModelSpec(str(folder), dtype="float32"), where, where.parent / "weights")


def test_a_recovery_without_steps_gives_the_fitted_weights(folder: Path, tmp_path: Path) -> None:
    training = prepared(folder, tmp_path / "t")
    result = train(training, [TEXT], RECIPE)
    assert (result["steps"], result["tokens"], result["losses"], result["fitted"]) == (0, 0, [], 1)
    found = load_file(training.weights_folder / f"{result['weights_id']}.safetensors")
    fitted = load_file(training.folder / REPAIRED_FILE)
    assert list(fitted) == ["model.layers.0.mlp.down_proj.weight"]
    assert all(torch.equal(found[name], value) for name, value in fitted.items())
    assert not any(found[f"{block}.{own}.weight"].any() for block, own in [(GONE[0], "q_proj"), (GONE[1], "up_proj")])


def test_steps_go_on_from_what_was_fitted(folder: Path, tmp_path: Path) -> None:
    steps = replace(RECIPE, masked_steps=4)
    fitted = train(prepared(folder, tmp_path / "a" / "t"), [TEXT], steps)["losses"]
    assert fitted != train(prepared(folder, tmp_path / "b" / "t"), [TEXT], replace(steps, repair_tokens=0))["losses"]


def test_a_fit_that_is_there_is_not_made_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = prepared(folder, tmp_path / "a" / "t"), prepared(folder, tmp_path / "b" / "t")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dtmsearch.model.training.train_loop.Learner", interrupted)
        train(parts, [TEXT], RECIPE)
    with monkeypatch.context() as patch:
        patch.setattr("dtmsearch.model.training.train_loop.repaired", interrupted)
        again = train(parts, [TEXT], RECIPE)
    assert again["weights_id"] == train(whole, [TEXT], RECIPE)["weights_id"]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_dropped_blocks_of_transposed_matrices_and_biases_learn_nothing(tmp_path: Path) -> None:
    """GPT-2: what a training starts from lies as the parameters do, and what is dropped adds no bias."""
    config = GPT2Config(
        vocab_size=258, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=256, eos_token_id=257,
        initializer_range=0.2, n_inner=48,
    )  # fmt: skip
    model = write_model(tmp_path / "model", config)
    own = load_file(model / "model.safetensors")
    biases = {name: noise(*value.shape, seed=0) for name, value in own.items() if name.endswith("bias")}
    save_file(own | biases, model / "model.safetensors", {"format": "pt"})
    training = Training(ModelSpec(str(model), dtype="float32"), tmp_path / "t", tmp_path / "weights")
    training.folder.mkdir()
    held = replica(model, weights_folder=str(training.weights_folder))
    plan = Plan.of({"transformer.h.1.attn": "drop", "transformer.h.2.mlp": "drop"})
    held.save_pruned(Variant(plan, "", ""), str(training.folder))
    result = train(training, [TEXT], replace(RECIPE, masked_steps=3))
    found = load_file(training.weights_folder / f"{result['weights_id']}.safetensors")
    gone = [name for name in found if name.startswith(("transformer.h.1.attn.", "transformer.h.2.mlp."))]
    assert len(gone) == 8 and not any(bool(found[name].any()) for name in gone)
    # So the model that was trained is the one that the plan makes of its weights.
    trained = loaded(model)
    overlay(trained, training.weights_folder / f"{result['weights_id']}.safetensors")
    reference = with_reference(held)
    whole = 0, reference.num_prompts
    (measured,) = held.evaluate([EvalRequest(plan, reference.id, whole, (), plan, "", str(result["weights_id"]))])
    tokens, own = (torch.from_numpy(each).long() for each in (reference.text[:, :10], reference.continuation))
    with torch.inference_mode():
        logits = trained(input_ids=torch.cat([tokens, own], dim=1)).logits[:, 9:-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="none")
    wanted = losses.view(own.shape).mean(1).exp()
    torch.testing.assert_close(torch.from_numpy(measured.dppl), wanted, rtol=1e-3, atol=0.0, check_dtype=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masked_steps": 0, "unmasked_steps": 0}, "masked_steps, unmasked_steps and repair_tokens are all 0"),
        ({"repair_tokens": 1000}, "repair_tokens 1000 is less than two sequences of sequence_tokens 512"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecoverySettings(("text.txt",), **settings)
