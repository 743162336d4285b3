"""The verb `components`: from a configuration alone, what is searched in a model, what not, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families_of_models import tiny_config
from transformers import AutoConfig

from dtmsearch.cli import main
from dtmsearch.console.model_text import model_components_text
from dtmsearch.workflows.list_components import Machine, ModelComponents, list_components


def listed(tmp_path: Path, family: str) -> ModelComponents:
    tiny_config(family).save_pretrained(tmp_path)
    return list_components(str(tmp_path / "config.json"))


def test_a_configuration_alone_says_what_is_searched(tmp_path: Path) -> None:
    found = listed(tmp_path, "mixtral")
    assert {(k.kind, k.number, k.shape) for k in found.kinds} == {
        *(("q", 2, (32, 32)), ("k", 2, (16, 32)), ("v", 2, (16, 32)), ("o", 2, (32, 32))),
        *(("gate_up", 8, (96, 32)), ("down", 8, (32, 48))),
    }


@pytest.mark.parametrize("family", ["mixtral", "dbrx", "qwen3_next", "zamba", "gemma3n_text", "llava"])
def test_every_weight_is_searched_or_left_out_with_a_reason(tmp_path: Path, family: str) -> None:
    found = listed(tmp_path, family)
    assert sum(part.num_weights for part in (*found.kinds, *found.left_out)) == found.num_weights


def test_reasons_are_those_of_the_code(tmp_path: Path) -> None:
    reasons = {left.reason for left in listed(tmp_path, "qwen3_next").left_out}
    assert reasons == {
        "an embedding: searched where it is named",
        "outside the layers: searched where it is named",
        "the kernel of a convolution",
        "chooses among experts, or weighs one: 16 bits in every published checkpoint",
        "vectors: norms, biases and the like",
    }


def test_layers_of_full_size_are_told_without_their_weights(tmp_path: Path) -> None:
    AutoConfig.for_model("deepseek_v3", num_hidden_layers=4).save_pretrained(tmp_path)
    kinds = {(k.kind, k.number, k.shape) for k in list_components(str(tmp_path)).kinds}
    assert {("gate_up", 256, (4096, 7168)), ("kv_b", 4, (32768, 512)), ("gate", 3, (18432, 7168))} <= kinds


def test_the_text_fits_sixty_columns(tmp_path: Path) -> None:
    text = model_components_text(listed(tmp_path, "qwen3_next"))
    assert max(map(len, text.splitlines())) <= 60


def test_json_has_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    assert main(["components", str(tmp_path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_components"] == 14


def test_a_model_that_is_nowhere_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["components", str(tmp_path / "none")]) == 2
    assert "give a folder, its config.json, or a hub id" in capsys.readouterr().err


CONFIGS = Path(__file__).parent / "configs"


@pytest.mark.parametrize(
    ("name", "layers", "num_components", "num_units", "source"),
    [
        ("qwen3.5-27b", 4, 31, 31, ""),
        ("gpt-oss-20b", 24, 1_632, 120, "MXFP4 in groups of 32"),
        ("deepseek-v3", 4, 544, 33, "FP8 in blocks of 128 x 128"),
    ],
)
def test_released_models_are_described_by_their_configurations_alone(
    tmp_path: Path, name: str, layers: int, num_components: int, num_units: int, source: str
) -> None:
    """The first layers are enough; docs/families.md has all, with the counts of weights of the model cards."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config.get("text_config", config)["num_hidden_layers"] = layers
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = list_components(str(tmp_path / "config.json"))
    assert (found.num_components, found.cost.num_units, found.source) == (num_components, num_units, source)
    # Of mixtures no rate of forward passes alone was measured.
    assert found.cost.forward_tflops == found.cost.tflops * (1.0 if found.experts else 2.5)


def test_the_cost_of_a_search_is_told_for_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    found = list_components(str(tmp_path), machine=Machine(1, gpu_gb=1e-4, tflops=1e-6))
    assert found.cost.price_seconds == pytest.approx(6 * found.cost.active_weights * 192 * 200 / 1e6)
    assert found.cost.forward_tflops == pytest.approx(2.5e-6)
    assert found.cost.num_gpus == -(-found.cost.replica_bytes // 10**5)
    assert main(["components", str(tmp_path), "--tflops", "0.000001"]) == 0
    assert "At 1e-06 x 10^12 operations a second" in capsys.readouterr().out


LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8_192, "intermediate_size": 28_672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32_000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("8xH200", ["--gpus-per-replica 2", "--weights streamed"]),
        ("H200", ["--nodes-per-replica 2", "--weights streamed"]),
        ("8xB200", [""]),
    ],
)
def test_ways_to_search_a_large_model_on_a_machine(tmp_path: Path, name: str, options: list[str]) -> None:
    large = tmp_path / "config.json"
    large.write_text(json.dumps(LLAMA_70B | ({"num_hidden_layers": 40} if "B200" in name else {})))
    cost = list_components(str(large), machine=Machine.named(name)).cost
    assert [way.options for way in cost.ways] == options
    gpus = int(name.partition("x")[0]) if "x" in name else 1
    way = cost.ways[0]
    # Each GPU gives all of what it can alone, three quarters of it among others.
    rate = (0.75 if way.options else 1.0) * gpus * (2 if "nodes" in way.options else 1)
    assert way.price_seconds == pytest.approx(cost.price_seconds / rate, rel=0.01)
    assert way.probe_seconds == pytest.approx(cost.probe_seconds / rate, rel=0.01)


def test_weights_that_pass_through_take_at_least_the_time_to_read_them(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    cost = list_components(str(tmp_path), machine=Machine(4, gpu_gb=1e-6, tflops=1e6)).cost
    (streamed,) = (way for way in cost.ways if "streamed" in way.options)
    weights = cost.replica_bytes / 1.2
    assert streamed.probe_seconds == pytest.approx(4 * weights / 20e9, rel=0.01)


def test_a_machine_that_nobody_knows_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    assert main(["components", str(tmp_path), "--as", "8xK80"]) == 2
    assert "give one like 8xH100" in capsys.readouterr().err
