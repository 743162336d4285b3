"""Heat maps of layers by kinds: what each component costs alone, and what the plan makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dtmsearch.analysis.format import with_error
from dtmsearch.analysis.scheme_characters import UNQUANTIZED, scheme_characters
from dtmsearch.core.schemes import DENSE, parse_scheme
from dtmsearch.report.charts.drawing import (
    FAINT,
    ROW_HEIGHT,
    Figure,
    damage_title_of,
    named,
    ramp_legend,
    sized,
)
from dtmsearch.report.charts.scheme_colours import by_bits, colour_of, ink_on
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import Row, RunFacts, damage, kinds_of

# Up to this many schemes have colours of their own; more are drawn by their bits.
MOST_COLOURS = 12
# Characters are written into cells while there are no more layers than have room for them on a phone.
MOST_LAYERS_WRITTEN = 36


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
            kinds = list(dict.fromkeys([*kinds_of(facts.components), *(cell["kind"] for cell in cells[scheme])]))
            chart = _sensitivity_map(name, cells[scheme], metric, domain, kinds, legend)
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
    """The frame of a heat map: a row a kind, a column a layer."""
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


def price_figures(facts: RunFacts) -> list[Figure]:
    """The same of prices: KL by backward passes, where the search took them."""
    cells = {
        scheme: _price_cells([row for row in facts.story.prices if row["scheme"] == scheme])
        for scheme in by_bits(row["scheme"] for row in facts.story.prices)
    }
    values = [cell["value"] for group in cells.values() for cell in group]
    if len(set(values)) < 2:
        return []
    domain, kinds, found = (min(values), max(values)), kinds_of(facts.components), []
    for scheme, own in cells.items():
        legend = ramp_legend(damage_title_of("kl"), _marks(domain)) if scheme == list(cells)[-1] else None
        scale = alt.Scale(type="log" if _is_wide(domain) else "linear", domain=list(domain))
        name = f"prices-{scheme}"
        chart = layers_by_kinds(name, own, kinds).encode(
            color=alt.Color("value:Q", scale=scale, legend=legend),
            tooltip=[
                alt.Tooltip("component:N"),
                alt.Tooltip("scheme:N"),
                alt.Tooltip("said:N", title="KL, priced"),
                alt.Tooltip("num_weights:Q", title="weights", format=","),
            ],
        )
        chart = sized(chart, ROW_HEIGHT * len(kinds), "Heat map of layers by kinds: priced KL")
        found.append(Figure("prices", name, chart.properties(title=scheme), {name: own}))
    return found


def _price_cells(rows: Sequence[Row]) -> list[Row]:
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["kind"]), []).append(row)
    return [
        {
            "layer": layer,
            "kind": kind,
            "value": (mean := sum(row["kl"] for row in group) / len(group)),
            "said": with_error(mean, max(row["error"] for row in group)),
            "component": group[0]["component"] if len(group) == 1 else f"{len(group)} components, their mean",
            "scheme": group[0]["scheme"],
            "num_weights": sum(row["num_weights"] for row in group),
        }
        for (layer, kind), group in groups.items()
    ]


def plan_figures(facts: RunFacts) -> list[Figure]:
    """The plan's schemes by layer and kind."""
    if not facts.plan_rows:
        return []
    return [scheme_map("plan", "plan", facts.plan_rows, "Heat map of layers by kinds: the plan's schemes")]


def scheme_map(section: str, name: str, plan_rows: Sequence[Row], description: str, choice: str = "") -> Figure:
    """A plan's schemes as colours and characters."""
    kinds = kinds_of(plan_rows)
    cells = plan_cells(plan_rows)
    schemes = list(dict.fromkeys(cell["scheme"] for cell in cells))
    tooltip = [
        alt.Tooltip("component:N"),
        alt.Tooltip("scheme:N"),
        alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
        alt.Tooltip("num_weights:Q", title="weights", format=","),
    ]
    if len(schemes) > MOST_COLOURS:
        colour = alt.Color("bits:Q", legend=ramp_legend("bits per weight"))
        chart = layers_by_kinds(name, cells, kinds).encode(color=colour, tooltip=tooltip)
        return Figure(section, name, sized(chart, ROW_HEIGHT * len(kinds), description), {name: cells}, choice)
    cells = _marked(cells)
    rectangles = layers_by_kinds(name, cells, kinds)
    chart = rectangles.encode(color=_marked_colour(cells), tooltip=tooltip)
    if len({cell["layer"] for cell in cells}) <= MOST_LAYERS_WRITTEN:
        written = rectangles.mark_text(fontSize=11, aria=False, cursor="pointer")
        chart = chart + written.encode(
            text=alt.Text("character:N"), color=alt.Color("ink:N", scale=None), tooltip=tooltip
        )
    return Figure(section, name, sized(chart, ROW_HEIGHT * len(kinds), description), {name: cells}, choice)


def _marked(cells: Sequence[Row]) -> list[Row]:
    """Cells with the character of their scheme, the ink that is read on its colour, and how a legend says it."""
    known = {cell["scheme"] for cell in cells if _is_known(cell["scheme"])}
    characters = dict(scheme_characters(known - {DENSE})) | {DENSE: UNQUANTIZED}
    found = []
    for cell in cells:
        scheme = cell["scheme"]
        character = characters.get(scheme, "+")
        ink = ink_on(scheme) if scheme in known else "#000000"
        found.append({**cell, "character": character, "ink": ink, "marked": f"{character}  {scheme}"})
    return found


def _is_known(scheme: str) -> bool:
    """Whether it is a scheme: cells of several components have other words."""
    try:
        return bool(parse_scheme(scheme))
    except ValueError:
        return False


def _marked_colour(cells: Sequence[Row]) -> Any:
    shown = {cell["marked"]: cell for cell in cells}
    order = sorted(shown, key=lambda name: (shown[name]["scheme"] != DENSE, -shown[name]["bits"], name))
    palette = [colour_of(shown[n]["scheme"]) if _is_known(shown[n]["scheme"]) else FAINT for n in order]
    return alt.Color(
        "marked:N",
        scale=alt.Scale(domain=order, range=palette),
        legend=alt.Legend(title=None, orient="bottom", columns=3, symbolType="square"),
    )


def plan_cells(rows: Sequence[Row]) -> list[Row]:
    """A cell for each layer and kind, from a row for each component."""
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
