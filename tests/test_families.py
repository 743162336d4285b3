"""Every family of models goes the whole way without code of its own: components, search, resume, exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import families_of_models
import pytest
import torch
from exports import in_process, measured_plan
from tiny import VOCABULARY, in_stages, values, with_reference, write_model, write_tokenizer
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Outcome, Reference, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import SearchStopped, UserError
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import make_strategy
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.run import rare_experts

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 0,
}
_LLAMA_LIKE = _SHAPE | {"num_key_value_heads": 2, "intermediate_size": 64}
_EXPERTS = {"gate_up", "down"}


@dataclass(frozen=True)
class Family:
    """A tiny configuration; the kinds of components that it should have; the formats that hold its plans."""

    config: PretrainedConfig
    kinds: set[str]
    formats: tuple[str, ...] = ("dense", "compressed-tensors", "bitsandbytes")
    attention: str = "sdpa"


LINEAR = {"q", "k", "v", "o"}
FAMILIES = {
    "mistral": Family(MistralConfig(**_LLAMA_LIKE, sliding_window=8), LINEAR | {"gate", "up", "down"}),
    "gemma2": Family(
        Gemma2Config(**_LLAMA_LIKE, head_dim=8, sliding_window=8, tie_word_embeddings=True),
        LINEAR | {"gate", "up", "down"},
        attention="eager",
    ),
    "qwen2": Family(Qwen2Config(**_LLAMA_LIKE, tie_word_embeddings=False), LINEAR | {"gate", "up", "down"}),
    "phi3": Family(Phi3Config(**_LLAMA_LIKE), {"qkv", "o", "gate_up", "down"}),
    "opt": Family(
        OPTConfig(**_SHAPE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2),
        {"q", "k", "v", "out", "fc1", "fc2"},
    ),
    "gpt-neox": Family(
        GPTNeoXConfig(**_SHAPE, intermediate_size=64),
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "gpt2": Family(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=257, bos_token_id=256,
            initializer_range=0.2,
        ),
        {"c_attn", "c_proj", "c_fc"},
        ("dense",),
    ),
    "mixtral": Family(MixtralConfig(**_LLAMA_LIKE, num_local_experts=4), LINEAR | _EXPERTS, ("dense",)),
    "qwen3-moe": Family(
        Qwen3MoeConfig(**_LLAMA_LIKE, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=8),
        LINEAR | _EXPERTS,
        ("dense",),
    ),
    "gpt-oss": Family(
        GptOssConfig(**_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8),
        LINEAR | _EXPERTS,
        ("dense",),
        "eager",
    ),
}  # fmt: skip
SCHEMES = {"dense": "int4-g16", "compressed-tensors": "int4-g32", "bitsandbytes": "nf4"}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write_model(tmp_path_factory.mktemp("model"), FAMILIES[request.param].config)


@pytest.fixture(scope="module")
def running(family: tuple[str, Path]) -> tuple[Replica, Reference]:
    spec = ModelSpec(str(family[1]), dtype="float32", attention=FAMILIES[family[0]].attention)
    model = Replica(spec, ReplicaSettings(num_threads=1))
    return model, with_reference(model, count=4, prompt=8, continuation=10)


def test_a_family_in_two_stages_measures_as_in_one_process(
    family: tuple[str, Path], running: tuple[Replica, Reference]
) -> None:
    staged = in_stages(family[1], 2, FAMILIES[family[0]].attention)
    reference = with_reference(staged, count=4, prompt=8, continuation=10)
    requests = [
        EvalRequest(Plan.of({component.name: "int4-g16"}), reference.id, (0, 4), ("kl",))
        for component in staged.manifest().components[::4]
    ]
    found = []
    for model, own in (running, (staged, reference)):
        outcomes = [values(outcome) for outcome in model.evaluate(requests)]
        found.append((own.continuation.tolist(), outcomes, model.routed_tokens(own.id)))
    assert found[0] == found[1]


@dataclass
class Here:
    """An evaluator: a replica in this process."""

    model: Replica
    waiting: list[EvalRequest] = field(default_factory=list)

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self.waiting += requests

    def poll(self, seconds: float) -> list[Outcome]:
        asked, self.waiting = self.waiting, []
        return self.model.evaluate(asked)

    def cancel(self) -> None:
        self.waiting = []


def test_components_are_found(family: tuple[str, Path]) -> None:
    manifest = read_manifest(ModelSpec(str(family[1]), dtype="float32"))
    assert {c.kind for c in manifest.components} == FAMILIES[family[0]].kinds


def test_each_kind_can_be_compressed_and_is_put_back_bit_by_bit(running: tuple[Replica, Reference]) -> None:
    model, reference = running
    kinds = {c.kind: c.name for c in reversed(model.manifest().components)}
    whole = (0, reference.num_prompts)
    dense = EvalRequest(Plan(), reference.id, whole)
    alone = [EvalRequest(Plan.of({name: "int2-channel"}), reference.id, whole) for name in kinds.values()]
    before = values(model.evaluate([dense])[0])
    changed = [values(outcome) != before for outcome in model.evaluate(alone)]
    assert (changed, values(model.evaluate([dense])[0])) == ([True] * len(alone), before)


def test_a_plan_applied_for_good_says_what_it_said_as_a_perturbation(running: tuple[Replica, Reference]) -> None:
    model, reference = running
    plan = Plan.uniform(model.manifest().components, "int3-channel")
    first = EvalRequest(plan, reference.id, (0, reference.num_prompts), parent=plan)
    other = EvalRequest(plan, reference.id, (0, reference.num_prompts))
    assert values(model.evaluate([first])[0]) == values(model.evaluate([other])[0])


def _searched(running: tuple[Replica, Reference], store: Path, stop_after: int | None) -> Plan | None:
    model, reference = running
    manifest = model.manifest()
    last = tuple(c for c in manifest.components if c.layer == 1)[:3]
    space = SearchSpace(last, ("int3-channel",), dense_bits=manifest.dense_bits)

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, reference.id, (0, reference.num_prompts), (), parent)

    strategy = make_strategy("beam", space, request_for, "sdt", tree=TreeSettings(width=2, expand=2))
    with ResultStore(store).writer("run") as writer:
        writer.put_components(manifest, space.components)
        stop = (lambda: len(set(writer.replay())) >= stop_after) if stop_after is not None else (lambda: False)
        return search(strategy, Here(model), writer, Silent(), stop)


def test_a_beam_that_is_stopped_resumes_to_the_same_plan(running: tuple[Replica, Reference], tmp_path: Path) -> None:
    with pytest.raises(SearchStopped):
        _searched(running, tmp_path / "stopped", stop_after=4)
    resumed = _searched(running, tmp_path / "stopped", stop_after=None)
    assert resumed == _searched(running, tmp_path / "whole", stop_after=None) != None  # noqa: E711


# Every family unpacked, every format that packs with families that keep their matrices differently: tied heads, fused
# matrices, biases. All of both: --all-cases.
PACKED = {"compressed-tensors": {"gemma2", "phi3", "opt"}, "bitsandbytes": {"mistral", "qwen2", "gpt-neox"}}


@pytest.mark.covering(lambda family, to: to == "dense" or family in PACKED[to])
@pytest.mark.parametrize("to", sorted(SCHEMES))
def test_exports_measure_as_recorded(
    family: tuple[str, Path], to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if to not in FAMILIES[family[0]].formats:
        pytest.skip(f"{to} holds no {family[0]}")
    in_process(monkeypatch)
    manifest = read_manifest(ModelSpec(str(family[1]), dtype="float32"))
    plan = {c.name: SCHEMES[to] for c in manifest.components if c.layer == 0}
    attention = FAMILIES[family[0]].attention
    check = measured_plan(family[1], tmp_path / "store", plan, attention=attention).export(to, tmp_path / "out").check
    assert check is not None and check.equal and check.sdt_measured > 0


def test_a_half_of_a_mixture_is_exported_as_its_own_matrix(tmp_path: Path) -> None:
    """Gate and up of an expert are one component: a scale of the whole tensor covers both of their tensors."""
    path = write_model(tmp_path / "model", FAMILIES["mixtral"].config)
    name = "model.layers.0.mlp.experts.2.gate_up_proj"
    measured_plan(path, tmp_path / "store", {name: "int2-tensor"}).export("dense", tmp_path / "out", check=False)
    from safetensors.torch import load_file

    after = load_file(tmp_path / "out" / "model.safetensors")
    parts = [after[f"model.layers.0.block_sparse_moe.experts.2.{part}.weight"] for part in ("w1", "w3")]
    assert len(torch.cat(parts).unique()) == 3


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"], indirect=True)
def test_every_token_reaches_as_many_experts_as_the_router_chooses(running: tuple[Replica, Reference]) -> None:
    model, reference = running
    down = {name: n for name, n in model.routed_tokens(reference.id).items() if name.endswith("down_proj")}
    assert sum(down.values()) == 2 * 2 * reference.num_prompts * 18


def test_experts_that_few_tokens_reach_are_named() -> None:
    said = rare_experts({"experts.0.down_proj": 300, "experts.1.down_proj": 290, "experts.2.down_proj": 3})
    assert "1 of 3" in said and "experts.2.down_proj (3)" in said


# A family for each kind of forward that is not Llama's: how its passes run, as `families_of_models.how_it_runs` says.
FORWARDS = {
    "gemma3": "all",  # a wrapper of images and text
    "qwen3_5": "all",  # the same around gated delta nets
    "llama4": "all",  # whose head lies inside the wrapped model
    "llava": "all",  # no causal class
    "falcon_h1": "all",  # multiplies the head's output
    "gemma4_text": "all",  # embeddings for each layer
    "deepseek_v32": "all",  # an indexer whose weights are read past its module
    "mamba": "all, own cache",
    "rwkv": "all, no cache",
    "minimax": "all, own cache",
    "deepseek_v4": "all, own cache",  # several streams between layers
    "zaya": "1/2",  # hands more than a state from layer to layer
    "hrm_text": "0/2",  # runs its layers several times
}


@pytest.mark.parametrize("name", sorted(FORWARDS))
def test_a_family_measures_as_plain_code_does(name: str) -> None:
    found = families_of_models.check(name)
    assert (found["cuts"], found["ok"], found["right"], found["components"]) == (FORWARDS[name], True, True, True)


def written(name: str, folder: Path) -> Path:
    families_of_models.tiny_model(name).save_pretrained(folder)
    return write_tokenizer(folder)


@pytest.mark.parametrize("name", ["dbrx", "jetmoe", "hrm_text"])
def test_what_the_files_hold_in_another_form_is_exported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    check = (
        measured_plan(written(name, tmp_path / "model"), tmp_path / "store", "int4-g8")
        .export("dense", tmp_path / "out")
        .check
    )
    assert check is not None and check.equal and check.sdt_measured > 0


def test_linear_layers_of_a_mixture_are_packed_beside_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader of quantized models would look for packed experts where it puts them together."""
    in_process(monkeypatch)
    path = write_model(tmp_path / "model", FAMILIES["mixtral"].config)
    names = [c.name for c in read_manifest(ModelSpec(str(path), dtype="float32")).components if c.kind in LINEAR]
    plan = measured_plan(path, tmp_path / "store", dict.fromkeys(names, "int4-channel"))
    check = plan.export("compressed-tensors", tmp_path / "out").check
    assert check is not None and check.equal and check.sdt_measured > 0


def test_tensors_that_the_model_keeps_in_32_bits_stay_so(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = written("deepseek_v3", tmp_path / "model")
    plan = measured_plan(path, tmp_path / "store", "int8-channel", dtype="bfloat16")
    plan.export("dense", tmp_path / "out", check=False)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.rpartition(".")[2] for name, tensor in after.items() if tensor.dtype == torch.float32} == {
        "e_score_correction_bias"
    }


# Code that reads a layer's weight as it begins; experts that are built otherwise in a quantized model, and would be
# filled at random.
@pytest.mark.parametrize(("name", "reason"), [("falcon", "has no attribute 'weight'"), ("llama4_text", "look for")])
def test_what_transformers_cannot_load_packed_is_refused_before_it_is_written(
    name: str, reason: str, tmp_path: Path
) -> None:
    path = written(name, tmp_path / "model")
    linear = [c.name for c in read_manifest(ModelSpec(str(path), dtype="float32")).components if not c.stacked]
    plan = measured_plan(path, tmp_path / "store", dict.fromkeys(linear, "int4-channel"))
    with pytest.raises(UserError, match=f"cannot hold this plan for transformers.*{reason}.*`dense` holds"):
        plan.export("compressed-tensors", tmp_path / "out", check=False)
    assert not list(tmp_path.glob("out*"))


def test_what_the_loader_puts_together_of_unquantized_tensors_is_packed_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of convolutions, each of which the files hold in three."""
    in_process(monkeypatch)
    path = written("olmo_hybrid", tmp_path / "model")
    names = [c.name for c in read_manifest(ModelSpec(str(path), dtype="float32")).components]
    plan = measured_plan(path, tmp_path / "store", dict.fromkeys(names, "int4-channel"))
    check = plan.export("compressed-tensors", tmp_path / "out").check
    assert check is not None and check.equal and check.sdt_measured > 0
