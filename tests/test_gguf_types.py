"""llama.cpp's types as schemes: sizes, what stands in where blocks do not divide a row, and the weights themselves,
where llama.cpp's quantizer is installed (DTMSEARCH_GGML)."""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from gguf.quants import dequantize
from tiny import TEXT, llama_config, replica, with_reference, write_model

from dtmsearch import config
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.core import gguf_types, schemes
from dtmsearch.core.calibration import InputStatistics
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec
from dtmsearch.core.gguf_presets import PRESETS, preset_plan
from dtmsearch.core.gguf_types import TYPES, held_type, quantized, round_trip, stored_bits
from dtmsearch.core.plan import Budget, Perturbation, Plan
from dtmsearch.core.prices import PriceRequest
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import LibraryMissing, UserError
from dtmsearch.export.formats.gguf import write_recipe
from dtmsearch.export.job import Job
from dtmsearch.model.compress import compressor as compressor_module
from dtmsearch.model.compress.compressor import Compressor
from dtmsearch.model.compress.number_rounding import round_inputs
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.search.baselines import (
    best_rival,
    better_uniform,
    may_take_its_place,
    preset_rivals,
    uniform_rivals,
)
from dtmsearch.search.space import SearchSpace
from dtmsearch.workflows.check_search import check_search
from dtmsearch.workflows.run import run
from dtmsearch.workflows.validate import validation_plans


def has_library() -> bool:
    try:
        gguf_types.ggml()
    except UserError:
        return False
    return True


needs_library = pytest.mark.skipif(not has_library(), reason="llama.cpp's quantizer is not installed here")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gguf_types._found.cache_clear()
    monkeypatch.delenv(gguf_types.VARIABLE, raising=False)
    monkeypatch.setattr(gguf_types.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(gguf_types.importlib.util, "find_spec", lambda name: None)
    yield
    gguf_types._found.cache_clear()


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: str(kind.name))
def test_blocks_are_those_of_the_gguf_package(kind: gguf_types.GgufType) -> None:
    number = gguf.GGMLQuantizationType[kind.name]
    assert (int(number), gguf.GGML_QUANT_SIZES[number]) == (kind.number, (kind.block, kind.block_bytes))


@pytest.mark.parametrize(
    ("scheme", "cols", "held", "bits"),
    [
        ("gguf-Q4_K", 512, "Q4_K", 4.5),
        ("gguf-Q6_K", 768, "Q6_K", 6.5625),
        ("gguf-IQ4_XS", 256, "IQ4_XS", 4.25),
        ("gguf-Q4_K", 576, "Q5_0", 5.5),  # as llama.cpp takes instead where 256 does not divide the rows
        ("gguf-Q5_K", 576, "Q5_1", 6.0),
        ("gguf-Q6_K", 576, "Q8_0", 8.5),
        ("gguf-IQ4_XS", 64, "IQ4_NL", 4.5),
        ("gguf-Q8_0", 576, "Q8_0", 8.5),
        ("gguf-Q4_K", 40, None, 16.0),
        ("gguf-Q4_0", 40, None, 16.0),
    ],
)
def test_rows_that_blocks_do_not_divide_are_held_as_llama_cpp_holds_them(
    scheme: str, cols: int, held: str | None, bits: float
) -> None:
    kind = held_type(scheme, cols)
    assert (kind and kind.name) == held
    assert stored_bits(scheme, (8, cols)) == 8 * cols * bits == parse_scheme(scheme).stored_bits((8, cols), 16)


def test_every_type_is_in_one_line_of_its_make() -> None:
    lines = [line for weighted in (True, False) for line in gguf_types.lines_of(gguf_types.names_of(weighted))]
    assert sorted(name for line in lines for name in line) == sorted(f"gguf-{kind}" for kind in TYPES)
    assert ("gguf-Q6_K", "gguf-Q5_K", "gguf-Q4_K", "gguf-Q3_K", "gguf-Q2_K") in lines


def test_uniform_rivals_are_the_least_compressed_of_each_make_that_fit() -> None:
    components = tuple(Component(f"layers.{i}.up", i, "up", (512, 512)) for i in range(2))
    space = SearchSpace(components, ("gguf-Q4_K",))
    assert uniform_rivals(space, space.uniform("gguf-Q4_K")) == ["gguf-Q4_K", "gguf-Q4_0", "gguf-IQ4_NL", "gguf-IQ4_XS"]


def test_types_that_an_importance_matrix_changes_are_calibrated() -> None:
    assert parse_scheme("gguf-Q4_K").needs_calibration and not parse_scheme("gguf-Q8_0").needs_calibration


def test_without_the_library_it_is_said_how_to_have_it(no_library: None) -> None:
    with pytest.raises(UserError, match=r"need llama.cpp's quantizer, libggml-base: pip install llama-cpp-python, or"):
        gguf_types.ggml()


def test_a_search_that_needs_the_library_is_refused_before_it_begins(no_library: None, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", llama_config(num_hidden_layers=1))
    (tmp_path / "text.txt").write_text(TEXT)
    prompts = {"files": ["text.txt"], "count": 4, "prompt_tokens": 8, "continuation_tokens": 8}
    search = {"strategy": "probe", "schemes": ["gguf-Q8_0"]}
    file = {"run": "r", "model": {"path": str(model)}, "prompts": prompts, "search": search}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(file))
    loaded = config.load(tmp_path / "search.yaml")
    with pytest.raises(LibraryMissing, match="pip install llama-cpp-python"):
        check_search(loaded)
    with pytest.raises(LibraryMissing, match="pip install llama-cpp-python"):
        run(loaded, str(tmp_path / "store"), PoolSettings(in_process=True))
    assert not (tmp_path / "store" / "evaluations").exists()


def test_a_library_that_a_replica_lacks_is_no_failure_of_the_plan(no_library: None, tmp_path: Path) -> None:
    """It would be recorded, and hold wherever the library is."""
    model = replica(write_model(tmp_path / "model", llama_config(num_hidden_layers=1)))
    reference = with_reference(model)
    plan = Plan.of({"model.layers.0.mlp.up_proj": "gguf-Q8_0"})
    with pytest.raises(LibraryMissing):
        model.evaluate([EvalRequest(plan, reference.id, (0, reference.num_prompts))])


def test_the_library_is_looked_for_once_where_there_is_none(no_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every identity of an evaluation asks for its build."""
    looked: list[str] = []
    monkeypatch.setattr(gguf_types.ctypes.util, "find_library", looked.append)
    assert [gguf_types.build() for _ in range(3)] == ["", "", ""] and looked == ["ggml-base"]


def of_another_build(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A request as it comes out of a process with another build of the quantizer than this one's."""
    with monkeypatch.context() as there:
        family = replace(schemes._FAMILIES["gguf-plain"], build=lambda: "ggml of there")
        there.setitem(schemes._FAMILIES, family.name, family)
        return pickle.loads(pickle.dumps(request))


@pytest.mark.parametrize("kind", ["evaluation", "prices"])
def test_a_replica_refuses_what_another_build_of_the_library_would_be_recorded_for(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = replica(write_model(tmp_path / "model", llama_config(num_hidden_layers=1)))
    reference = with_reference(model)
    name, prompts = "model.layers.0.mlp.up_proj", (0, reference.num_prompts)
    with pytest.raises(LibraryMissing, match=r"of the family gguf-plain.*than where the search runs \(.*of there"):
        if kind == "evaluation":
            made = EvalRequest(Plan.of({name: "gguf-Q8_0"}), reference.id, prompts)
            model.evaluate([of_another_build(made, monkeypatch)])
        else:
            model.price(of_another_build(PriceRequest(reference.id, prompts, (name,), ("gguf-Q8_0",)), monkeypatch))


def test_a_variable_that_names_nothing_is_said(
    no_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(gguf_types.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match="DTMSEARCH_GGML: there is no libggml-base at "):
        gguf_types.ggml()


def test_a_file_that_is_no_library_is_said(no_library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libggml-base.so"
    path.write_bytes(b"no library")
    monkeypatch.setenv(gguf_types.VARIABLE, str(path))
    with pytest.raises(UserError, match=r"is no library of llama.cpp's quantizer"):
        gguf_types.ggml()


def matrix(rows: int = 6, cols: int = 512) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return random.normal(0, 0.02, (rows, cols)).astype(np.float32), random.exponential(1, cols).astype(np.float32)


# Types whose quantizer begins at once.
QUICK = [kind for name, kind in TYPES.items() if not name.startswith("IQ3")]


@needs_library
@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: str(kind.name))
def test_weights_are_those_that_the_gguf_package_reads(kind: gguf_types.GgufType) -> None:
    values, importance = matrix()
    blocks = quantized(values, kind, importance)
    np.testing.assert_array_equal(
        round_trip(values, kind, importance), dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    )


@needs_library
def test_importance_lowers_the_error_that_it_weighs() -> None:
    values, importance = matrix(32)
    importance = importance**3

    def error(weights: Any) -> float:
        return float((((round_trip(values, TYPES["Q4_K"], weights) - values) ** 2) * importance).sum())

    assert error(importance) < 0.95 * error(None)


@needs_library
def test_a_scheme_makes_them_of_a_tensor_by_its_inputs_mean_squares() -> None:
    values, importance = matrix()
    scheme = parse_scheme("gguf-Q4_K")
    assert scheme.own is not None and scheme.own.make is not None
    made = scheme.own.make(torch.from_numpy(values), scheme, lambda: torch.from_numpy(importance))
    np.testing.assert_array_equal(made.numpy(), round_trip(values, TYPES["Q4_K"], importance))


@needs_library
def test_rows_in_parts_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    values, importance = matrix(37)
    whole = quantized(values, TYPES["Q5_K"], importance)
    monkeypatch.setattr(gguf_types, "_PART_WEIGHTS", 1024)
    np.testing.assert_array_equal(quantized(values, TYPES["Q5_K"], importance), whole)


def test_a_recipe_keeps_the_types_and_the_importance_that_they_were_made_by(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", llama_config(hidden_size=256, num_attention_heads=4))
    manifest = read_manifest(ModelSpec(str(folder), dtype="float32"))
    names = {"model.layers.0.self_attn.q_proj": "gguf-Q4_K", "model.layers.1.mlp.down_proj": "gguf-IQ4_XS"}
    compressor = Compressor()
    squares = {c.name: np.arange(1, c.shape[1] + 1, dtype=np.float32) for c in manifest.components}
    compressor.calibrate("text", InputStatistics("text", squares), torch.device("cpu"))
    job = Job(folder, manifest, Plan.of(names), torch.float32, torch.device("cpu"), compressor=compressor)
    (tmp_path / "out").mkdir()
    written = write_recipe(job, tmp_path / "out")
    types = (tmp_path / "out" / "tensor-types.txt").read_text().splitlines()
    assert "blk\\.0\\.attn_q\\.weight=q4_k" in types
    assert "blk\\.1\\.ffn_down\\.weight=f16" in types  # rows of 48
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "imatrix.gguf").tensors}
    np.testing.assert_array_equal(
        tensors["blk.0.attn_q.weight.in_sum2"] / tensors["blk.0.attn_q.weight.counts"], [squares[next(iter(names))]]
    )
    assert any("IQ4_XS by F16" in note for note in written.notes)
    assert any("--outtype f32" in note for note in written.notes)


def inputs(cols: int = 512) -> torch.Tensor:
    """Of several sizes, a block of zeros and halves of steps among them."""
    values = torch.randn(5, cols, generator=torch.Generator().manual_seed(3)) * torch.tensor(
        [[1e-4], [1], [0], [30], [1]]
    )
    values[4, :256] = torch.arange(256) - 127.0
    values[4, 256:] = (torch.arange(256) - 127.0) / 2
    return values


def as_q8_0(block: Any) -> Any:
    scale = np.float32(np.abs(block).max()) / np.float32(127)
    factor = np.float32(1) / scale if scale else np.float32(0)
    scaled = block * factor
    codes = [np.sign(v) * np.floor(np.float64(abs(v)) + 0.5) for v in scaled]
    return np.array([np.float32(code) * np.float32(np.float16(scale)) for code in codes])


def as_q8_k(block: Any) -> Any:
    largest = block[int(np.abs(block).argmax())]
    if largest == 0:
        return np.zeros_like(block)
    factor = np.float32(-127) / largest
    codes = [min(127.0, float(np.rint(v * factor))) for v in block]
    return np.array([np.float32(1) / factor * np.float32(code) for code in codes], np.float32)


@pytest.mark.parametrize(("scheme", "size", "plain"), [("gguf-Q5_0", 32, as_q8_0), ("gguf-Q4_K", 256, as_q8_k)])
def test_inputs_are_rounded_in_blocks_of_8_bits(scheme: str, size: int, plain: Any) -> None:
    values = inputs()
    rounding = parse_scheme(scheme).inputs(512)
    assert rounding is not None and rounding.size == size
    expected = np.stack([plain(block) for block in values.numpy().reshape(-1, size)]).reshape(values.shape)
    np.testing.assert_array_equal(round_inputs(values, rounding).numpy(), expected)


@needs_library
@pytest.mark.parametrize(
    ("scheme", "name", "size", "room"), [("gguf-Q8_0", "q8_0", 32, 34), ("gguf-Q6_K", "q8_K", 256, 292)]
)
def test_inputs_are_rounded_to_the_bit_as_by_ggml_itself(scheme: str, name: str, size: int, room: int) -> None:
    values = inputs().numpy()
    rounding = parse_scheme(scheme).inputs(values.shape[1])
    assert rounding is not None
    library = ctypes.CDLL(str(gguf_types.ggml().path))
    blocks, back = np.zeros(values.size // size * room, np.uint8), np.empty_like(values)
    for function, *arrays in (
        (f"quantize_row_{name}_ref", values, blocks),
        (f"dequantize_row_{name}", blocks, back),
    ):
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        getattr(library, function)(*pointers, ctypes.c_int64(values.size))
    np.testing.assert_array_equal(round_inputs(torch.from_numpy(values), rounding).numpy(), back)


@pytest.mark.parametrize(
    ("scheme", "cols", "size"), [("gguf-Q4_K", 512, 256), ("gguf-Q4_K", 576, 32), ("gguf-IQ4_NL", 512, 32)]
)
def test_what_is_read_has_blocks_of_the_type_that_is_held(scheme: str, cols: int, size: int) -> None:
    rounding = parse_scheme(scheme).inputs(cols)
    assert rounding is not None and rounding.size == size
    assert parse_scheme("gguf-Q4_K").inputs(40) is None


class Halves:
    """In the place of llama.cpp's quantizer: weights as halves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.quantized = 0
        monkeypatch.setattr(gguf_types, "quantized", self._quantized)
        monkeypatch.setattr(gguf_types, "dequantized", lambda blocks, kind, cols: blocks.view(np.float16).astype("f4"))

    def _quantized(self, values: Any, kind: Any, importance: Any) -> Any:
        self.quantized += 1
        return values.astype(np.float16).view(np.uint8)


def test_a_component_under_a_type_reads_rounded_inputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Halves(monkeypatch)
    folder = write_model(tmp_path / "model", llama_config(hidden_size=64, num_attention_heads=2))
    weights = replica(folder)._weights
    name = "model.layers.0.mlp.up_proj"
    scheme, values = parse_scheme("gguf-Q8_0"), torch.randn(3, 64)
    with torch.no_grad():
        found = weights.made(name, scheme)(values)
    rounding = scheme.inputs(64)
    assert rounding is not None
    held = weights.original(name).half().float()
    torch.testing.assert_close(found, torch.nn.functional.linear(round_inputs(values, rounding), held))
    assert not torch.equal(round_inputs(values, rounding), values)


def test_a_matrix_is_quantized_once_as_long_as_its_calibration_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    library, compressor = Halves(monkeypatch), Compressor()
    scheme, weight = parse_scheme("gguf-Q4_0"), torch.randn(4, 64)
    statistics = InputStatistics("text", {"up": np.ones(64, np.float32)})
    compressor.calibrate("text", statistics, torch.device("cpu"))
    first = compressor.compress("up", weight, scheme)
    first.zero_()  # what is made is the caller's own
    torch.testing.assert_close(compressor.compress("up", weight, scheme), weight.half().float())
    assert library.quantized == 1
    compressor.calibrate("another", statistics, torch.device("cpu"))
    compressor.compress("up", weight, scheme)
    assert library.quantized == 2


def test_quantized_matrices_beyond_what_is_kept_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    library, compressor = Halves(monkeypatch), Compressor()
    monkeypatch.setattr(compressor_module, "_KEPT_BYTES", 3 * 4 * 64 * 2)
    scheme, weight = parse_scheme("gguf-Q8_0"), torch.randn(4, 64)
    for name in ("a", "b", "c", "a", "d", "a"):
        compressor.compress(name, weight, scheme)
    assert library.quantized == 4  # b went for d
    compressor.compress("b", weight, scheme)
    assert library.quantized == 5


def test_a_value_of_another_build_of_the_library_is_another_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def request_id(build: str) -> str:
        monkeypatch.setattr(gguf_types, "ggml", lambda: SimpleNamespace(build=build))
        plan = Plan.of({"model.layers.0.mlp.up_proj": "gguf-Q8_0"})
        return EvalRequest(plan, "reference", (0, 4)).id

    assert request_id("ggml 0.25.1 0ad4a86") == request_id("ggml 0.25.1 0ad4a86") != request_id("ggml 0.26.0 1234567")


@needs_library
def test_the_library_says_which_build_it_is() -> None:
    assert gguf_types.build().startswith("ggml ") and len(gguf_types.build()) > len("ggml ")


def llama(layers: int = 32, queries: int = 512, values: int = 128) -> list[Component]:
    shapes = {"q": (queries, 512), "k": (values, 512), "v": (values, 512), "o": (512, queries)}
    shapes |= {"gate": (1024, 512), "up": (1024, 512), "down": (512, 1024)}
    return [
        Component(name=f"{layer}.{kind}", layer=layer, kind=kind, shape=shape)
        for layer in range(layers)
        for kind, shape in shapes.items()
    ]


def whole(components: list[Component], *others: Component) -> ModelManifest:
    layers = 1 + max(component.layer for component in components)
    return ModelManifest("toy", None, "bfloat16", layers, "id", tuple(components), others)


def held_by(name: str, kind: str, components: list[Component]) -> list[str]:
    schemes = preset_plan(name, components, whole(components)).schemes
    return [schemes[c.name].removeprefix("gguf-") for c in components if c.kind == kind]


def test_the_medium_mixture_keeps_values_and_down_in_more_bits_in_half_of_the_layers() -> None:
    more = [at for at, kind in enumerate(held_by("Q4_K_M", "down", llama())) if kind == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert held_by("Q4_K_M", "v", llama()) == held_by("Q4_K_M", "down", llama())
    assert set(held_by("Q4_K_M", "gate", llama()) + held_by("Q4_K_M", "o", llama())) == {"Q4_K"}


def test_the_small_mixtures_keep_the_first_layers_in_more_bits() -> None:
    assert held_by("Q4_K_S", "v", llama()) == ["Q5_K"] * 4 + ["Q4_K"] * 28
    assert held_by("Q3_K_M", "down", llama()) == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert held_by("Q3_K_M", "v", llama()) == ["Q5_K"] * 2 + ["Q4_K"] * 30


def test_values_that_four_queries_share_are_kept_in_more_bits() -> None:
    assert set(held_by("Q2_K", "v", llama())) == {"Q4_K"} and set(held_by("IQ4_XS", "v", llama())) == {"Q5_K"}
    assert set(held_by("Q2_K", "v", llama(values=512))) == {"Q3_K"}


def manifest_of(folder: Path, kv_context: int = 0, **changes: object) -> ModelManifest:
    shapes = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512}
    written = write_model(folder, llama_config(**shapes, **changes))
    return read_manifest(ModelSpec(str(written), dtype="float32", kv_context=kv_context))


def test_mixtures_keep_the_head_in_more_bits_and_not_an_embedding_beside_it(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    both = manifest.select(("*", "lm_head", "*embed_tokens"))
    schemes = preset_plan("Q4_K_M", both, manifest).schemes
    assert (schemes["model.embed_tokens"], schemes["lm_head"]) == ("gguf-Q4_K", "gguf-Q6_K")
    # Whatever part of the model is searched.
    (embedding,) = manifest.select(("*embed_tokens",))
    assert preset_plan("Q4_K_M", [embedding], manifest).schemes == {"model.embed_tokens": "gguf-Q4_K"}


def test_mixtures_keep_an_embedding_in_more_bits_that_is_the_head_too(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, tie_word_embeddings=True)
    schemes = preset_plan("Q4_K_M", manifest.select(("*", "*embed_tokens")), manifest).schemes
    assert schemes["model.embed_tokens"] == "gguf-Q6_K"


def test_the_mixture_that_is_a_rival_is_that_of_the_whole_model_s_layers(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path)
    own = preset_plan("Q4_K_M", (*manifest.components, *manifest.others), manifest).schemes
    for include in (("*", "lm_head"), ("model.layers.0.*", "model.layers.1.*"), ("down",)):
        components = manifest.select(include)
        space = SearchSpace(components, ("gguf-Q4_K", "gguf-Q6_K"), manifest=manifest)
        plan = Plan.of({c.name: own[c.name] for c in components})
        found = preset_rivals(space, space.size(plan).stored_bits)
        assert plan in found.values(), include


def test_values_are_told_by_the_queries_to_each_though_these_are_not_searched() -> None:
    only = [component for component in llama() if component.kind == "v"]
    assert set(preset_plan("IQ4_XS", only, whole(llama())).schemes.values()) == {"gguf-Q5_K"}


def test_mixtures_leave_kv_caches_as_they_are(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, kv_context=100)
    caches = [component for component in manifest.others if component.is_cache]
    plan = preset_plan("Q4_K_M", (*manifest.components, *caches), manifest)
    assert len(caches) == 16 and set(plan.schemes) == {component.name for component in manifest.components}


def test_a_mixture_beside_a_scheme_of_kv_caches_gives_all_of_them_that(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, kv_context=100)
    caches = [component for component in manifest.others if component.is_cache]
    components = (*manifest.components, *caches)
    plan = preset_plan("Q4_K_M+kv-fp8", components, manifest)
    assert {plan.scheme_of(cache.name) for cache in caches} == {"kv-fp8"}
    weights = {name: scheme for name, scheme in plan.schemes.items() if scheme != "kv-fp8"}
    assert weights == preset_plan("Q4_K_M", components, manifest).schemes
    for name, said in (("Q4_K_M+kv-fp8", "no KV caches are searched"), ("Q4_K_M+kv-int3", "unknown scheme")):
        with pytest.raises(UserError, match=said):
            preset_plan(name, manifest.components, manifest)


def test_where_kv_caches_are_searched_mixtures_beside_their_schemes_are_rivals(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, kv_context=1000)
    components = (*manifest.components, *(component for component in manifest.others if component.is_cache))
    space = SearchSpace(components, ("gguf-Q4_K", "gguf-Q6_K", "kv-fp8", "kv-int4"), manifest=manifest)
    whole_size = space.size(preset_plan("Q6_K", components, manifest)).stored_bits
    assert set(preset_rivals(space, whole_size)) == {"preset:Q6_K", "preset:Q6_K+kv-fp8", "preset:Q6_K+kv-int4"}
    small = space.size(preset_plan("Q4_K_M+kv-int4", components, manifest)).stored_bits
    found = preset_rivals(space, small)
    assert "preset:Q4_K_M+kv-int4" in found
    assert all(space.size(plan).stored_bits <= 1.01 * small for plan in found.values())


def test_a_mixture_that_is_not_known_is_said() -> None:
    with pytest.raises(UserError, match="there is no preset:Q4; llama"):
        preset_plan("Q4", llama(), whole(llama()))


# Of a search among types that Q4_K_M has: 32 layers of rows of 512 and 1,024.
SPACE = SearchSpace(
    tuple(llama()),
    ("gguf-Q3_K", "gguf-Q4_K", "gguf-Q6_K"),
    budget=Budget(bits_per_weight=5.5),
    manifest=whole(llama()),
)


def of_bits(bits: float) -> float:
    return bits * sum(component.num_weights for component in SPACE.components)


def test_a_plan_is_held_against_the_largest_mixture_of_its_size() -> None:
    sizes = {name: SPACE.size(preset_plan(name, llama(), whole(llama()))).bits_per_weight for name in PRESETS}
    assert list(preset_rivals(SPACE, of_bits(sizes["Q4_K_M"]))) == ["preset:Q4_K_M"]
    assert list(preset_rivals(SPACE, of_bits(sizes["Q4_K_M"] * 0.98))) == ["preset:Q4_K_S"]
    assert preset_rivals(SPACE, of_bits(2.0)) == {}


def test_searches_among_other_schemes_are_not_held_against_mixtures() -> None:
    space = SearchSpace(tuple(llama()), ("int4-g128", "int8-channel"))
    assert preset_rivals(space, of_bits(8.0)) == {}


def test_held_out_prompts_are_run_under_the_mixture_and_one_that_is_better_takes_the_plan_s_place() -> None:
    plan = preset_plan("Q4_K_M", llama(), whole(llama())).with_(Perturbation("0.q", "gguf-Q6_K"))
    label = "preset:Q4_K_M"
    plans = validation_plans(SPACE, plan, only_rivals=True)
    assert label in plans and label in validation_plans(SPACE, plan)
    ones, kl = np.ones(8, np.int32), {name: 0.1 if name == label else 0.2 for name in plans}
    outcomes = {n: EvalResult("id", ones, ones, np.ones(8, np.float32), np.full(8, kl[n], np.float32)) for n in plans}
    assert best_rival(SPACE, plans, outcomes, "kl") == better_uniform(SPACE, plans, outcomes, "kl") == label


def test_a_mixture_of_types_that_the_search_does_not_name_takes_no_plan_s_place() -> None:
    plan = SPACE.uniform("gguf-Q4_K")
    assert may_take_its_place(SPACE, plan, preset_plan("Q4_K_M", llama(), whole(llama())))
    assert not may_take_its_place(SPACE, plan, preset_plan("Q4_K_S", llama(), whole(llama())))
