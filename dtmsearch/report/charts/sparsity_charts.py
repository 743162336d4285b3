"""What a search that prunes shows beside the rest: pruned shares, its rounds, losses of training."""

from __future__ import annotations

from typing import Any

from dtmsearch.report.charts.drawing import PLAN_COLOUR, ROW_HEIGHT, Figure, counts, named, ramp_legend, sized, title_of
from dtmsearch.report.charts.heatmaps import layers_by_kinds, plan_cells
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import RunFacts, kinds_of


def sparsity_figures(facts: RunFacts) -> list[Figure]:
    """What each component loses, how quality falls from round to round, and what training regains."""
    if not any(row["pruned"] for row in facts.plan_rows):
        return []
    kinds = kinds_of(facts.plan_rows)
    cells = plan_cells(facts.plan_rows)
    chart = layers_by_kinds("pruned", cells, kinds).encode(
        color=alt.Color(
            "pruned:Q", scale=alt.Scale(domain=[0, 1]), legend=ramp_legend("share of weights pruned", (0, 0.5, 1))
        ),
        tooltip=[alt.Tooltip("component:N"), alt.Tooltip("scheme:N"), alt.Tooltip("pruned:Q", format=".1%")],
    )
    chart = sized(chart, ROW_HEIGHT * len(kinds), "Heat map of layers by kinds: the share of weights that is pruned")
    found = [Figure("sparsity", "pruned", chart, {"pruned": cells})]
    path = [row for row in facts.path if row["sparsity"] and row.get(facts.rank_by) is not None]
    if len(path) > 1:
        found.append(Figure("sparsity", "rounds", _rounds(facts.rank_by), {"path": facts.path}))
    if facts.losses:
        found.append(Figure("sparsity", "losses", _losses(), {"losses": facts.losses}))
    return found


def _rounds(metric: str) -> Any:
    chart = (
        named("path")
        .mark_line(color=PLAN_COLOUR, strokeWidth=2, point=alt.OverlayMarkDef(size=40, color=PLAN_COLOUR))
        .encode(
            x=alt.X("sparsity:Q", title="sparsity after the round", axis=alt.Axis(format="%", grid=False)),
            y=alt.Y(f"{metric}:Q", title=title_of(metric), scale=alt.Scale(zero=False)),
            order=alt.Order("step:Q"),
            tooltip=[
                alt.Tooltip("step:Q", title="round"),
                alt.Tooltip("sparsity:Q", format=".1%"),
                alt.Tooltip(f"{metric}:Q", title=metric.upper(), format=".4~g"),
            ],
        )
    )
    return sized(chart, 220, f"{title_of(metric)} after each round, against sparsity")


def _losses() -> Any:
    chart = (
        named("losses")
        .mark_line(strokeWidth=1.2, aria=False)
        .encode(
            x=alt.X("step:Q", title="training step", axis=counts()),
            y=alt.Y("loss:Q", title="training loss (nats per token)", scale=alt.Scale(zero=False)),
            color=alt.Color("round:N", legend=alt.Legend(title=None, orient="bottom")),
            strokeDash=alt.StrokeDash("round:N", legend=alt.Legend(title=None, orient="bottom")),
            tooltip=[alt.Tooltip("round:N"), alt.Tooltip("step:Q"), alt.Tooltip("loss:Q", format=".4~g")],
        )
    )
    return sized(chart, 220, "Loss of the trainings between rounds, by step")
