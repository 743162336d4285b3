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
from fakes import FakeEvaluator, evaluate, toy_components, toy_manifest
from reported import HOSTILE, NUM_LAYERS, SCHEMES, make_priced_run, make_probe_run, make_run, reference, request

from dtmsearch.analysis.summary import runs_overview, summarize_run
from dtmsearch.cli import main
from dtmsearch.console.run_text import overview_text, run_text
from dtmsearch.core.evaluation import EvalRequest, EvalResult
from dtmsearch.report.charts import Figure, figures, plan_name, save
from dtmsearch.report.charts.scheme_colours import by_bits, colour_of, ink_on
from dtmsearch.report.comparison import compared, held_out_differences, plan_differences, sentence
from dtmsearch.report.facts import RunFacts, gather, per_prompt, spending_of, spread, suffering_of
from dtmsearch.report.writing import page
from dtmsearch.search.loop import measure
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
def drawn(facts: RunFacts) -> list[Figure]:
    return figures(facts)


@pytest.fixture(scope="module")
def html(store: ResultStore, facts: RunFacts, drawn: list[Figure]) -> str:
    return page(store, facts, drawn)


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


def test_figures_are_written_as_svg_and_png(tmp_path: Path, drawn: list[Figure]) -> None:
    chosen = [figure for figure in drawn if figure.name in ("plan", "tree")]
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


# Schemes.


def lightness(colour: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.1)."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("form", ["int{}-g32", "int{}-channel", "gptq-int{}-g128"])
def test_the_fewer_bits_a_scheme_has_the_lighter_it_is(form: str) -> None:
    found = [lightness(colour_of(form.format(bits))) for bits in range(2, 9)]
    assert found == sorted(found, reverse=True) and found[0] > 2 * found[-1]


def test_schemes_of_as_many_bits_have_colours_of_their_own() -> None:
    schemes = ["int4-g32", "int4-g32-asym", "int4-channel", "int4-tensor", "gptq-int4-g32", "nf4"]
    assert len({colour_of(scheme) for scheme in schemes}) == len(schemes)


@pytest.mark.parametrize("scheme", ["dense", "int2-g32", "int4-channel", "int8-g32", "nf4", "magnitude-0.5", "drop"])
def test_a_schemes_character_can_be_read_on_its_colour(scheme: str) -> None:
    low, high = sorted((lightness(colour_of(scheme)), lightness(ink_on(scheme))))
    assert (high + 0.05) / (low + 0.05) >= 4.5


def colours_in(part: Any) -> dict[str, str]:
    """Scheme -> colour, of every scale and every row in a chart that names schemes."""
    found: dict[str, str] = {}
    if isinstance(part, dict):
        domain, shades = part.get("domain"), part.get("range")
        if isinstance(domain, list) and isinstance(shades, list):
            found |= {str(name).split()[-1]: shade for name, shade in zip(domain, shades, strict=True)}
        for inner in part.values():
            found |= colours_in(inner)
    elif isinstance(part, list):
        for inner in part:
            found |= colours_in(inner)
    return found


def test_a_scheme_has_one_colour_on_every_chart_of_both_pages(pair: tuple[RunFacts, RunFacts]) -> None:
    charts = [figure.spec for figure in [*figures(pair[0]), *compared(*pair)]]
    coloured = [colours_in(chart["encoding"] if "encoding" in chart else chart["layer"]) for chart in charts]
    found = [shades["int8-channel"] for shades in coloured if "#" in str(shades.get("int8-channel"))]
    assert len(found) >= 4 and set(found) == {colour_of("int8-channel")}


def test_what_is_drawn_is_right_by_the_schema_of_its_language(
    pair: tuple[RunFacts, RunFacts], priced: tuple[RunFacts, str]
) -> None:
    for figure in [*figures(pair[0]), *compared(*pair), *figures(priced[0])]:
        assert figure.chart.to_dict(validate=True) == figure.spec


def test_a_legend_of_schemes_goes_from_many_bits_to_few() -> None:
    assert by_bits(["int2-g32", "int8-g32", "dense", "int4-g32"]) == ["dense", "int8-g32", "int4-g32", "int2-g32"]


def test_cells_of_a_plan_name_their_scheme_by_a_character(drawn: list[Figure]) -> None:
    (plan,) = [figure for figure in drawn if figure.name == "plan"]
    shown = {row["scheme"]: row["character"] for row in plan.data["plan"]}
    assert shown["dense"] == "." and shown["int8-channel"] == "8"


def test_tokens_are_counted_by_whole_numbers(drawn: list[Figure]) -> None:
    (chart,) = [figure.spec for figure in drawn if figure.name == "survival"]
    assert chart["encoding"]["x"]["axis"]["tickMinStep"] == 1 and chart["encoding"]["x"]["axis"]["format"] == ",d"


# A search by prices.


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFacts, str]:
    store = make_priced_run(tmp_path_factory.mktemp("priced"))
    found = gather(store, "priced")
    return found, page(store, found, figures(found))


def test_every_option_has_a_price_with_its_standard_error(priced: tuple[RunFacts, str]) -> None:
    facts, _ = priced
    assert len(facts.story.prices) == NUM_LAYERS * 3 * 3 and facts.story.samples == 32
    assert all(0.0 < row["error"] < row["kl"] for row in facts.story.prices)


def test_a_plans_price_is_half_the_mean_square_of_its_options_products_summed(tmp_path: Path) -> None:
    store = make_priced_run(tmp_path)
    facts = gather(store, "priced")
    rows = store.table("prices", ["component", "scheme", "products"], "priced").to_pylist()
    products = {(row["component"], row["scheme"]): np.array(row["products"], np.float64) for row in rows}
    plan = facts.summary.final_plan
    assert plan is not None and facts.ceiling is not None
    total = np.sum([products[entry] for entry in plan.entries], axis=0)
    (found,) = [row["predicted"] for row in facts.story.foreseen if row["plan_id"] == plan.id]
    assert found == pytest.approx(np.square(total).mean() / (2 * facts.ceiling))


def test_a_search_by_prices_tells_its_own_story_and_draws_no_beam(priced: tuple[RunFacts, str]) -> None:
    facts, text = priced
    places = {figure.section for figure in figures(facts)}
    assert {"prices", "plan", "spending", "sizes"} <= places and not {"course", "tree", "interaction"} & places
    assert "How the plan was found" in text and "The course of the search" not in text


def test_the_predicted_front_falls_with_size_and_has_the_plans_on_it(priced: tuple[RunFacts, str]) -> None:
    facts, text = priced
    (chart,) = [figure for figure in figures(facts) if figure.name == "front"]
    front, plans = chart.data["front"], chart.data["front-plans"]
    bits, values = [row["bits"] for row in front], [row["kl"] for row in front]
    assert bits == sorted(bits) and values == sorted(values, reverse=True)
    assert all(row["kl_low"] < row["kl"] < row["kl_high"] for row in front)
    # From the smallest uniform plan to about the largest (more bits are not better everywhere), each foreseen too.
    assert bits[0] == pytest.approx(2.25) and 8.0 < bits[-1] <= 8.25
    foreseen = {row["name"]: row["bits"] for row in plans if row["series"] == "uniform, foreseen"}
    assert foreseen == {f"uniform int{n}-channel": pytest.approx(n + 0.25) for n in (2, 4, 8)}
    (own,) = [row for row in plans if row["series"] == "this plan, held out"]
    assert own["bits"] == pytest.approx(facts.summary.bits_per_weight)
    assert "dtmsearch solve priced --bits BITS" in text


def test_a_run_without_prices_has_no_front(facts: RunFacts, drawn: list[Figure]) -> None:
    assert facts.story.front == [] and "front" not in {figure.section for figure in drawn}


def test_stages_say_what_was_asked_of_the_model(priced: tuple[RunFacts, str]) -> None:
    first, *others = priced[0].story.stages
    assert (first["what"], first["number"], first["tokens"]) == ("prices of all options", 32, 640)
    assert sum(stage["number"] for stage in others) == priced[0].num_points


def test_what_layers_spend_adds_up_to_the_plans_bits(priced: tuple[RunFacts, str]) -> None:
    facts = priced[0]
    weights = {row["layer"]: 0 for row in facts.plan_rows}
    for row in facts.plan_rows:
        weights[row["layer"]] += row["num_weights"]
    spent = sum(row["bits"] * weights[row["layer"]] for row in spending_of(facts.plan_rows, "layer"))
    assert spent / sum(weights.values()) == pytest.approx(facts.summary.bits_per_weight)


def test_what_layers_suffer_is_one_on_average_over_weights(priced: tuple[RunFacts, str]) -> None:
    facts = priced[0]
    scheme, rows = suffering_of(facts.alone, "kl", facts.ceiling, "kind")
    weights = {row["kind"]: 0 for row in facts.components}
    for row in facts.components:
        weights[row["kind"]] += row["num_weights"]
    mean = sum(row["times"] * weights[row["kind"]] for row in rows) / sum(weights.values())
    assert scheme == "int2-channel" and mean == pytest.approx(1.0)


# A probe, and trainings.


def test_a_probe_shows_its_ranking_and_no_plan(tmp_path: Path) -> None:
    store = make_probe_run(tmp_path)
    found = gather(store, "probe")
    text = page(store, found, figures(found))
    costs = [row["kl"] for row in found.ranking]
    assert len(costs) == NUM_LAYERS * 3 * 2 and costs == sorted(costs)
    assert "The ranking" in text and "The leading plan" not in text and "of searched components" not in text
    assert {figure.section for figure in figures(found)} == {"sensitivity"}


def test_values_before_and_after_a_training_of_one_plan_are_its_own(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    plan = store.plan(gather(store, "toy").summary.final_plan_id or "", "toy")
    assert plan is not None
    trained = replace(request(plan, reference("held out", NUM_LAYERS)), weights_id="trained")

    def better(asked: EvalRequest) -> EvalResult:
        return replace(evaluate(asked), fdt=evaluate(asked).fdt + 7)

    with store.writer("toy") as writer:
        writer.put_components(toy_manifest(NUM_LAYERS), toy_components(NUM_LAYERS))
        measure({"round-1:20.0%:trained": trained}, FakeEvaluator(better), writer, "validation")
    found = gather(store, "toy")
    values = per_prompt(store, found.record, found.summary)
    gained = np.subtract(values["round-1:20.0%:trained"]["fdt"], values["plan"]["fdt"])
    assert gained.tolist() == [7] * 8
    assert plan_name("round-1:20.0%:trained") == "round 1, 20.0% pruned, trained"


def test_tokens_of_prices_are_counted(priced: tuple[RunFacts, str]) -> None:
    facts, text = priced
    assert facts.cost.price_tokens == 640 and facts.cost.tokens == 640  # toy evaluations count none
    assert "of which 640 backward too" in text


# How to use it, and what failed.


def test_a_page_says_which_exports_the_plan_allows_and_how_large_they_are(priced: tuple[RunFacts, str]) -> None:
    facts, text = priced
    possible = [use for use in facts.uses if use["obstacle"] is None]
    assert [use["command"].split(" --out")[0] for use in possible] == [
        "dtmsearch export priced --to compressed-tensors",
        "dtmsearch export priced --to dense",
    ]
    assert possible[0]["size_mb"] < possible[1]["size_mb"] == pytest.approx(facts.dense_size_mb)
    assert (
        all(use["command"] in text for use in possible)
        and "Not for vLLM: vLLM runs q, k, v and gate, up as one" in text
    )


LOST = (
    "5 replicas in a row did not start; the last: The actor died unexpectedly before finishing this task.\n"
    f"The actor died because its node has died. Node Id: {'c8f8e3b1a2d4' * 4}"
)


def test_a_failed_run_says_what_failed_wherever_it_is_shown(tmp_path: Path) -> None:
    store = make_run(tmp_path, status="failed", message=LOST)
    found = gather(store, "toy")
    headline = "5 replicas in a row did not start; the last: the machine was lost"
    text = page(store, found, figures(found))
    assert f"This run failed: {headline}." in text and f"<dt>failures</dt><dd>{headline}" in text
    assert headline in run_text(summarize_run(store, "toy"))
    listed = overview_text(runs_overview(store))
    assert headline in listed and "c8f8e3b1a2d4" not in listed


def test_the_tokens_before_a_divergence_are_in_sight_with_their_blanks(html: str) -> None:
    assert "base model, around the divergence" in html and '<i class="sp"> </i>' in html


def test_where_two_plans_differ_is_told_without_colour(pair: tuple[RunFacts, RunFacts]) -> None:
    (chart,) = [figure for figure in compared(*pair) if figure.name == "plans"]
    signs = {row["choice"]: row["sign"] for row in chart.data["choices"]}
    assert signs["the same scheme"] == "=" and signs["only in further"] == "2"


def test_a_run_without_held_out_values_has_no_layer_for_them(tmp_path: Path) -> None:
    found = gather(make_run(tmp_path, status="failed"), "toy")
    courses = [str(figure.spec) for figure in figures(found) if figure.section == "course"]
    assert courses and not any("held_out" in chart for chart in courses)


def test_a_search_that_failed_before_its_plan_says_so(tmp_path: Path) -> None:
    assert summarize_run(make_run(tmp_path, status="failed"), "toy").verdict.startswith("The search failed before")
