"""`min_fdt` is kept with the confidence that is stated: on prompts of its own, and said beside what was asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from fakes import FakeEvaluator, MemoryLog, request_for, run_search, toy_components, toy_manifest
from inprocess import run_here
from test_validation import reference
from tiny import TEXT, llama_config, write_model

from dtmsearch import config
from dtmsearch.analysis.summary import RunSummary, summarize_run
from dtmsearch.console.run_text import run_text
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, IntArray
from dtmsearch.core.plan import Plan
from dtmsearch.core.statistics import Values, lower_bound
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.core.windows import num_touching
from dtmsearch.search.min_fdt import ladder_of, smallest_that_keeps
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.keep_fdt import KeptPlan, keep_fdt
from dtmsearch.workflows.session import Session
from dtmsearch.workflows.text_windows import text_lines

SETS, LENGTH = 400, 100
# What a rate of 5% can look like in so many sets, once in a thousand times.
MOST_FALSE = 0.05 + 3.1 * math.sqrt(0.05 * 0.95 / SETS)


def rarely_short(generator: np.random.Generator, shape: tuple[int, int]) -> Values:
    """Texts that stay the base model's to the end but for 3%, which leave it at once."""
    return np.where(generator.random(shape) < 0.03, 0.0, LENGTH)


def early(generator: np.random.Generator, shape: tuple[int, int]) -> Values:
    """As they are under a plan of few bits: most diverge early."""
    return np.minimum(np.floor(generator.exponential(20.0, shape)), LENGTH)


def late(generator: np.random.Generator, shape: tuple[int, int]) -> Values:
    """Most reach the end."""
    return np.minimum(np.floor(generator.exponential(200.0, shape)), LENGTH)


@pytest.mark.parametrize("num_prompts", [8, 16, 64, 256])
@pytest.mark.parametrize("draw", [rarely_short, early, late])
def test_a_mean_fdt_is_seldom_below_its_bound(
    draw: Callable[[np.random.Generator, tuple[int, int]], Values], num_prompts: int
) -> None:
    mean = draw(np.random.default_rng(1), (1, 1_000_000)).mean()
    samples = draw(np.random.default_rng(num_prompts), (SETS, num_prompts))
    assert np.mean([lower_bound(sample, 0.0, 0.95) > mean for sample in samples]) <= MOST_FALSE


def test_a_bound_is_not_much_lower_than_it_needs_be() -> None:
    samples = early(np.random.default_rng(0), (50, 256))
    gaps = [sample.mean() - lower_bound(sample, 0.0, 0.95) for sample in samples]
    assert np.median(gaps) < 1.2 * 1.645 * samples.std() / math.sqrt(256)


def result(fdt: IntArray, request_id: str = "id") -> EvalResult:
    return EvalResult(request_id, fdt, LENGTH - fdt, np.ones(len(fdt), np.float32))


def all_at(fdt: int) -> EvalResult:
    return result(np.full(200, fdt, np.int32))


def test_the_last_plan_before_one_that_does_not_keep_it_is_taken() -> None:
    outcomes = [all_at(99), all_at(80), all_at(70), all_at(40), all_at(90)]
    assert smallest_that_keeps(outcomes, 60.0, 0.95) == 2


def test_what_is_only_just_above_is_not_shown_to_keep_it() -> None:
    assert smallest_that_keeps([all_at(99), all_at(60)], 60.0, 0.95) == 0


def test_a_plan_that_could_not_be_measured_keeps_nothing() -> None:
    assert smallest_that_keeps([EvalFailure("id", "nonfinite", ""), all_at(90)], 60.0, 0.95) is None


def test_plans_that_fall_below_seldom_count_as_keeping_it() -> None:
    """A search picks the plan nearest the limit by its own prompts; the ladder is tested on others."""
    generator = np.random.default_rng(5)
    scales = np.linspace(300.0, 20.0, 12)  # plans from the least compressed on
    means = np.array([np.minimum(np.random.default_rng(1).exponential(s, 200_000), LENGTH).mean() for s in scales])
    limit = 40.0
    wrong = 0
    for _ in range(SETS):
        sensitivity = generator.exponential(1.0, 64)
        outcomes = [result(np.floor(np.minimum(s * sensitivity, LENGTH)).astype(np.int32)) for s in scales]
        kept = smallest_that_keeps(outcomes, limit, 0.95)
        wrong += kept is not None and means[kept] < limit
    assert wrong / SETS <= MOST_FALSE


def test_a_ladder_ends_at_the_best_and_begins_at_the_first_decision() -> None:
    beam = Beam(Task(SearchSpace(toy_components(), ("nf4",)), request_for, "fdt", min_fdt=40.0), TreeSettings(width=2))
    best = run_search(beam)
    ladder = ladder_of(beam)
    assert (ladder[0], ladder[-1]) == (beam.decisions[0].plan, best)


def test_a_long_ladder_is_thinned_towards_its_beginning() -> None:
    plans = [Plan.of({f"c{j}": "nf4" for j in range(i + 1)}) for i in range(84)]
    course: Any = SimpleNamespace(best=plans[-1], decisions=[SimpleNamespace(plan=plan) for plan in plans])
    sizes = [len(plan) for plan in ladder_of(course)]
    assert (sizes[0], sizes[-5:], len(sizes)) == (1, [80, 81, 82, 83, 84], 14)


FILE = """
run: floor
model: {path: model, dtype: float32}
prompts: {files: [text.txt], count: 12, prompt_tokens: 10, continuation_tokens: 12}
search: {strategy: greedy, rank_by: fdt, schemes: [int4-g16], stop: {min_fdt: 5, min_fdt_prompts: 40}}
validation: {count: 10}
"""
PLANS = [Plan.of({c.name: "nf4" for c in toy_components()[: i + 1]}) for i in range(4)]


def kept(fdt_of: dict[int, int]) -> KeptPlan:
    """What is kept of plans whose FDT is that of their number of components."""

    def answer(request: EvalRequest) -> EvalResult:
        return result(np.full(200, fdt_of[len(request.plan)], np.int32), request.id)

    file = config.parse(FILE.replace("min_fdt: 5", "min_fdt: 10"), "search.yaml", Path())
    pool: Any = FakeEvaluator(answer, per_poll=8)
    log: Any = MemoryLog()
    calibrating: Any = SimpleNamespace(for_plans=lambda _: "")
    nobody: Any = None
    session = Session(file, nobody, log, pool, toy_manifest(), Silent())
    return keep_fdt(session, calibrating, PLANS, reference("own"))


def test_the_plan_is_the_smallest_that_is_shown_to_keep_it() -> None:
    found = kept({1: 12, 2: 12, 3: 11, 4: 10})
    assert found.plan == PLANS[2]
    assert "the plan that the search came to is not shown to keep it" in found.said


def test_where_none_is_shown_to_the_unquantized_model_is_the_plan() -> None:
    found = kept({1: 10, 2: 9, 3: 8, 4: 7})
    assert (found.plan, "no plan is shown to keep it" in found.said) == (Plan(), True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[ResultStore, RunSummary]:
    """A whole run, in this process."""
    folder = tmp_path_factory.mktemp("floor")
    write_model(folder / "model", llama_config(num_hidden_layers=2))
    (folder / "text.txt").write_text(TEXT)
    (folder / "floor.yaml").write_text(FILE)
    run_here(folder / "floor.yaml", folder / "store")
    store = ResultStore(str(folder / "store"))
    return store, summarize_run(store, "floor")


def test_what_keeps_it_is_measured_on_prompts_of_its_own(ran: tuple[ResultStore, RunSummary]) -> None:
    store, _ = ran
    record = store.run("floor")
    assert record is not None
    own, *others = (
        found.text
        for i in (record.min_fdt_reference_id, record.validation_reference_id, record.reference_id)
        if i is not None and (found := store.reference(i)) is not None
    )
    assert (len(own), [num_touching(own, other) for other in others]) == (40, [0, 0])


def test_status_shows_what_was_asked_beside_what_was_found(ran: tuple[ResultStore, RunSummary]) -> None:
    _, summary = ran
    assert summary.min_fdt is not None
    assert summary.min_fdt.found >= summary.min_fdt.at_least >= 5.0
    assert f"min_fdt    asked 5; found {summary.min_fdt.found:.1f} on 40 prompts of its own" in run_text(summary)
    assert f"held out {summary.validation[0].summary.fdt_mean:.1f}" in run_text(summary)  # type: ignore[union-attr]


def test_too_little_text_for_it_is_said_by_its_key(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT[: 22 * 30])
    file = config.parse(FILE, "search.yaml", tmp_path)
    with pytest.raises(ValueError, match=r"search.stop.min_fdt_prompts asks for 40 prompts of 10 \+ 12 tokens"):
        text_lines(file)


def test_an_fdt_that_nothing_can_have_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"min_fdt is 12, but an FDT is at most prompts\.continuation_tokens, 12"):
        config.parse(FILE.replace("min_fdt: 5", "min_fdt: 12"), "search.yaml", Path())


@pytest.mark.parametrize("strategy", ["probe", "sparsity", "knapsack"])
def test_strategies_that_keep_to_sizes_keep_no_fdt(strategy: str) -> None:
    content = yaml.safe_load(FILE)
    content["search"]["strategy"] = strategy
    if strategy == "sparsity":
        del content["search"]["schemes"]
        content["search"]["rounds"] = [20]
    with pytest.raises(ValueError, match=f"stop.min_fdt: {strategy} keeps to sizes only"):
        config.parse(yaml.safe_dump(content), "search.yaml", Path())
