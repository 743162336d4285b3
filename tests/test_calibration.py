"""Calibrated schemes on a replica: statistics against plain hooks, purity, identities, errors of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEXT, VOCABULARY, llama_config, replica, result, values, with_reference, write_model
from transformers import AutoModelForCausalLM, GPT2Config

from dtmsearch.core.calibration import Calibration
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.model.calibration import weight_errors
from dtmsearch.model.compress import compressor as compressor_module
from dtmsearch.model.compress.gptq import Job, inverse_factor, solve
from dtmsearch.model.compress.packing import unpack
from dtmsearch.model.replica.replica import Replica

ALL = ("kl", "ppl")
CALIBRATED = [
    *("wanda-0.5", "wanda-2:4", "sparsegpt-0.5", "gptq-int3-g16", "gptq-int4-channel-asym"),
    *("int4-g16+wanda-0.5", "gptq-int3-g16+wanda-0.5", "int8-channel+sparsegpt-0.5"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), llama_config(num_hidden_layers=2))


def calibrated(model: Replica, seed: int = 3) -> Calibration:
    calibration = model.cut_calibration([TEXT], 12, 24, seed)
    model.use_calibration(calibration)
    return calibration


def inputs_of(folder: Path, calibration: Calibration, component: str) -> torch.Tensor:
    """[tokens, cols] of what a component of the base model reads, from a plain forward pass."""
    model, seen = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    module = model.get_submodule(component)
    module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].reshape(-1, module.in_features)))
    with torch.inference_mode():
        model(torch.from_numpy(calibration.tokens).long())
    return torch.cat(seen)


@pytest.mark.parametrize("component", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_mean_squares_are_those_of_a_plain_pass(folder: Path, component: str) -> None:
    model = replica(folder)
    calibration = calibrated(model)
    found = model.gather_statistics(calibration).mean_squares[component]
    expected = inputs_of(folder, calibration, component).square().mean(dim=0)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


def test_statistics_reach_every_component(folder: Path) -> None:
    model = replica(folder)
    found = model.gather_statistics(calibrated(model)).mean_squares
    assert {name: len(values) for name, values in found.items()} == {
        c.name: c.shape[1] for c in model.manifest().components
    }


def hessians(model: Replica, calibration: Calibration) -> dict[tuple[str, ...], torch.Tensor]:
    with torch.inference_mode():
        model._calibrator.activate(calibration.id)
        return {h.components: h.hessian for layer in (0, 1) for h in model._calibrator.hessians.of_layer(layer)}


def test_hessians_are_those_of_a_plain_pass(folder: Path) -> None:
    model = replica(folder, batch_tokens=100)
    calibration = calibrated(model)
    for components, found in hessians(model, calibration).items():
        inputs = inputs_of(folder, calibration, components[-1])
        torch.testing.assert_close(found, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)


def test_components_that_read_the_same_share_a_hessian(folder: Path) -> None:
    model = replica(folder)
    kinds = [[name.rpartition(".")[2][0] for name in names] for names in hessians(model, calibrated(model))]
    assert kinds == 2 * [["q", "k", "v"], ["o"], ["g", "u"], ["d"]]


def mixed(model: Replica) -> Plan:
    components = model.manifest().components
    return Plan.of({components[0].name: "gptq-int3-g16", components[9].name: "wanda-0.5"})


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_shared_prefixes_change_no_bit(folder: Path, scheme: str) -> None:
    model = replica(folder)
    reference, calibration = with_reference(model), calibrated(model)
    parent = mixed(model)
    plans = [parent.with_(Perturbation(c.name, scheme)) for c in model.manifest().components[::3]]
    asked = [EvalRequest(p, reference.id, (0, 6), ALL, parent, calibration.id) for p in plans]
    shared = model.evaluate(asked)
    alone = replica(folder)
    alone.use(reference)
    alone.use_calibration(calibration)
    whole = [alone.evaluate([EvalRequest(p, reference.id, (0, 6), ALL, p, calibration.id)])[0] for p in plans]
    assert [values(o) for o in shared] == [values(o) for o in whole]


def test_the_same_plan_gives_the_same_bits_after_others(folder: Path) -> None:
    model = replica(folder)
    reference, calibration = with_reference(model), calibrated(model)
    a = EvalRequest(mixed(model), reference.id, (0, 6), ALL, calibration_id=calibration.id)
    others = [
        EvalRequest(
            Plan.uniform(model.manifest().components, scheme), reference.id, (0, 6), ALL, Plan(), calibration.id
        )
        for scheme in CALIBRATED
    ]
    first = values(model.evaluate([a])[0])
    model.evaluate(others)
    assert values(model.evaluate([a])[0]) == first


def through_compressed(model: Replica) -> Calibration:
    calibration = model.cut_calibration([TEXT], 12, 24, 3, "compressed")
    model.use_calibration(calibration)
    return calibration


def test_through_compressed_layers_a_matrix_follows_what_its_scheme_makes_of_the_layers_below(folder: Path) -> None:
    model, plain = replica(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    calibration, scheme = through_compressed(model), "gptq-int2-g16"
    first = [(c.name, scheme) for c in model.manifest().components if c.layer == 0]
    for packed in model.solve(calibration.id, first):
        weight = unpack(packed, torch.float32, torch.device("cpu"))
        plain.get_submodule(packed.component).weight.data = weight
    name, seen = "model.layers.1.self_attn.q_proj", []
    module = plain.get_submodule(name)
    module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].reshape(-1, module.in_features)))
    with torch.inference_mode():
        plain(torch.from_numpy(calibration.tokens).long())
    inputs = torch.cat(seen)
    job = Job(module.weight.data, parse_scheme(scheme))
    expected = solve([job], inverse_factor(inputs.T @ inputs / len(inputs)))[0].codes
    found = unpack(model.solve(calibration.id, [(name, scheme)])[0], torch.float32, torch.device("cpu"))
    assert expected is not None
    close = torch.isclose(found, expected.dense(torch.float32), atol=1e-4)  # but for a near tie of rounding
    assert close.float().mean() > 0.99


def test_through_compressed_layers_a_matrix_is_the_same_whatever_else_is_asked(folder: Path) -> None:
    alone, scheme = replica(folder), "gptq-int3-g16"
    names = [c.name for c in alone.manifest().components]
    one = alone.solve(through_compressed(alone).id, [(names[-1], scheme)])[0]
    model = replica(folder)
    calibration = through_compressed(model)
    model.solve(calibration.id, [(name, "gptq-int2-g16") for name in names])
    all_of_it = model.solve(calibration.id, [(name, scheme) for name in names])[-1]
    assert (one.component, one.codes.tolist()) == (all_of_it.component, all_of_it.codes.tolist())


def test_what_the_text_has_passed_is_part_of_a_calibration_s_identity(folder: Path) -> None:
    model = replica(folder)
    assert len({model.cut_calibration([TEXT], 4, 24, 0, through).id for through in ("base", "compressed")}) == 2


def test_another_calibration_between_changes_no_bit(folder: Path) -> None:
    model = replica(folder)
    reference, first, second = with_reference(model), calibrated(model), calibrated(model, seed=8)
    plan = mixed(model)
    one = EvalRequest(plan, reference.id, (0, 6), ALL, plan, first.id)
    other = EvalRequest(plan, reference.id, (0, 6), ALL, plan, second.id)
    before = values(model.evaluate([one])[0])
    between = values(model.evaluate([other])[0])
    assert (values(model.evaluate([one])[0]) == before, between == before) == (True, False)


def test_solved_matrices_that_are_handed_over_give_the_same_bits(folder: Path) -> None:
    model = replica(folder)
    reference, calibration = with_reference(model), calibrated(model)
    plan = mixed(model)
    request = EvalRequest(plan, reference.id, (0, 6), ALL, plan, calibration.id)
    own = values(model.evaluate([request])[0])
    matrices = {(p.component, p.scheme): p for p in model.solve(calibration.id, plan.entries)}
    other = replica(folder)
    other.use(reference)
    other.use_calibration(calibration, model.gather_statistics(calibration))
    other.use_solved(calibration.id, lambda component, scheme: matrices.get((component, scheme)))
    other._calibrator.solver._hessians = None  # nothing is left to solve for
    assert (values(other.evaluate([request])[0]), list(matrices)) == (own, [plan.entries[0]])


def test_the_model_is_dense_again_after_calibrated_plans(folder: Path) -> None:
    model = replica(folder)
    reference, calibration = with_reference(model), calibrated(model)
    for scheme in CALIBRATED:
        plan = Plan.uniform(model.manifest().components, scheme)
        result(model.evaluate([EvalRequest(plan, reference.id, (0, 6), (), plan, calibration.id)])[0])
    assert model.canary(reference.id) == 0.0


def test_a_new_replica_checks_a_calibrated_plan_before_it_evaluates(folder: Path) -> None:
    model, fresh = replica(folder), replica(folder)
    reference, calibration = with_reference(model), calibrated(model)
    plan = mixed(model)
    measured = result(model.evaluate([EvalRequest(plan, reference.id, (0, 6), (), plan, calibration.id)])[0])
    fresh.use(reference)
    fresh.use_calibration(calibration)
    assert fresh.check(plan, reference.id, 6)[0].tolist() == measured.sdt.tolist()


def test_wanda_s_zeros_stand_in_the_model(folder: Path) -> None:
    model = replica(folder)
    reference, calibration = with_reference(model), calibrated(model)
    plan = Plan.uniform(model.manifest().components, "int4-g16+wanda-0.5")
    model.evaluate([EvalRequest(plan, reference.id, (0, 6), (), plan, calibration.id)])
    for component in model.manifest().components:
        weight = model._body.model.get_submodule(component.name).weight
        assert bool(((weight == 0).sum(dim=1) >= component.shape[1] // 2).all())


def failure(outcome: Any) -> str:
    assert isinstance(outcome, EvalFailure)
    return f"{outcome.kind}: {outcome.message}"


def test_a_calibrated_plan_without_calibration_is_a_failure_value(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    outcome = model.evaluate([EvalRequest(mixed(model), reference.id, (0, 6))])[0]
    assert failure(outcome).startswith("invalid: a calibrated scheme needs calibration text; the request names none")


def test_a_component_outside_the_layers_cannot_be_solved(folder: Path) -> None:
    model = replica(folder)
    reference, calibration = with_reference(model), calibrated(model)
    request = EvalRequest(Plan.of({"lm_head": "gptq-int4-g16"}), reference.id, (0, 6), (), Plan(), calibration.id)
    assert "lm_head lies outside the layers" in failure(model.evaluate([request])[0])


def test_a_calibration_of_another_model_is_refused(folder: Path) -> None:
    calibration = Calibration("id", "another", np.zeros((1, 4), np.int32))
    with pytest.raises(ValueError, match="is of another model"):
        replica(folder).use_calibration(calibration)


def test_calibration_rows_longer_than_the_model_reads_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"calibration.tokens is 200, .* reads 128 at most"):
        replica(folder).cut_calibration([TEXT], 1, 200, 0)


def test_too_little_calibration_text_says_how_much_there_is(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"calibration.count asks for 9 rows of 24 tokens, but the text holds 2"):
        replica(folder).cut_calibration([TEXT[:60]], 9, 24, 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A folder of trained weights, `moved`: the layers' weights, each a little off."""
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    place = tmp_path_factory.mktemp("weights")
    save_file(
        {n: w + 0.1 * torch.randn_like(w) for n, w in weights.items() if "layers" in n}, place / "moved.safetensors"
    )
    return place


def on_weights(folder: Path, trained: Path) -> Replica:
    settings = ReplicaSettings(num_threads=1, weights_folder=str(trained))
    return Replica(ModelSpec(str(folder), dtype="float32"), settings)


def test_trained_weights_are_solved_for_as_they_are(folder: Path, trained: Path) -> None:
    model = on_weights(folder, trained)
    reference, calibration = with_reference(model), calibrated(model)
    name = "model.layers.1.mlp.up_proj"
    plan = Plan.of({name: "gptq-int8-channel"})
    model.evaluate([EvalRequest(plan, reference.id, (0, 6), ALL, plan, calibration.id, "moved")])
    found = model._body.model.get_submodule(name).weight
    away = [
        float((found - load_file(file)[f"{name}.weight"]).abs().max())
        for file in (trained / "moved.safetensors", folder / "model.safetensors")
    ]
    assert (away[0] < 0.02, away[1] > 0.1) == (True, True)


def test_calibrated_plans_on_several_weights_do_not_mix(folder: Path, trained: Path) -> None:
    model = on_weights(folder, trained)
    reference, calibration = with_reference(model), calibrated(model)
    components = model.manifest().components
    plans = [mixed(model), Plan.of({components[3].name: "sparsegpt-0.5", components[8].name: "magnitude-0.5"})]
    asked = [
        EvalRequest(plan, reference.id, (0, 6), ALL, parent, calibration.id, weights)
        for plan in plans
        for parent in (Plan(), plans[0])
        for weights in ("", "moved")
    ]
    together = [values(outcome) for outcome in model.evaluate(asked)]
    alone = on_weights(folder, trained)
    alone.use(reference)
    alone.use_calibration(calibration)
    assert [values(alone.evaluate([one])[0]) for one in reversed(asked)] == together[::-1]


def test_more_solved_matrices_than_are_kept_are_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressor_module, "_KEPT_BYTES", 1000)
    model = replica(folder)
    reference, calibration = with_reference(model), calibrated(model)
    plans = [Plan.uniform(model.manifest().components, f"gptq-int{bits}-g16") for bits in (3, 4)]
    asked = [EvalRequest(p, reference.id, (0, 6), ALL, p, calibration.id) for p in plans]
    first = [values(model.evaluate([one])[0]) for one in asked]
    assert ([values(model.evaluate([one])[0]) for one in asked], len(model._weights.compressor._solved)) == (first, 14)


def test_transposed_matrices_are_calibrated_as_others_are(tmp_path: Path) -> None:
    sizes = {
        "bos_token_id": 256,
        "eos_token_id": 257,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 1,
        "n_head": 4,
        "n_positions": 128,
    }
    model = replica(write_model(tmp_path, GPT2Config(vocab_size=VOCABULARY, initializer_range=0.2, **sizes)))
    found = model.weight_errors(
        [c.name for c in model.manifest().components],
        ["int3-g16", "gptq-int3-g16", "magnitude-0.5", "wanda-0.5", "sparsegpt-0.5"],
        calibrated(model).id,
        by_hessian=True,
    )
    errors = np.array([e.weighted_by_hessian for e in found]).reshape(-1, 5)
    better = (errors[:, 1] < errors[:, 0]) & (errors[:, 4] < errors[:, 2]) & (errors[:, 4] < errors[:, 3])
    assert (len(errors), better.tolist()) == (4, [True] * 4)


# Identities.


def test_an_identity_holds_the_calibration_only_of_calibrated_plans() -> None:
    rounded, calibrated_plan = Plan.of({"a": "int4-g128"}), Plan.of({"a": "int4-g128+wanda-0.5"})
    same = [
        EvalRequest(plan, "r", (0, 1)).id == EvalRequest(plan, "r", (0, 1), calibration_id="c").id
        for plan in (rounded, calibrated_plan)
    ]
    assert same == [True, False]


def test_the_identity_of_an_uncalibrated_plan_stands() -> None:
    """It changes with METRICS_VERSION alone; else every store would be measured anew."""
    request = EvalRequest(Plan.of({"model.layers.0.mlp.up_proj": "nf4"}), "reference", (0, 8), ("kl",))
    assert request.id == "511bbf8b38fecc9ec480684a6a69c6ec"


def test_a_calibration_s_identity_follows_its_text(folder: Path) -> None:
    model = replica(folder)
    ids = [model.cut_calibration([TEXT], 4, 24, seed).id for seed in (0, 0, 1)]
    assert (ids[0] == ids[1], ids[0] == ids[2]) == (True, False)


# Errors of weights.


def test_weight_errors_are_the_definitions(folder: Path) -> None:
    model = replica(folder)
    calibration = calibrated(model)
    component = "model.layers.1.self_attn.v_proj"
    scheme = "wanda-0.5"
    (found,) = model.weight_errors([component], [scheme], calibration.id, by_hessian=True)
    weight = model._weights.original(component).double()
    inputs = inputs_of(folder, calibration, component).double()
    plan = Plan.of({component: scheme})
    reference = with_reference(model)
    model.evaluate([EvalRequest(plan, reference.id, (0, 6), (), plan, calibration.id)])
    change = model._body.model.get_submodule(component).weight.double() - weight
    squares = inputs.square().mean(dim=0)
    expected = (
        float(change.square().sum() / weight.square().sum()),
        float((change.square() * squares).sum() / (weight.square() * squares).sum()),
        float((inputs @ change.T).square().sum() / (inputs @ weight.T).square().sum()),
    )
    assert found.weighted_by_inputs is not None and found.weighted_by_hessian is not None
    np.testing.assert_allclose([found.plain, found.weighted_by_inputs, found.weighted_by_hessian], expected, rtol=1e-4)


def test_weight_errors_come_in_order_of_components_then_schemes(folder: Path) -> None:
    model = replica(folder)
    components, schemes = [c.name for c in model.manifest().components[::-4]], ["int3-g16", "nf4", "w8a8", "drop"]
    found = model.weight_errors(components, schemes)
    assert [(e.component, e.scheme) for e in found] == [(c, s) for c in components for s in schemes]


def test_a_dropped_component_errs_wholly(folder: Path) -> None:
    model = replica(folder)
    (found,) = model.weight_errors(["model.layers.0.mlp.up_proj"], ["drop"], calibrated(model).id, by_hessian=True)
    assert (found.plain, found.weighted_by_inputs, found.weighted_by_hessian) == (1.0, 1.0, 1.0)


def test_without_calibration_only_plain_errors_are_known(folder: Path) -> None:
    (found,) = replica(folder).weight_errors(["model.layers.0.mlp.up_proj"], ["int4-g16"])
    assert (found.plain > 0, found.weighted_by_inputs, found.weighted_by_hessian) == (True, None, None)


def test_gptq_s_outputs_err_less_than_rounding_s(folder: Path) -> None:
    model = replica(folder)
    components = [c.name for c in model.manifest().components]
    found = model.weight_errors(components, ["int3-g16", "gptq-int3-g16"], calibrated(model).id, by_hessian=True)
    rounding, gptq = (np.array([e.weighted_by_hessian for e in found[at::2]]) for at in (0, 1))
    assert (gptq < rounding).mean() > 0.9


def test_weight_errors_again_cost_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replica(folder)
    first = model.weight_errors(["model.layers.0.mlp.up_proj"], ["int4-g16"])
    monkeypatch.setattr(weight_errors, "_norms", None)
    assert model.weight_errors(["model.layers.0.mlp.up_proj"], ["int4-g16"]) == first
