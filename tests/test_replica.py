"""A replica measures purely: what it did before, and how requests are grouped, changes no bit."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DEMO_MODEL, TEXT, llama_config, measuring, replica, result, values, with_reference, write_model
from transformers import AutoModelForCausalLM

import dtmsearch as dtm
from dtmsearch.core.evaluation import (
    EvalFailure,
    EvalRequest,
    EvalResult,
    ModelSpec,
    Outcome,
    Reference,
    ReplicaSettings,
    check_agreement,
)
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.errors import UserError
from dtmsearch.model.replica import replica as replica_module
from dtmsearch.model.replica.replica import Replica

ALL = ("kl", "ppl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def component(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


MIXED = Plan.of(
    {
        component(0, "self_attn.q_proj"): "int4-g16",
        component(1, "mlp.down_proj"): "nf4",
        component(1, "self_attn.v_proj"): "w8a8",
        component(2, "mlp.gate_proj"): "int8-channel",
    }
)


def test_the_dense_plan_has_no_divergent_token(folder: Path) -> None:
    model, reference = measuring(folder)
    measured = result(model.evaluate([EvalRequest(Plan(), reference.id, (0, 6), ALL)])[0])
    assert (measured.sdt.tolist(), measured.fdt.tolist()) == ([0] * 6, [12] * 6)


def test_the_dense_plan_has_no_kl(folder: Path) -> None:
    model, reference = measuring(folder)
    measured = result(model.evaluate([EvalRequest(Plan(), reference.id, (0, 6), ALL)])[0])
    assert measured.kl is not None
    assert measured.kl.max() < 1e-6


def test_the_same_plan_gives_the_same_bits_after_others(folder: Path) -> None:
    model, reference = measuring(folder)
    a = EvalRequest(MIXED, reference.id, (0, 6), ALL)
    b = EvalRequest(Plan.uniform(model.manifest().components, "int3-g8"), reference.id, (0, 6), ALL)
    first = values(model.evaluate([a])[0])
    model.evaluate([b])
    assert values(model.evaluate([a])[0]) == first


PRUNED = ["magnitude-0.5", "magnitude-2:4", "random-0.1", "drop", "int4-g8-asym+magnitude-0.25"]


SHARED = ["int4-channel", "nf4", "w8a8", "int2-g8-asym", *PRUNED]


@pytest.mark.parametrize("scheme", SHARED)
def test_shared_prefixes_change_no_bit(folder: Path, scheme: str) -> None:
    model, reference = measuring(folder)
    # Every kind of component and every layer with each scheme, and all components over the schemes.
    components, at = model.manifest().components, SHARED.index(scheme)
    plans = [MIXED.with_(Perturbation(c.name, scheme)) for i, c in enumerate(components) if (i % 7 + at) % 3 == c.layer]
    shared = model.evaluate([EvalRequest(p, reference.id, (0, 6), ALL, parent=MIXED) for p in plans])
    # A fresh replica that runs each plan whole, from the tokens up.
    alone = replica(folder)
    alone.use(reference)
    whole = [alone.evaluate([EvalRequest(p, reference.id, (0, 6), ALL, parent=p)])[0] for p in plans]
    assert [values(o) for o in shared] == [values(o) for o in whole]


def test_any_order_of_requests_gives_the_same_bits(folder: Path) -> None:
    model, reference = measuring(folder)
    plans = [Plan().with_(Perturbation(c.name, "int3-g8")) for c in model.manifest().components[::2]]
    requests = [EvalRequest(p, reference.id, (0, 6), ALL, parent=MIXED) for p in plans]
    forwards = {o.request_id: values(o) for o in model.evaluate(requests)}
    one_by_one = {r.id: values(model.evaluate([r])[0]) for r in reversed(requests)}
    assert one_by_one == forwards


def test_a_second_reference_does_not_disturb_the_first(folder: Path) -> None:
    model = replica(folder)
    first, second = with_reference(model), with_reference(model, count=3, prompt=5)
    request = EvalRequest(MIXED, first.id, (0, 6), ALL, parent=Plan())
    before = values(model.evaluate([request])[0])
    model.evaluate([EvalRequest(MIXED, second.id, (0, 3), ALL, parent=Plan())])
    assert values(model.evaluate([request])[0]) == before


def test_a_canary_finds_what_evaluations_of_its_plan_found(folder: Path) -> None:
    model, reference = measuring(folder)
    measured = result(model.evaluate([EvalRequest(MIXED, reference.id, (0, 6))])[0])
    sdt, dppl = model.check(MIXED, reference.id, 4)
    assert (sdt.tolist(), dppl.tolist()) == (measured.sdt[:4].tolist(), pytest.approx(measured.dppl[:4].tolist()))


def test_a_canary_sees_a_weight_that_is_not_what_it_should_be(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    with torch.no_grad():
        model._body.model.get_submodule(component(1, "mlp.up_proj")).weight *= 1.5
    _, dppl = model.check(Plan(), reference.id, 4)
    assert dppl.tolist() != pytest.approx(result(dense_outcome(folder, reference)).dppl[:4].tolist(), rel=1e-3)


def dense_outcome(folder: Path, reference: Reference) -> Outcome:
    """What an undamaged replica finds of the dense plan."""
    model = replica(folder)
    model.use(reference)
    return model.evaluate([EvalRequest(Plan(), reference.id, (0, 6))])[0]


@pytest.mark.parametrize("plan", [Plan(), MIXED])
def test_a_canary_does_not_disturb_what_follows(folder: Path, plan: Plan) -> None:
    model, reference = measuring(folder)
    request = EvalRequest(
        MIXED.with_(Perturbation(component(2, "mlp.up_proj"), "nf4")), reference.id, (0, 6), ALL, MIXED
    )
    before = values(model.evaluate([request])[0])
    model.check(plan, reference.id, 4)
    assert values(model.evaluate([request])[0]) == before


def test_a_range_of_prompts_is_a_part_of_the_whole(folder: Path) -> None:
    model = replica(folder, batch_tokens=1)
    reference = with_reference(model)
    whole = result(model.evaluate([EvalRequest(MIXED, reference.id, (0, 6))])[0])
    part = result(model.evaluate([EvalRequest(MIXED, reference.id, (2, 5))])[0])
    assert part.fdt.tolist() == whole.fdt[2:5].tolist()


def test_batch_size_changes_no_more_than_rounding_noise(folder: Path) -> None:
    reference = with_reference(replica(folder))
    measured = []
    for batch_tokens in (1, 10_000):
        model = replica(folder, batch_tokens=batch_tokens)
        model.use(reference)
        measured.append(result(model.evaluate([EvalRequest(MIXED, reference.id, (0, 6))])[0]).dppl)
    np.testing.assert_allclose(measured[0], measured[1], rtol=1e-4)


def test_fdt_and_sdt_are_those_of_a_plain_forward_pass(folder: Path) -> None:
    model, reference = measuring(folder)
    plan = Plan.uniform(model.manifest().components, "int4-g16")
    measured = result(model.evaluate([EvalRequest(plan, reference.id, (0, 6))])[0])
    plain = write_rounded(folder, plan)
    tokens = torch.from_numpy(np.concatenate([reference.text[:, :10], reference.continuation], axis=1)).long()
    with torch.inference_mode():
        logits = plain(tokens).logits[:, 9:-1].float()
        logits[..., list(reference.suppressed)] = -torch.inf
    diverged = (logits.argmax(-1) != tokens[:, 10:]).numpy()
    assert measured.sdt.tolist() == diverged.sum(axis=1).tolist()


def write_rounded(folder: Path, plan: Plan) -> torch.nn.Module:
    from dtmsearch.core.schemes import parse_scheme
    from dtmsearch.model.compress.rounding import round_weight

    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, scheme in plan.entries:
        module = model.get_submodule(name)
        module.weight.data = round_weight(module.weight.data, parse_scheme(scheme))
    return model.eval()


def test_kl_is_the_mean_over_positions_of_the_definition(folder: Path) -> None:
    model, reference = measuring(folder)
    plan = Plan.uniform(model.manifest().components, "int4-g16")
    measured = result(model.evaluate([EvalRequest(plan, reference.id, (0, 6), ALL)])[0])
    tokens = torch.from_numpy(np.concatenate([reference.text[:, :10], reference.continuation], axis=1)).long()
    with torch.inference_mode():
        base = write_rounded(folder, Plan())(tokens).logits[:, 9:-1].log_softmax(-1)
        compressed = write_rounded(folder, plan)(tokens).logits[:, 9:-1].log_softmax(-1)
    expected = (base.exp() * (base - compressed)).sum(-1).mean(-1)
    np.testing.assert_allclose(measured.kl, expected.numpy(), rtol=1e-4)


def test_positions_where_the_base_model_leaves_itself_count_no_divergence(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    nowhere = type(reference)(**{**reference.__dict__, "id": "masked", "agrees": np.zeros_like(reference.agrees)})
    model.use(nowhere)
    plan = Plan.uniform(model.manifest().components, "int2-g8")
    assert result(model.evaluate([EvalRequest(plan, "masked", (0, 6))])[0]).sdt.tolist() == [0] * 6


def test_what_is_left_out_of_fdt_and_sdt_is_counted_beside_them(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    plan = Plan.uniform(model.manifest().components, "int2-g8")
    everywhere = result(model.evaluate([EvalRequest(plan, reference.id, (0, 6))])[0])
    agrees = reference.agrees.copy()
    agrees[np.arange(6), everywhere.fdt.clip(max=agrees.shape[1] - 1)] = False
    model.use(type(reference)(**{**reference.__dict__, "id": "masked", "agrees": agrees}))
    masked = result(model.evaluate([EvalRequest(plan, "masked", (0, 6))])[0])
    assert masked.fdt.sum() > everywhere.fdt.sum()
    assert masked.fdt_unmasked is not None and masked.sdt_unmasked is not None
    assert masked.fdt_unmasked.tolist() == everywhere.fdt.tolist()
    assert masked.sdt_unmasked.tolist() == everywhere.sdt.tolist()


def test_the_base_model_against_itself_diverges_where_it_leaves_its_continuation(folder: Path) -> None:
    model = replica(folder)
    other = with_reference(model)
    continuation, agrees = other.continuation.copy(), other.agrees.copy()
    continuation[2, 5] = (continuation[2, 5] + 1) % 50
    agrees[2, 5:] = False
    model.use(type(other)(**{**other.__dict__, "id": "other", "continuation": continuation, "agrees": agrees}))
    found = result(model.evaluate([EvalRequest(Plan(), "other", (0, 6))])[0])
    assert found.fdt_unmasked is not None
    assert (found.fdt[2], found.fdt_unmasked[2]) == (agrees.shape[1], 5)


def test_end_of_text_is_never_chosen(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model, count=20)
    assert not np.isin(reference.continuation, reference.suppressed).any()


def test_the_canary_of_a_sound_replica_is_silent(folder: Path) -> None:
    reference = with_reference(replica(folder))
    other = replica(folder)
    other.use(reference)
    assert other.canary(reference.id) == 0.0


def test_the_canary_of_other_weights_is_loud(folder: Path, tmp_path: Path) -> None:
    reference = with_reference(replica(folder))
    other = replica(write_model(tmp_path, seed=1))
    other.use(reference)
    assert other.canary(reference.id) > 0.5


def test_non_finite_logits_are_a_failure_value(tmp_path: Path) -> None:
    model = replica(write_model(tmp_path))
    reference = with_reference(model)
    broken = model._weights.standing("model.layers.1.mlp.down_proj")
    broken.mul_(1e38)  # after the reference: of a base model like that none is made
    plan = Plan.of({"model.layers.0.self_attn.q_proj": "int8-channel"})
    outcome = model.evaluate([EvalRequest(plan, reference.id, (0, 6))])[0]
    assert isinstance(outcome, EvalFailure)
    assert outcome.kind == "nonfinite"


@pytest.mark.usefixtures("quick_collections")
def test_out_of_memory_is_answered_with_smaller_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replica(folder)
    reference = with_reference(model)
    request = EvalRequest(MIXED, reference.id, (0, 6))
    run = model._body.finish

    def limited(tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return run(tokens, *rest)

    monkeypatch.setattr(model._body, "finish", limited)
    assert isinstance(model.evaluate([request])[0], EvalResult)


@pytest.mark.usefixtures("quick_collections")
def test_out_of_memory_with_single_prompts_is_a_failure_value(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replica(folder)
    reference = with_reference(model)

    def never(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model._body, "finish", never)
    outcome = model.evaluate([EvalRequest(MIXED, reference.id, (0, 6))])[0]
    assert isinstance(outcome, EvalFailure)
    assert outcome.kind == "out_of_memory"


def test_a_scheme_that_a_component_cannot_take_is_a_failure_value(folder: Path) -> None:
    model, reference = measuring(folder)
    plan = Plan.of({"model.embed_tokens": "nf4"})
    outcome = model.evaluate([EvalRequest(plan, reference.id, (0, 6))])[0]
    assert isinstance(outcome, EvalFailure)
    assert outcome.kind == "invalid"


def test_embeddings_and_norms_can_be_rounded_by_name(folder: Path) -> None:
    model, reference = measuring(folder)
    plan = Plan.of({"model.embed_tokens": "int2-g8", "model.norm": "int2-g8"})
    assert result(model.evaluate([EvalRequest(plan, reference.id, (0, 6))])[0]).sdt.sum() > 0


def test_weights_are_the_checkpoints_again_after_any_plans(folder: Path) -> None:
    model, reference = measuring(folder)
    for scheme in ("int4-g16", "nf4", "w8a8", "int2-g8", *PRUNED):
        plan = Plan.uniform(model.manifest().components, scheme)
        model.evaluate([EvalRequest(MIXED, reference.id, (0, 6), parent=plan)])
    assert model.canary(reference.id) == 0.0


def test_a_component_the_checkpoint_names_otherwise_comes_back_from_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module.Checkpoint, "holds", lambda *_: False)
    model = replica(folder)
    reference = with_reference(model)
    plan = Plan.uniform(model.manifest().components, "nf4")
    model.evaluate([EvalRequest(MIXED, reference.id, (0, 6), parent=plan)])
    assert model.canary(reference.id) == 0.0


def matrices() -> dict[int, torch.Tensor]:
    """Every matrix of floating-point numbers in this process, by where its storage lies."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return {t.untyped_storage().data_ptr(): t for t in tensors if t.is_floating_point() and t.ndim == 2}


def held(model: Replica, others: dict[int, torch.Tensor]) -> float:
    """Weights in memory beside `others` (earlier tests' fixtures), as a multiple of the model's own."""
    own = sum(p.numel() for p in model._body.model.parameters())
    return sum(t.numel() for place, t in matrices().items() if place not in others) / own


@pytest.mark.usefixtures("quick_collections")
def test_a_replica_holds_one_copy_of_the_weights(folder: Path) -> None:
    others = matrices()
    model = replica(folder)
    reference = with_reference(model)
    plan = Plan.uniform(model.manifest().components, "int4-g16")
    model.evaluate([EvalRequest(plan, reference.id, (0, 6), parent=plan)])
    assert held(model, others) <= 1.2


@pytest.mark.usefixtures("quick_collections")
def test_a_plan_far_from_its_parent_is_measured_without_holding_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = matrices()
    model = replica(folder)
    reference = with_reference(model)
    run, seen = model._body.finish, []

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(held(model, others))
        return run(*arguments)

    monkeypatch.setattr(model._body, "finish", watched)
    plan = Plan.uniform(model.manifest().components, "int4-g16")
    model.evaluate([EvalRequest(plan, reference.id, (0, 6), parent=Plan())])
    assert max(seen) <= 1.2


def test_a_reference_of_another_numeric_mode_is_refused(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    other = type(reference)(**{**reference.__dict__, "mode": NumericMode("bfloat16", "cuda", "sdpa")})
    with pytest.raises(ValueError, match="made in mode bfloat16/cuda"):
        replica(folder).use(other)


def test_prompts_longer_than_the_model_reads_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="reads 128 at most"):
        replica(folder).cut_prompts(["x"], 1, 100, 100, 0)


def test_a_tied_head_feels_rounded_embeddings(tmp_path: Path) -> None:
    model = replica(write_model(tmp_path, llama_config(tie_word_embeddings=True)))
    reference = with_reference(model)
    plan = Plan.of({"model.embed_tokens": "int2-tensor"})
    measured = result(model.evaluate([EvalRequest(plan, reference.id, (0, 6), ALL)])[0])
    assert measured.sdt.sum() > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parent", [False, True])
def test_kl_of_a_plan_that_changes_the_head_is_against_the_base_models_head(
    tmp_path: Path, tied: bool, parent: bool
) -> None:
    folder = write_model(tmp_path, llama_config(tie_word_embeddings=tied))
    model, reference = measuring(folder)
    plan = Plan.of({"model.embed_tokens": "int4-g16"} | ({} if tied else {"lm_head": "w8a8-channel"}))
    request = EvalRequest(plan, reference.id, (0, 6), ("kl",), plan if parent else Plan())
    found = result(model.evaluate([request])[0])
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    other = dtm.apply(plan, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    rows = torch.tensor(np.concatenate([reference.text[:, :10], reference.continuation], 1))
    with torch.inference_mode():
        p, q = (each(input_ids=rows).logits[:, 9:-1].log_softmax(-1) for each in (base, other))
    assert found.kl is not None and found.kl.mean() > 0.0
    np.testing.assert_allclose(found.kl, (p.exp() * (p - q)).sum(-1).mean(1).numpy(), rtol=1e-3, atol=1e-6)
    assert values(model.evaluate([request])[0]) == values(found)
    assert model.canary(reference.id) == 0.0


def test_the_packaged_model_continues_python(tmp_path: Path) -> None:
    model = replica(DEMO_MODEL)
    reference = with_reference(model, count=4, prompt=30, continuation=20)
    text = model._tokenizer.decode(reference.continuation[0].tolist())
    assert "return" in text or "def" in text


def test_a_model_that_accelerate_has_spread_measures_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import dispatch_model

    plain = replica(folder)
    reference = with_reference(plain)
    plans = [MIXED.with_(Perturbation(c.name, "int4-channel")) for c in plain.manifest().components]
    requests = [EvalRequest(p, reference.id, (0, 6), ALL, parent=MIXED) for p in plans]
    load = replica_module.load_model

    def spread(*arguments: object) -> torch.nn.Module:
        model = load(*arguments)
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        layers = {f"model.layers.{index}": "cpu" for index in range(3)}
        return dispatch_model(model, places | layers, main_device="cpu", force_hooks=True)

    monkeypatch.setattr(replica_module, "load_model", spread)
    hooked = replica(folder)
    hooked.use(reference)
    assert [values(o) for o in hooked.evaluate(requests)] == [values(o) for o in plain.evaluate(requests)]


def test_timing_leaves_nothing_behind(folder: Path) -> None:
    model = replica(folder)
    reference = with_reference(model)
    request = EvalRequest(Plan.of({component(1, "mlp.up_proj"): "int3-g8"}), reference.id, (0, 6))
    before = values(model.evaluate([request])[0])
    model.measure_speed(4, 5, 5)
    assert (list(model._evaluator.references), values(model.evaluate([request])[0])) == ([reference.id], before)


def test_a_base_model_that_overflows_is_a_mistake_that_names_dtype_and_remedy(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 40_000  # activations pass 65504
    save_file(tensors, path, metadata={"format": "pt"})
    model = Replica(ModelSpec(str(tmp_path), dtype="float16"), ReplicaSettings(num_threads=1))
    prompts, _ = model.cut_prompts([TEXT], 4, 10, 12, 0)
    with pytest.raises(UserError, match=r"not finite in float16, on 4 of 4 prompts\. .* model\.dtype: bfloat16"):
        model.make_reference(prompts)


@pytest.mark.parametrize(("num_differing", "refused"), [(100, False), (101, True)])
def test_a_base_model_must_agree_with_itself_on_nine_tokens_of_ten(
    folder: Path, num_differing: int, refused: bool
) -> None:
    made = with_reference(replica(folder), count=2)
    agrees = (np.arange(1_000) >= num_differing).reshape(2, 500)
    with pytest.raises(UserError, match=r"only 89\.9%.*90% are the least") if refused else nullcontext():
        check_agreement(replace(made, agrees=agrees))


def test_a_base_model_that_leaves_its_own_words_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtmsearch.core.evaluation.LEAST_AGREEMENT", 1.5)
    model = replica(folder)
    prompts, _ = model.cut_prompts([TEXT], 4, 10, 12, 0)
    with pytest.raises(UserError, match=r"float32 the base model chooses only 100\.0% .* model\.attention: eager"):
        model.make_reference(prompts)
