"""Mixtures of experts: which matrices are experts', what ties them, and what of a plan a token reads."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from exports import in_process, measured_plan
from fakes import MODE, toy_manifest
from families_of_models import empty_tiny_model, tiny_model, tiny_settings
from inprocess import run_here
from solving import request_for
from stores import run_record
from test_verdict import PLAN, rival
from tiny import LONG_TEXT as TEXT
from tiny import TRAINING, replica, write_tokenizer

from dtmsearch import config
from dtmsearch.analysis.format import edge_in_words
from dtmsearch.analysis.verdict import rival_of, verdict
from dtmsearch.config.stop_section import StopSection
from dtmsearch.console.run_text import run_text
from dtmsearch.core.calibration import Calibration, ExpertUse, InputStatistics, Routing, Through, calibration_id
from dtmsearch.core.checkpoint_files import read_header
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.holders import holders_of
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.strategy_settings import McMoeSettings
from dtmsearch.errors import UserError
from dtmsearch.model.calibration import hessians
from dtmsearch.model.calibration.calibrator import Calibrator
from dtmsearch.model.calibration.expert_use import expert_uses
from dtmsearch.model.calibration.input_statistics import Gatherer
from dtmsearch.model.compress.packing import unpack
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.modules.discovery import components_of
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.baselines import rivals_of_size, uniform_rivals
from dtmsearch.search.solver.choices import Choices
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies import mc_moe
from dtmsearch.search.strategies.mc_moe import mc_moe_plan
from dtmsearch.search.strategies.strategy_registry import make_strategy
from dtmsearch.store.codecs.plans import PlanRows
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows import lookup
from dtmsearch.workflows.calibrate import sparsely_reached
from dtmsearch.workflows.export import Exported
from dtmsearch.workflows.list_components import list_components
from dtmsearch.workflows.run import rare_experts

LEVELS = ("int2-channel", "int4-channel", "int8-channel")


def mixture(num_layers: int = 2, num_experts: int = 4, chosen: int = 1) -> tuple[Component, ...]:
    """Layers of an attention matrix and a mixture, as Qwen's."""
    found = []
    for layer in range(num_layers):
        found.append(Component(f"layers.{layer}.attn.o", layer, "o", (16, 16)))
        for expert in range(num_experts):
            for kind, shape in (("gate_up", (32, 16)), ("down", (16, 16))):
                name = f"layers.{layer}.mlp.experts.{expert}.{kind}"
                of = f"layers.{layer}.mlp", num_experts, chosen
                found.append(Component(name, layer, kind, shape, False, True, *of))
    return tuple(found)


@pytest.mark.parametrize(
    ("family", "block", "routing"),
    [
        ("mixtral", "model.layers.0.mlp", (4, 2)),
        ("deepseek_v3", "model.layers.1.mlp", (4, 2)),  # groups are chosen before experts
        ("phimoe", "model.layers.0.mlp", (4, 2)),  # one after the other
        ("longcat_flash", "model.layers.0.mlp", (8, 2)),  # four of them hold no weights
        ("jetmoe", "model.layers.0.self_attention.experts", (4, 2)),
        ("dbrx", "transformer.blocks.0.ffn", (4, 2)),
    ],
)
def test_an_experts_matrix_knows_its_mixture_and_how_many_experts_a_token_is_given_to(
    family: str, block: str, routing: tuple[int, int]
) -> None:
    with torch.device("meta"):
        components = components_of(empty_tiny_model(family))
    found = {(c.num_experts, c.experts_per_token) for c in components if c.mixture == block}
    assert found == {routing}


def test_shared_experts_and_attention_are_no_experts() -> None:
    with torch.device("meta"):
        components = components_of(empty_tiny_model("deepseek_v3"))
    assert not [c.name for c in components if c.mixture and ("shared" in c.name or "attn" in c.name)]


def test_all_experts_of_a_layer_change_together() -> None:
    components = mixture()
    units = SearchSpace(components, LEVELS).units
    assert [len(unit.components) for unit in units] == [1, 8, 1, 8]


def test_experts_may_be_chosen_a_scheme_for_each() -> None:
    components = mixture()
    assert len(SearchSpace(components, LEVELS, experts="expert").units) == len(components)


def test_kinds_that_are_tied_in_each_expert_are_tied_in_all_of_a_layer() -> None:
    tied = (("gate_up", "down"),)
    untied = SearchSpace(mixture(), LEVELS, tied, experts="expert")
    assert [len(unit.components) for unit in untied.units] == [1, 2, 2, 2, 2, 1, 2, 2, 2, 2]
    assert [len(unit.components) for unit in SearchSpace(mixture(), LEVELS, tied).units] == [1, 8, 1, 8]


def test_a_token_reads_the_experts_that_it_is_given_to() -> None:
    """A quarter of the experts: 256 + 768 weights a layer, of which the attention has 2 bits and the experts 8."""
    space = SearchSpace(mixture(1), ("int2-tensor", "int8-tensor"))
    plan = space.uniform("int8-tensor").with_(space.units[0].edges[0])
    size = space.size(plan)
    scales = 16 * (1 + Fraction(8, 4))
    assert size.active_weights == 256 + 768
    assert size.active_bits == 256 * 2 + 768 * 8 + scales
    assert size.stored_bits == 256 * 2 + 4 * 768 * 8 + 16 * 9


def test_of_a_model_without_experts_a_token_reads_all() -> None:
    space = SearchSpace(toy_manifest().components, LEVELS)
    size = space.size(space.uniform("int4-channel"))
    assert not size.is_of_mixture and size.active_bits_per_weight == size.bits_per_weight


def test_a_budget_of_what_a_token_reads_is_met_exactly() -> None:
    """The uniform plan's own size is a budget that it meets, and the solver may use all of it."""
    components = mixture(3, 6, 2)
    wanted = SearchSpace(components, LEVELS).size(Plan.uniform(components, "int4-channel")).active_bits_per_weight
    space = SearchSpace(components, LEVELS, budget=Budget(active_bits_per_weight=wanted), experts="expert")
    choices = Choices(space)
    damages = [np.array([0.0, 3.0, 1.0, 0.1])] * len(choices.units)
    plan = choices.plan(choices.solve(damages).options)
    assert space.budget.reached(space.size(space.uniform("int4-channel")))
    assert 0.9 * wanted < space.size(plan).active_bits_per_weight <= wanted


def test_experts_cost_what_tokens_read_of_them() -> None:
    """Of equal damage it is cheaper to widen what few tokens read."""
    components = mixture(1, 4, 1)
    space = SearchSpace(components, LEVELS, budget=Budget(active_bits_per_weight=6.0), experts="expert")
    choices = Choices(space)
    damages = [np.array([0.0, 3.0, 1.0, 0.1])] * len(choices.units)
    size = space.size(choices.plan(choices.solve(damages).options))
    assert size.active_bits_per_weight <= 6.0 < size.bits_per_weight


def test_a_budget_that_is_out_of_reach_is_said() -> None:
    with pytest.raises(UserError, match=r"stop\.active_bits_per_weight: 1 is out of reach"):
        SearchSpace(mixture(), LEVELS, budget=Budget(active_bits_per_weight=1))


@pytest.mark.parametrize(("active", "rivals"), [(False, ["int5-channel"]), (True, ["int4-channel"])])
def test_rivals_are_of_the_size_that_the_budget_counts(active: bool, rivals: list[str]) -> None:
    """The plan has its experts wide, of which a token reads a quarter."""
    components = (Component("layers.0.attn.q", 0, "q", (16, 16)), *mixture(1, 4, 1))
    budget = Budget(active_bits_per_weight=5.5) if active else Budget(bits_per_weight=7)
    space = SearchSpace(components, ("int2-channel", "int6-channel"), budget=budget)
    plan = space.uniform("int6-channel").with_(space.units[0].edges[0]).with_(space.units[1].edges[0])
    found = [scheme for scheme in uniform_rivals(space, plan) if scheme.endswith("-channel")]
    assert found[:1] == rivals
    assert found == [s for s in rivals_of_size(space, float(budget.counted(space.size(plan)))) if s in found]


def test_rows_hold_what_a_token_reads_as_plans_count_it() -> None:
    components = mixture(2, 6, 2)
    manifest = ModelManifest("m", None, "bfloat16", 2, "id", components)
    plan = Plan.of({components[1].name: "int4-channel", components[0].name: "int8-channel"})
    (figures,) = PlanRows(manifest, components).figures([plan])
    size = SearchSpace(components, LEVELS).size(plan)
    assert figures.active_bits_per_weight == pytest.approx(size.active_bits_per_weight, rel=1e-12)
    assert figures.bits_per_weight == pytest.approx(size.bits_per_weight, rel=1e-12)


def test_rows_of_other_models_say_nothing_of_what_a_token_reads() -> None:
    manifest = toy_manifest()
    (figures,) = PlanRows(manifest, manifest.components).figures([Plan()])
    assert figures.active_bits_per_weight is None


def test_the_verdict_holds_a_plan_against_what_has_a_token_read_as_much() -> None:
    """Six bits are stored, four read: a uniform plan of five stores less, and has more read."""
    plan = replace(PLAN, active_bits_per_weight=4.0)
    five = replace(rival("int5-channel", 5.0, kl=0.1), active_bits_per_weight=5.0)
    four = replace(rival("int4-channel", 4.0, kl=0.2), active_bits_per_weight=4.0)
    found = rival_of([plan, five, four], "kl", sized_by="active_bits_per_weight")
    assert found is four
    said = verdict([plan, five, four], "kl", sized_by="active_bits_per_weight")
    assert "6.00 bits per weight, 4.00 of those that a token reads" in said
    assert "better than the best uniform plan that has a token read at most as many bits, int4-channel" in said


def search(**keys: Any) -> dict[str, Any]:
    section = {"strategy": "auto", "schemes": ["int4-channel"], "stop": {"bits_per_weight": 5}} | keys
    return {"run": "r", "model": {"path": "m"}, "prompts": {"files": ["a.txt"]}, "search": section}


def test_a_run_of_before_there_was_the_key_had_no_experts_tied() -> None:
    assert config.recorded(run_record("r", config=yaml_of(search()))).search.experts == "expert"
    assert config.from_mapping(search(), "file", Path()).search.experts == "layer"


@pytest.mark.parametrize("mixed", [False, True])
def test_such_a_run_goes_on_where_there_are_no_experts_and_is_told_apart_where_there_are(
    tmp_path: Path, mixed: bool
) -> None:
    results = ResultStore(tmp_path)
    manifest = ModelManifest("m", None, "bfloat16", 2, "id", mixture() if mixed else mixture()[:1])
    with results.writer("r") as writer:
        writer.put_components(manifest, manifest.components)
        writer.put_run(run_record("r", config=yaml_of(search()), manifest_id="id", reference_id="reference"))
    file = config.from_mapping(search(), "file", Path())
    if not mixed:
        assert lookup.begun(results, file) is not None
        return
    with pytest.raises(UserError, match=r"search\.experts: expert -> layer"):
        lookup.begun(results, file)


def yaml_of(content: dict[str, Any]) -> str:
    """As an earlier version wrote it."""
    text = config.from_mapping(content, "file", Path()).to_yaml()
    written = yaml.safe_load(text)
    del written["search"]["experts"]
    del written["search"]["stop"]["active_bits_per_weight"]
    return yaml.safe_dump(written)


def test_a_budget_of_what_a_token_reads_that_asks_for_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"stop\.active_bits_per_weight: 40 asks for nothing"):
        config.from_mapping(search(stop={"active_bits_per_weight": 40}), "file", Path())


def test_a_search_of_what_a_token_reads_counts_no_stored_bits() -> None:
    assert StopSection(active_bits_per_weight=3).budget.reads_less
    assert not StopSection(active_bits_per_weight=3, size_mb=5).budget.reads_less


# --- MC-MoE ---


def uses_of(components: tuple[Component, ...], given: dict[int, int]) -> list[ExpertUse]:
    """Expert `n` is given to so many tokens, with weights alike; a bit less costs twice the error."""
    found = []
    for mixture_name, expert in dict.fromkeys((c.mixture, c.expert) for c in components if c.mixture):
        for bits in (2, 4, 8):
            tokens = given[expert]
            use = ExpertUse(mixture_name, expert, f"int{bits}-channel", tokens, 100, tokens / 200, 2.0**-bits)
            found.append(use)
    return found


def test_experts_that_are_used_most_have_most_bits() -> None:
    components = mixture(2, 4, 1)
    space = SearchSpace(components, LEVELS, budget=Budget(bits_per_weight=5.0), experts="expert")
    plan = mc_moe_plan(space, uses_of(components, {0: 90, 1: 60, 2: 5, 3: 1}), McMoeSettings())
    bits = {c.expert: plan.scheme(c.name).bits for c in components if c.mixture}
    assert bits[0] > bits[3] and sorted(bits.values(), reverse=True) == list(bits.values())
    assert {plan.scheme_of(c.name) for c in components if not c.mixture} == {"int4-channel"}
    assert space.budget.reached(space.size(plan))


def test_the_matrices_of_an_expert_have_one_width_and_layers_the_same_mean() -> None:
    components = mixture(3, 4, 1)
    space = SearchSpace(components, LEVELS, budget=Budget(active_bits_per_weight=5.0), experts="expert")
    plan = mc_moe_plan(space, uses_of(components, {0: 4, 1: 3, 2: 2, 3: 1}), McMoeSettings())
    for one in components[1:]:
        assert (
            one.expert < 0
            or len({plan.scheme_of(c.name) for c in components if c.mixture and c.expert == one.expert}) == 1
        )
    assert space.budget.reached(space.size(plan))


def test_what_is_no_experts_goes_below_four_bits_where_experts_would_have_too_few() -> None:
    components = mixture(2, 4, 1)
    space = SearchSpace(components, LEVELS, budget=Budget(active_bits_per_weight=3.3), experts="expert")
    plan = mc_moe_plan(space, uses_of(components, dict.fromkeys(range(4), 1)), McMoeSettings())
    assert {plan.scheme_of(c.name) for c in components if not c.mixture} == {"int2-channel"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": "layer"}, "set search.experts: expert"),
        ({"budget": Budget(share=0.5)}, "keeps to bits"),
        ({"components": mixture()[:1]}, "none of these components is an expert's"),
    ],
)
def test_mc_moe_says_what_it_needs(changes: dict[str, Any], said: str) -> None:
    keys: dict[str, Any] = {"components": mixture(), "experts": "expert", "budget": Budget(bits_per_weight=5)}
    space = SearchSpace(schemes=LEVELS, **keys | changes)
    with pytest.raises(UserError, match=said):
        make_strategy("mc_moe", space, request_for, "kl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four experts, of which a token is given to two."""
    place = tmp_path_factory.mktemp("mixture")
    tiny_model("qwen3_moe").save_pretrained(place)
    return write_tokenizer(place)


def test_the_use_of_an_expert_is_that_of_plain_code(folder: Path) -> None:
    """Its tokens and weights by the router alone, and the change of the mixture's output over all tokens."""
    from transformers import AutoModelForCausalLM

    model = replica(folder)
    calibration = model.cut_calibration([TEXT], 4, 32, 0)
    model.use_calibration(calibration)
    name = "model.layers.1.mlp.experts.2"
    (use,) = model.expert_uses([f"{name}.gate_up_proj", f"{name}.down_proj"], ["int3-channel"], calibration.id)

    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    block, seen = plain.model.layers[1].mlp, []
    block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    tokens = torch.from_numpy(calibration.tokens).long()
    with torch.inference_mode():
        plain(input_ids=tokens, use_cache=False)
        (inputs, before) = seen.pop()
        _, weights, chosen = block.gate(inputs.reshape(-1, inputs.shape[-1]))
        for stack in (block.experts.gate_up_proj, block.experts.down_proj):
            scale = stack[2].abs().amax(1, keepdim=True) / 3.5
            stack[2] = (stack[2] / scale).round().clamp(-4, 3) * scale
        after = block(inputs)
    assert (use.tokens, use.num_tokens) == (int((chosen == 2).sum()), tokens.numel())
    assert use.routing_weight == pytest.approx(float(weights[chosen == 2].sum()) / tokens.numel(), rel=1e-5)
    assert use.error == pytest.approx(float((after - before).norm()), rel=1e-4)


def test_a_search_by_mc_moe_is_recorded_and_replayed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    section = {"strategy": "mc_moe", "experts": "expert", "rank_by": "kl", "schemes": list(LEVELS)}
    file = {
        "run": "r", "model": {"path": str(folder), "dtype": "float32"},
        "prompts": {"files": ["text.txt"], "count": 6, "prompt_tokens": 8, "continuation_tokens": 8},
        "search": section | {"stop": {"active_bits_per_weight": 4.6}},
    }  # fmt: skip
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(file))
    summary = run_here(tmp_path / "search.yaml", tmp_path / "store")
    assert summary.active_bits_per_weight is not None and summary.active_bits_per_weight <= 4.6
    results = ResultStore(tmp_path / "store")
    rows = results.table("expert_uses", run="r").to_pylist()
    assert len(rows) == 2 * 4 * len(LEVELS) and {row["num_tokens"] for row in rows} == {6 * 16}
    assert run_here(tmp_path / "search.yaml", tmp_path / "store").already_complete


def test_the_benchmark_of_a_mixture_trains_one_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    (tmp_path / "text.txt").write_text(TEXT * 2)
    (tmp_path / "train.txt").write_text(TRAINING)
    write_tokenizer(tmp_path / "tokenizer")
    texts = [str(tmp_path / "train.txt"), str(tmp_path / "text.txt"), str(tmp_path / "text.txt")]
    sizes = {"train-steps": 3, "train-rows": 4, "train-tokens": 32, "prompts": 8, "held-out-prompts": 8, "tokens": 8}
    options = {"tokenizer": tmp_path / "tokenizer", "out": tmp_path / "out", "cases": 3, "strategy": "sensitivity"}
    given = [f"--{name}={value}" for name, value in (sizes | options).items()]
    ran = CliRunner().invoke(importlib.import_module("mixture").main, [*texts, *given, "--toy"])
    assert ran.exit_code == 0, ran.output
    rows = json.loads((tmp_path / "out" / "mixture.json").read_text())
    kinds = ["uniform int3-g32-asym", "mc_moe", "tied", "untied"]
    assert [(row["budget"], row["plan_of"]) for row in rows] == [(b, k) for b in ("stored", "active") for k in kinds]
    for budget in ("stored", "active"):
        sizes_of = [row[budget] for row in rows if row["budget"] == budget]
        assert all(size <= sizes_of[0] for size in sizes_of)


# --- exports ---


def exported_mixture(family: str, place: Path, schemes: dict[str, str], **sizes: int) -> tuple[Exported, Path]:
    """A tiny mixture of a family with some kinds of its components under schemes, as engines load it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = tiny_settings(AutoConfig.for_model(family), {}) | {"hidden_size": 64} | sizes
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else None
    made.save_pretrained(place / "model")
    write_tokenizer(place / "model")
    components = replica(place / "model").manifest().components
    plan = {c.name: schemes[c.kind] for c in components if c.kind in schemes}
    measured = measured_plan(place / "model", place / "store", plan)
    return measured.export("compressed-tensors", place / "out", runtime="vllm"), place / "out"


@pytest.mark.parametrize(
    ("family", "sizes", "block", "parts"),
    [
        ("mixtral", {"intermediate_size": 32}, "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", {"moe_intermediate_size": 32}, "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_are_exported_as_engines_look_for_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    sizes: dict[str, int],
    block: str,
    parts: Sequence[str],
) -> None:
    """Each by itself, gate and up apart, under a pattern that also has the names by which vLLM asks; and the folder
    measures as recorded."""
    in_process(monkeypatch)
    schemes = {"gate_up": "int4-g32", "down": "int4-g32", "o": "int8-channel"}
    exported, out = exported_mixture(family, tmp_path, schemes, **sizes)
    assert exported.check is not None and exported.check.equal
    held = read_header(out / "model.safetensors")
    for part in parts:
        rows, cols = (64, 32) if part in ("w2", "down_proj") else (32, 64)
        assert held[f"model.layers.1.{block}.experts.3.{part}.weight_packed"] == ("I32", (rows, cols * 4 // 32))
        assert held[f"model.layers.1.{block}.experts.3.{part}.weight_scale"][1] == (rows, cols // 32)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    targets = [target for group in settings["config_groups"].values() for target in group["targets"]]
    for layer in range(2):
        (pattern,) = [t for t in targets if t.startswith("re:") and f"layers\\.{layer}\\." in t]
        for name in (*parts, "gate_proj", "up_proj", "down_proj"):
            assert re.match(pattern.removeprefix("re:"), f"model.layers.{layer}.{block}.experts.0.{name}")
        assert f"model.layers.{layer}.{block}.gate" in settings["ignore"]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_plain_transformers_loads_exported_experts_of_one_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    in_process(monkeypatch)
    schemes = {"gate_up": "int4-g32", "down": "int4-g32"}
    _, out = exported_mixture("qwen3_moe", tmp_path, schemes, moe_intermediate_size=32)
    how = CompressedTensorsConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=how)
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    weight = base.model.layers[1].mlp.experts.down_proj[2]
    rounded = round_weight(weight.detach(), parse_scheme("int4-g32"))
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj[2], rounded)


@pytest.mark.parametrize(
    ("schemes", "said"),
    [
        ({"gate_up": "int4-g32", "down": "int8-channel"}, "the experts of model.layers.0.mlp: 4 x int"),
        ({"gate_up": "int4-g32-asym", "down": "int4-g32-asym"}, "take no zero points"),
    ],
)
def test_what_no_engine_runs_is_refused(tmp_path: Path, schemes: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        exported_mixture("qwen3_moe", tmp_path, schemes, moe_intermediate_size=32)


@pytest.mark.parametrize("apart", [False, True])
def test_an_export_for_engines_is_offered_where_the_files_hold_each_expert_by_itself(apart: bool) -> None:
    components = [replace(component, apart=apart, shape=(64, 64)) for component in mixture(1) if component.mixture]
    held = holders_of(Plan.uniform(components, "int4-g32"), components, 16, 16)
    (vllm,) = [each for each in held if each.holder == "compressed-tensors (vllm)"]
    assert (vllm.obstacle is None) == apart


# --- calibration ---


def plain_inputs(folder: Path, tokens: Any, layer: int, expert: int, everywhere: bool) -> dict[str, Any]:
    """What an expert of a Qwen3-MoE reads, by plain code: rows of gate_up's inputs, and of down's."""
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    block, seen = plain.model.layers[layer].mlp, []
    block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        plain(input_ids=torch.from_numpy(tokens).long(), use_cache=False)
        rows = seen.pop().reshape(-1, block.experts.gate_up_proj.shape[-1])
        chosen = block.gate(rows)[2]
        rows = rows if everywhere else rows[(chosen == expert).any(1)]
        gate, up = (rows @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        return {"gate_up_proj": rows, "down_proj": torch.nn.functional.silu(gate) * up}


@pytest.mark.parametrize("experts", ["routed", "all"])
def test_experts_are_calibrated_by_what_they_read(folder: Path, experts: Routing) -> None:
    model = replica(folder)
    calibration = model.cut_calibration([TEXT], 16, 32, 0, experts=experts)
    statistics = model.gather_statistics(calibration)
    model._calibrator.activate(calibration.id)
    assert isinstance(model._calibrator, Calibrator)
    hessians = {h.components[0]: h for h in model._calibrator.texts.gatherer(calibration).hessians(1)}
    for leaf, rows in plain_inputs(folder, calibration.tokens, 1, 2, experts == "all").items():
        name = f"model.layers.1.mlp.experts.2.{leaf}"
        assert statistics.num_tokens[name] == hessians[name].num_tokens == len(rows)
        np.testing.assert_allclose(statistics.mean_squares[name], rows.square().mean(0).numpy(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(hessians[name].hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "llama4_text", "jetmoe"])
def test_experts_of_every_layout_are_reached_by_the_tokens_that_they_are_given(tmp_path: Path, family: str) -> None:
    """In modules of their own, in batched products, in grouped ones: as many tokens as the router chooses."""
    tiny_model(family).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model = Replica(ModelSpec(str(tmp_path), dtype="float32", attention="eager"), ReplicaSettings(num_threads=1))
    experts = [c for c in model.manifest().components if c.mixture]
    tokens = model.gather_statistics(model.cut_calibration([TEXT], 8, 32, 0)).num_tokens
    kinds = {(c.mixture, c.kind) for c in experts}
    for mixture_name, kind in kinds:
        reached = [tokens.get(c.name, 0) for c in experts if (c.mixture, c.kind) == (mixture_name, kind)]
        assert sum(reached) == 2 * 8 * 32


def test_experts_that_enough_tokens_reach_are_solved_for_and_others_rounded(folder: Path) -> None:
    """A quarter of an expert's tokens for each of its inputs: what GPTQ makes of too few is plain rounding."""
    model, name, scheme = replica(folder), "model.layers.1.mlp.experts.2.down_proj", parse_scheme("gptq-int3-channel")
    weight = model._weights.original(name).clone()
    plain = round_weight(weight, parse_scheme("int3-channel"), torch.float16)
    for rows, is_plain in ((2, True), (40, False)):
        calibration = model.cut_calibration([TEXT], rows, 32, 0)
        model.use_calibration(calibration)
        (packed,) = model.solve(calibration.id, [(name, scheme.name)])
        assert torch.equal(unpack(packed, weight.dtype, weight.device), plain) == is_plain


def test_an_expert_that_no_token_reaches_is_pruned_by_magnitude(folder: Path) -> None:
    model, name = replica(folder), "model.layers.1.mlp.experts.2.down_proj"
    calibration = model.cut_calibration([TEXT], 1, 2, 0)
    model.use_calibration(calibration)
    model._calibrator.activate(calibration.id)
    assert calibration_reach(model, calibration) < 32
    weight = model._weights.original(name).clone()
    made = model._weights.compressor.compress(name, weight, parse_scheme("wanda-0.5"))
    kept = weight.abs() >= weight.abs().median(1, keepdim=True).values
    assert ((made != 0) == kept).float().mean() > 0.95


def calibration_reach(model: Replica, calibration: Calibration) -> int:
    return max(model._calibrator.statistics(calibration.id).num_tokens.values())


def test_a_calibration_of_all_tokens_is_another_one(folder: Path) -> None:
    model = replica(folder)
    routed, everywhere = (model.cut_calibration([TEXT], 4, 16, 0, experts=how) for how in ("routed", "all"))
    assert routed.id != everywhere.id
    ids = {calibration_id("m", MODE, routed.tokens, experts=how) for how in (None, "routed", "all")}
    assert len(ids) == 3


def test_experts_that_few_calibration_tokens_reach_are_told() -> None:
    components = mixture(1)
    tokens = {c.name: 1000 for c in components} | {"layers.0.mlp.experts.2.down": 7}
    (line,) = sparsely_reached(components, InputStatistics("c", {}, tokens))
    assert "1 of 8 experts' matrices" in line and "(layers.0.mlp.experts.2.down by 7)" in line
    assert not sparsely_reached(components, InputStatistics("c", {}, {c.name: 1000 for c in components}))


# --- what is told ---


def test_a_run_tells_how_many_of_its_tokens_reach_each_expert(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    file = {
        "run": "r", "model": {"path": str(folder), "dtype": "float32"},
        "prompts": {"files": ["text.txt"], "count": 6, "prompt_tokens": 8, "continuation_tokens": 8},
        "search": {"strategy": "knapsack", "rank_by": "kl", "schemes": ["int4-channel"], "stop": {"share": 1.0}},
    }  # fmt: skip
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(file))
    summary = run_here(tmp_path / "search.yaml", tmp_path / "store")
    rows = ResultStore(tmp_path / "store").table("expert_tokens", run="r").to_pylist()
    tokens = [row["tokens"] for row in rows]
    assert len(rows) == 2 * 4 and sum(tokens) == 2 * 2 * 6 * 16
    assert f"  experts    8, reached by {min(tokens)} to {max(tokens)} tokens of the search" in run_text(summary)


def test_a_mixtures_components_say_what_a_token_reads(folder: Path) -> None:
    """Half of the experts' weights, and all others."""
    found = list_components(str(folder))
    manifest = replica(folder).manifest()
    experts = sum(c.num_weights for c in manifest.components if c.mixture)
    read = 1 - experts / 2 / found.num_weights
    assert found.experts == f"2 mixtures of 4 experts, 2 for a token: a token reads {read:.2%} of all weights"


def test_an_edge_of_many_tied_components_is_told_in_short() -> None:
    edge = str(SearchSpace(mixture(1), LEVELS).units[1].edges[0])
    assert edge_in_words(edge) == "layers.0.mlp.experts.0.gate_up and 7 tied to it=int2-channel"
    assert edge_in_words("a+b=int4-g128+wanda-0.5") == "a+b=int4-g128+wanda-0.5"


def test_the_baseline_counts_what_the_base_models_own_files_take() -> None:
    component = Component("model.layers.0.mlp.up_proj", 0, "up", (64, 64), source_bits=64 * 64 * 4)
    assert mc_moe._stored_bits([component], "source", 16) == 64 * 64 * 4


def test_where_nothing_is_known_of_routing_no_expert_is_said_to_be_reached() -> None:
    assert "not known" in rare_experts({})


def test_the_baseline_gives_others_what_the_base_models_own_files_take() -> None:
    other = Component("model.layers.0.self_attn.o_proj", 0, "o", (64, 64), source_bits=64 * 64 * 4)
    space = SearchSpace((other,), ("source", "int2-g32"), budget=Budget(bits_per_weight=4.2))
    assert mc_moe._schemes_of_others(space, McMoeSettings()) == ["source", "int2-g32"]


def test_experts_that_are_modules_of_their_own_are_refused_in_words() -> None:
    expert = Component("m.experts.0.up_proj", 0, "up", (8, 8), mixture="m", num_experts=2)
    with pytest.raises(UserError, match="the experts of m is not told: each is a module of its own"):
        expert_uses(None, None, [expert], [])  # type: ignore[arg-type]


@pytest.mark.parametrize("through", ["base", "compressed"])
def test_hessians_in_parts_have_the_same_bits(
    through: Through, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all experts of a large layer do not fit at once."""
    folder = tmp_path / "model"
    tiny_model("mixtral").save_pretrained(folder)
    write_tokenizer(folder)
    most: list[int] = []
    gather = Gatherer.hessians

    def gathering(self: Gatherer, *arguments: Any, **options: Any) -> Any:
        found = gather(self, *arguments, **options)
        most.append(sum(4 * shared.hessian.numel() for shared in found))
        return found

    monkeypatch.setattr(Gatherer, "hessians", gathering)

    def solved(bound: int) -> tuple[list[Any], list[Any], int]:
        monkeypatch.setattr(hessians, "_MOST_HESSIAN_BYTES", bound)
        most.clear()
        model = replica(folder)
        calibration = model.cut_calibration([TEXT], 16, 32, 0, through)
        model.use_calibration(calibration)
        components = model.manifest().components
        plan = Plan.uniform(components, "gptq-int3-g8")
        model._calibrator.prepare([plan], calibration.id)
        matrices = model.solve(calibration.id, plan.entries)
        errors = model.weight_errors([c.name for c in components], ["int3-g8"], calibration.id, through == "base")
        return matrices, errors, max(most)

    whole, parts = solved(1 << 30), solved(20_000)
    assert parts[2] <= 20_000 < whole[2]
    assert whole[1] == parts[1]
    for one, other in zip(whole[0], parts[0], strict=True):
        assert one.component == other.component and np.array_equal(one.codes, other.codes)
        assert np.array_equal(one.scales, other.scales)
