"""Budgets of milliseconds: what components take by a table of times, and plans that keep to it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fakes import FakeEvaluator, MemoryLog, request_for, toy_components
from inprocess import run_here
from test_verdict import PLAN, rival
from tiny import TEXT, llama_config, replica, write_model

from dtmsearch import config
from dtmsearch.analysis.verdict import rival_of, verdict
from dtmsearch.core.components import Component
from dtmsearch.core.plan import Budget, Plan, plan_size
from dtmsearch.core.times import PICOSECONDS, Times
from dtmsearch.errors import UserError
from dtmsearch.search.baselines import uniform_rivals
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Silent
from dtmsearch.search.solver.choices import Choices
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import make_strategy
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.solve_budgets import predicted_front, solve_budgets

SCHEMES = ("int4-g32", "int8-channel")
# Of a weight: 4 bits are read faster than 8, and take longer where many tokens are multiplied with them.
DECODE, PREFILL = {"dense": 16, "int8-channel": 8, "int4-g32": 5}, {"dense": 10, "int8-channel": 6, "int4-g32": 12}


def times(without: tuple[str, int, int] | None = None) -> Times:
    shapes = sorted({component.shape for component in toy_components()})
    rows = {
        (scheme, *shape): (DECODE[scheme] * shape[0] * shape[1] * 1000, PREFILL[scheme] * shape[0] * shape[1] * 1000)
        for scheme in ("dense", *SCHEMES)
        for shape in shapes
    }
    return Times({key: value for key, value in rows.items() if key != without}, 512, "toy")


def space(**budget: float) -> SearchSpace:
    return SearchSpace(toy_components(), SCHEMES, budget=Budget(**budget), times=times())  # type: ignore[arg-type]


def milliseconds(weight: int) -> float:
    """Of all toy components at so much a weight."""
    return weight * sum(c.num_weights for c in toy_components()) * 1000 / PICOSECONDS


def test_a_plan_takes_what_its_components_take() -> None:
    size = plan_size(Plan.of({toy_components()[0].name: "int4-g32"}), toy_components(), 16, times())
    first, others = toy_components()[0].num_weights, sum(c.num_weights for c in toy_components()[1:])
    assert size.picoseconds == ((5 * first + 16 * others) * 1000, (12 * first + 10 * others) * 1000)
    assert size.decode_ms == pytest.approx((5 * first + 16 * others) * 1e-6)


def test_an_expert_takes_its_share_of_the_tokens() -> None:
    expert = Component("mlp.experts.0.up", 0, "up", (64, 64), mixture="mlp", num_experts=8, experts_per_token=2)
    assert times().of(expert, "dense") == (16 * 64 * 64 * 1000 // 4, None)


def test_what_a_block_takes_beside_its_products_goes_with_it() -> None:
    """Counted with its last matrix: where that is rounded it stays, where the block is dropped it goes."""
    name = "model.layers.0.mlp"
    up, down = Component(f"{name}.up_proj", 0, "up", (64, 16)), Component(f"{name}.down_proj", 0, "down", (16, 64))
    rows = {(scheme, *c.shape): (at, 10 * at) for at, scheme in ((8, "dense"), (4, "int8-channel")) for c in (up, down)}
    table = Times(rows, 512, blocks={"mlp": (100, 1000), "attention": (7, 7)})
    assert plan_size(Plan(), (up, down), 16, table).picoseconds == (116, 1160)
    assert plan_size(Plan.of({down.name: "int8-channel"}), (up, down), 16, table).picoseconds == (112, 1120)
    assert plan_size(Plan.of({name: "drop"}), (up, down), 16, table).picoseconds == (0, 0)


def test_a_budget_of_a_prompts_time_is_refused_of_a_mixture() -> None:
    expert = Component("mlp.experts.0.up", 0, "up", (64, 64), mixture="mlp", num_experts=8, experts_per_token=2)
    with pytest.raises(UserError, match=r"stop\.prefill_ms cannot be told of this model.*Give stop\.decode_ms"):
        SearchSpace((expert,), SCHEMES, budget=Budget(prefill_ms=1.0), times=times())


def test_where_every_scheme_is_slower_somewhere_a_search_is_foretold_to_end_at_the_budget() -> None:
    rows = {k: (v[0] * (9 if k[0] == "int8-channel" and k[1] == 16 else 1), v[1]) for k, v in times().rows.items()}
    slow = {k: (v[0] * (9 if k[0] == "int4-g32" and k[1] == 96 else 1), v[1]) for k, v in rows.items()}
    budget = Budget(decode_ms=milliseconds(14))
    found = SearchSpace(toy_components(), SCHEMES, budget=budget, times=Times(slow, 512))
    assert found.expected_cost == milliseconds(14) * PICOSECONDS


def test_a_table_names_schemes_that_there_are_by_their_own_names() -> None:
    row = {"outputs": 64, "inputs": 64, "decode_ms": 1.0, "prefill_ms": 1.0}
    with pytest.raises(UserError, match="itn8"):
        config.from_mapping(content(times={"rows": [row | {"scheme": "itn8-channel"}]}), "file", Path())


def test_without_a_row_there_is_no_time() -> None:
    missing = times(without=("int4-g32", 64, 64))
    size = plan_size(Plan.uniform(toy_components(), "int4-g32"), toy_components(), 16, missing)
    assert size.picoseconds is None and size.decode_ms is None


def test_a_search_says_which_rows_its_table_lacks() -> None:
    with pytest.raises(UserError, match=r"search\.times has no row for int4-g32 of 64 x 64: measure them"):
        SearchSpace(toy_components(), SCHEMES, times=times(without=("int4-g32", 64, 64)))


def test_a_time_that_no_plan_comes_to_is_refused() -> None:
    with pytest.raises(UserError, match=rf"stop\.decode_ms: 0\.01 is out of reach .* is {milliseconds(5)}"):
        space(decode_ms=0.01)


def test_where_time_is_counted_a_component_goes_on_to_less_time() -> None:
    """In prefill 4 bits are slower than none."""
    edges = space(prefill_ms=milliseconds(7)).perturbations(Plan())
    assert {edge.scheme for edge in edges} == {"int8-channel"}
    faster = space(decode_ms=milliseconds(7)).perturbations(Plan.uniform(toy_components(), "int8-channel"))
    assert {edge.scheme for edge in faster} == {"int4-g32"}


@pytest.mark.parametrize("rule", ["decode_ms", "prefill_ms"])
def test_the_solver_finds_the_least_damage_within_the_time(rule: str) -> None:
    choices = Choices(space(**{rule: milliseconds(9)}))
    damages = [np.array([0.0, *np.random.default_rng(u).random(len(s) - 1)]) for u, s in enumerate(choices.schemes)]
    found = choices.solve(damages)

    def within(options: tuple[int, ...]) -> bool:
        plan = choices.plan(options)
        return choices.space.budget.reached(choices.space.size(plan))

    every = product(*(range(len(schemes)) for schemes in choices.schemes))
    best = min((o for o in every if within(o)), key=lambda o: sum(d[i] for d, i in zip(damages, o, strict=True)))
    assert within(found.options) and sum(d[i] for d, i in zip(damages, found.options, strict=True)) == pytest.approx(
        sum(d[i] for d, i in zip(damages, best, strict=True))
    )


@pytest.mark.parametrize("strategy", ["greedy", "lazy_greedy", "knapsack", "local"])
def test_a_search_keeps_to_the_time(strategy: str) -> None:
    within = space(decode_ms=milliseconds(9))
    made = make_strategy(strategy, within, request_for, "kl")
    plan = search(made, FakeEvaluator(), MemoryLog(), Silent())
    assert plan is not None
    assert within.budget.reached(within.size(plan)) and made.expected_evaluations() is not None


def test_rivals_are_uniform_plans_that_take_no_longer() -> None:
    within = space(prefill_ms=milliseconds(9))
    assert uniform_rivals(within, within.uniform("int8-channel")) == ["int8-channel"]


def test_what_takes_longer_is_no_rival_and_a_slower_plan_says_so() -> None:
    plan = replace(PLAN, decode_ms=1.0, prefill_ms=9.0)
    small = replace(rival("int4-g32", 4.5, kl=0.2), decode_ms=1.0, prefill_ms=8.0)
    slow = replace(rival("int3-g32", 3.5, kl=0.1), decode_ms=2.0, prefill_ms=8.0)
    found = rival_of([plan, small, slow], "kl", "decode_ms")
    assert found is small
    said = verdict([plan, small, slow], "kl", sized_by="decode_ms")
    assert "the best uniform plan that takes no longer for a token, int4-g32" in said
    assert (
        "takes 1 ms for a token and 9 for a prompt, int4-g32 1 ms for a token and 8 for a prompt: slower in prefill."
        in said
    )


ROWS = [
    {"scheme": s, "outputs": 64, "inputs": 64, "decode_ms": 1.0, "prefill_ms": 2.0} for s in ("dense", "int8-channel")
]


def content(**search_keys: Any) -> dict[str, Any]:
    base = {"strategy": "auto", "rank_by": "kl", "schemes": ["int8-channel"]}
    return {"run": "r", "model": {"path": "m"}, "prompts": {"files": ["t"]}, "search": base | search_keys}


def test_a_table_is_read_beside_the_search_file_and_kept_with_it(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(json.dumps({"device": "a card", "rows": ROWS}))
    given = content(times="times.json", stop={"decode_ms": 3})
    file = config.from_mapping(given, "file", tmp_path)
    assert file.search.times is not None and file.search.times.table.device == "a card"
    (tmp_path / "times.json").unlink()
    again = config.parse(file.to_yaml(), "file", tmp_path)
    assert again.search.times == file.search.times
    assert config.times_of(file.to_yaml()) == file.search.times.table


def test_a_table_that_has_changed_is_told_in_short_and_told_apart() -> None:
    many = [row | {"outputs": 64 + at} for at in range(40) for row in ROWS]
    files = [content(times={"rows": rows}, stop={"decode_ms": 3}) for rows in (many, many[:-2])]
    old, new = (config.from_mapping(file, "file", Path()).to_yaml() for file in files)
    (line,) = config.difference(old, new)
    before, _, after = line.removeprefix("search.times.rows: ").partition(" -> ")
    assert len(line) < 400 and before != after


def test_schemes_of_the_table_are_among_those_that_may_be_measured() -> None:
    file = config.from_mapping(content(times={"rows": ROWS}, stop={"decode_ms": 3}), "file", Path())
    assert file.search.every_scheme == ("int8-channel", "dense")


def test_a_budget_of_milliseconds_needs_a_table() -> None:
    with pytest.raises(UserError, match=r"stop\.decode_ms needs search\.times.*dtmsearch profile"):
        config.from_mapping(content(stop={"decode_ms": 3}), "file", Path())


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no table of times at .*gone\.json"):
        config.from_mapping(content(times="gone.json", stop={"decode_ms": 3}), "file", tmp_path)


def test_a_run_by_time_is_held_against_what_takes_no_longer(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", llama_config(num_hidden_layers=2))
    shapes = sorted({component.shape for component in replica(folder).manifest().components})
    rows = [
        {"scheme": s, "outputs": o, "inputs": i, "decode_ms": DECODE[s] * o * i / 1e6, "prefill_ms": PREFILL[s] / 1e3}
        for s in ("dense", *SCHEMES)
        for o, i in shapes
    ]
    (tmp_path / "times.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "text.txt").write_text(TEXT)
    whole = sum(c.num_weights for c in replica(folder).manifest().components)
    prompts = {"files": ["text.txt"], "count": 4, "prompt_tokens": 8, "continuation_tokens": 8}
    file: dict[str, Any] = {
        "run": "timed", "model": {"path": str(folder), "dtype": "float32"}, "prompts": prompts,
        "validation": {"files": ["text.txt"], "count": 4},
        "search": {
            "strategy": "sensitivity", "rank_by": "kl", "schemes": list(SCHEMES), "times": "times.json",
            "stop": {"decode_ms": 7 * whole / 1e6},
        },
    }  # fmt: skip
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(file))
    priced = file["search"] | {"strategy": "fisher", "fisher": {"samples": 8}}
    (tmp_path / "priced.yaml").write_text(yaml.safe_dump(file | {"run": "priced", "search": priced}))
    run_here(tmp_path / "priced.yaml", tmp_path / "store")
    found = run_here(tmp_path / "search.yaml", tmp_path / "store")
    assert list(found.components) == list(replica(folder).manifest().components)
    times = {row.label: row.decode_ms for row in found.validation}
    assert times["plan"] is not None and times["plan"] <= 7 * whole / 1e6
    assert times["base"] == pytest.approx(16 * whole / 1e6) and times["uniform:int8-channel"] > times["plan"]
    assert found.rival == "uniform:int4-g32" and "that takes no longer for a token" in found.verdict
    assert "By its table of times the plan takes" in found.verdict
    # What another run of the same store has read of the model counts once.
    assert list(found.components) == list(replica(folder).manifest().components)
    results = ResultStore(tmp_path / "store")
    (solved,) = solve_budgets(results, "priced", [6.0])
    assert solved.bits_per_weight <= 6.0 and predicted_front(results, "priced").front
