"""Base models that come quantized: what they are unquantized to, against the libraries that own the formats; searches
that start from them; and the scheme that keeps what is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import RUN, in_process, measured_plan
from inprocess import run_here
from quantized import (
    GROUP,
    awq_model,
    awq_parts,
    fp8_model,
    gguf_model,
    gptq_model,
    gptq_parts,
    mxfp4_model,
)
from safetensors.torch import load_file
from tiny import LONG_TEXT as TEXT
from tiny import replica, result, values, with_reference, write_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dtmsearch import config
from dtmsearch.analysis.summary import summarize_run
from dtmsearch.core.checkpoint_files import weight_files
from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, ModelSpec
from dtmsearch.core.holders import source_note
from dtmsearch.core.plan import Plan, plan_size
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.model.modules.discovery import read_manifest, survey
from dtmsearch.model.modules.loading import checkpoint_folder, described_checkpoint
from dtmsearch.model.sources import float_formats, integer_formats, stored
from dtmsearch.model.sources.integer_formats import unpacked
from dtmsearch.model.sources.unquantized import CACHE
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.export import export
from dtmsearch.workflows.init_config import read_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    yield tmp_path / "cache"


_PACKED: dict[str, Path] = {}


def packed_model(factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, scheme: str = "int4-g16") -> Path:
    """A folder of compressed-tensors, as our exporter writes it; one for all tests."""
    in_process(monkeypatch)
    if scheme not in _PACKED:
        folder, half = factory.mktemp("packed"), {"dtype": "bfloat16", "scale_dtype": "bfloat16"}
        made = measured_plan(write_model(folder / "plain"), folder / "store", scheme, **half)
        made.export("compressed-tensors", folder / "packed", check=False)
        _PACKED[scheme] = folder / "packed"
    return _PACKED[scheme]


def ours(path: Path, dtype: str = "bfloat16") -> dict[str, Tensor]:
    folder = checkpoint_folder(ModelSpec(str(path), dtype=dtype))
    state: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).state_dict()
    return state


def theirs(path: Path, dtype: str = "bfloat16") -> dict[str, Tensor]:
    """As transformers' own quantizer unquantizes a folder."""
    config = AutoConfig.from_pretrained(path)
    config.quantization_config["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=getattr(torch, dtype), device_map="cpu")
    state: dict[str, Tensor] = model.state_dict()
    return state


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_blocks_of_fp8_are_what_transformers_makes_of_them(tmp_path: Path, dtype: str) -> None:
    model = fp8_model(tmp_path / "model")
    assert_same(ours(model, dtype), theirs(model, dtype))


def test_blocks_of_fp8_at_the_edges_are_cut(tmp_path: Path) -> None:
    """transformers would take 40 rows of three scales for blocks that do not divide, and 24 of two for blocks of 12."""
    model = fp8_model(tmp_path / "model", intermediate_size=40, hidden_size=24, num_attention_heads=2, head_dim=12)
    parts = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    codes, scales, found = parts[name].float(), parts[f"{name}_scale_inv"], ours(model, "float32")[name]
    assert codes.shape == (40, 24) and scales.shape == (3, 2)
    wanted = [[codes[i, j] * scales[i // 16, j // 16] for j in range(24)] for i in range(40)]
    assert found.tolist() == torch.tensor(wanted).tolist()


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    model = mxfp4_model(tmp_path / "model")
    assert_same(ours(model), theirs(model))


@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel"])
def test_compressed_tensors_are_what_transformers_makes_of_them(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    model = packed_model(tmp_path_factory, monkeypatch, scheme)
    assert_same(ours(model), theirs(model))


@pytest.mark.parametrize("scheme", ["nf4", "w8a8"])
def test_bitsandbytes_weights_are_what_the_library_makes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    in_process(monkeypatch)
    made = measured_plan(write_model(tmp_path / "plain"), tmp_path / "store", scheme)
    made.export("bitsandbytes", tmp_path / "packed", check=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32, device_map="cpu")
    wanted = model.dequantize().state_dict()
    found = ours(tmp_path / "packed", "float32")
    assert all(torch.allclose(found[name], wanted[name].float(), rtol=1e-6, atol=0) for name in found)


def loop(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """(code - zero point) x scale of its group, of [inputs, outputs] and [groups, outputs], as [outputs, inputs]."""
    rows = [
        [(codes[i, o] - zeros[i // GROUP, o]) * scales[i // GROUP, o] for i in range(len(codes))]
        for o in range(codes.shape[1])
    ]
    return torch.tensor(rows)


def codes_of(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """The eight codes of each word along its rows, one by one."""
    found = torch.zeros(len(words), words.shape[1] * 8)
    for i, row in enumerate(words.tolist()):
        for at, word in enumerate(row):
            for place, shift in enumerate(order):
                found[i, at * 8 + place] = (word >> (4 * shift)) & 15
    return found


def test_gptq_is_code_less_zero_point_times_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = gptq_parts(torch.randn(32, 48))
    plain = tuple(range(8))
    codes = codes_of(parts["qweight"].t(), plain).t()
    zeros = codes_of(parts["qzeros"], plain) + 1
    wanted = loop(codes, zeros, parts["scales"].float())
    [weight] = _weights("gptq", parts, {"bits": 4, "group_size": GROUP})
    assert torch.equal(weight, wanted)


def test_awq_is_code_less_zero_point_times_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = awq_parts(torch.randn(32, 48))
    order = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of outputs 0, 1, 2, ... lie in a word
    wanted = loop(codes_of(parts["qweight"], order), codes_of(parts["qzeros"], order), parts["scales"].float())
    [weight] = _weights("awq", parts, {"bits": 4, "group_size": GROUP})
    assert torch.equal(weight, wanted)


def _weights(method: str, parts: dict[str, Tensor], settings: dict[str, Any]) -> list[Tensor]:
    tensors = {f"m.{name}": part for name, part in parts.items()}
    headers = {name: (str(part.dtype).removeprefix("torch."), tuple(part.shape)) for name, part in tensors.items()}
    form = stored.format_of({"quant_method": method}, "model")
    return [weight.make(tensors) for weight in form.weights(headers, settings, tensors.__getitem__)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_may_lie_in_two_words(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    stream = sum(code << (bits * at) for at, code in enumerate(codes))
    words = [(stream >> (32 * at)) & 0xFFFFFFFF for at in range(64 * bits // 32)]
    signed = torch.tensor([[w - 2**32 if w >= 2**31 else w for w in words]], dtype=torch.int32)
    assert unpacked(signed, bits, 1).tolist() == [codes]


def test_gguf_is_what_its_own_library_makes_of_it(tmp_path: Path) -> None:
    import gguf

    path = gguf_model(tmp_path)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    found = ours(path, "float32")["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(found.numpy(), wanted)


def test_a_manifest_says_what_the_model_came_as(tmp_path: Path) -> None:
    manifest = read_manifest(ModelSpec(str(fp8_model(tmp_path / "model"))))
    by_kind = {component.kind: component for component in manifest.components}
    assert manifest.source == "FP8 in blocks of 16 x 16"
    assert by_kind["up"].source_bits == 48 * 32 * 8 + 3 * 2 * 32
    assert manifest.dtype == "bfloat16"


def test_experts_of_a_stack_share_its_bits(tmp_path: Path) -> None:
    manifest = read_manifest(ModelSpec(str(mxfp4_model(tmp_path / "model"))))
    down = next(c for c in manifest.components if c.kind == "down")
    assert down.source_bits / down.num_weights == 4.25
    assert next(c for c in manifest.components if c.kind == "q").source_bits == 0


def test_a_manifest_is_the_same_in_every_dtype_and_another_than_the_unquantized_model_s(tmp_path: Path) -> None:
    path = gptq_model(tmp_path / "model")
    first, other = (read_manifest(ModelSpec(str(path), dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert first == other
    plain = read_manifest(ModelSpec(str(checkpoint_folder(ModelSpec(str(path))))))
    assert first.id != plain.id and not plain.source


def test_names_and_shapes_take_no_room(tmp_path: Path) -> None:
    spec = ModelSpec(str(fp8_model(tmp_path / "model")))
    survey(spec)
    [file] = weight_files(described_checkpoint(spec))
    assert file.stat().st_blocks * 512 < file.stat().st_size / 2
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith("bfloat16")]


def test_a_source_is_unquantized_once(tmp_path: Path) -> None:
    spec = ModelSpec(str(fp8_model(tmp_path / "model")))
    first = checkpoint_folder(spec)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert checkpoint_folder(spec) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_format_without_its_package_is_said_with_the_command(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_model(tmp_path_factory, monkeypatch)
    monkeypatch.setattr(stored, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"compressed-tensors, which needs: pip install compressed-tensors$"):
        checkpoint_folder(ModelSpec(str(packed)))


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "higgs"}}))
    with pytest.raises(
        UserError, match="quantized by 'higgs', which is not read here: formats that are, are fp8, mxfp4"
    ):
        read_manifest(ModelSpec(str(model)))


def test_what_is_no_gguf_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="is no GGUF file, or a damaged one"):
        read_manifest(ModelSpec(str(tmp_path / "model.gguf")))


def test_what_is_kept_as_stored_changes_nothing(tmp_path: Path) -> None:
    model = replica(fp8_model(tmp_path / "model"))
    reference = with_reference(model)
    kept = Plan.uniform(model.manifest().components, "source")
    span = (0, reference.num_prompts)
    outcome, base = model.evaluate([EvalRequest(plan, reference.id, span) for plan in (kept, Plan())])
    assert values(outcome) == values(base)
    assert result(outcome).sdt.sum() == 0


def test_errors_of_what_is_kept_as_stored_leave_the_weights_alone(tmp_path: Path) -> None:
    model = replica(fp8_model(tmp_path / "model"))
    names = [component.name for component in model.manifest().components]
    reference = with_reference(model)
    request = EvalRequest(Plan.uniform(model.manifest().components, "int4-g16"), reference.id, (0, 4))
    before = values(model.evaluate([request])[0])
    errors = model.weight_errors(names, ["source"])
    assert {error.plain for error in errors} == {0.0}
    assert values(model.evaluate([request])[0]) == before


SEARCH = """
run: mine
model: {{path: {model}, dtype: float32, attention: eager}}
prompts: {{files: [text.txt], count: 4, prompt_tokens: 10, continuation_tokens: 8}}
validation: {{count: 4, files: [text.txt]}}
search:
  strategy: {strategy}
  rank_by: kl
  schemes: [{schemes}]
  components: {{include: [{include}]}}
  stop: {{bits_per_weight: {bits}}}
"""


def searched(
    tmp_path: Path, model: Path, schemes: str, bits: float, include: str = "'*.1.*'", strategy: str = "sensitivity"
) -> Any:
    (tmp_path / "text.txt").write_text(TEXT)
    file = tmp_path / "search.yaml"
    file.write_text(SEARCH.format(model=model, schemes=schemes, bits=bits, include=include, strategy=strategy))
    return run_here(file, tmp_path / "dtm-store")


MODELS = {
    "fp8": (fp8_model, "source, int4-g16", 6.5, "'*.1.*'", "source"),
    "mxfp4": (mxfp4_model, "source, int3-g32", 4.2, "gate_up, down", "dense"),
    "gptq": (gptq_model, "source, int3-g16", 5.5, "'*.1.*'", "dense"),
    "gguf": (gguf_model, "int8-channel, int4-g16", 6.5, "'*.1.*'", "compressed-tensors"),
    "compressed-tensors": (None, "source, int3-g16", 4.5, "'*.1.*'", "compressed-tensors"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_search_from_a_quantized_source_ends_in_an_export_that_measures_as_recorded(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    in_process(monkeypatch)
    make, schemes, bits, include, form = MODELS[name]
    source = packed_model(tmp_path_factory, monkeypatch) if make is None else make(tmp_path / "model-folder")
    summary = searched(tmp_path, source, schemes, bits, include)
    assert summary.status == "finished" and summary.final_plan is not None
    assert "the source itself stores" in str(summary.source)
    exported = export(RUN, form, tmp_path / "out", str(tmp_path / "dtm-store"))
    assert exported.check is not None and exported.check.equal


def raw(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def assert_kept(tmp_path: Path, source: Path, made: Any, form: str) -> None:
    """Of every component under `source`, the export holds the bytes that the source has."""
    made.export(form, tmp_path / "out")
    before, after = raw(source), raw(tmp_path / "out")
    kept = [component for component, scheme in made.plan.entries if scheme == "source"]
    names = [name for name in before for component in kept if name.startswith(f"{component}.")]
    assert len(names) > len(kept)
    for name in names:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


KEPT = {
    "model.layers.0.mlp.up_proj": "source",
    "model.layers.1.mlp.up_proj": "source",
    "model.layers.2.mlp.down_proj": "int4-g16",
}


def test_an_export_to_fp8_keeps_the_bytes_of_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    source = fp8_model(tmp_path / "model")
    made = measured_plan(source, tmp_path / "store", KEPT, dtype="bfloat16")
    assert_kept(tmp_path, source, made, "source")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["model.layers.2.mlp.down_proj"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (gptq_model, {"dynamic": {r"-:^model\.layers\.2\.mlp\.down_proj$": {}}}),
        (awq_model, {"modules_to_not_convert": ["model.layers.2.mlp.down_proj"]}),
    ],
)
def test_an_export_to_packed_integers_keeps_the_bytes_of_what_is_kept(
    make: Any, told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    source = make(tmp_path / "model")
    before = json.loads((source / "config.json").read_text())["quantization_config"]
    made = measured_plan(source, tmp_path / "store", KEPT, dtype="bfloat16")
    assert_kept(tmp_path, source, made, "source")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == before | told


def test_an_export_to_mxfp4_keeps_the_experts_of_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    source = mxfp4_model(tmp_path / "model")
    experts = [f"{e}.{m}" for e in range(4) for m in ("gate_up_proj", "down_proj")]
    kept = {f"model.layers.0.mlp.experts.{each}": "source" for each in experts}
    changed = {f"model.layers.1.mlp.experts.{each}": "int3-g32" for each in experts}
    made = measured_plan(source, tmp_path / "store", kept | changed, dtype="bfloat16", attention="eager")
    check = made.export("source", tmp_path / "out").check
    assert check is not None and check.equal
    before, after = raw(source), raw(tmp_path / "out")
    packed = [name for name in before if ".0.mlp.experts." in name and name.endswith(("_blocks", "_scales"))]
    assert len(packed) == 4 and all(torch.equal(before[name], after[name]) for name in packed)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"][-1] == "model.layers.1.mlp.experts"


def test_experts_of_one_tensor_are_not_kept_beside_changed_ones(tmp_path: Path) -> None:
    source = mxfp4_model(tmp_path / "model")
    name = "model.layers.0.mlp.experts.{}.down_proj"
    made = measured_plan(
        source,
        tmp_path / "store",
        {name.format(0): "source", name.format(1): "int3-g32"},
        "bfloat16",
        attention="eager",
    )
    with pytest.raises(UserError, match=r"in one tensor with others that the plan changes\n  .*experts.0.down_proj"):
        made.export("source", tmp_path / "out", check=False)


@pytest.mark.parametrize("form", ["source", "compressed-tensors"])
def test_an_export_to_compressed_tensors_keeps_the_bytes_of_what_is_kept(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    source = packed_model(tmp_path_factory, monkeypatch)
    made = measured_plan(source, tmp_path / "store-of-packed", KEPT, dtype="bfloat16", scale_dtype="bfloat16")
    assert_kept(tmp_path, source, made, form)


def test_other_formats_refuse_what_they_cannot_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    made = measured_plan(gptq_model(tmp_path / "model"), tmp_path / "store", KEPT)
    with pytest.raises(UserError, match="up_proj: source: the base model comes as GPTQ in 4 bits, groups of 16, whose"):
        made.export("compressed-tensors", tmp_path / "out")


def test_a_plan_that_is_larger_than_its_source_is_warned_of(tmp_path: Path) -> None:
    measured_plan(fp8_model(tmp_path / "model"), tmp_path / "store", "int8-g16")
    summary = summarize_run(ResultStore(tmp_path / "store"), RUN)
    assert summary.source == (
        "FP8 in blocks of 16 x 16: the source itself stores 8.12 bits per weight, the plan 9.00: the plan is larger "
        "than what it was made from"
    )
    assert summary.source in summary.verdict


def test_source_is_no_scheme_of_a_model_that_does_not_come_quantized(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not come quantized: leave it out"):
        searched(tmp_path, write_model(tmp_path / "model"), "source, int4-g16", 6)


def test_a_search_file_is_proposed_for_a_gguf_file(tmp_path: Path) -> None:
    path = gguf_model(tmp_path)
    facts = read_model(str(path))
    assert (facts.path, facts.architecture, facts.num_layers) == (str(path), "LlamaForCausalLM", 3)


def test_a_scale_for_each_of_stacked_matrices_is_that_matrixs() -> None:
    codes = torch.ones(2, 4, 8).to(torch.float8_e4m3fn)
    scales = torch.tensor([0.5, 3.0])
    found = float_formats._scaled("weight", "scale", None, {"weight": codes, "scale": scales})
    assert torch.equal(found, scales.reshape(2, 1, 1).expand(2, 4, 8))
    with pytest.raises(UserError, match="of no blocks"):
        float_formats._spans((2, 4, 8), (4,), None, "weight")
    one = float_formats._scaled("weight", "scale", None, {"weight": codes, "scale": torch.tensor([2.0])})
    assert torch.equal(one, torch.full((2, 4, 8), 2.0))


def test_a_zero_point_of_nothing_is_read_in_version_1_of_gptq() -> None:
    """Stored less one it is the largest code."""
    names = {part: part for part in ("qweight", "qzeros", "scales")}
    parts = {
        "qweight": torch.tensor([[0x55555555]], dtype=torch.int32),
        "qzeros": torch.tensor([[-1]], dtype=torch.int32),
        "scales": torch.ones(1, 1),
    }
    assert torch.equal(integer_formats._gptq(names, 4, 1, 8, parts), torch.full((1, 8), 5.0))


def test_a_place_where_unquantized_weights_cannot_be_kept_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, "/proc")
    with pytest.raises(UserError, match=f"cannot be kept in /proc.*{CACHE}"):
        replica(fp8_model(tmp_path / "fp8"))


def test_a_component_that_stays_as_the_base_model_stores_it_is_not_compressed() -> None:
    component = Component("model.layers.0.mlp.up_proj", 0, "up", (64, 64), source_bits=64 * 64 * 4)
    size = plan_size(Plan.uniform([component], "source"), [component], 16)
    assert (size.num_compressed, size.share, size.bits_per_weight) == (0, 0.0, 4.0)
    with pytest.raises(UserError, match="source leaves components as they are, so stop needs a rule that counts bits"):
        config.parse(
            "run: r\nmodel: m\nprompts: {files: [t.txt], count: 2, prompt_tokens: 8, continuation_tokens: 8}\n"
            "search: {schemes: [source, int4-g16], stop: {share: 0.8}}\n", "s.yaml", Path()
        )  # fmt: skip


def test_that_no_export_holds_source_beside_others_is_said_before_the_search() -> None:
    both = [parse_scheme("source"), parse_scheme("int4-g32")]
    assert "no export holds `source` beside other schemes" in str(source_note("bitsandbytes NF4", both))
    assert source_note("FP8 in blocks of 128 x 128", both) is None
    assert source_note("bitsandbytes NF4", both[:1]) is None and source_note("", both) is None
