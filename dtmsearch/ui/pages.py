"""The pages of `dtmsearch ui`, and the states by which they follow a run: all from a store, none of them written."""

from __future__ import annotations

from dtmsearch.analysis.metric_text import metric_value
from dtmsearch.analysis.pareto_runs import candidates
from dtmsearch.analysis.summary import RunOverview, runs_overview
from dtmsearch.console.watch import glance
from dtmsearch.report.charts import figures
from dtmsearch.report.charts.quality import store_figures
from dtmsearch.report.comparison import comparison_page
from dtmsearch.report.facts import gather, plans_of
from dtmsearch.report.writing import page, page_data, places, render
from dtmsearch.store.store import ResultStore

State = dict[str, str]


def runs_page(store: ResultStore) -> str:
    """Every run with how far it is, and the plans that no other beats."""
    drawn = store_figures(plans_of(candidates(store)))
    context = {"runs": states(store), "places": places(drawn), "store": store.url, "live": "/api/runs"}
    return render("runs.html", context, page_data(drawn) | {"store": store.url})


def run_page(store: ResultStore, run: str) -> str:
    """A run's report, which says when there is more than it shows. Raises `UserError` for an unknown run."""
    facts = gather(store, run)
    return page(store, facts, figures(facts), live=f"/api/runs/{run}")


def compared_page(store: ResultStore, one: str, other: str) -> str:
    """Two runs side by side. Raises `UserError` where one is unknown, or they are one."""
    return comparison_page(store, one, other, is_served=True)[0]


def states(store: ResultStore) -> list[State]:
    """How far every run is, as text, in order of creation; the newest first."""
    return [_state(store, overview) for overview in reversed(runs_overview(store))]


def state(store: ResultStore, run: str) -> State:
    """How far a run is. Raises `UserError` for an unknown one."""
    return _progress(store, run)


def _state(store: ResultStore, run: RunOverview) -> State:
    status = "interrupted" if run.interrupted else run.status
    found = {
        "run": run.run,
        "status": status if run.failed is None else f"{status}: {run.failed}",
        "model": run.model or "",
        "bits": "" if run.bits_per_weight is None else f"{run.bits_per_weight:.2f}",
        "held_out": "" if run.held_out is None else metric_value(run.rank_by, run.held_out),
        "in_search": "" if run.score is None else metric_value(run.rank_by, run.score),
        "evaluations": f"{run.num_evaluations:,}",
        "progress": "",
    }
    return found | ({"progress": _progress(store, run.run)["progress"]} if status == "running" else {})


def _progress(store: ResultStore, run: str) -> State:
    seen = glance(store, run)
    parts = [f"{seen.evaluations:,} evaluations"]
    if seen.failures:
        parts.append(f"{seen.failures:,} failed")
    if seen.steps:
        parts.append(f"step {seen.steps[-1].step}")
    if seen.reached is not None:
        parts.append(f"{min(seen.reached, 1.0):.0%} of the way")
    if seen.rate and not seen.is_over:
        parts.append(f"{seen.rate:.1f} a second")
    return {"run": run, "status": seen.status, "progress": ", ".join(parts)}
