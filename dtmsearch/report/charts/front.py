"""The predicted front: what prices foresee of the best plan of every size, with the plans that were measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtmsearch.report.charts.drawing import (
    FAINT,
    PALETTE,
    Figure,
    decades,
    named,
    plan_name,
    sized,
    title_of,
)
from dtmsearch.report.charts.quality import labelled, named_apart, written
from dtmsearch.report.charts.scheme_colours import colour_of
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import Row, RunFacts

# Fewer sizes than this make no front.
_FEWEST_SIZES = 4
_HEIGHT = 320
_SERIES = ("this plan, held out", "uniform, held out", "uniform, foreseen", "measured by the search")


def front_figures(facts: RunFacts) -> list[Figure]:
    """Size against KL: the line that prices foresee, with its 95% interval, and plans as points."""
    front = facts.story.front
    if len({round(row["bits"], 2) for row in front}) < _FEWEST_SIZES or min(row["kl_low"] for row in front) <= 0.0:
        return []
    plans = _plans(facts)
    values = [row[key] for row in front for key in ("kl_low", "kl_high")] + [row["kl"] for row in plans]
    scale = alt.Scale(type="log", nice=False, padding=10)
    x_axis = alt.Axis(grid=False, format="~f", tickCount=8)
    x = alt.X("bits:Q", title="bits per weight", scale=alt.Scale(zero=False, nice=False, padding=14), axis=x_axis)
    y_axis = decades(values)
    line = named("front").encode(x=x)
    band = line.mark_area(color=PALETTE[0], opacity=0.16, aria=False).encode(
        y=alt.Y("kl_low:Q", title=title_of("kl"), scale=scale, axis=y_axis), y2=alt.Y2("kl_high:Q")
    )
    tooltip = [
        alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
        alt.Tooltip("kl:Q", title="KL foreseen", format=".2~g"),
        alt.Tooltip("kl_low:Q", title="from", format=".2~g"),
        alt.Tooltip("kl_high:Q", title="to", format=".2~g"),
    ]
    at_y = alt.Y("kl:Q", title=title_of("kl"), scale=scale, axis=y_axis)
    drawn = line.mark_line(color=PALETTE[0], strokeWidth=2, aria=False).encode(y=at_y)
    touched = line.mark_point(opacity=0, size=120, aria=False).encode(y=at_y, tooltip=tooltip)
    layers = [band, drawn, touched, *_points(x, at_y, plans)]
    chart = sized(alt.layer(*layers), _HEIGHT, "KL against bits per weight: the predicted front and measured plans")
    return [Figure("front", "front", chart, {"front": front, "front-plans": plans})]


def _points(x: Any, y: Any, rows: Sequence[Row]) -> list[Any]:
    """Plans by what is known of them, told apart by shape too; uniform ones in their scheme's colour, with its name."""
    plans = named("front-plans").encode(x=x, y=y)
    shape = alt.Shape(
        "series:N",
        scale=alt.Scale(domain=list(_SERIES), range=["diamond", "circle", "square", "cross"]),
        legend=alt.Legend(
            title=None, orient="bottom", columns=2, symbolOpacity=1, symbolFillColor=FAINT, symbolStrokeColor=FAINT
        ),
    )
    tooltip = [
        alt.Tooltip("name:N", title="plan"),
        alt.Tooltip("series:N", title="KL"),
        alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
        alt.Tooltip("kl:Q", title="KL", format=".3~g"),
    ]
    found = []
    for series, size, filled in zip(_SERIES, (130, 75, 45, 22), (True, True, False, True), strict=True):
        if not any(row["series"] == series for row in rows):
            continue
        own = plans.transform_filter(alt.datum.series == series)
        colour = alt.Color("colour:N", scale=None)
        found.append(
            own.mark_point(filled=filled, size=size, opacity=1).encode(color=colour, shape=shape, tooltip=tooltip)
        )
    # The plan lies on top of the others, names on top of all.
    return [*found[::-1], *written(plans, rows)]


def _plans(facts: RunFacts) -> list[Row]:
    own, uniform, foreseen, searched = _SERIES
    rows = [
        _row(searched, f"plan {row['plan_id'][:8]}", row["bits"], row["measured"], FAINT)
        for row in facts.story.foreseen
        if _lies_in(facts, row["bits"])
    ]
    rows += [
        _row(foreseen, plan_name(f"uniform:{row['scheme']}"), row["bits"], row["kl"], colour_of(row["scheme"]))
        for row in facts.story.uniform
    ]
    held_out = [
        {**row, **labelled(row["label"])}
        for row in facts.uniform
        if row["label"] != "base" and row.get("kl") and _lies_in(facts, row["bits"])
    ]
    for row in named_apart(held_out, "kl") if held_out else []:
        series = own if row["whose"] == "this plan" else uniform
        rows.append(
            {
                **_row(series, row["name"], row["bits"], row["kl"], row["colour"]),
                "named": row["named"],
                "side": row["side"],
                "whose": row["whose"],
            }
        )
    return rows


def _lies_in(facts: RunFacts, bits: float) -> bool:
    """Whether it is a size of the front: components alone have nearly the base model's."""
    least, most = (float(facts.story.front[at]["bits"]) for at in (0, -1))
    return least - 0.01 <= bits <= most + 0.01


def _row(series: str, name: str, bits: float, kl: float, colour: str) -> Row:
    return {
        "series": series,
        "name": name,
        "bits": bits,
        "kl": kl,
        "colour": colour,
        "named": False,
        "side": "center",
        "whose": "other",
    }
