"""The pictures of studies (`analysis.findings`) as charts."""

from __future__ import annotations

import math
from typing import Any

from dtmsearch.analysis.findings import Axis, Picture
from dtmsearch.report.charts.drawing import (
    DASHES,
    FAINT,
    PALETTE,
    PLOT_HEIGHT,
    ROW_HEIGHT,
    Figure,
    decades,
    named,
    ramp_legend,
    sized,
)
from dtmsearch.report.charts.heatmaps import layers_by_kinds
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import kinds_of

_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")


def drawn(picture: Picture) -> Figure:
    """A picture as a chart over its rows."""
    chart = _heat(picture) if picture.kind == "heat" else _over_axes(picture)
    data = {picture.name: list(picture.rows)}
    if picture.marks:
        data[f"{picture.name}-marks"] = list(picture.marks)
    return Figure(picture.place, picture.name, chart, data, picture.choice)


def _heat(picture: Picture) -> Any:
    rows = list(picture.rows)
    values = [row[picture.y.field] for row in rows]
    kinds = kinds_of(rows)
    scale = alt.Scale(type="log" if picture.y.logarithmic else "linear", domain=[min(values), max(values)])
    tooltip = [alt.Tooltip("layer:O"), alt.Tooltip("kind:N"), alt.Tooltip(f"{picture.y.field}:Q", format=".3~g")]
    colour = alt.Color(f"{picture.y.field}:Q", scale=scale, legend=ramp_legend(picture.y.title))
    chart = layers_by_kinds(picture.name, rows, kinds).encode(color=colour, tooltip=tooltip)
    return sized(chart, ROW_HEIGHT * len(kinds), picture.description)


def _over_axes(picture: Picture) -> Any:
    x, y = _axis(alt.X, picture, picture.x), _axis(alt.Y, picture, picture.y)
    encoding: dict[str, Any] = {"x": x, "y": y}
    fields = dict.fromkeys((picture.x.field, picture.y.field))
    encoding["tooltip"] = [alt.Tooltip(f"{field}:Q", format=".4~g") for field in fields]
    if picture.series:
        names = list(dict.fromkeys(str(row[picture.series]) for row in picture.rows))
        legend = alt.Legend(title=None, orient="bottom", columns=4, symbolOpacity=1)
        colours = alt.Scale(domain=names, range=[PALETTE[at % len(PALETTE)] for at in range(len(names))])
        encoding["color"] = alt.Color(f"{picture.series}:N", scale=colours, legend=legend)
        encoding["tooltip"].insert(0, alt.Tooltip(f"{picture.series}:N"))
        if picture.kind == "lines":
            dashes = alt.Scale(domain=names, range=[list(DASHES[at % len(DASHES)]) for at in range(len(names))])
            encoding["strokeDash"] = alt.StrokeDash(f"{picture.series}:N", scale=dashes, legend=legend)
        else:
            shapes = alt.Scale(domain=names, range=[_SHAPES[at % len(_SHAPES)] for at in range(len(names))])
            encoding["shape"] = alt.Shape(f"{picture.series}:N", scale=shapes, legend=legend)
    base = named(picture.name)
    mark = (
        base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18), aria=False)
        if picture.kind == "lines"
        else base.mark_point(filled=True, size=40, opacity=0.85)
    )
    layers = [mark.encode(**encoding)]
    if picture.low:
        spans = {"x": x, "y": _axis(alt.Y, picture, picture.y, picture.low), "y2": f"{picture.high}:Q"}
        spans |= {"color": encoding["color"]} if picture.series else {}
        layers.insert(0, base.mark_rule(opacity=0.5, aria=False).encode(**spans))
    if picture.marks:
        line = named(f"{picture.name}-marks").mark_line(color=FAINT, strokeDash=[4, 4], strokeWidth=1.5, aria=False)
        layers.append(line.encode(x=_axis(alt.X, picture, picture.x, "x"), y=_axis(alt.Y, picture, picture.y, "y")))
    return sized(alt.layer(*layers), PLOT_HEIGHT, picture.description)


def _axis(kind: Any, picture: Picture, axis: Axis, field: str = "") -> Any:
    """An encoding by a number, or by names in the order of their rows."""
    values = [row[axis.field] for row in picture.rows]
    if any(isinstance(value, str) for value in values):
        return kind(f"{field or axis.field}:N", title=axis.title, sort=list(dict.fromkeys(values)))
    if axis.logarithmic:
        present = [value for value in values if value is not None and math.isfinite(value) and value > 0]
        scale = alt.Scale(type="log", nice=False, padding=8)
        return kind(f"{field or axis.field}:Q", title=axis.title, scale=scale, axis=decades(present or [1.0]))
    scale = alt.Scale(zero=axis.from_zero, padding=8)
    if all(isinstance(value, int) for value in values):
        ticks = alt.Axis(format="d", tickMinStep=1, grid=False)
        return kind(f"{field or axis.field}:Q", title=axis.title, scale=scale, axis=ticks)
    return kind(f"{field or axis.field}:Q", title=axis.title, scale=scale)
