"""Where a plan spends its bits, by layer and by kind, beside what compressing a weight there costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtmsearch.report.charts.drawing import FAINT, Figure, named, sized
from dtmsearch.report.charts.heatmaps import MOST_COLOURS
from dtmsearch.report.charts.scheme_colours import by_bits, colour_of
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import Row, RunFacts, kinds_of, spending_of, suffering_of

_HEIGHT = 190


def spending_figures(facts: RunFacts) -> list[Figure]:
    """For layers and for kinds: bits per weight as bars of schemes, and the damage beside, if any was measured."""
    found: list[Figure] = []
    if not facts.plan_rows or len({row["scheme"] for row in facts.plan_rows}) < 2:
        return []
    for by, choice in (("layer", "by layer"), ("kind", "by kind")):
        order = _order(facts, by)
        if len(order) < 2:
            continue
        spent, name = spending_of(facts.plan_rows, by), f"bits-{by}"
        if len({row["scheme"] for row in facts.plan_rows}) > MOST_COLOURS:  # too many to be told apart in a bar
            whole = {row[by]: row["group_bits"] for row in spent}
            spent = [{by: group, "bits": bits, "group_bits": bits} for group, bits in whole.items()]
        found.append(Figure("spending", name, _bits(name, by, spent, order), {name: spent}, choice))
        metric = "kl" if not facts.sensitivity else facts.rank_by
        scheme, suffered = suffering_of(facts.alone, metric, facts.ceiling, by)
        if scheme is not None:
            name = f"suffering-{by}"
            chart = _suffering(name, by, scheme, metric, order)
            found.append(Figure("spending", name, chart, {name: suffered}, choice))
    return found


def _order(facts: RunFacts, by: str) -> list[Any]:
    return kinds_of(facts.plan_rows) if by == "kind" else sorted({row["layer"] for row in facts.plan_rows})


def _x(by: str, order: Sequence[Any]) -> Any:
    axis = alt.Axis(labelAngle=0, ticks=False, domain=False, labelOverlap=True)
    return alt.X(
        f"{by}:O", title=by, sort=list(order), scale=alt.Scale(domain=list(order), paddingInner=0.2), axis=axis
    )


def _bits(name: str, by: str, rows: Sequence[Row], order: Sequence[Any]) -> Any:
    schemes = by_bits(row["scheme"] for row in rows if "scheme" in row)
    tooltip = [alt.Tooltip(f"{by}:N"), alt.Tooltip("group_bits:Q", title="bits per weight, all", format=".2f")]
    if schemes:
        tooltip[1:1] = [
            alt.Tooltip("scheme:N"),
            alt.Tooltip("share:Q", title="share of weights", format=".0%"),
        ]
    y = alt.Y("bits:Q", title="bits per weight", stack="zero", axis=alt.Axis(tickCount=5, format="~g"))
    bars = named(name).mark_bar(aria=False).encode(x=_x(by, order), y=y, tooltip=tooltip)
    if schemes:
        scale = alt.Scale(domain=schemes, range=[colour_of(scheme) for scheme in schemes])
        legend = alt.Legend(title=None, orient="bottom", columns=3, symbolType="square")
        bars = bars.encode(color=alt.Color("scheme:N", scale=scale, legend=legend), order=alt.Order("width:Q"))
    else:
        bars = bars.encode(color=alt.value(FAINT))
    return sized(bars.properties(title="bits per weight"), _HEIGHT, f"Bars: bits per weight of each {by}, by scheme")


def _suffering(name: str, by: str, scheme: str, metric: str, order: Sequence[Any]) -> Any:
    y = alt.Y("times:Q", title="times the mean", axis=alt.Axis(tickCount=5, format="~g"))
    tooltip = [alt.Tooltip(f"{by}:N"), alt.Tooltip("times:Q", title="times the mean", format=".2~f")]
    bars = named(name).mark_bar(color=FAINT, aria=False).encode(x=_x(by, order), y=y, tooltip=tooltip)
    title = f"{metric.upper()} a weight costs under {scheme} alone"
    return sized(bars.properties(title=title), _HEIGHT, f"Bars: damage a weight of each {by}, beside the mean")
