"""Quality against size, against text length, against the sum of parts: the course of a search, how long texts stay the
base model's, how damages add up, and the plans of a whole store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from dtmsearch.report.charts.drawing import (
    FAINT,
    PALETTE,
    PLOT_HEIGHT,
    Figure,
    decades,
    named,
    plan_name,
    ramp_legend,
    sized,
    title_of,
)
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import Row, RunFacts


def course_figures(facts: RunFacts) -> list[Figure]:
    if not facts.points and not facts.path:
        return []
    held_out = [{**row, "name": plan_name(row["label"])} for row in facts.uniform if row["label"] != "base"]
    data = {"points": facts.points, "path": facts.path, "held_out": held_out}
    found = []
    for metric in facts.metrics:
        for x, title in (("bits", "bits per weight"), ("share", "share of weights compressed")):
            chart = _course(facts, metric, x, title)
            found.append(Figure("course", f"course-{metric}-{x}", chart, data, f"{metric.upper()}|{title}"))
    return found


def _course(facts: RunFacts, metric: str, x: str, x_title: str) -> Any:
    # Bits fall as a search goes on: its time runs from left to right in either picture.
    x_scale = alt.Scale(reverse=x == "bits", zero=False, nice=False, padding=8)
    x_axis = alt.Axis(format="%" if x == "share" else "~g", grid=False, tickCount=8)
    at_x = alt.X(f"{x}:Q", title=x_title, scale=x_scale, axis=x_axis)
    shown = (*facts.points, *facts.path, *(row for row in facts.uniform if row["label"] != "base"))
    values = [row[metric] for row in shown if row.get(metric) is not None]
    logarithmic = metric in ("kl", "sdt") and min(values) > 0
    y_scale = alt.Scale(type="log", nice=False) if logarithmic else alt.Scale(zero=False)
    at_y = alt.Y(
        f"{metric}:Q", title=title_of(metric), scale=y_scale, axis=decades(values) if logarithmic else alt.Axis()
    )
    numbers = [
        alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
        alt.Tooltip("share:Q", title="share", format=".1%"),
        *(alt.Tooltip(f"{m}:Q", title=m.upper(), format=".4~g") for m in facts.metrics),
    ]
    edge = [alt.Tooltip("edge:N", title="last choice"), alt.Tooltip("num_compressed:Q", title="components"), *numbers]
    points = named("points").mark_circle(size=9, opacity=0.3, color=FAINT, clip=True, aria=False)
    line = named("path").mark_line(color=PALETTE[0], strokeWidth=2, point=alt.OverlayMarkDef(size=22, color=PALETTE[0]))
    held_out = named("held_out").encode(x=at_x, y=at_y, tooltip=[alt.Tooltip("name:N", title="held out"), *numbers])
    whose = alt.condition("datum.label === 'plan'", alt.value(PALETTE[0]), alt.value(PALETTE[5]))
    layers = [
        points.encode(x=at_x, y=at_y, tooltip=edge),
        line.encode(x=at_x, y=at_y, order="step:Q", tooltip=[alt.Tooltip("step:Q"), *edge]),
        held_out.encode(color=whose).mark_point(shape="diamond", size=90, filled=True, opacity=1),
        _beside(held_out.transform_filter("datum.label != 'plan'"), "right", PALETTE[5]),
        _beside(held_out.transform_filter("datum.label == 'plan'"), "left", PALETTE[0]),
    ]
    description = f"{title_of(metric)} of every candidate against {x_title}"
    return sized(alt.layer(*layers), PLOT_HEIGHT, description)


def _beside(points: Any, align: Literal["left", "right"], colour: str) -> Any:
    """Names of points, in their colour, on the side where there is room."""
    dx = -9 if align == "right" else 9
    return points.mark_text(align=align, dx=dx, dy=-4, fontSize=11, color=colour).encode(text="name:N")


def survival_figures(facts: RunFacts) -> list[Figure]:
    if not facts.survival:
        return []
    rows = [{**row, "label": plan_name(row["label"])} for row in facts.survival]
    return [Figure("divergence", "survival", survival(rows, "survival"), {"survival": rows})]


def survival(rows: Sequence[Row], name: str) -> Any:
    labels = list(dict.fromkeys(row["label"] for row in rows))
    legend = alt.Legend(title=None, orient="bottom", columns=3, symbolSize=300)
    chart = (
        named(name)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("token:Q", title="tokens generated", scale=alt.Scale(nice=False)),
            y=alt.Y("same:Q", title="texts still the base model's", axis=alt.Axis(format="%")),
            color=alt.Color("label:N", sort=labels, legend=legend),
            tooltip=[
                alt.Tooltip("label:N", title="plan"),
                alt.Tooltip("token:Q", title="after token"),
                alt.Tooltip("same:Q", title="still the same", format=".1%"),
            ],
        )
    )
    return sized(chart, 260, "Share of held-out prompts whose text is still the base model's, by tokens generated")


def interaction_figures(facts: RunFacts) -> list[Figure]:
    if not facts.sums:
        return []
    metric = facts.sums[0]["metric"]
    sums = [row for row in facts.sums if row["sum"] > 0 and row["measured"] > 0]
    if not sums:
        return []
    values = [row[key] for row in sums for key in ("sum", "measured")]
    low, high = min(values), max(values)
    scale, axis = alt.Scale(type="log", domain=[low, high], nice=False), decades(values)
    points = (
        named("sums")
        .mark_circle(size=18, opacity=0.7, aria=False)
        .encode(
            x=alt.X("sum:Q", title=f"sum of its components' {metric.upper()}, each alone", scale=scale, axis=axis),
            y=alt.Y("measured:Q", title=f"measured {title_of(metric)}", scale=scale, axis=axis),
            color=alt.Color("num_compressed:Q", legend=ramp_legend("components compressed")),
            tooltip=[
                alt.Tooltip("num_compressed:Q", title="components"),
                alt.Tooltip("sum:Q", title="sum of parts", format=".3~g"),
                alt.Tooltip("measured:Q", title="measured", format=".3~g"),
            ],
        )
    )
    diagonal = (
        named("diagonal")
        .mark_line(strokeDash=[4, 4], color=FAINT, strokeWidth=1)
        .encode(x=alt.X("a:Q", scale=scale, axis=axis), y=alt.Y("a:Q", scale=scale, axis=axis))
    )
    description = "Measured damage of plans against the sum of their components' damages"
    chart = sized(alt.layer(diagonal, points), PLOT_HEIGHT, description)
    return [Figure("interaction", "interaction", chart, {"sums": sums, "diagonal": [{"a": low}, {"a": high}]})]


def sweep_figures(facts: RunFacts) -> list[Figure]:
    """Size against quality of every run's plan on the same prompts; the front is joined."""
    found = []
    for metric in ("fdt", "sdt", "kl"):
        rows = [row for row in facts.sweep if row[metric] is not None]
        if rows:
            data = {"sweep": facts.sweep, f"front-{metric}": [row for row in rows if metric in row["fronts"]]}
            found.append(Figure("sweep", f"sweep-{metric}", _sweep(rows, metric), data, metric.upper()))
    return found


def _sweep(rows: Sequence[Row], metric: str) -> Any:
    values = [row[metric] for row in rows]
    logarithmic = metric != "fdt" and min(values) > 0
    scale = alt.Scale(type="log", nice=False, padding=12) if logarithmic else alt.Scale(zero=False)
    axis = decades(values) if logarithmic else alt.Axis()
    whose = ["this run", "another run", "uniform plan"]
    x = alt.X(
        "bits:Q",
        title="bits per weight",
        scale=alt.Scale(zero=False, nice=False, padding=12),
        axis=alt.Axis(grid=False, format="~g", tickCount=8),
    )
    y = alt.Y(f"{metric}:Q", title=title_of(metric), scale=scale, axis=axis)
    points = named("sweep").encode(
        x=x,
        y=y,
        color=alt.Color(
            "whose:N",
            scale=alt.Scale(domain=whose, range=[PALETTE[0], PALETTE[1], FAINT]),
            legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1),
        ),
        tooltip=[
            alt.Tooltip("name:N", title="plan"),
            alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
            *(alt.Tooltip(f"{m}:Q", title=m.upper(), format=".4~g") for m in ("fdt", "sdt", "kl")),
        ],
    )
    line = named(f"front-{metric}").mark_line(color=FAINT, strokeWidth=1.2, strokeDash=[4, 4], aria=False)
    chart = alt.layer(
        line.encode(x=x, y=y, order="bits:Q"),
        points.mark_point(filled=True, opacity=1, size=70, cursor="pointer"),
    )
    return sized(
        chart, PLOT_HEIGHT, f"{title_of(metric)} of every run's plan on the same held-out prompts, against size"
    )
