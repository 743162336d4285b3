"""Mixtures of experts: which matrices are experts', what ties them, and what of a plan a token reads."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fakes import toy_manifest
from families_of_models import empty_tiny_model
from stores import run_record
from test_verdict import PLAN, rival

from dtmsearch import config
from dtmsearch.analysis.verdict import rival_of, verdict
from dtmsearch.config.sections import StopSection
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.errors import UserError
from dtmsearch.model.modules.discovery import components_of
from dtmsearch.search.baselines import rivals_of_size, uniform_rivals
from dtmsearch.search.solver.choices import Choices
from dtmsearch.search.space import SearchSpace
from dtmsearch.store.codecs.plans import PlanRows
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows import lookup

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
    assert found == [s for s in rivals_of_size(space, float(budget.counted_bits(space.size(plan)))) if s in found]


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
    found = rival_of([plan, five, four], "kl", active=True)
    assert found is four
    said = verdict([plan, five, four], "kl", active=True)
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
