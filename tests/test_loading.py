"""The model that is measured is the one that transformers loads: every tensor of it from the files, none at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llama_config, replica, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.utils import logging as transformers_logging

from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.errors import UserError
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.modules.loading import load_model

LAST = "model.layers.2.mlp.down_proj"
Tensors = dict[str, Tensor]


def with_tensors(folder: Path, change: Callable[[Tensors], object]) -> Path:
    """A model whose file of weights has been changed in place."""
    path = write_model(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def with_config(folder: Path, **changes: object) -> Path:
    path = write_model(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def check(folder: Path) -> None:
    read_manifest(ModelSpec(str(folder), dtype="float32"))


@pytest.mark.parametrize("other", ["model_old.safetensors", "pytorch_model.safetensors", "a.safetensors"])
def test_the_weights_are_those_that_transformers_loads(tmp_path: Path, other: str) -> None:
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: torch.randn_like(t) for n, t in tensors.items()}, folder / other, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(replica(folder)._weights.original(LAST), loaded.get_submodule(LAST).weight)


def test_the_weights_of_shards_are_those_that_transformers_loads(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert torch.equal(replica(folder)._weights.original(LAST), model.get_submodule(LAST).weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{LAST}.weight"), rf"checkpoint misses {LAST}\.weight\. Take"),
        (lambda t: t.update(extra=torch.ones(2, 2)), r"checkpoint has no place for extra\. Take"),
        (
            lambda t: t.update({f"{LAST}.weight": torch.ones(2, 3)}),
            rf"{LAST}\.weight is 32 x 48 by config.json but 2 x 3",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model\.norm\.weight is 32 by config.json but 7"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1." in n], r"misses model\.layers\.1\..* and 4 more"),
    ],
    ids=["missing", "unexpected", "another shape", "another shape of a norm", "a layer missing"],
)
def test_tensors_that_are_not_the_models_are_named(
    tmp_path: Path, change: Callable[[Tensors], object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check(with_tensors(tmp_path, change))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 4}, r"misses model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"has no place for model\.layers\.2\."),
        ({"model_type": "qwen2"}, r"misses model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"vocab_size": 300}, r"model\.embed_tokens\.weight is 300 x 32 by config.json but 258 x 32"),
    ],
    ids=["a layer more", "a layer less", "another family", "a larger vocabulary"],
)
def test_a_configuration_of_another_model_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(with_config(tmp_path, **changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda t, part: t.pop(part),
        lambda t, part: t.update({part: torch.ones(5, 7)}),
        lambda t, part: t.update({part.replace("experts.1", "experts.9"): t[part].clone()}),
    ],
    ids=["missing", "another shape", "one too many"],
)
def test_an_expert_that_cannot_be_put_together_is_named(
    tmp_path: Path, change: Callable[[Tensors, str], object]
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=258, num_key_value_heads=2, num_local_experts=4, **sizes)
    path = write_model(tmp_path, config) / "model.safetensors"
    tensors = load_file(path)
    change(tensors, "model.layers.1.block_sparse_moe.experts.1.w1.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"a part of model\.layers\.1\.mlp\.experts\.gate_up_proj, or has one too many"):
        check(tmp_path)


def test_loading_refuses_what_it_would_fill_at_random(tmp_path: Path) -> None:
    folder = with_tensors(tmp_path, lambda tensors: tensors.pop(f"{LAST}.weight"))
    with pytest.raises(UserError, match=rf"misses {LAST}\.weight"):
        load_model(folder, ModelSpec(str(folder), dtype="float32"), torch.device("cpu"))


def test_what_transformers_declares_ignorable_is_no_mistake(tmp_path: Path) -> None:
    check(with_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})))


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_may_be_stored_or_not(tmp_path: Path, stored: bool) -> None:
    path = write_model(tmp_path, llama_config(tie_word_embeddings=True)) / "model.safetensors"
    tensors = load_file(path)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if stored else {}
    save_file(tensors | head, path, metadata={"format": "pt"})
    check(tmp_path)


def test_a_model_is_checked_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path)
    transformers_logging.enable_progress_bar()
    capfd.readouterr()
    check(tmp_path)
    assert "".join(capfd.readouterr()) == ""


def test_a_refused_model_is_not_reported_by_the_loader_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = with_tensors(tmp_path, lambda tensors: tensors.pop(f"{LAST}.weight"))
    with pytest.raises(UserError):
        check(folder)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())
