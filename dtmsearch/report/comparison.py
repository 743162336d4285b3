"""Two runs side by side on one page: their plans on the same held-out prompts, where they differ, how they came there.

Knows what two runs have in common, and claims nothing where they have not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dtmsearch.analysis.format import with_interval
from dtmsearch.config import difference
from dtmsearch.core.metrics import difference_limits
from dtmsearch.core.schemes import DENSE
from dtmsearch.core.statistics import PairedDifference, paired_difference
from dtmsearch.errors import UserError
from dtmsearch.report.charts import Figure, save
from dtmsearch.report.charts.compared import compared_course, compared_plans, compared_survival
from dtmsearch.report.facts import Row, RunFacts, ceiling_of, gather, per_prompt
from dtmsearch.report.writing import page_data, places, render
from dtmsearch.store.store import ResultStore

_INTERVAL_SEED = 0
_DIGITS = {"fdt": 1, "sdt": 2, "kl": 4}


def write_comparison(
    store: ResultStore, first: str, second: str, out: Path, figures_folder: Path | None = None
) -> list[Path]:
    """Write a page about two runs to `out`, and its figures into a folder; the files written.

    Raises `UserError` when the store lacks one of them, or they are one.
    """
    text, drawn = comparison_page(store, first, second)
    out.write_text(text, encoding="utf-8")
    return [out] + ([] if figures_folder is None else save(drawn, figures_folder))


def comparison_page(store: ResultStore, first: str, second: str, is_served: bool = False) -> tuple[str, list[Figure]]:
    """The HTML text about two runs, and its figures. Raises `UserError` when the store lacks one, or they are one."""
    if first == second:
        raise UserError(f"{first} is compared with itself: give two runs")
    one, other = gather(store, first), gather(store, second)
    drawn = compared(one, other)
    differences = held_out_differences(store, one, other)
    context = {
        "one": one,
        "other": other,
        "sentence": sentence(one, other, differences),
        "differences": {metric: _said(metric, found) for metric, found in differences.items()},
        "changes": difference(one.record.config, other.record.config),
        "places": places(drawn),
        "store": store.url,
        "live": "-" if is_served else None,
    }
    return render("comparison.html", context, page_data(drawn)), drawn


def compared(one: RunFacts, other: RunFacts) -> list[Figure]:
    """The figures of a comparison, as far as the two have what they show."""
    runs = (one.summary.run, other.summary.run)
    plans = one.plan_rows, other.plan_rows
    found = compared_plans(plan_differences(one, other), runs, plans) if _same_model(one, other) else []
    metrics = [metric for metric in one.metrics if metric in other.metrics]
    found += compared_course([(run, facts.path) for run, facts in zip(runs, (one, other), strict=True)], metrics)
    if _same_prompts(one, other):
        curves = [(run, _plan_survival(facts)) for run, facts in zip(runs, (one, other), strict=True)]
        found += compared_survival(curves)
    return found


def _same_model(one: RunFacts, other: RunFacts) -> bool:
    return one.summary.manifest_id is not None and one.summary.manifest_id == other.summary.manifest_id


def _same_prompts(one: RunFacts, other: RunFacts) -> bool:
    reference_id = one.summary.validation_reference_id
    return reference_id is not None and reference_id == other.summary.validation_reference_id


def _plan_survival(facts: RunFacts) -> list[Row]:
    return [row for row in facts.survival if row["label"] == "plan"]


def plan_differences(one: RunFacts, other: RunFacts) -> list[Row]:
    """Each component that both plans know, with its scheme in either and which of them compresses it."""
    theirs = {row["component"]: row for row in other.plan_rows}
    runs = one.summary.run, other.summary.run
    return [
        {
            **row,
            "other_scheme": theirs[row["component"]]["scheme"],
            "choice": _choice(row, theirs[row["component"]], runs),
        }
        for row in one.plan_rows
        if row["component"] in theirs
    ]


def _choice(row: Row, other: Row, runs: tuple[str, str]) -> str:
    if row["scheme"] == other["scheme"]:
        return "dense in both" if row["scheme"] == DENSE else "the same scheme"
    if DENSE in (row["scheme"], other["scheme"]):
        return f"only in {runs[0] if other['scheme'] == DENSE else runs[1]}"
    return "different schemes"


def held_out_differences(store: ResultStore, one: RunFacts, other: RunFacts) -> dict[str, PairedDifference]:
    """metric -> the first run's plan minus the second's, paired over the held-out prompts that they share."""
    if not _same_prompts(one, other):
        return {}
    plans = [per_prompt(store, facts.record, facts.summary).get("plan") for facts in (one, other)]
    a, b = plans
    if a is None or b is None:
        return {}
    columns = {"fdt": "fdt", "sdt": "sdt", "kl": "kl_list"}
    length = ceiling_of(store, one.record, held_out=True)
    return {
        metric: paired_difference(
            np.asarray(a[column]), np.asarray(b[column]), _INTERVAL_SEED, limits=difference_limits(metric, length)
        )
        for metric, column in columns.items()
        if a[column] is not None and b[column] is not None and len(a[column]) == len(b[column])
    }


def sentence(one: RunFacts, other: RunFacts, differences: dict[str, PairedDifference]) -> str:
    """What can be said of the two plans, claiming no more than the interval bears."""
    a, b = one.summary, other.summary
    found = differences.get("fdt")
    if found is None:
        return (
            "The two plans were not both measured on the same held-out prompts of the same model, so neither is called "
            "better."
        )
    sizes = " and ".join(f"{s.bits_per_weight:.2f}" for s in (a, b) if s.bits_per_weight is not None)
    if not found.is_known:
        return f"There are too few held-out prompts to say which of the two plans is better ({found.mean:+.1f} tokens)."
    span = f"{found.mean:+.1f} tokens, {found.confidence:.0%} interval {found.low:+.1f} to {found.high:+.1f}"
    if not found.excludes_zero:
        return f"At {sizes} bits per weight, the two plans cannot be told apart by where texts first diverge ({span})."
    better, worse = (a.run, b.run) if found.mean > 0 else (b.run, a.run)
    return f"At {sizes} bits per weight, texts of {better} diverge later than those of {worse} ({span})."


def _said(metric: str, found: PairedDifference) -> str:
    return with_interval(found.mean, found.low, found.high, _DIGITS[metric], sign="+")
