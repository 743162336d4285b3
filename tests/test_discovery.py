"""Components come from the module tree; what cannot be searched is refused with its reason."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from families_of_models import empty_tiny_model
from tiny import llama_config, write_model
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, MistralConfig, OPTConfig, Qwen2Config

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.model.modules import discovery
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.replica.in_memory import manifest_of as manifest_in_memory


def manifest_of(folder: Path):  # type: ignore[no-untyped-def]
    return read_manifest(ModelSpec(str(folder), dtype="float32"))


def test_a_llama_has_seven_kinds_in_each_layer(tmp_path: Path) -> None:
    manifest = manifest_of(write_model(tmp_path))
    expected = [(layer, kind) for layer in range(3) for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    assert [(c.layer, c.kind) for c in manifest.components] == expected


def test_shapes_are_outputs_by_inputs(tmp_path: Path) -> None:
    manifest = manifest_of(write_model(tmp_path))
    assert manifest.by_name["model.layers.0.mlp.gate_proj"].shape == (48, 32)


def test_embeddings_norms_and_head_stand_apart(tmp_path: Path) -> None:
    manifest = manifest_of(write_model(tmp_path))
    names = {c.name for c in manifest.others}
    assert {"model.embed_tokens", "model.norm", "lm_head", "model.layers.2.input_layernorm"} <= names


def test_a_tied_head_is_its_embedding(tmp_path: Path) -> None:
    manifest = manifest_of(write_model(tmp_path, llama_config(tie_word_embeddings=True)))
    assert "lm_head" not in {c.name for c in manifest.others}


def test_the_same_model_in_another_folder_is_the_same_model(tmp_path: Path) -> None:
    first = write_model(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    assert manifest_of(tmp_path / "b").id == manifest_of(first).id


def test_what_is_known_of_a_model_is_told_of_its_copy_under_its_own_name(tmp_path: Path) -> None:
    first = manifest_of(write_model(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert (first.model, manifest_of(tmp_path / "b").model) == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_model_is_laid_out_once_for_all_that_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = manifest_of(write_model(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(discovery, "empty_model", lambda *_: pytest.fail("its tree was made again"))
    assert [manifest_of(tmp_path / name).id for name in ("a", "b")] == [first.id, first.id]


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b", seed=1)
    assert manifest_of(first).id != manifest_of(second).id


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (
            MistralConfig(
                vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, sliding_window=16,
            ),
            {"q", "k", "v", "o", "gate", "up", "down"},
        ),
        (
            Qwen2Config(
                vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2,
            ),
            {"q", "k", "v", "o", "gate", "up", "down"},
        ),
        (
            OPTConfig(
                vocab_size=258, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=32,
            ),
            {"q", "k", "v", "out", "fc1", "fc2"},
        ),
        (
            GPTNeoXConfig(
                vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
            ),
            {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        ),
    ],
    ids=["mistral", "qwen2", "opt", "gpt-neox"],
)  # fmt: skip
def test_other_families_need_no_code_of_their_own(tmp_path: Path, config: object, kinds: set[str]) -> None:
    manifest = manifest_of(write_model(tmp_path, config))  # type: ignore[arg-type]
    assert {c.kind for c in manifest.components} == kinds


_TINY = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 128,
}  # fmt: skip
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_LFM = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
_MAMBA = {
    "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
    "mamba_d_state": 16, "shared_intermediate_size": 16,
}  # fmt: skip


def tree(family: str, **changes: object) -> ModelManifest:
    """The components of a tiny model of a family, found without any weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(_TINY | changes)))
    return manifest_in_memory(model)


@pytest.mark.parametrize(
    ("family", "changes", "number"),
    [("lfm2", _LFM, 12), ("qwen3_next", _DELTA, 29), ("granitemoehybrid", _MAMBA, 26)],
)
def test_channels_of_convolutions_are_no_components(family: str, changes: dict[str, object], number: int) -> None:
    manifest = tree(family, **changes)
    assert (len(manifest.components), [c for c in manifest.components if "conv1d" in c.name]) == (number, [])


def test_matrices_of_one_head_each_are_no_experts() -> None:
    manifest = tree("recurrent_gemma", lru_width=32, attention_window_size=16, block_types=["recurrent", "attention"])
    assert not [c.name for c in manifest.components if "rg_lru" in c.name]


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "llama4_text", "phimoe", "jetmoe", "mixtral"])
def test_experts_are_outputs_by_inputs_however_a_family_keeps_them(family: str) -> None:
    manifest = tree(family, kv_channels=8, interleave_moe_layer_step=1)
    experts = [c for c in manifest.components if ".0.gate_up_proj" in c.name or ".input_linear.0." in c.name]
    assert experts and {c.shape[1] for c in experts} == {32}


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("qwen2_moe", "mlp.shared_expert_gate"),
        ("phimoe", "mlp.router"),
        ("jetmoe", "mlp.router.layer"),
        ("hunyuan_v1_moe", "mlp.gate.wg"),
        ("llama4_text", "feed_forward.router"),
    ],
)
def test_what_routes_tokens_is_searched_only_when_it_is_named(family: str, router: str) -> None:
    manifest = tree(family, kv_channels=8, interleave_moe_layer_step=1, moe_topk=2)
    name = f"model.layers.0.{router}"
    assert name in manifest.routers
    assert name not in {c.name for c in manifest.select(("*",))}
    assert [c.name for c in manifest.select((name,))] == [name]


def kinds_of(family: str) -> Counter[str]:
    """Kinds of a tiny model of a family, counted, without any weights."""
    with torch.device("meta"):
        return Counter(c.kind for c in manifest_in_memory(empty_tiny_model(family)).components)


def test_experts_above_each_other_in_a_matrix_are_components_of_their_own() -> None:
    assert kinds_of("dbrx") == {"Wqkv": 2, "out": 2, "w1": 8, "v1": 8, "w2": 8}


def test_experts_along_the_other_side_are_kept_transposed() -> None:
    with torch.device("meta"):
        components = manifest_in_memory(empty_tiny_model("dbrx")).components
    assert {(c.kind, c.shape, c.transposed) for c in components if c.kind in ("w1", "w2")} == {
        ("w1", (16, 32), False),
        ("w2", (32, 16), True),
    }


def test_a_router_of_several_matrices_routes_with_all_of_them() -> None:
    assert not {"fc1", "fc2", "out", "router_mlp"} & kinds_of("zaya").keys()


def test_rotated_queries_choose_nothing() -> None:
    """Llama 4 rotates them as complex numbers."""
    assert {"q", "k", "v", "o"} <= kinds_of("llama4_text").keys()


def test_weights_that_the_code_changes_before_it_uses_them_are_no_components() -> None:
    assert "correction_coefs" not in kinds_of("gemma3n_text")


def test_tables_of_positions_and_mixtures_of_streams_are_no_components() -> None:
    assert not {"proj", "fn", "position_bias"} & (kinds_of("inkling_text") | kinds_of("deepseek_v4")).keys()


def test_of_a_model_of_images_and_text_what_text_reaches_is_searched() -> None:
    with torch.device("meta"):
        manifest = manifest_in_memory(empty_tiny_model("llava"))
    assert not [c.name for c in (*manifest.components, *manifest.others) if "vision" in c.name or "projector" in c.name]


def test_layers_that_share_their_weights_are_searched_once() -> None:
    assert kinds_of("zamba")["q"] == 1


def test_a_checkpoint_that_is_only_said_to_be_quantized_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantized by gptq, but its files hold no such weights"):
        manifest_of(tmp_path)


def test_a_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match="not of one model"):
        manifest_of(tmp_path)


def test_a_model_that_is_nowhere_says_where_was_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="no folder here, and the hub gave none"):
        manifest_of(Path("somebody/some-model"))
