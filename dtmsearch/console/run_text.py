"""Runs as a terminal shows them, and as values for JSON: how they stand, their plan, held-out values and verdict."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dtmsearch.analysis.failure import headline
from dtmsearch.analysis.format import duration, edge_in_words, plain, with_interval
from dtmsearch.analysis.metric_text import metric_value
from dtmsearch.analysis.shape import shape_sentence
from dtmsearch.console.plan_picture import plan_picture
from dtmsearch.console.plan_text import METRIC_COLUMNS, schemes_line, size_line
from dtmsearch.console.terminal_tables import labelled, table
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.statistics import PairedDifference
from dtmsearch.core.strategy_settings import RANK_BY

if TYPE_CHECKING:
    from dtmsearch.analysis.summary import RunOverview, RunSummary
    from dtmsearch.analysis.verdict import ValidationRow
    from dtmsearch.workflows.sweep import SweepOutcome

# To be pasted between double quotes in a shell, so without ", $, ` and !.
PLAN_QUERY = "SELECT component, scheme FROM plans WHERE plan_id = '{plan_id}' ORDER BY component"


def run_text(summary: RunSummary, long: bool = False) -> str:
    """What the store knows of a run. Its verdict is a sentence, `long` all that there is to say of it."""
    lines = [f"run {summary.run}: {_status(summary)}"]
    lines += [_message(summary.status, summary.message)] if summary.message else []
    lines.append(labelled("model", summary.model or "not read yet"))
    lines += [labelled("KV cache", summary.kv_cache)] if summary.kv_cache else []
    lines.append(labelled("search", _effort(summary)))
    lines += [labelled("prompts", summary.search_text)] if summary.search_text else []
    lines += [labelled("held out", summary.held_out_text)] if summary.held_out_text else []
    if summary.last_step is not None:
        step = summary.last_step
        value = metric_value(summary.rank_by, step.score, with_unit=True)
        choice = edge_in_words(step.perturbation) if step.perturbation else "chosen as a whole"
        lines.append(labelled("last step", f"{step.step}: {choice}, {value} on the search's prompts"))
    lines += _plan_lines(summary)
    lines += [labelled("min_fdt", str(summary.min_fdt))] if summary.min_fdt else []
    if summary.final_plan is not None:
        shape = shape_sentence(summary.final_plan, summary.components)
        lines += [labelled("shape", shape)] if shape else []
        picture = plan_picture(summary.final_plan, summary.components)
        lines += ["", textwrap.indent(picture, "  ")] if picture else []
    if summary.validation:
        lines += ["", "On held-out prompts:", validation_table(summary.validation, summary.rank_by)]
    return "\n".join([*lines, "", summary.verdict if long else summary.verdict_in_brief or summary.verdict])


def run_values(summary: RunSummary) -> dict[str, Any]:
    """A run's summary for JSON, its plan as component -> scheme; the model's components stand in the store."""
    values: dict[str, Any] = plain(replace(summary, components=()))
    del values["components"]
    values["final_plan"] = None if summary.final_plan is None else summary.final_plan.schemes
    return values


def _message(status: str, message: str) -> str:
    """Of a failed run what failed; JSON holds all that was said."""
    return labelled("failed", headline(message)) if status == "failed" else labelled("message", message)


def _status(summary: RunSummary) -> str:
    if summary.missing:
        what = " and ".join(summary.missing)
        return f"incomplete: rows of {what} are lost; `run` or `resume` measures them again"
    if summary.already_complete:
        return "already complete"
    if summary.interrupted:
        return f"interrupted: no driver works on it; {_continuing(summary)}"
    return {"stopped": f"stopped; {_continuing(summary)}"}.get(summary.status, summary.status)


def _continuing(summary: RunSummary) -> str:
    if summary.continue_command is None:
        return "`resume` continues it"
    return f"where it was submitted, `{summary.continue_command}` continues it"


def _effort(summary: RunSummary) -> str:
    failed = ", ".join(f"{number} {kind}" for kind, number in summary.failures.items())
    took = "" if summary.wall_seconds is None else f" in {duration(summary.wall_seconds)}"
    return f"{summary.num_steps} steps, {summary.num_evaluations} evaluations{f' ({failed})' if failed else ''}{took}"


def _plan_lines(summary: RunSummary) -> list[str]:
    if summary.final_plan_id is None:
        return []
    lines = [labelled("plan", summary.final_plan_id)]
    if summary.share is not None and summary.bits_per_weight is not None:
        bits = summary.bits_per_weight, summary.active_bits_per_weight
        lines.append(labelled("size", size_line(summary.num_compressed, summary.share, *bits)))
    if summary.final_plan is not None:
        lines.append(labelled("schemes", schemes_line(summary.final_plan)))
    lines += [labelled("files", summary.written)] if summary.written else []
    lines += [labelled("experts", summary.experts)] if summary.experts else []
    lines += [labelled("source", summary.source)] if summary.source else []
    return lines


def validation_table(rows: Sequence[ValidationRow], rank_by: str = RANK_BY) -> str:
    """The final plan beside uniform ones; `ahead` is its value minus theirs, paired over prompts, with the interval: of
    the metric that the search ranks by, and of FDT. The metric that the search ranks by comes first."""
    compared = tuple(dict.fromkeys((rank_by, "fdt")))
    others = [name for name in METRIC_COLUMNS if name.lower() not in compared]
    mixed = any(row.active_bits_per_weight is not None for row in rows)
    figures = (name for metric in compared for name in (metric.upper(), _ahead_title(metric)))
    columns = ["plan", "bits", *(["bits read"] if mixed else []), *figures]
    cells = [_validation_cells(row, compared, others, mixed) for row in rows]
    return table([*columns, *others, "share", "components"], cells)


def _ahead_title(metric: str) -> str:
    found = METRICS[metric]
    title = found.title or metric
    if found.mean == "geometric":
        return f"plan's ln {title} more by"
    return f"plan's {title} {'ahead' if found.higher_is_better else 'more'} by"


def _validation_cells(row: ValidationRow, compared: Sequence[str], others: Sequence[str], mixed: bool) -> list[object]:
    share = f"{row.share:.1%}"
    cells: list[object] = [row.uniform_scheme or row.label, f"{row.bits_per_weight:.2f}"]
    active = row.active_bits_per_weight
    cells += [None if active is None else f"{active:.2f}"] if mixed else []
    if row.summary is None:
        unmeasured = [None] * (2 * len(compared) - 2 + len(others))
        return [*cells, None, row.failure, *unmeasured, share, row.num_compressed]
    values = row.summary.metrics
    for metric in compared:
        digits = 2 if metric in ("fdt", "sdt") else 4
        cells += [values.get(metric), _ahead(row.vs_plan(metric), digits)]
    return [*cells, *(values.get(name.lower()) for name in others), share, row.num_compressed]


def _ahead(difference: PairedDifference | None, digits: int) -> str:
    if difference is None:
        return ""
    if not difference.is_known:
        return f"{difference.mean:+.{digits}f} (too few prompts to say)"
    return with_interval(difference.mean, difference.low, difference.high, digits, sign="+")


def overview_text(runs: Sequence[RunOverview]) -> str:
    """The runs of a store as a table."""
    columns = ["run", "status", "bits", "held out", "in search", "created", "evaluations", "model", "share", "step"]
    rows = [_overview_cells(run) for run in runs]
    if any(run.failed is not None for run in runs):
        columns.insert(2, "what failed")
        for run, row in zip(runs, rows, strict=True):
            row.insert(2, run.failed)
    return table(columns, rows)


def _overview_cells(run: RunOverview) -> list[object]:
    return [
        run.run,
        "interrupted" if run.interrupted else run.status,
        None if run.bits_per_weight is None else f"{run.bits_per_weight:.2f}",
        None if run.held_out is None else metric_value(run.rank_by, run.held_out),
        None if run.score is None else metric_value(run.rank_by, run.score),
        _local_time(run.created_at),
        run.num_evaluations,
        run.model,
        None if run.share is None else f"{run.share:.1%}",
        run.last_step,
    ]


def _local_time(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):  # no time that a calendar has
        return str(seconds)


def sweep_text(outcome: SweepOutcome) -> str:
    """How each search of a sweep stands."""
    rows = [[run, status, outcome.messages.get(run)] for run, status in outcome.statuses.items()]
    return table(["run", "status", "message"], rows)
