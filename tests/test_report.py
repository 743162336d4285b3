"""What a report says of a run, without looking at it: facts, the page's text, its size, bad input."""

from __future__ import annotations

import builtins
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from reported import HOSTILE, NUM_LAYERS, SCHEMES, make_run

from dtmsearch.cli import main
from dtmsearch.report.charts import figures, save
from dtmsearch.report.comparison import held_out_differences, plan_differences, sentence
from dtmsearch.report.facts import RunFacts, gather, per_prompt, spread
from dtmsearch.report.writing import page
from dtmsearch.store.store import ResultStore

MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    return make_run(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def pair(store: ResultStore) -> tuple[RunFacts, RunFacts]:
    """The run, and one of the same model and prompts that went further."""
    make_run(Path(store.url), "further", share=0.9)
    return gather(store, "toy"), gather(store, "further")


@pytest.fixture(scope="module")
def facts(store: ResultStore) -> RunFacts:
    return gather(store, "toy")


@pytest.fixture(scope="module")
def html(store: ResultStore, facts: RunFacts) -> str:
    return page(store, facts, figures(facts))


def test_every_component_has_its_damage_under_every_scheme(facts: RunFacts) -> None:
    pairs = {(row["component"], row["scheme"]) for row in facts.sensitivity}
    assert len(pairs) == len(facts.components) * len(SCHEMES) == NUM_LAYERS * 3 * 2


def test_the_path_ends_with_the_final_plan(facts: RunFacts) -> None:
    assert facts.path[-1]["plan_id"] == facts.summary.final_plan_id


def test_the_plans_rows_make_its_size(facts: RunFacts) -> None:
    bits = sum(row["bits"] * row["num_weights"] for row in facts.plan_rows)
    assert facts.size_mb == pytest.approx(bits / 8e6)


def test_kept_plans_are_joined_to_the_plan_that_they_extend(facts: RunFacts) -> None:
    kept = [row for row in facts.nodes if row["fate"] != "dropped"]
    assert len(facts.edges) == len(kept)


def test_texts_come_with_the_token_at_which_they_part(facts: RunFacts) -> None:
    assert [row["diverges_at"] for row in facts.texts] == [0, 1, 2]


def test_survival_falls_from_all_to_those_that_never_diverge(facts: RunFacts) -> None:
    same = [row["same"] for row in facts.survival if row["label"] == "plan"]
    assert same[0] == 1.0 and same == sorted(same, reverse=True)


def test_a_sum_of_parts_is_that_of_the_parts_alone(facts: RunFacts, store: ResultStore) -> None:
    alone = {(row["component"], row["scheme"]): row["kl"] for row in facts.sensitivity}
    plan = store.plan(facts.summary.final_plan_id or "", "toy")
    assert plan is not None
    expected = sum(alone[entry] for entry in plan.entries)
    assert any(row["sum"] == pytest.approx(expected) for row in facts.sums)


def test_a_page_holds_nothing_of_a_store_as_markup(html: str) -> None:
    assert HOSTILE not in html and "<img src=x" not in html and "&lt;script&gt;document" in html


def test_a_page_forbids_every_request(html: str) -> None:
    markup = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert "default-src 'none'" in markup and not re.search(r"(href|src)=\"(?!data:)|url\(", markup)


def test_a_page_is_small(html: str) -> None:
    assert len(html.encode()) < MOST_BYTES


def test_a_run_that_has_no_plan_yet_is_shown_as_far_as_it_went(tmp_path: Path) -> None:
    store = make_run(tmp_path, status="failed")
    found = gather(store, "toy")
    text = page(store, found, figures(found))
    assert "The leading plan so far" in text and "On held-out prompts" not in text


def test_a_run_without_evaluations_is_no_fault(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    record = store.run("toy")
    assert record is not None
    empty = replace(record, run="empty", final_plan_id=None, reference_id=None, validation_reference_id=None)
    with store.writer("empty") as writer:
        writer.put_run(replace(empty, status="running", manifest_id=None))
    text = page(store, found := gather(store, "empty"), figures(found))
    assert "The search has not come to a plan yet." in text


def test_the_command_writes_the_page_and_says_where(tmp_path: Path, store: ResultStore, capsys: Any) -> None:
    out = tmp_path / "page.html"
    assert main(["report", "toy", "--store", store.url, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.stat().st_size < MOST_BYTES


def test_an_unknown_run_is_said(store: ResultStore, capsys: Any) -> None:
    assert main(["report", "nosuch", "--store", store.url]) == 2
    assert "it holds: toy" in capsys.readouterr().err


def test_a_missing_library_is_said_with_the_command_that_installs_it(
    store: ResultStore, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "altair":
            raise ModuleNotFoundError("No module named 'altair'", name="altair")
        return real(name, *rest)

    for module in [name for name in sys.modules if name.startswith("dtmsearch.report")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["report", "toy", "--store", store.url]) == 2
    assert "pip install 'dtmsearch[report]'" in capsys.readouterr().err


def test_figures_are_written_as_svg_and_png(tmp_path: Path, facts: RunFacts) -> None:
    chosen = [figure for figure in figures(facts) if figure.name in ("plan", "tree")]
    written = save(chosen, tmp_path / "figures")
    assert {path.name for path in written} == {"plan.svg", "plan.png", "tree.svg", "tree.png"}
    assert all(path.stat().st_size > 1000 for path in written)


def test_of_points_on_one_spot_one_is_drawn() -> None:
    table = pa.table({"x": [0.0, 0.0, 1.0, None] * 1000, "y": [1.0, 1.0, 2.0, 5.0] * 1000})
    assert spread(table, "x", "y", 100).to_pylist() == [{"x": 0.0, "y": 1.0}, {"x": 1.0, "y": 2.0}]


# Two runs.


def test_two_plans_are_compared_on_the_prompts_that_they_share(
    store: ResultStore, pair: tuple[RunFacts, RunFacts]
) -> None:
    plans = [per_prompt(store, facts.record, facts.summary)["plan"]["fdt"] for facts in pair]
    found = held_out_differences(store, *pair)["fdt"]
    assert found.mean == pytest.approx(np.mean(plans[0]) - np.mean(plans[1])) and found.mean > 0
    assert "texts of toy diverge later than those of further" in sentence(*pair, {"fdt": found})


def test_a_component_that_one_plan_compresses_is_named_after_it(pair: tuple[RunFacts, RunFacts]) -> None:
    choices = {row["component"]: row["choice"] for row in plan_differences(*pair)}
    mine, theirs = ({row["component"] for row in facts.plan_rows if row["scheme"] != "dense"} for facts in pair)
    assert {name for name, choice in choices.items() if choice == "only in further"} == theirs - mine


def test_plans_of_other_prompts_are_called_neither_better_nor_worse(pair: tuple[RunFacts, RunFacts]) -> None:
    assert "neither is called better" in sentence(*pair, {})


def test_the_command_compares_two_runs(
    store: ResultStore, pair: tuple[RunFacts, RunFacts], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "both.html"
    assert main(["report", "toy", "further", "--store", store.url, "--out", str(out)]) == 0
    assert "run: toy -&gt; further" in out.read_text() and out.stat().st_size < MOST_BYTES


def test_a_run_is_not_compared_with_itself(store: ResultStore, capsys: Any) -> None:
    assert main(["report", "toy", "toy", "--store", store.url]) == 2
    assert "give two runs" in capsys.readouterr().err


# What only some runs have.


def test_beside_other_runs_a_plan_is_this_runs_or_anothers(store: ResultStore, pair: tuple[RunFacts, RunFacts]) -> None:
    found = gather(store, "toy").sweep
    assert {row["name"]: row["whose"] for row in found if row["label"] == "plan"} == {
        "toy": "this run",
        "further": "another run",
    }


def test_a_pruned_plan_shows_what_each_component_loses(tmp_path: Path) -> None:
    store = make_run(tmp_path, schemes=("magnitude-0.5", "drop"))
    found = gather(store, "toy")
    lost = {row["scheme"]: row["pruned"] for row in found.plan_rows}
    assert lost["dense"] == 0.0 and set(lost.values()) <= {0.0, 0.5, 1.0} and len(lost) > 1
    assert "What was pruned" in page(store, found, figures(found))


def test_a_run_that_prunes_nothing_and_stands_alone_has_no_sections_for_it(html: str) -> None:
    assert "What was pruned" not in html and "Beside the store" not in html
