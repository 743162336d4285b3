"""Exports that other tools apply: llama.cpp's types, EvoPress's configuration and database; and what was calibrated."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exports import Measured, in_process, measured_plan
from safetensors.torch import load_file
from stores import as_format_1
from test_families import FAMILIES
from tiny import llama_config, write_model

from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.export.formats.evopress import levels_of, read_configuration, read_weight
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.workflows.export import export

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("wide")
    config = llama_config(hidden_size=256, intermediate_size=64, num_hidden_layers=2)
    plan = {Q: "int4-g32", DOWN: "int8-channel", "model.layers.1.self_attn.o_proj": "int3-g64"}
    return measured_plan(write_model(folder / "model", config), folder / "store", plan)


def types_of(folder: Path) -> dict[str, str]:
    lines = (folder / "tensor-types.txt").read_text().splitlines()
    return {name.replace("\\.", "."): kind for name, kind in (line.split("=") for line in lines)}


def test_a_recipe_names_llama_cpps_tensors_with_the_types_nearest_in_bits(wide: Measured, tmp_path: Path) -> None:
    wide.export("gguf-recipe", tmp_path / "out")
    types = types_of(tmp_path / "out")
    wanted = {"blk.0.attn_q.weight": "q4_k", "blk.1.attn_output.weight": "q3_k", "blk.1.ffn_down.weight": "q8_0"}
    assert {name: types[name] for name in wanted} == wanted


def test_a_recipe_leaves_dense_components_in_16_bits(wide: Measured, tmp_path: Path) -> None:
    wide.export("gguf-recipe", tmp_path / "out")
    assert types_of(tmp_path / "out")["blk.0.ffn_up.weight"] == "f16"


def test_types_of_a_recipe_divide_the_rows(wide: Measured, tmp_path: Path) -> None:
    """Rows of 64 weights take no type with blocks of 256."""
    narrow = measured_plan(Path(wide.manifest.model), tmp_path / "store", {DOWN: "int4-g32"})
    narrow.export("gguf-recipe", tmp_path / "out")
    assert types_of(tmp_path / "out")["blk.1.ffn_down.weight"] == "q4_0"


def test_names_of_a_recipe_match_their_own_tensor_only(wide: Measured, tmp_path: Path) -> None:
    wide.export("gguf-recipe", tmp_path / "out")
    patterns = [line.split("=")[0] for line in (tmp_path / "out" / "tensor-types.txt").read_text().splitlines()]
    names = [pattern.replace("\\", "") for pattern in patterns]
    assert [sum(re.search(pattern, name) is not None for name in names) for pattern in patterns] == [1] * len(names)


def test_a_recipe_says_how_to_make_an_importance_matrix(wide: Measured, tmp_path: Path) -> None:
    wide.export("gguf-recipe", tmp_path / "out")
    assert "llama-imatrix" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opt"}))
def test_every_familys_components_have_a_tensor_in_llama_cpp(family: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES[family].config)
    attention = FAMILIES[family].attention
    measured = measured_plan(path, tmp_path / "store", "int8-channel", attention=attention)
    measured.export("gguf-recipe", tmp_path / "out")
    assert set(types_of(tmp_path / "out").values()) == {"q8_0"}


def test_a_family_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", FAMILIES["opt"].config)
    measured = measured_plan(path, tmp_path / "store", "int8-channel")
    with pytest.raises(ValueError, match="no architecture for models of type 'opt'"):
        measured.export("gguf-recipe", tmp_path / "out")


def test_evopresss_configuration_reads_back_as_the_plan(wide: Measured, tmp_path: Path) -> None:
    wide.export("evopress", tmp_path / "out")
    assert read_configuration(tmp_path / "out" / "configuration.txt") == wide.plan


def test_evopresss_database_holds_every_scheme_of_the_search(wide: Measured, tmp_path: Path) -> None:
    wide.export("evopress", tmp_path / "out")
    levels = levels_of(sorted({"dense", "int8-channel", "int4-g16", "int4-g32", "int3-g64"}))
    before = load_file(Path(wide.manifest.model) / "model.safetensors")[f"{Q}.weight"]
    stored = read_weight(tmp_path / "out" / "database", Q, levels["int4-g16"])
    assert torch.equal(stored, round_weight(before, parse_scheme("int4-g16")))


def test_levels_are_bits_where_bits_tell_schemes_apart() -> None:
    assert levels_of(["dense", "int4-g128", "int3-g128"]) == {"dense": 16, "int4-g128": 4, "int3-g128": 3}


def test_a_configuration_is_exported_as_the_plan_that_it_is(wide: Measured, tmp_path: Path) -> None:
    wide.export("evopress", tmp_path / "evopress")
    source = str(tmp_path / "evopress" / "configuration.txt")
    check = export(source, "dense", tmp_path / "out", str(wide.store), model=wide.manifest.model).check
    assert check is not None and check.equal


def test_a_level_that_is_no_scheme_is_named(tmp_path: Path) -> None:
    (tmp_path / "configuration.txt").write_text(f"{Q}: 5\n")
    with pytest.raises(ValueError, match="has level 5, which is no scheme"):
        read_configuration(tmp_path / "configuration.txt", {"int4-g128": 4})


WIDTHS = {Q: "int4-g32-asym", DOWN: "int8-g64-asym"}


@pytest.fixture(scope="module")
def in_groups(wide: Measured, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measured_plan(Path(wide.manifest.model), tmp_path_factory.mktemp("groups") / "store", WIDTHS)


def of_llm_compressor(folder: Path) -> dict[str, Any]:
    modifiers = yaml.safe_load((folder / "recipe.yaml").read_text())["compression_stage"]["compression_modifiers"]
    groups = [group for modifier in modifiers.values() for group in modifier["config_groups"].values()]
    return {name: group["weights"] for group in groups for name in group["targets"]}


def test_llm_compressors_recipe_names_every_component_with_its_width(in_groups: Measured, tmp_path: Path) -> None:
    in_groups.export("llm-compressor", tmp_path / "out")
    found = of_llm_compressor(tmp_path / "out")
    assert {name: (w["num_bits"], w["group_size"], w["symmetric"]) for name, w in found.items()} == {
        Q: (4, 32, False),
        DOWN: (8, 64, False),
    }


def test_llm_compressor_solves_by_gptq_what_the_plan_solves(wide: Measured, tmp_path: Path) -> None:
    plan = {Q: "gptq-int4-g32", DOWN: "int8-channel"}
    measured_plan(Path(wide.manifest.model), tmp_path / "store", plan).export("llm-compressor", tmp_path / "out")
    stage = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["compression_stage"]
    found = {kind: m["config_groups"] for kind, m in stage["compression_modifiers"].items()}
    assert found["GPTQModifier"]["gptq-int4-g32"]["targets"] == [Q]
    assert found["QuantizationModifier"]["int8-channel"]["weights"]["strategy"] == "channel"


def test_llm_compressor_has_floats_and_what_is_rounded_of_inputs(wide: Measured, tmp_path: Path) -> None:
    plan = {Q: "fp8-channel", DOWN: "nvfp4a16"}
    measured_plan(Path(wide.manifest.model), tmp_path / "store", plan).export("llm-compressor", tmp_path / "out")
    stage = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["compression_stage"]
    groups = stage["compression_modifiers"]["QuantizationModifier"]["config_groups"]
    assert groups["fp8-channel"]["input_activations"]["dynamic"] and groups["fp8-channel"]["weights"]["type"] == "float"
    assert "input_activations" not in groups["nvfp4a16"] and groups["nvfp4a16"]["weights"]["group_size"] == 16


def test_model_optimizers_configuration_turns_on_the_plans_weights_alone(wide: Measured, tmp_path: Path) -> None:
    wide.export("model-optimizer", tmp_path / "out")
    entries = runpy.run_path(str(tmp_path / "out" / "quant_config.py"))["QUANT_CONFIG"]["quant_cfg"]
    assert entries[0] == {"quantizer_name": "*", "enable": False}
    settings = {entry["quantizer_name"]: entry["cfg"] for entry in entries[1:]}
    assert settings[f"*{Q}.weight_quantizer"] == {"num_bits": 4, "block_sizes": {-1: 32}}
    assert settings[f"*{DOWN}.weight_quantizer"] == {"num_bits": 8, "axis": 0}


def test_auto_rounds_layers_are_all_linear_ones(wide: Measured, tmp_path: Path) -> None:
    wide.export("auto-round", tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "layer_config.json").read_text())
    assert layers[Q] == {"bits": 4, "data_type": "int", "group_size": 32, "sym": True, "act_bits": 16}
    assert layers["model.layers.0.mlp.up_proj"] == {"bits": 16}
    assert len(layers) == len(wide.manifest.components) + 1  # and the head


def test_mlx_lms_predicate_says_width_and_group(in_groups: Measured, tmp_path: Path) -> None:
    in_groups.export("mlx-lm", tmp_path / "out")
    predicate = runpy.run_path(str(tmp_path / "out" / "mlx_predicate.py"))["quant_predicate"]
    assert predicate(Q, None) == {"bits": 4, "group_size": 32}
    assert predicate("lm_head", None, {}) is False


@pytest.mark.parametrize(
    ("tool", "scheme", "reason"),
    [
        ("mlx-lm", "int4-g32", "give the scheme with -asym"),
        ("mlx-lm", "int7-g32-asym", "2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128"),
        ("model-optimizer", "int4-g32-asym", "give the scheme without -asym"),
        ("auto-round", "int8-tensor", "no scale for a whole matrix"),
        ("llm-compressor", "magnitude-0.5", "no rounding that its files"),
        ("llm-compressor", "int4-g96", "its rows of 256 weights are no multiple of 96"),
        ("llm-compressor", "nf4", "no rounding that its files"),
        ("llm-compressor", "awq-int4-g128", "scales columns, which a recipe has no numbers for; int4-g128 has"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(
    wide: Measured, tmp_path: Path, tool: str, scheme: str, reason: str
) -> None:
    measured = measured_plan(Path(wide.manifest.model), tmp_path / "store", {Q: scheme})
    with pytest.raises(UserError, match=reason):
        measured.export(tool, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CALIBRATED = {
    Q: "gptq-int4-g16",
    DOWN: "wanda-0.5",
    "model.layers.0.mlp.up_proj": "sparsegpt-2:4",
    "model.layers.2.mlp.gate_proj": "int4-g16+magnitude-0.5",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calibrated_schemes_are_exported_as_they_were_measured(tmp_path: Path, dtype: str) -> None:
    path = write_model(tmp_path / "model", llama_config(dtype=dtype))
    check = measured_plan(path, tmp_path / "store", CALIBRATED, dtype).export("dense", tmp_path / "out").check
    assert check is not None and check.equal and check.sdt_measured > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gptqs_own_codes_are_packed(tmp_path: Path, dtype: str) -> None:
    path = write_model(tmp_path / "model", llama_config(dtype=dtype))
    plan = {Q: "gptq-int4-g16", "model.layers.1.mlp.up_proj": "gptq-int3-channel"}
    exported = measured_plan(path, tmp_path / "store", plan, dtype).export("compressed-tensors", tmp_path / "out")
    assert exported.check is not None and exported.check.equal and dict(exported.extra_bits) == {"shapes": 256}


def test_a_calibrated_plan_of_a_store_of_format_1_is_refused_in_words(tmp_path: Path) -> None:
    """Its rows do not say by which text it was calibrated."""
    made = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", {Q: "gptq-int4-g16"})
    as_format_1(made.store)
    with pytest.raises(UserError, match=r"recorded by an older dtmsearch.*dtmsearch evaluate"):
        made.export("dense", tmp_path / "out")


def test_a_plan_of_a_store_of_format_1_without_calibrated_schemes_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    made = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", {Q: "int4-g16"})
    as_format_1(made.store)
    check = made.export("dense", tmp_path / "out").check
    assert check is not None and check.equal
