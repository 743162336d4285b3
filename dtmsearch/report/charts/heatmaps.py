"""Heat maps of layers by kinds: what each component costs alone, and what the plan makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dtmsearch.core.schemes import DENSE
from dtmsearch.report.charts.drawing import (
    DENSE_COLOUR,
    PALETTE,
    ROW_HEIGHT,
    Figure,
    damage_title_of,
    named,
    ramp_legend,
    sized,
)
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import Row, RunFacts, damage, kinds_of

# Up to this many schemes have colours of their own; more are drawn by their bits.
_MOST_COLOURS = 7


def schemes_of(sensitivity: Sequence[Row]) -> list[str]:
    """The schemes that were measured alone, from many bits to few."""
    bits: dict[str, float] = {}
    for row in sensitivity:
        bits[row["scheme"]] = min(row["bits"], bits.get(row["scheme"], math.inf))
    return sorted(bits, key=lambda scheme: (-bits[scheme], scheme))


def sensitivity_figures(facts: RunFacts) -> list[Figure]:
    """A heat map of layer x kind for each scheme and metric; a metric's maps share one scale, which the last of them
    explains."""
    found = []
    schemes = schemes_of(facts.sensitivity)
    for metric in facts.metrics:
        rows = [row for row in facts.sensitivity if metric in row]
        cells = {
            scheme: _cells([r for r in rows if r["scheme"] == scheme], metric, facts.ceiling) for scheme in schemes
        }
        values = [cell["value"] for group in cells.values() for cell in group]
        if not values:
            continue
        for scheme in schemes:
            name = f"sensitivity-{metric}-{scheme}"
            domain = min(values), max(values)
            legend = ramp_legend(damage_title_of(metric), _marks(domain)) if scheme == schemes[-1] else None
            chart = _sensitivity_map(name, cells[scheme], metric, domain, kinds_of(facts.components), legend)
            found.append(
                Figure("sensitivity", name, chart.properties(title=scheme), {name: cells[scheme]}, metric.upper())
            )
    return found


def _cells(rows: Sequence[Row], metric: str, ceiling: int | None) -> list[Row]:
    """One row a cell of layer x kind; where several components share one (experts), their mean."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["kind"]), []).append(row)
    return [
        {
            "layer": layer,
            "kind": kind,
            "value": sum(damage(metric, row[metric], ceiling) for row in group) / len(group),
            "component": group[0]["component"] if len(group) == 1 else f"{len(group)} components, their mean",
            "scheme": group[0]["scheme"],
            "fdt": sum(row["fdt"] for row in group) / len(group),
            "sdt": sum(row["sdt"] for row in group) / len(group),
            "num_weights": sum(row["num_weights"] for row in group),
        }
        for (layer, kind), group in groups.items()
    ]


def _sensitivity_map(
    name: str, cells: Sequence[Row], metric: str, domain: tuple[float, float], kinds: Sequence[str], legend: Any
) -> Any:
    scale = alt.Scale(type="log" if _is_wide(domain) else "linear", domain=list(domain))
    tooltip = [
        alt.Tooltip("component:N"),
        alt.Tooltip("scheme:N"),
        alt.Tooltip("value:Q", title=damage_title_of(metric).partition(" (")[0], format=".3~g"),
        alt.Tooltip("fdt:Q", title="FDT", format=".1f"),
        alt.Tooltip("sdt:Q", title="SDT", format=".2f"),
        alt.Tooltip("num_weights:Q", title="weights", format=","),
    ]
    colour = alt.Color("value:Q", scale=scale, legend=legend)
    chart = layers_by_kinds(name, cells, kinds).encode(color=colour, tooltip=tooltip)
    return sized(chart, ROW_HEIGHT * len(kinds), f"Heat map of layers by kinds: {damage_title_of(metric)}")


def _is_wide(domain: tuple[float, float]) -> bool:
    """Damages lie decades apart; where they can be zero or below, a logarithm has no place for them."""
    return domain[0] > 0 and domain[1] > 8 * domain[0]


def _marks(domain: tuple[float, float]) -> list[float]:
    """Values that a ramp names: its ends and its middle."""
    low, high = domain
    return [low, math.sqrt(low * high) if _is_wide(domain) else (low + high) / 2, high]


def layers_by_kinds(name: str, cells: Sequence[Row], kinds: Sequence[str]) -> Any:
    layers = sorted({row["layer"] for row in cells})
    # A label for each layer where there is room, otherwise for every fourth.
    shown = layers if len(layers) <= 24 else [layer for layer in layers if layer % 4 == 0]
    axis = alt.Axis(values=shown, labelAngle=0, ticks=False, domain=False, labelOverlap=True)
    return (
        named(name)
        .mark_rect(cursor="pointer")
        .encode(
            x=alt.X("layer:O", title="layer", axis=axis, scale=alt.Scale(paddingInner=0.06)),
            y=alt.Y(
                "kind:N",
                title=None,
                sort=list(kinds),
                scale=alt.Scale(domain=list(kinds), paddingInner=0.06),
                axis=alt.Axis(ticks=False, domain=False),
            ),
        )
    )


def plan_figures(facts: RunFacts) -> list[Figure]:
    if not facts.plan_rows:
        return []
    cells = plan_cells(facts.plan_rows)
    kinds = kinds_of(facts.plan_rows)
    chart = layers_by_kinds("plan", cells, kinds).encode(
        color=_scheme_colour(cells),
        tooltip=[
            alt.Tooltip("component:N"),
            alt.Tooltip("scheme:N"),
            alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
            alt.Tooltip("num_weights:Q", title="weights", format=","),
        ],
    )
    chart = sized(chart, ROW_HEIGHT * len(kinds), "Heat map of layers by kinds: the plan's schemes")
    return [Figure("plan", "plan", chart, {"plan": cells})]


def plan_cells(rows: Sequence[Row]) -> list[Row]:
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["kind"]), []).append(row)
    cells = []
    for (layer, kind), group in groups.items():
        schemes = sorted({row["scheme"] for row in group}, key=[row["scheme"] for row in group].count, reverse=True)
        weights = sum(row["num_weights"] for row in group)
        cells.append(
            {
                "layer": layer,
                "kind": kind,
                "component": group[0]["component"] if len(group) == 1 else f"{len(group)} components",
                "scheme": schemes[0] if len(schemes) == 1 else f"{schemes[0]} and others",
                "bits": sum(row["bits"] * row["num_weights"] for row in group) / weights,
                "pruned": sum(row["pruned"] * row["num_weights"] for row in group) / weights,
                "num_weights": weights,
            }
        )
    return cells


def _scheme_colour(cells: Sequence[Row]) -> Any:
    """A colour a scheme, from many bits to few, dense in grey; with more schemes than colours, the bits as a ramp."""
    bits: dict[str, float] = {}
    for cell in cells:
        bits[cell["scheme"]] = max(bits.get(cell["scheme"], 0.0), cell["bits"])
    schemes = sorted(bits, key=lambda scheme: (scheme != DENSE, -bits[scheme]))
    if len([s for s in schemes if s != DENSE]) > _MOST_COLOURS:
        return alt.Color("bits:Q", legend=ramp_legend("bits per weight"))
    colours = iter(PALETTE)
    palette = [DENSE_COLOUR if scheme == DENSE else next(colours) for scheme in schemes]
    return alt.Color(
        "scheme:N",
        scale=alt.Scale(domain=schemes, range=palette),
        legend=alt.Legend(title=None, orient="bottom", columns=4, symbolType="square"),
    )
