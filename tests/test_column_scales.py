"""Columns that are scaled by powers of two before they are rounded (AWQ, SmoothQuant), and where a folder has these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exports import Measured, in_process, measured_plan
from safetensors.torch import load_file, save_file
from test_number_formats import decompressed_weights
from tiny import TEXT, in_stages, llama_config, replica, values, with_reference, write_model, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, GemmaConfig

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, ReplicaSettings
from dtmsearch.core.fusion import input_readers
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.column_scales import awq_scales, smooth_scales
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.replica.exported import decompressed_model, round_as_engines_do
from dtmsearch.model.replica.replica import Replica

FIRST, SECOND = "model.layers.0", "model.layers.1"
# Every place that there is, with what reads the same under one scheme or left as it is.
PLAN = {
    **{f"{FIRST}.self_attn.{part}_proj": "awq-int4-g32" for part in "qv"},
    f"{FIRST}.self_attn.o_proj": "awq-int4-g32",
    **{f"{FIRST}.mlp.{part}_proj": "awq-int3-g32-asym" for part in ("gate", "up")},
    f"{FIRST}.mlp.down_proj": "awq-int3-channel",
    **{f"{SECOND}.self_attn.{part}_proj": "smooth-w8a8-channel" for part in "qk"},
    f"{SECOND}.self_attn.o_proj": "smooth-w8a8-channel",
    **{f"{SECOND}.mlp.{part}_proj": "smooth-w4a8-g32" for part in ("gate", "up")},
    f"{SECOND}.mlp.down_proj": "awq-int4-channel",
}


def with_outliers(folder: Path) -> Path:
    """A model whose norms have some inputs stand out, by no powers of two."""
    state = load_file(folder / "model.safetensors")
    drawn = torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        if tensor.ndim == 1:
            state[name] = torch.exp(torch.randn(tensor.shape, generator=drawn) * 1.2).to(tensor)
        if "up_proj" in name:
            state[name] = tensor * torch.exp(torch.randn(len(tensor), 1, generator=drawn) * 1.2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    return with_outliers(write_model(tmp_path_factory.mktemp("uneven"), config))


def calibrated(folder: Path, plan: Plan, dtype: str) -> Replica:
    """A replica that has what the plan needs, by the text of `measured_plan`."""
    found = Replica(ModelSpec(str(folder), dtype=dtype, scale_dtype=dtype), ReplicaSettings(num_threads=1))
    calibration = found.cut_calibration([TEXT], 8, 16, 0)
    found.use_calibration(calibration)
    found._calibrator.prepare([plan], calibration.id)
    return found


@pytest.fixture(params=["float32", "bfloat16"])
def written(
    request: pytest.FixtureRequest, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Path]]:
    """The plan's folder, of a model in some dtype."""
    in_process(monkeypatch)
    measured: Measured = measured_plan(uneven, tmp_path / "store", PLAN, request.param, scale_dtype=request.param)
    exported = measured.export("compressed-tensors", tmp_path / "out")
    assert exported.check is not None and exported.check.equal
    yield request.param, tmp_path / "out"


def test_a_scheme_takes_the_bits_of_the_one_that_rounds_its_columns() -> None:
    for name in ("awq-int4-g128", "awq-int3-channel-asym", "smooth-w8a8-channel", "smooth-w4a8-g64"):
        scheme = parse_scheme(name)
        assert scheme.needs_calibration
        assert scheme.stored_bits((64, 256), 16) == parse_scheme(scheme.scaled).stored_bits((64, 256), 16)


@pytest.mark.parametrize("name", ["awq-int4-tensor", "awq-gptq-int4-g128", "smooth-int8-channel", "smooth-w4afp8"])
def test_what_no_export_could_hold_is_no_scheme(name: str) -> None:
    with pytest.raises(UserError, match="unknown scheme"):
        parse_scheme(name)


def test_scales_are_powers_of_two_that_lessen_the_error_of_outputs() -> None:
    drawn = torch.Generator().manual_seed(1)
    weight, sizes = torch.randn(48, 64, generator=drawn), torch.exp(torch.randn(64, generator=drawn) * 2)
    squares, scheme = sizes.square(), parse_scheme("int3-g32")

    def error(scales: Tensor) -> float:
        return float(((round_weight(weight * scales, scheme) / scales - weight).square() @ squares).sum())

    found = awq_scales([weight], squares, lambda scaled: round_weight(scaled, scheme))
    assert torch.equal(torch.frexp(found).mantissa, torch.full((64,), 0.5))
    assert error(found) < 0.9 * error(torch.ones(64))
    even = awq_scales([weight], torch.ones(64), lambda scaled: round_weight(scaled, scheme))
    assert torch.equal(even, torch.ones(64))


def test_smoothing_moves_the_root_of_what_stands_out_to_the_weights() -> None:
    sizes, weight = torch.ones(8), torch.ones(2, 8)
    sizes[3], sizes[5], weight[1, 5] = 64.0, 0.0, -4.0
    expected = torch.ones(8)
    expected[3] = 8.0
    assert torch.equal(smooth_scales([weight], sizes.square()), expected)


def test_who_reads_the_same() -> None:
    def component(name: str, kind: str, mixture: str = "") -> Component:
        return Component(f"layer.{name}", 0, kind, (8, 8), mixture=mixture)

    names = [("a.q", "q"), ("a.k", "k"), ("a.o", "o"), ("m.gate", "gate"), ("m.up", "up"), ("m.down", "down")]
    found = input_readers([component(*pair) for pair in names] + [component("x.up", "up"), component("x.down", "down")])
    pairs = {"layer.a.q": ("layer.a.q", "layer.a.k"), "layer.m.gate": ("layer.m.gate", "layer.m.up")}
    assert {name: found[name] for name in pairs} == pairs
    assert found["layer.m.down"] == ("layer.m.down",)
    assert not found.keys() & {"layer.a.o", "layer.x.up", "layer.x.down"}
    assert not input_readers([component("e.gate", "gate", "layer.e"), component("e.up", "up", "layer.e")])


def test_a_folder_says_what_the_plan_says_bit_for_bit(uneven: Path, written: tuple[str, Path]) -> None:
    dtype, folder = written
    plan = Plan.of(PLAN)
    ours = calibrated(uneven, plan, dtype)
    served = decompressed_model(folder, ModelSpec(str(folder), dtype=dtype), torch.device("cpu")).eval()
    round_as_engines_do(served, folder)
    tokens = torch.arange(60).reshape(3, 20)
    with torch.inference_mode(), ours._weights.perturbed(plan):
        expected = ours._weights._model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(served(input_ids=tokens, use_cache=False).logits, expected)


def test_norms_and_rows_hold_the_scales_of_columns(uneven: Path, written: tuple[str, Path]) -> None:
    dtype, folder = written
    plan = Plan.of(PLAN)
    compressor = calibrated(uneven, plan, dtype)._weights.compressor
    before, after = load_file(uneven / "model.safetensors"), load_file(folder / "model.safetensors")
    weights = decompressed_weights(folder)
    for layer, norm, reader in (
        (FIRST, "input_layernorm", "self_attn.q_proj"),
        (FIRST, "post_attention_layernorm", "mlp.up_proj"),
        (SECOND, "input_layernorm", "self_attn.k_proj"),
        (SECOND, "post_attention_layernorm", "mlp.gate_proj"),
    ):
        name = f"{layer}.{reader}"
        scales = compressor.column_scales(name, plan.scheme(name))
        assert scales is not None and len(scales.unique()) > 1, name
        kept = before[f"{layer}.{norm}.weight"].to(getattr(torch, dtype))
        assert torch.equal(after[f"{layer}.{norm}.weight"] * scales.to(kept), kept), name
    unquantized = f"{FIRST}.self_attn.k_proj"
    scales = compressor.column_scales(f"{FIRST}.self_attn.q_proj", plan.scheme(f"{FIRST}.self_attn.q_proj"))
    assert scales is not None
    own = before[f"{unquantized}.weight"].to(getattr(torch, dtype))
    assert torch.equal(after[f"{unquantized}.weight"], own * scales.to(own))
    down, up = f"{FIRST}.mlp.down_proj", f"{FIRST}.mlp.up_proj"
    rows, columns = compressor.column_scales(down, plan.scheme(down)), compressor.column_scales(up, plan.scheme(up))
    assert rows is not None and columns is not None and len(rows.unique()) > 1
    made = compressor.compress(up, before[f"{up}.weight"].to(getattr(torch, dtype)), plan.scheme(up))
    assert torch.equal(weights[up].to(made) * rows.to(made).unsqueeze(1) / columns.to(made), made)


def test_scales_are_those_of_unrounded_weights_whatever_was_replaced_before(uneven: Path) -> None:
    q, k = f"{FIRST}.self_attn.q_proj", f"{FIRST}.self_attn.k_proj"
    plan = Plan.of({q: "int2-channel", k: "awq-int4-g32"})
    model = calibrated(uneven, plan, "float32")
    with model._weights.perturbed(Plan.of({k: "awq-int4-g32"})):
        expected = model._weights.standing(k).clone()
    model._weights.compressor.forget_weights()
    with model._weights.perturbed(plan):
        assert torch.equal(model._weights.standing(k), expected)


def test_weights_that_pass_through_and_layers_in_stages_are_scaled_the_same(uneven: Path) -> None:
    found = []
    for made in (replica(uneven), replica(uneven, weights="streamed"), in_stages(uneven, 2)):
        reference = with_reference(made)
        calibration = made.cut_calibration([TEXT], 8, 16, 0)
        made.use_calibration(calibration)
        made.gather_statistics(calibration)
        names = list(PLAN)
        plans = [Plan.of(PLAN), *(Plan.of({name: PLAN[name]}) for name in (names[0], names[4], names[7], names[9]))]
        requests = [EvalRequest(plan, reference.id, (0, 6), calibration_id=calibration.id) for plan in plans]
        found.append([values(outcome) for outcome in made.evaluate(requests)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("schemes", "said"),
    [
        ({"self_attn.q_proj": "awq-int4-g32", "self_attn.k_proj": "int4-g32"}, "k_proj: int4-g32 reads what"),
        ({"self_attn.q_proj": "awq-int4-g32", "self_attn.k_proj": "awq-int2-g32"}, "awq-int2-g32 reads what"),
        ({"mlp.up_proj": "int8-tensor", "mlp.down_proj": "awq-int3-g32"}, "behind .*up_proj: int8-tensor"),
    ],
)
def test_scales_that_have_no_place_are_refused(
    schemes: dict[str, str], said: str, uneven: Path, tmp_path: Path
) -> None:
    plan = {f"{FIRST}.{name}": scheme for name, scheme in schemes.items()}
    measured = measured_plan(uneven, tmp_path / "store", plan)
    with pytest.raises(UserError, match=said):
        measured.export("compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def side_by_side(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A model of Cohere's, whose attention and MLP read one norm, and the kinds of its components."""
    config = CohereConfig(
        vocab_size=258, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=257, bos_token_id=256, logit_scale=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    folder = with_outliers(write_tokenizer(tmp_path / "model"))
    kinds = {c.name: c.kind for c in read_manifest(ModelSpec(str(folder))).components}
    return folder, kinds


def test_attention_and_mlp_behind_one_norm_cannot_both_scale_it(tmp_path: Path) -> None:
    folder, kinds = side_by_side(tmp_path)
    both = {name: "awq-int3-g32" for name, kind in kinds.items() if kind in ("q", "k", "v", "gate", "up")}
    measured = measured_plan(folder, tmp_path / "store", both)
    with pytest.raises(UserError, match="has room for one scale of each output"):
        measured.export("compressed-tensors", tmp_path / "out")


def test_where_only_attention_scales_what_both_read_the_mlp_s_columns_are_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    folder, kinds = side_by_side(tmp_path)
    plan = {name: "awq-int3-g32" for name, kind in kinds.items() if kind in ("q", "k", "v")}
    measured = measured_plan(folder, tmp_path / "store", plan)
    exported = measured.export("compressed-tensors", tmp_path / "out")
    assert exported.check is not None and exported.check.equal
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    gate = next(name for name, kind in kinds.items() if kind == "gate")
    assert not torch.equal(after[f"{gate}.weight"], before[f"{gate}.weight"])


def test_a_norm_whose_outputs_do_not_follow_its_weights_has_no_place_for_scales(tmp_path: Path) -> None:
    """Gemma's adds one to them."""
    config = GemmaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, eos_token_id=257, bos_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    folder = with_outliers(write_tokenizer(tmp_path / "model"))
    names = [c.name for c in read_manifest(ModelSpec(str(folder))).components if c.kind in "qkv"]
    measured = measured_plan(folder, tmp_path / "store", dict.fromkeys(names, "awq-int3-g32"))
    with pytest.raises(UserError, match=r"GemmaRMSNorm\) do not follow its weights"):
        measured.export("compressed-tensors", tmp_path / "out")
    measured.export("dense", tmp_path / "dense", check=False)
