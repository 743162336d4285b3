"""Blocks and layers that are dropped whole: what is measured, how large it is, and which plans a search comes to."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeEvaluator, request_for, run_search
from processes import tiny_search
from tiny import in_stages, llama_config, result, values, with_reference, write_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MixtralConfig,
    MptConfig,
    MptForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from dtmsearch.analysis.shape import shape_sentence
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.config import SearchFile, load, parse
from dtmsearch.core import evaluation
from dtmsearch.core.components import BlockKind, Component, blocks_of
from dtmsearch.core.evaluation import (
    EvalFailure,
    EvalRequest,
    EvalResult,
    ModelSpec,
    Outcome,
    Reference,
    ReplicaSettings,
)
from dtmsearch.core.holders import HOLDERS, holders_of
from dtmsearch.core.metric_registry import first_divergent_token
from dtmsearch.core.plan import Budget, Perturbation, Plan, plan_size
from dtmsearch.core.plan_file import plan_from_json, plan_to_json
from dtmsearch.core.schemes import DROP
from dtmsearch.core.strategy_settings import AutoSettings, EvolutionSettings, KnapsackSettings, LocalSettings
from dtmsearch.core.variant import Variant
from dtmsearch.errors import SearchStopped, UserError
from dtmsearch.model.modules import blocks
from dtmsearch.model.modules.blocks import take_out
from dtmsearch.model.modules.compiled import Slot
from dtmsearch.model.modules.slots import Places
from dtmsearch.model.replica import streamed_model
from dtmsearch.model.replica.in_memory import manifest_of
from dtmsearch.model.replica.replica import Replica
from dtmsearch.report.facts.plan_facts import dropped_with
from dtmsearch.search.baselines import depth_rivals
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Silent
from dtmsearch.search.solver.choices import Choices
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import SolverSettings, make_strategy
from dtmsearch.store.codecs.plans import PlanRows
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.check_search import check_search
from dtmsearch.workflows.evaluate import evaluate
from dtmsearch.workflows.in_process import apply
from dtmsearch.workflows.session import pool_for

ATTENTION, MLP, LAYER = "model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.1"
Running = tuple[Replica, Reference]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Running:
    """In float64, where nothing is lost by another order of sums."""
    folder = write_model(tmp_path_factory.mktemp("model"), llama_config(num_hidden_layers=4))
    spec = ModelSpec(str(folder), dtype="float64", kv_context=100)
    model = Replica(spec, ReplicaSettings(num_threads=1))
    return model, with_reference(model)


def measured(running: Running, plan: Plan, parent: Plan = Plan()) -> list[list[float]]:
    model, reference = running
    return values(model.evaluate([EvalRequest(plan, reference.id, (0, 6), ("kl", "ppl"), parent)])[0])


def dropped(*names: str) -> Plan:
    return Plan.of(dict.fromkeys(names, DROP))


@pytest.mark.parametrize(
    ("whole", "zeroed"),
    [
        ([ATTENTION], [f"{ATTENTION}.o_proj"]),
        ([MLP], [f"{MLP}.down_proj"]),
        ([LAYER], [f"{ATTENTION}.o_proj", f"{MLP}.down_proj"]),
        ([ATTENTION, MLP], [f"{ATTENTION}.o_proj", f"{MLP}.down_proj"]),
        ([ATTENTION, "model.layers.3.mlp"], [f"{ATTENTION}.o_proj", "model.layers.3.mlp.down_proj"]),
    ],
    ids=["attention", "mlp", "layer", "both", "two layers"],
)
def test_what_is_dropped_whole_is_what_has_an_output_of_zeros(
    running: Running, whole: list[str], zeroed: list[str]
) -> None:
    assert measured(running, dropped(*whole)) == measured(running, dropped(*zeroed)) != measured(running, Plan())


def test_a_dropped_layer_is_the_model_without_it(running: Running) -> None:
    model, reference = running
    tokens = torch.from_numpy(reference.text).long()
    with torch.inference_mode():
        model._bench.become(Variant(dropped(LAYER)))
        found = model._body.finish(tokens, None, 0)
        model._bench.become(Variant(Plan()))
        inner = model._body.model.model
        kept = [layer for index, layer in enumerate(inner.layers) if index != 1]
        states = inner.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        angles = inner.rotary_emb(states, positions)
        for layer in kept:
            states = layer(states, position_embeddings=angles, attention_mask=None, position_ids=positions)
        wanted = inner.norm(states)
    assert torch.equal(found, wanted)


def test_a_dropped_block_does_not_run(running: Running) -> None:
    model, reference = running
    tokens = torch.from_numpy(reference.text).long()
    module, calls = model._body.model.get_submodule(f"{MLP}.up_proj"), []
    hook = None
    with torch.inference_mode():
        model._bench.become(Variant(dropped(MLP)))
        try:
            model._body.finish(tokens, None, 0)  # once, to see how it returns
            hook = module.register_forward_hook(lambda *_: calls.append(1))
            model._body.finish(tokens, None, 0)
        finally:
            model._bench.become(Variant(Plan()))
            if hook is not None:
                hook.remove()
    assert not calls


@pytest.mark.parametrize("block", [ATTENTION, MLP, LAYER, "model.layers.0.self_attn"])
def test_the_first_use_of_a_dropped_block_may_be_a_generation(running: Running, block: str) -> None:
    model, reference = running
    (single,) = model.evaluate([EvalRequest(dropped(block), reference.id, (0, 6))])
    blocks._manners.clear()  # as in a fresh process
    written = model.generate(dropped(block), reference.prompts)
    first = first_divergent_token((written != reference.continuation) & reference.agrees)
    assert first.tolist() == result(single).fdt.tolist()


BLOOM = BloomForCausalLM, BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2)
MPT = MptForCausalLM, MptConfig(vocab_size=64, d_model=32, n_layers=3, n_heads=4, max_seq_len=32, initializer_range=0.2)


@pytest.mark.parametrize(
    ("family", "block", "output"),
    [
        (BLOOM, "transformer.h.1.self_attention", "dense"),
        (BLOOM, "transformer.h.1.mlp", "dense_4h_to_h"),
        (MPT, "transformer.blocks.1.attn", "out_proj"),
        (MPT, "transformer.blocks.1.ffn", "down_proj"),
    ],
)
def test_a_block_that_adds_the_residual_itself_hands_it_on(family: tuple[Any, Any], block: str, output: str) -> None:
    model, tokens = family[0](family[1]).eval(), torch.arange(8).unsqueeze(0)
    zeroed = copy.deepcopy(model)
    for parameter in zeroed.get_submodule(f"{block}.{output}").parameters():
        parameter.data.zero_()
    with torch.no_grad():
        take_out(model.get_submodule(block), manifest_of(model).by_name[block], True)
        first, second = (model(tokens).logits for _ in range(2))
    assert torch.equal(first, zeroed(tokens).logits) and torch.equal(first, second)


@pytest.mark.parametrize("block", ["transformer.h.1.mlp", "transformer.h.1"])
def test_a_model_with_dropped_blocks_is_saved_as_it_computes(tmp_path: Path, block: str) -> None:
    model, tokens = BLOOM[0](BLOOM[1]).eval(), torch.arange(8).unsqueeze(0)
    for parameter in model.parameters():  # biases, too
        parameter.data += 0.01
    apply({block: DROP}, model).save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(BloomForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("block", ["model.layers.0.linear_attn", "model.layers.0", "model.layers.1.self_attn"])
def test_linear_attention_is_dropped_of_a_model_that_keeps_states_of_it(block: str) -> None:
    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], initializer_range=0.2,
    )  # fmt: skip
    model: Any = Qwen3NextForCausalLM(config)
    model.eval()
    take_out(model.get_submodule(block), manifest_of(model).by_name[block], True)
    written = model.generate(torch.arange(3, 11).unsqueeze(0), max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        best = model(input_ids=written).logits.argmax(-1)
    assert written[0, 8:].tolist() == best[0, 7:-1].tolist()


def test_a_block_that_does_more_than_add_is_refused() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            normed: torch.Tensor = self.norm(hidden_states + self.up(hidden_states))
            return normed

    module = Normed()
    take_out(module, Component("m.layers.0.mlp", 0, "mlp", (1, 16)), True)
    with pytest.raises(UserError, match=r"m\.layers\.0\.mlp cannot be dropped: Normed does more than add"):
        module(torch.randn(1, 3, 4))


def test_values_of_dropped_blocks_have_a_version() -> None:
    ids = {name: EvalRequest(dropped(name), "r", (0, 2), ("kl",)).id for name in (ATTENTION, LAYER, f"{MLP}.up_proj")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "BLOCKS_VERSION", 9)
        later = {name: EvalRequest(dropped(name), "r", (0, 2), ("kl",)).id for name in ids}
    assert [ids[name] == later[name] for name in ids] == [False, False, True]


def test_a_dropped_layer_is_not_the_head() -> None:
    assert evaluation._IN_A_LAYER.search(LAYER) and not evaluation._IN_A_LAYER.search("lm_head")


def test_a_model_is_what_it_was_after_blocks_were_dropped(running: Running) -> None:
    rounded = Plan.of({f"{ATTENTION}.q_proj": "int4-g16", f"{MLP}.up_proj": "int4-g16"})
    before = measured(running, rounded, rounded)
    both = measured(running, Plan.of({ATTENTION: DROP, f"{MLP}.up_proj": "int4-g16"}), rounded)
    without = measured(running, dropped(LAYER), dropped(LAYER))
    assert (measured(running, rounded, dropped(LAYER)), measured(running, rounded, rounded)) == (before, before)
    assert both == measured(running, Plan.of({ATTENTION: DROP, f"{MLP}.up_proj": "int4-g16"}), dropped(ATTENTION))
    assert without == measured(running, dropped(LAYER))


def test_what_lies_in_a_dropped_block_has_no_say_in_a_plan() -> None:
    named = {ATTENTION: DROP, f"{ATTENTION}.q_proj": "int8-channel", f"{MLP}.up_proj": "nf4"}
    plan = Plan.of(named)
    later = Plan.of({f"{ATTENTION}.q_proj": "int8-channel", f"{MLP}.up_proj": "nf4"}).with_(
        Perturbation(ATTENTION, DROP)
    )
    assert plan == later == Plan.of({ATTENTION: DROP, f"{MLP}.up_proj": "nf4"})
    assert plan.scheme_of(f"{ATTENTION}.q_proj") == DROP
    assert plan.with_(Perturbation(LAYER, DROP)) == dropped(LAYER)


def test_a_dropped_block_takes_no_bytes_and_neither_do_its_caches(running: Running) -> None:
    manifest = running[0].manifest()
    caches = [other for other in manifest.others if other.is_cache]
    parts = (*manifest.components, *caches)
    plan = Plan.of({ATTENTION: DROP, "model.layers.3": DROP, f"{MLP}.up_proj": "int8-channel"})
    size = plan_size(plan, parts, manifest.dense_bits)
    gone = [c for c in parts if c.name.startswith((f"{ATTENTION}.", "model.layers.3."))]
    up = manifest.by_name[f"{MLP}.up_proj"]
    left = sum(c.num_weights * 32 for c in parts if c not in gone and c is not up)
    assert size.stored_bits == left + up.num_weights * 8 + up.shape[0] * 16
    assert size.removed_weights == sum(c.num_weights for c in gone if not c.is_cache)
    assert (size.blocks, size.num_compressed) == (3, len(gone) + 1)


@pytest.mark.parametrize(
    ("names", "left"), [(("model.layers.0", LAYER, "model.layers.2", "model.layers.3"), 0.0), ((LAYER,), 0.75)]
)
def test_what_is_left_of_the_weights_counts_no_caches(running: Running, names: tuple[str, ...], left: float) -> None:
    manifest = running[0].manifest()
    caches = tuple(other for other in manifest.others if other.is_cache)
    size = plan_size(dropped(*names), (*manifest.components, *caches), manifest.dense_bits)
    assert len(caches) == 8
    assert (size.parameters, size.flops) == (left, left)


@pytest.mark.parametrize("budget", [Budget(parameters=0.5), Budget(flops=0.5)])
def test_a_budget_of_what_is_left_is_solved_beside_searched_caches(running: Running, budget: Budget) -> None:
    manifest = running[0].manifest()
    parts = (*manifest.components, *(other for other in manifest.others if other.is_cache))
    blocks = manifest.droppable(["layer"], parts)
    within = SearchSpace(parts, ("int8-channel", "kv-int8"), dense_bits=32, budget=budget, blocks=blocks)
    choices = Choices(within)
    found = choices.solve([np.arange(len(schemes), dtype=float) for schemes in choices.schemes])
    assert len(choices.plan(found.options).dropped) == 2


def test_a_store_counts_what_a_dropped_block_holds(running: Running) -> None:
    manifest = running[0].manifest()
    searched = manifest.components
    for plan in (dropped(ATTENTION), dropped(LAYER, "model.layers.2.mlp"), dropped(f"{MLP}.up_proj")):
        (found,) = PlanRows(manifest, searched).figures([plan])
        size = plan_size(plan, searched, manifest.dense_bits)
        assert (found.num_compressed, found.share, found.bits_per_weight) == (
            size.num_compressed,
            size.share,
            size.bits_per_weight,
        )


def test_a_plan_file_names_blocks_which_take_nothing_but_drop(running: Running) -> None:
    manifest = running[0].manifest()
    plan = dropped(ATTENTION, "model.layers.3")
    text = plan_to_json(plan, manifest)
    assert plan_from_json(text, manifest, "plan.json") == plan
    with pytest.raises(UserError, match="a whole attention is dropped"):
        plan_from_json(text.replace('"drop"', '"int8-channel"'), manifest, "plan.json")


def test_blocks_of_other_families_are_found_by_their_modules() -> None:
    names = [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.1.fc1",
        "transformer.h.1.mixer.x",
    ]
    found = blocks_of(Component(name, int(name.split(".")[2]), "x", (2, 3)) for name in names)
    assert [(block.name, block.kind, block.num_weights) for block in found] == [
        ("transformer.h.0.attn", "attention", 6),
        ("transformer.h.0.mlp", "mlp", 6),
        ("transformer.h.0", "layer", 12),
        ("transformer.h.1", "layer", 12),
    ]


def space(running: Running, budget: Budget, schemes: tuple[str, ...] = (), kinds: str = "attention mlp") -> SearchSpace:
    manifest = running[0].manifest()
    blocks = manifest.droppable(kinds.split(), manifest.components)  # type: ignore[arg-type]
    return SearchSpace(manifest.components, schemes, dense_bits=32, budget=budget, manifest=manifest, blocks=blocks)


def test_nothing_is_chosen_for_what_lies_in_a_dropped_block(running: Running) -> None:
    found = space(running, Budget(bits_per_weight=6), ("int8-channel",), "attention layer")
    legal = {edge.component for edge in found.perturbations(dropped(ATTENTION, "model.layers.3"))}
    inside = {f"{ATTENTION}.{part}_proj" for part in "qkvo"}
    assert not legal & (inside | {ATTENTION, "model.layers.3", "model.layers.3.mlp.up_proj"})
    assert {LAYER, f"{MLP}.up_proj", "model.layers.2.self_attn"} <= legal


def test_a_block_as_a_unit_is_what_dropping_it_changes(running: Running) -> None:
    found = space(running, Budget(blocks=2))
    unit = next(unit for unit in found.units if unit.name == MLP)
    more = found.size(dropped(MLP)).less(found.size(Plan()))
    assert unit.sizes[DROP] == more
    assert more.stored_bits == -sum(c.num_weights * 32 for c in found.components if c.block == MLP)


@pytest.mark.parametrize("budget", [Budget(blocks=9), Budget(parameters=0.0, components=99)])
def test_a_budget_that_no_dropping_meets_is_refused(running: Running, budget: Budget) -> None:
    manifest = running[0].manifest()
    held = tuple(c for c in manifest.components if c.layer < 4)
    with pytest.raises(UserError, match="out of reach"):
        SearchSpace(held, (), dense_bits=32, budget=budget, blocks=manifest.droppable(["attention", "mlp"], held))


@pytest.mark.parametrize("budget", [Budget(parameters=0.1), Budget(flops=0.1), Budget(share=0.9)])
def test_progress_of_dropped_blocks_is_by_the_weights_that_the_rule_counts(running: Running, budget: Budget) -> None:
    found = space(running, budget)
    for block in (ATTENTION, MLP):
        gone = 1.0 - found.size(dropped(block)).parameters
        assert found.progress(dropped(block)) == pytest.approx(gone / 0.9)


def test_progress_of_dropped_blocks_is_by_their_number_where_that_is_counted(running: Running) -> None:
    assert space(running, Budget(blocks=8)).progress(dropped(ATTENTION)) == 1 / 8


@pytest.mark.parametrize(
    ("include", "exclude", "kind", "missing"),
    [
        (("q",), (), "attention", "k_proj"),
        (("*",), ("o",), "attention", "o_proj"),
        (("*",), ("*self_attn*",), "layer", "self_attn.q_proj"),
    ],
)
def test_a_block_is_dropped_only_where_all_that_lies_in_it_is_searched(
    running: Running, include: tuple[str, ...], exclude: tuple[str, ...], kind: BlockKind, missing: str
) -> None:
    manifest = running[0].manifest()
    with pytest.raises(UserError, match=rf"no {kind} of .* is searched whole: .*{missing}, which is not searched"):
        manifest.droppable([kind], manifest.select(include, exclude), exclude)


def test_a_block_of_which_something_is_left_out_stays_and_others_may_go(running: Running) -> None:
    manifest = running[0].manifest()
    exclude = (f"{ATTENTION}.o_proj",)
    found = manifest.droppable(["attention", "layer"], manifest.select(("*",), exclude), exclude)
    assert {block.name for block in found} == {
        f"model.layers.{layer}{part}" for layer in (0, 2, 3) for part in ("", ".self_attn")
    }


HEAD = "run: a\nmodel: {path: m}\nprompts: {files: [a.txt]}\n"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{strategy: lazy_greedy, schemes: [nf4], stop: {blocks: 2}}", "nothing may be: give search.drop"),
        ("{strategy: floating, schemes: [nf4], drop: [mlp]}", "give search.drop, and no schemes"),
        ("{strategy: spdy, schemes: [nf4], drop: [mlp]}", "does not drop blocks"),
        ("{strategy: floating, drop: [mlp]}", "until a size is met, and stop has none: give stop.blocks"),
        ("{strategy: floating, drop: [mlp], stop: {seconds: 9}}", "until a size is met, and stop has none"),
    ],
)
def test_a_file_that_drops_what_cannot_be_is_refused(section: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(f"{HEAD}search: {section}", "search.yaml", Path())


def test_a_kind_that_the_model_does_not_have_is_named(running: Running) -> None:
    manifest = running[0].manifest()
    held = tuple(c for c in manifest.components if c.block.endswith("mlp"))
    with pytest.raises(UserError, match=r"no attention of .* can be dropped; .* self_attn"):
        manifest.droppable(["attention"], held)


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


def searched(
    running: Running,
    store: Path,
    name: str = "floating",
    budget: Budget = Budget(blocks=3),
    stop_after: int = 0,
    schemes: tuple[str, ...] = (),
) -> Plan | None:
    model, reference = running
    within = space(running, budget, schemes)

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, reference.id, (0, reference.num_prompts), ("kl",), parent)

    errors = {(c.name, s): 4.0 ** -int(s[3]) for c in within.components for s in schemes}
    effort = SolverSettings(
        AutoSettings(probe_prompts=2, prompts=2, plans=2, rounds=2),
        knapsack=KnapsackSettings(prompts=2),
        evolution=EvolutionSettings(children=4, generations=2, survivors=(2,), prompts=(2, 4)),
        local=LocalSettings(rounds=2, children=4, prompts=2),
        errors=errors,
    )
    strategy = make_strategy(name, within, request_for, "kl", continuation_tokens=12, solver=effort)
    with ResultStore(store).writer("run") as writer:
        writer.put_components(model.manifest(), within.components)
        return search(strategy, Here(model), writer, Silent(), lambda: 0 < stop_after <= len(set(writer.replay())))


@pytest.mark.parametrize("after", [3, 9])
def test_a_search_for_blocks_that_is_stopped_resumes_to_the_same_plan(
    running: Running, tmp_path: Path, after: int
) -> None:
    with pytest.raises(SearchStopped):
        searched(running, tmp_path / "stopped", stop_after=after)
    resumed = searched(running, tmp_path / "stopped")
    whole = searched(running, tmp_path / "whole")
    assert resumed == whole and whole is not None and len(whole.dropped) == 3


@pytest.mark.parametrize("name", ["floating", "lazy_greedy", "greedy"])
def test_a_budget_of_parameters_is_met(running: Running, tmp_path: Path, name: str) -> None:
    found = searched(running, tmp_path, name, Budget(parameters=0.75))
    assert found is not None and found.dropped
    assert space(running, Budget(parameters=0.75)).size(found).parameters <= 0.75


def planted(plan: Plan) -> float:
    """Losses by which the attention of layer 0, which alone does least harm, stands in the way of all others."""
    alone = {"0.self_attn": 1.0, "1.self_attn": 1.1, "2.self_attn": 1.2, "3.self_attn": 3.0}
    names = [name.removeprefix("model.layers.") for name in plan.dropped]
    in_the_way = 2.0 * (len(names) - 1) if "0.self_attn" in names else 0.0
    return sum(alone.get(name, 9.0) for name in names) + in_the_way


def answered(request: EvalRequest) -> EvalResult:
    count = request.prompts[1] - request.prompts[0]
    harm = np.full(count, planted(request.plan), np.float32)
    no_tokens = np.zeros(count, np.int32)
    return EvalResult(request.id, no_tokens, no_tokens, np.exp(harm), kl=harm, ppl=np.exp(harm))


def test_steps_back_find_what_greedy_misses(running: Running) -> None:
    within = space(running, Budget(blocks=3))

    def found_by(name: str) -> set[str]:
        strategy = make_strategy(name, within, request_for, "kl")
        plan = run_search(strategy, FakeEvaluator(answered))
        assert plan is not None
        return {name.removeprefix("model.layers.").removesuffix(".self_attn") for name in plan.dropped}

    assert found_by("lazy_greedy") == found_by("greedy") == {"0", "1", "2"}
    assert found_by("floating") == {"1", "2", "3"}


def every_choice(choices: Choices, losses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Losses and bits of all canonical choices."""
    ranges = (range(len(loss)) for loss in losses)
    every = np.array([o for o in itertools.product(*ranges) if choices.canonical(o) == o])
    units = range(len(losses))
    return tuple(sum(table[u][every[:, u]] for u in units) for table in (losses, choices.bits))  # type: ignore[return-value]


@pytest.mark.parametrize("kinds", ["attention", "mlp layer", "attention mlp layer"])
def test_the_solver_finds_the_best_of_all_choices_of_blocks_and_what_lies_in_them(kinds: str) -> None:
    names = [f"m.layers.{layer}.{part}" for layer in (0, 1) for part in ("attn.q", "attn.o", "mlp.up")]
    parts = tuple(Component(name, int(name.split(".")[2]), name[-1], (8, 16)) for name in names)
    blocks = tuple(block for block in blocks_of(parts) if block.kind in kinds.split())
    within = SearchSpace(parts, ("int8-channel", "int4-channel"), budget=Budget(bits_per_weight=6), blocks=blocks)
    choices, random = Choices(within), np.random.default_rng(0)
    losses = [np.append(0.0, np.sort(random.random(len(schemes) - 1))) for schemes in choices.schemes]
    losses = [loss * (2.5 if unit.is_block else 1.0) for loss, unit in zip(losses, choices.units, strict=True)]
    sums, bits = every_choice(choices, losses)
    for capacity in (14 * 768, 9 * 768, 6 * 768, 4 * 768, 2 * 768):
        found = choices.within(losses, capacity)
        assert choices.canonical(found.options) == found.options
        size = within.size(choices.plan(found.options))
        assert size.stored_bits == choices.cost(choices.bits, found.options) <= capacity
        assert found.loss == pytest.approx(sums[bits <= capacity].min())


@pytest.mark.parametrize("name", ["auto", "knapsack", "evolution", "local"])
def test_blocks_are_dropped_and_the_rest_is_rounded_under_one_budget(
    running: Running, tmp_path: Path, name: str
) -> None:
    budget = Budget(bits_per_weight=5.5)  # less than all have in the narrowest scheme
    found = searched(running, tmp_path, name, budget, schemes=("int8-channel", "int6-channel"))
    assert found is not None
    size = space(running, budget, ("int8-channel", "int6-channel")).size(found)
    assert size.bits_per_weight <= 5.5
    assert found.dropped and set(found.schemes.values()) - {DROP}
    assert Plan.of(found.schemes) == found


@pytest.mark.parametrize("name", ["auto", "knapsack", "evolution", "local"])
def test_strategies_around_the_solver_drop_blocks_alone(running: Running, tmp_path: Path, name: str) -> None:
    found = searched(running, tmp_path, name, Budget(blocks=3))
    assert found is not None and len(found.dropped) >= 3


def test_components_that_are_tied_across_blocks_are_refused(running: Running) -> None:
    manifest = running[0].manifest()
    blocks = manifest.droppable(["mlp"], manifest.components)
    tied = (("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),)
    with pytest.raises(UserError, match="lie in different blocks"):
        SearchSpace(manifest.components, ("int8-channel",), tied=tied, blocks=blocks)


def test_what_is_dropped_is_said_by_layers(running: Running) -> None:
    components = running[0].manifest().components
    plan = dropped("model.layers.3", ATTENTION, "model.layers.2.mlp", "model.layers.2.self_attn", "model.layers.0.mlp")
    said = "6 of 8 blocks dropped: layers 2 3, attention of 1, mlp of 0; 25.0% of the weights left"
    assert shape_sentence(plan, components) == said
    assert shape_sentence(Plan.of({f"{MLP}.up_proj": DROP}), components) is None


def test_a_plan_that_drops_blocks_alone_is_held_against_the_last_layers(running: Running) -> None:
    found = space(running, Budget(blocks=3))
    plan = dropped(MLP, ATTENTION, "model.layers.0.mlp")
    last = dropped("model.layers.3.mlp", "model.layers.3.self_attn", "model.layers.2.mlp")
    assert depth_rivals(found, plan) == {"rule:last-layers": last}
    assert found.size(last) == found.size(plan)
    assert depth_rivals(space(running, Budget(bits_per_weight=6), ("int8-channel",)), plan) == {}


def test_exports_that_hold_a_smaller_model_are_told(running: Running) -> None:
    components = running[0].manifest().components
    whole, single = (
        {
            (holder.export, holder.engine): held.obstacle
            for holder, held in zip(HOLDERS, holders_of(plan, components, 32, 16), strict=True)
        }
        for plan in (dropped(LAYER), dropped(MLP))
    )
    assert whole["compressed-tensors", "vllm"] is None and whole["dense", "any"] is None is single["dense", "any"]
    assert "single attention or MLP blocks" in str(single["compressed-tensors", "vllm"])
    assert "without some of its blocks" in str(whole["gguf", "llama.cpp"])


def test_a_report_has_the_components_of_a_dropped_block_dropped() -> None:
    rows = {"m.layers.0.mlp": {"scheme": "drop"}, "m.layers.1.mlp.up": {"scheme": "nf4"}}
    assert dropped_with("m.layers.0.mlp.up", rows) == {"scheme": "drop"}
    assert dropped_with("m.layers.1.mlp.up", rows) is None


def test_layers_are_not_compiled_where_blocks_are_dropped() -> None:
    kept, dropping = (
        parse(f"{HEAD}search: {{strategy: greedy, schemes: [nf4]{more}}}", "search.yaml", Path()).model_spec.compile
        for more in ("", ", drop: [mlp]")
    )
    assert (kept, dropping) == ("auto", "never")


PLAN_FILE = {"manifest_id": "m", "plan_id": "p"}


@pytest.mark.parametrize(
    ("named", "mode"), [(MLP, "never"), (LAYER, "never"), (f"{MLP}.up_proj", "auto")], ids=["mlp", "layer", "matrix"]
)
def test_layers_are_not_compiled_for_a_plan_file_that_drops_blocks(tmp_path: Path, named: str, mode: str) -> None:
    asked: list[str] = []

    def opening(file: SearchFile, where: PoolSettings) -> ModelEvaluator:
        asked.append(file.model_spec.compile)
        raise UserError("enough")

    file, plan = load(tiny_search(tmp_path)), tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN_FILE | {"schemes": {named: DROP}}))
    with pytest.raises(UserError, match="enough"):
        evaluate(file, str(plan), str(tmp_path / "store"), evaluator=opening)
    assert asked == [mode]


def test_replicas_that_drop_no_blocks_are_refused_before_they_load(tmp_path: Path) -> None:
    where = PoolSettings(nodes_per_replica=2)
    search = {"strategy": "floating", "drop": ["mlp"], "stop": {"blocks": 1}}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN_FILE | {"schemes": {MLP: DROP}}))
    with (
        pytest.raises(UserError, match="one process holds whole: leave out --"),
        pool_for(load(tiny_search(tmp_path, search=search)), where, Silent()),
    ):
        pass
    with pytest.raises(UserError, match="one process holds whole: leave out --"):
        evaluate(load(tiny_search(tmp_path)), str(plan), str(tmp_path / "store"), where)


def test_a_check_says_that_weights_which_pass_through_a_gpu_have_no_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"strategy": "floating", "cut": ["channels-0.25-wanda"], "stop": {"parameters": 0.9}}
    monkeypatch.setattr(streamed_model, "streams", lambda *_: True)
    check_search(load(tiny_search(tmp_path, search=search)))
    search["cut"] = ["channels-0.25-gradient"]
    with pytest.raises(UserError, match="takes a backward pass"):
        check_search(load(tiny_search(tmp_path, search=search)))


def test_compiled_layers_say_how_they_are_not_compiled(running: Running) -> None:
    with pytest.raises(UserError, match=r"set model\.compile: never"):
        Places(running[0]._body.model, {"any": Slot(nn.Linear(1, 1))}).block(MLP)


def test_replicas_of_several_processes_refuse_to_drop_blocks(tmp_path: Path) -> None:
    model = in_stages(write_model(tmp_path, llama_config(num_hidden_layers=2)), 2)
    reference = with_reference(model, count=2)
    request = EvalRequest(dropped("model.layers.0.mlp"), reference.id, (0, 2))
    (outcome,) = model.evaluate([request])
    assert isinstance(outcome, EvalFailure) and "one process holds whole" in outcome.message


def test_blocks_of_a_mixture_are_dropped_with_all_its_experts(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=258, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
        eos_token_id=257, bos_token_id=256, initializer_range=0.2,
    )  # fmt: skip
    model = Replica(ModelSpec(str(write_model(tmp_path, config)), dtype="float32"), ReplicaSettings(num_threads=1))
    manifest, here = model.manifest(), (model, with_reference(model, count=6))
    size = plan_size(dropped("model.layers.1.mlp"), manifest.components, 32)
    both = dropped("model.layers.1.mlp", "model.layers.1.self_attn")
    assert measured(here, dropped("model.layers.1")) == measured(here, both)
    experts = [c for c in manifest.components if c.block == "model.layers.1.mlp"]
    assert size.removed_active == sum(c.num_weights for c in experts) / 2
