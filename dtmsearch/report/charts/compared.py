"""Figures of two runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from dtmsearch.report.charts.drawing import (
    DASHES,
    DENSE_COLOUR,
    PALETTE,
    PLOT_HEIGHT,
    ROW_HEIGHT,
    RUN_COLOURS,
    Figure,
    metric_axis,
    named,
    sized,
    title_of,
)
from dtmsearch.report.charts.heatmaps import MOST_LAYERS_WRITTEN, layers_by_kinds, scheme_map
from dtmsearch.report.charts.quality import survival
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import Row, kinds_of

# What a cell says without colour: left out of both, alike, different, in the first run only, in the second only.
_SIGNS = (".", "=", "~", "1", "2")
# Fewer sizes than this make no course.
_FEWEST_SIZES = 3


def compared_plans(
    rows: Sequence[Row], runs: tuple[str, str], plans: tuple[Sequence[Row], Sequence[Row]]
) -> list[Figure]:
    """Where two plans choose alike, and where not, and each of them. `rows` as `comparison.plan_differences` gives
    them, `plans` the components of either."""
    if not rows:
        return []
    each = [
        scheme_map("plans", f"plan-{at}", own, f"Heat map of layers by kinds: the schemes of {run}", f"plan of {run}")
        for at, (run, own) in enumerate(zip(runs, plans, strict=True))
    ]
    choices = ["dense in both", "the same scheme", "different schemes", *(f"only in {run}" for run in runs)]
    kinds = kinds_of(rows)
    signs = dict(zip(choices, _SIGNS, strict=True))
    cells = [
        {**row, "sign": signs[row["choice"]], "said": f"{signs[row['choice']]}  {row['choice']}"}
        for row in {(row["layer"], row["kind"]): row for row in rows}.values()
    ]
    scale = alt.Scale(
        domain=[f"{sign}  {choice}" for choice, sign in signs.items()],
        range=[DENSE_COLOUR, PALETTE[4], PALETTE[2], *RUN_COLOURS[:2]],
    )
    tooltip = [
        alt.Tooltip("component:N"),
        alt.Tooltip("scheme:N", title=runs[0]),
        alt.Tooltip("other_scheme:N", title=runs[1]),
    ]
    colour = alt.Color("said:N", scale=scale, legend=alt.Legend(title=None, orient="bottom", columns=3))
    chart = layers_by_kinds("choices", cells, kinds).encode(color=colour, tooltip=tooltip)
    description = "Heat map of layers by kinds: where the two plans choose alike"
    if len({cell["layer"] for cell in cells}) <= MOST_LAYERS_WRITTEN:
        written = layers_by_kinds("choices", cells, kinds).mark_text(fontSize=11, aria=False)
        chart = chart + written.encode(text=alt.Text("sign:N"), color=alt.value("#000000"), tooltip=tooltip)
    choices_map = sized(chart, ROW_HEIGHT * len(kinds), description)
    return [Figure("plans", "plans", choices_map, {"choices": cells}, "both"), *each]


def compared_course(paths: Sequence[tuple[str, Sequence[Row]]], metrics: Sequence[str]) -> list[Figure]:
    """The decisions of runs, a line each, by their metrics on their own prompts."""
    rows = [{**row, "run": run} for run, path in paths for row in path]
    if len({round(row["bits"], 2) for row in rows}) < _FEWEST_SIZES:
        return []
    runs = [run for run, _ in paths]
    found = []
    for metric in metrics:
        values = [row[metric] for row in rows if row.get(metric) is not None]
        logarithmic = metric in ("kl", "sdt") and bool(values) and min(values) > 0
        scale = alt.Scale(type="log", nice=False) if logarithmic else alt.Scale(zero=False)
        legend = alt.Legend(title=None, orient="bottom", symbolSize=300, symbolType="stroke")
        axis = metric_axis(metric, values, logarithmic)
        chart = (
            named("paths")
            .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18), aria=False)
            .encode(
                x=alt.X(
                    "bits:Q",
                    title="bits per weight",
                    scale=alt.Scale(reverse=True, zero=False, nice=False, padding=8),
                    axis=alt.Axis(format="~f", grid=False, tickCount=8),
                ),
                y=alt.Y(f"{metric}:Q", title=title_of(metric), scale=scale, axis=axis),
                color=alt.Color(
                    "run:N", sort=runs, scale=alt.Scale(domain=runs, range=list(RUN_COLOURS[:2])), legend=legend
                ),
                strokeDash=alt.StrokeDash(
                    "run:N", sort=runs, scale=alt.Scale(domain=runs, range=list(DASHES[:2])), legend=legend
                ),
                order=alt.Order("step:Q"),
                tooltip=[
                    alt.Tooltip("run:N"),
                    alt.Tooltip("step:Q"),
                    alt.Tooltip("edge:N", title="choice"),
                    alt.Tooltip("bits:Q", format=".2f"),
                    alt.Tooltip(f"{metric}:Q", title=metric.upper(), format=".4~g"),
                ],
            )
        )
        chart = sized(chart, PLOT_HEIGHT, f"{title_of(metric)} of both runs' decisions against bits per weight")
        found.append(Figure("course", f"courses-{metric}", chart, {"paths": rows}, metric.upper()))
    return found


def compared_survival(plans: Sequence[tuple[str, Sequence[Row]]]) -> list[Figure]:
    """How long texts stay the base model's, under the plans of runs."""
    rows = [{**row, "label": run} for run, curve in plans for row in curve]
    return [Figure("divergence", "survivals", survival(rows, "survivals"), {"survivals": rows})] if rows else []
