"""Components come from the module tree; what cannot be searched is refused with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import llama_config, write_model
from transformers import GPTNeoXConfig, MistralConfig, OPTConfig, Qwen2Config

from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.model.modules.discovery import read_manifest


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


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantized already"):
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
