"""The tree of kept and dropped plans."""

from __future__ import annotations

from dtmsearch.report.charts.drawing import FAINT, PALETTE, PLAN_COLOUR, Figure, counts, named, sized
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import RunFacts


def tree_figures(facts: RunFacts) -> list[Figure]:
    """The tree of plans that a search by rounds has gone through."""
    if not facts.nodes:
        return []
    fates = ["chosen", "kept", "dropped"]
    colour = alt.Color(
        "fate:N",
        scale=alt.Scale(domain=fates, range=[PLAN_COLOUR, PALETTE[0], FAINT]),
        legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1, symbolSize=60),
    )
    axis = counts()
    # Rounds count from 0; what the first of them extends stands before it.
    axis.labelExpr = "datum.value < 0 ? 'base' : datum.label"
    x = alt.X("step:Q", title="round", scale=alt.Scale(nice=False, padding=10), axis=axis)
    lowest = max(row["rank"] for row in facts.nodes)
    ranks = [step * 10**power for power in range(6) for step in (1, 2, 5) if step * 10**power <= lowest]
    y = alt.Y(
        "rank:Q",
        title="rank in its round (best on top)",
        scale=alt.Scale(type="log", reverse=True, domain=[0.8, lowest * 1.2], nice=False),
        axis=alt.Axis(values=ranks, format="d"),
    )
    tooltip = [
        alt.Tooltip("fate:N"),
        alt.Tooltip("step:Q", title="round"),
        alt.Tooltip("rank:Q"),
        alt.Tooltip("edge:N", title="last choice"),
        alt.Tooltip("value:Q", title=facts.rank_by.upper(), format=".4~g"),
        alt.Tooltip("num_compressed:Q", title="components"),
        alt.Tooltip("plan_id:N", title="plan"),
    ]
    nodes = named("nodes").encode(x=x, y=y, color=colour, tooltip=tooltip)
    shape = alt.Shape("fate:N", scale=alt.Scale(domain=fates, range=["diamond", "square", "circle"]))
    edges = named("edges").mark_rule(strokeWidth=1.2, clip=True, aria=False)
    zoomable = alt.layer(
        nodes.transform_filter("datum.fate == 'dropped'").mark_circle(size=10, opacity=0.4, clip=True, aria=False),
        edges.encode(x=x, y=y, x2="step2:Q", y2="rank2:Q", color=colour),
        nodes.transform_filter("datum.fate != 'dropped'")
        .mark_point(filled=True, size=36, opacity=1, clip=True, aria=False)
        .encode(shape=shape),
    ).add_params(alt.selection_interval(bind="scales", name="zoom"))
    chart = sized(zoomable, 340, "The tree of plans: rounds by rank, kept plans joined")
    return [Figure("tree", "tree", chart, {"nodes": facts.nodes, "edges": facts.edges})]
