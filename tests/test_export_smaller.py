"""Plans that drop blocks and layers, as checkpoints that are smaller by them."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import in_process, measured_plan
from inprocess import here, run_here
from processes import tiny_search
from safetensors.torch import load_file
from test_column_scales import with_outliers
from tiny import TEXT, llama_config, write_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from dtmsearch.core.schemes import DROP
from dtmsearch.errors import UserError
from dtmsearch.export.smaller_code import CODE_FILE
from dtmsearch.workflows import export as workflow
from dtmsearch.workflows.evaluate import recover
from dtmsearch.workflows.export import export

LAYERS = {"model.layers.1": DROP, "model.layers.2.self_attn": DROP, "model.layers.2.mlp": DROP}
BLOCKS = {"model.layers.0.self_attn": DROP, "model.layers.3.mlp": DROP}
ROUNDED = {"model.layers.0.mlp.up_proj": "int4-g16", "model.layers.3.self_attn.q_proj": "int4-g16"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), llama_config(num_hidden_layers=4))


@pytest.mark.parametrize("to", ["dense", "compressed-tensors"])
def test_without_layers_it_is_an_ordinary_checkpoint_that_says_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    in_process(monkeypatch)
    made = measured_plan(llama, tmp_path / "store", LAYERS | ROUNDED).export(to, tmp_path / "out")
    assert made.check is not None and made.check.equal
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_hidden_layers, len(model.model.layers)) == (2, 2)
    assert not (tmp_path / "out" / CODE_FILE).exists()


def test_what_is_known_of_inputs_is_that_of_the_layer_as_it_was_numbered(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the first layer each of the others has the name of the one below it."""
    in_process(monkeypatch)
    pruned = {f"model.layers.{layer}.{m}": "wanda-0.5" for layer in (1, 2) for m in ("self_attn.q_proj", "mlp.up_proj")}
    scaled = {f"model.layers.{layer}.mlp.down_proj": "awq-int3-g16" for layer in (1, 2)}
    measured = measured_plan(llama, tmp_path / "store", {"model.layers.0": DROP} | pruned | scaled)
    made = measured.export("dense", tmp_path / "out")
    assert made.check is not None and made.check.equal


def test_what_layers_took_is_gone_from_the_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    measured_plan(llama, tmp_path / "store", LAYERS).export("dense", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    kept = {"model.layers.0.": "model.layers.0.", "model.layers.1.": "model.layers.3."}
    for name, tensor in after.items():
        own = next((name.replace(new, old) for new, old in kept.items() if name.startswith(new)), name)
        assert torch.equal(tensor, before[own]), name
    assert len(after) == len(before) - 2 * sum(name.startswith("model.layers.0.") for name in before)


@pytest.mark.parametrize("to", ["dense", "compressed-tensors"])
def test_without_single_blocks_it_brings_the_code_that_builds_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    in_process(monkeypatch)
    plan = {"model.layers.1": DROP, **BLOCKS, "model.layers.0.mlp.up_proj": "int4-g16"}
    made = measured_plan(llama, tmp_path / "store", plan).export(to, tmp_path / "out")
    assert made.check is not None and made.check.equal
    assert json.loads((tmp_path / "out" / "config.json").read_text())["left_out"] == {
        "model.layers.0.self_attn": ["attention", 2, None],
        "model.layers.2.mlp": ["mlp", 0, None],
    }
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"llama_without_blocks|trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_a_model_without_its_first_attention_continues_a_text_as_it_reads_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    measured_plan(llama, tmp_path / "store", BLOCKS).export("dense", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    text = torch.arange(40, 60).unsqueeze(0)
    with torch.inference_mode():
        written = model.generate(text, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        best = model(input_ids=written).logits.argmax(-1)
    assert written[0, 20:].tolist() == best[0, 19:-1].tolist()


EVEN = {f"model.layers.{layer}.mlp": "channels-0.25-ziplm-repair" for layer in range(4)}
HEADS = {f"model.layers.{layer}.self_attn": "heads-1:2-wanda" for layer in range(4)}
UNEVEN = {"model.layers.0.mlp": "channels-0.25-ziplm-repair", "model.layers.2.self_attn": "heads-1:2-wanda"}
PRUNED = {"model.layers.0.mlp.down_proj": "wanda-0.5"}


def test_one_width_of_all_layers_is_said_by_an_ordinary_configuration(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    made = measured_plan(llama, tmp_path / "store", EVEN | HEADS | ROUNDED).export(
        "compressed-tensors", tmp_path / "out"
    )
    assert made.check is not None and made.check.equal
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "model_type"
    assert [config[name] for name in names] == [36, 2, 1, 8, "llama"]
    assert not (tmp_path / "out" / CODE_FILE).exists()


@pytest.mark.parametrize("further", [{}, PRUNED, BLOCKS | {"model.layers.1": DROP}], ids=["alone", "pruned", "dropped"])
def test_several_widths_bring_the_code_that_builds_them(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: dict[str, str]
) -> None:
    in_process(monkeypatch)
    made = measured_plan(llama, tmp_path / "store", UNEVEN | further).export("dense", tmp_path / "out")
    assert made.check is not None and made.check.equal
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 36)


@pytest.mark.parametrize(("scheme", "to"), [("awq-int2-channel", "dense"), ("fp8-tensor", "compressed-tensors")])
def test_what_is_cut_shares_no_scales_in_files_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, to: str
) -> None:
    in_process(monkeypatch)
    folder = with_outliers(write_model(tmp_path / "model", llama_config()))
    every = {f"model.layers.{layer}.mlp.{m}_proj": scheme for layer in range(3) for m in ("gate", "up", "down")}
    cut = {f"model.layers.{layer}.mlp": "channels-0.25-wanda" for layer in range(3)}
    measured = measured_plan(folder, tmp_path / "store", cut | every)
    made = measured.export(to, tmp_path / "out")
    assert made.check is not None and made.check.equal
    if scheme == "fp8-tensor":
        with pytest.raises(UserError, match="of cut blocks each has its own"):
            measured.export(to, tmp_path / "served", runtime="vllm")


@pytest.mark.parametrize(
    ("heads", "scheme", "said"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, "heads-1:2-wanda", [4, 2]),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, "heads-3:4-wanda", None),
    ],
    ids=["half of the key heads", "a number that the family does not take"],
)
def test_one_width_of_heads_is_said_where_the_family_takes_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: dict[str, int], scheme: str, said: list[int] | None
) -> None:
    in_process(monkeypatch)
    model = write_model(tmp_path / "model", llama_config(**heads))
    plan = {f"model.layers.{layer}.self_attn": scheme for layer in range(3)}
    stored = measured_plan(model, tmp_path / "store", plan)
    made = stored.export("dense", tmp_path / "out")
    assert made.check is not None and made.check.equal
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if said is not None:
        assert [config[name] for name in ("num_attention_heads", "num_key_value_heads")] == said
        return
    assert config["cut"]
    with pytest.raises(UserError, match="runs no model that takes a file of code"):
        stored.export("compressed-tensors", tmp_path / "other", check=False, runtime="vllm")


def test_cut_blocks_of_transposed_matrices_with_biases_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    config = GPT2Config(vocab_size=258, n_positions=128, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2,
                        eos_token_id=257, bos_token_id=256)  # fmt: skip
    model = write_model(tmp_path / "model", config)
    plan = {"transformer.h.1.mlp": "channels-0.25-wanda-repair"}
    made = measured_plan(model, tmp_path / "store", plan).export("dense", tmp_path / "out")
    assert made.check is not None and made.check.equal


@pytest.mark.parametrize("to", ["evopress", "llm-compressor"])
def test_formats_without_cut_blocks_refuse_them_in_a_line(llama: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(UserError, match="it holds no model without some of its blocks, or with cut ones"):
        measured_plan(llama, tmp_path / "store", UNEVEN).export(to, tmp_path / "out")


SHAPE: dict[str, Any] = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "eos_token_id": 257, "bos_token_id": 256, "initializer_range": 0.2}  # fmt: skip
NEOX = GPTNeoXConfig(**SHAPE, intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=False)
MIXTRAL = MixtralConfig(**SHAPE, intermediate_size=16, num_key_value_heads=2, max_position_embeddings=128,
                        num_local_experts=4, num_experts_per_tok=2)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (NEOX, "gpt_neox.layers.0.attention"),
        (MIXTRAL, "model.layers.1.self_attn"),
        (BloomConfig(**SHAPE), "transformer.h.1.self_attention"),
        (BloomConfig(**SHAPE), "transformer.h.1.mlp"),
    ],
    ids=["gpt_neox", "mixtral", "bloom-attention", "bloom-mlp"],
)
def test_families_whose_weights_or_sums_are_their_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: PreTrainedConfig, block: str
) -> None:
    in_process(monkeypatch)
    model = write_model(tmp_path / "model", config)
    stored = measured_plan(model, tmp_path / "store", {block: DROP}, attention="eager")
    made = stored.export("dense", tmp_path / "out")
    assert made.check is not None and made.check.equal


def test_a_text_goes_on_in_pieces_over_a_cache_by_any_name(tmp_path: Path) -> None:
    config = FalconConfig(**SHAPE, num_kv_heads=4, new_decoder_architecture=False, multi_query=False)
    model = write_model(tmp_path / "model", config)
    plan = {"transformer.h.0.self_attention": DROP}
    measured_plan(model, tmp_path / "store", plan).export("dense", tmp_path / "out", check=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    text = torch.arange(40, 60).unsqueeze(0)
    with torch.inference_mode():
        first = loaded(text[:, :12], use_cache=True)
        second = loaded(text[:, 12:], past_key_values=first.past_key_values)
        whole = loaded(text).logits
    torch.testing.assert_close(second.logits, whole[:, 12:])


def test_what_is_written_on_the_way_lies_beside_the_export(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    stored = measured_plan(llama, tmp_path / "store", LAYERS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    stored.export("dense", tmp_path / "out", check=False)
    assert not list(tmp_path.glob("out*-smaller-*"))


def test_lists_of_layers_in_a_configuration_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, layer_types=kinds, use_sliding_window=True,
        sliding_window=8, max_window_layers=0, eos_token_id=257, bos_token_id=256, initializer_range=0.2,
    )  # fmt: skip
    model = write_model(tmp_path / "model", config)
    made = measured_plan(model, tmp_path / "store", {"model.layers.0": DROP}).export("dense", tmp_path / "out")
    assert made.check is not None and made.check.equal
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == kinds[1:]


def test_layers_of_other_names_move_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    config = GPT2Config(
        vocab_size=258, n_embd=32, n_layer=3, n_head=4, n_positions=128, eos_token_id=257, bos_token_id=256,
        initializer_range=0.2,
    )  # fmt: skip
    model = write_model(tmp_path / "model", config)
    plan = {"transformer.h.0": DROP, "transformer.h.2.attn": DROP}
    made = measured_plan(model, tmp_path / "store", plan).export("dense", tmp_path / "out")
    assert made.check is not None and made.check.equal
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_layer"] == 2


@pytest.mark.parametrize("to", ["gguf-recipe", "llm-compressor"])
def test_formats_of_whole_models_refuse_it(llama: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(UserError, match=r"(?s)no model without some of its blocks.*model\.layers\.1"):
        measured_plan(llama, tmp_path / "store", LAYERS).export(to, tmp_path / "out", check=False)


def test_engines_refuse_single_blocks(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = measured_plan(llama, tmp_path / "store", BLOCKS)
    monkeypatch.setattr(workflow, "without_dropped", None)  # it is known before anything is written
    with pytest.raises(UserError, match="drop whole layers"):
        stored.export("compressed-tensors", tmp_path / "out", check=False, runtime="vllm")


def test_what_training_makes_of_the_rest_is_exported_without_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    search = {"strategy": "floating", "rank_by": "kl", "drop": ["attention", "mlp"], "stop": {"blocks": 2}}
    file, store = tiny_search(tmp_path, search=search, prompts__count=16), tmp_path / "store"
    run_here(file, store)
    recovery = ["files=[train.txt]", "masked_steps=3", "unmasked_steps=0", "batch_tokens=64", "sequence_tokens=16"]
    with pytest.raises(UserError, match="give unmasked_steps=0"):
        recover("tiny", str(store), [*recovery[:2], "unmasked_steps=1", *recovery[3:]], evaluator=here)
    trained = recover("tiny", str(store), recovery, evaluator=here)
    assert trained.before is not None and trained.after is not None and trained.before.kl != trained.after.kl
    made = export("tiny", "dense", tmp_path / "out", str(store), weights=trained.weights_id)
    assert made.check is not None and made.check.equal
    own = load_file(store / "weights" / f"{trained.weights_id}.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], own["model.norm.weight"])
    assert not any(name.startswith(f"{block}.") for block in made.plan.dropped for name in written)


def test_what_training_makes_of_cut_blocks_stays_as_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    search = {"strategy": "floating", "rank_by": "kl", "cut": ["channels-0.25-random-repair", "heads-1:2-wanda"]}
    file, store = (
        tiny_search(tmp_path, search=search | {"stop": {"parameters": 0.8}}, prompts__count=16),
        tmp_path / "s",
    )
    run_here(file, store)
    recovery = ["files=[train.txt]", "masked_steps=3", "unmasked_steps=0", "batch_tokens=64", "sequence_tokens=16"]
    trained = recover("tiny", str(store), recovery, evaluator=here)
    assert trained.before is not None and trained.after is not None and trained.before.kl != trained.after.kl
    made = export("tiny", "dense", tmp_path / "out", str(store), weights=trained.weights_id)
    assert made.check is not None and made.check.equal
    assert made.plan.widths and made.size.parameters <= 0.8
    before = sum(tensor.numel() for tensor in load_file(tmp_path / "model" / "model.safetensors").values())
    after = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert before - after == made.size.removed_weights


def test_a_plan_of_several_widths_is_exported_with_one_at_its_measured_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    search = {"strategy": "knapsack", "rank_by": "kl", "schemes": ["int8-channel"], "cut": ["channels-0.25-wanda"]}
    file = tiny_search(tmp_path, search=search | {"stop": {"parameters": 0.93}}, prompts__count=16)
    run_here(file, tmp_path / "s")
    made = export("tiny", "dense", tmp_path / "out", str(tmp_path / "s"), even=True)
    assert made.check is not None and made.check.equal and not (tmp_path / "out" / CODE_FILE).exists()
    assert re.search(r"one width of each kind instead of the plan's several: KL .* on 3 held-out", made.notes[0])
    whole = export("tiny", "dense", tmp_path / "several", str(tmp_path / "s"), check=False)
    assert (tmp_path / "several" / CODE_FILE).exists() and whole.plan != made.plan


def test_a_plan_that_cuts_nothing_has_no_even_widths(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="measured no plan of even widths beside its own"):
        measured_plan(llama, tmp_path / "store", ROUNDED).export("dense", tmp_path / "out", even=True)


def test_even_widths_that_no_configuration_takes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 hidden units are no multiple of 3 heads."""
    in_process(monkeypatch)
    write_model(tmp_path / "model", llama_config(num_hidden_layers=2, num_key_value_heads=4))
    (tmp_path / "text.txt").write_text(TEXT)
    search = {"strategy": "knapsack", "rank_by": "kl", "schemes": ["int8-channel"], "cut": ["heads-3:4-wanda"]}
    file = tiny_search(tmp_path, search=search | {"stop": {"parameters": 0.95}}, prompts__count=16)
    run_here(file, tmp_path / "s")
    with pytest.raises(UserError, match=r"takes a file of code as well: .* does not take such numbers"):
        export("tiny", "dense", tmp_path / "out", str(tmp_path / "s"), even=True)
    assert not (tmp_path / "out").exists()


def test_a_rival_that_drops_less_is_not_the_plan_with_even_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    search = {"strategy": "auto", "rank_by": "kl", "cut": ["channels-0.25-wanda"], "drop": ["attention"]}
    file = tiny_search(tmp_path, search=search | {"stop": {"parameters": 0.6}}, prompts__count=16)
    run_here(file, tmp_path / "s")
    with pytest.raises(UserError, match="measured no plan of even widths"):
        export("tiny", "dense", tmp_path / "out", str(tmp_path / "s"), even=True)
