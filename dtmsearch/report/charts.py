"""The figures of a report as Altair charts, and as files.

Charts name their rows, which stand beside them, so that figures share what they show. Colours are left to the theme,
which the page sets for light and dark and `save` for paper. Knows what a row means to the eye, nothing of stores or
pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtmsearch.plans.schemes import DENSE
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.extra import vl_convert
from dtmsearch.report.facts import Row, RunFacts, damage, kinds_of

# A metric as an axis names it, with its unit.
TITLES = {
    "fdt": "FDT (tokens before the first divergence)",
    "sdt": "SDT (divergent tokens a prompt)",
    "dppl": "DPPL (perplexity on the base model's text)",
    "ppl": "PPL (perplexity on human text)",
    "kl": "KL (nats a token)",
}
# The same for what a compression costs.
_DAMAGES = TITLES | {"fdt": "FDT lost (tokens)"}
# Up to this many schemes have colours of their own; more are drawn by their bits.
_MOST_COLOURS = 7
_ROW_HEIGHT = 22
_PLOT_HEIGHT = 300
# Figures for paper: pixels wide, and pixels of a PNG for each of them.
_PAPER_WIDTH = 560
_PNG_SCALE = 3.0
# The palette of Okabe and Ito, which the colour-blind tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_FAINT, _DENSE = "#8a8f98", "#a7abb2"
_PAPER = {
    "background": "white",
    "font": "Helvetica, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#e8e8e8", "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"},
    "legend": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"},
    "title": {"fontSize": 12, "anchor": "start", "fontWeight": "normal"},
    "range": {"category": list(PALETTE), "heatmap": {"scheme": "yelloworangebrown"}, "ramp": {"scheme": "viridis"}},
}


@dataclass(frozen=True)
class Figure:
    """A chart with the place it has: `section` of the page, `name` of its file, `choice` among the figures that share
    a place (empty where there is one; parts divided by `|` are chosen one by one). `data` are its rows by the names
    that the chart calls them, each of which means the same rows in all figures of a page."""

    section: str
    name: str
    chart: Any
    data: Mapping[str, Sequence[Row]]
    choice: str = ""


def plan_name(label: str) -> str:
    """A validated plan as a reader calls it."""
    kind, _, scheme = label.partition(":")
    return (
        f"uniform {scheme}"
        if kind.startswith("uniform")
        else {"plan": "this plan", "base": "base model"}.get(label, label)
    )


def figures(facts: RunFacts) -> list[Figure]:
    """Every figure that the rows of a run bear."""
    found: list[Figure] = []
    found += _sensitivity_figures(facts)
    found += _plan_figures(facts)
    found += _course_figures(facts)
    found += _survival_figures(facts)
    found += _interaction_figures(facts)
    found += _tree_figures(facts)
    found += _sparsity_figures(facts)
    found += _sweep_figures(facts)
    return found


def save(found: Iterable[Figure], folder: Path) -> list[Path]:
    """Write each figure as SVG and PNG for paper into `folder`, which is made; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in found:
        spec = figure.chart.to_dict()
        spec |= {"config": _PAPER, "datasets": {name: list(rows) for name, rows in figure.data.items()}}
        spec["width"] = _PAPER_WIDTH
        svg, png = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        svg.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
        png.write_bytes(vl_convert.vegalite_to_png(spec, scale=_PNG_SCALE))
        written += [svg, png]
    return written


def _named(name: str) -> Any:
    return alt.Chart(alt.NamedData(name))


def _sized(chart: Any, height: int, description: str) -> Any:
    return chart.properties(width="container", height=height, description=description)


# Heat maps


def schemes_of(sensitivity: Sequence[Row]) -> list[str]:
    """The schemes that were measured alone, from many bits to few."""
    bits: dict[str, float] = {}
    for row in sensitivity:
        bits[row["scheme"]] = min(row["bits"], bits.get(row["scheme"], math.inf))
    return sorted(bits, key=lambda scheme: (-bits[scheme], scheme))


def _sensitivity_figures(facts: RunFacts) -> list[Figure]:
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
            legend = _ramp_legend(_DAMAGES[metric], _marks(domain)) if scheme == schemes[-1] else None
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
        alt.Tooltip("value:Q", title=_DAMAGES[metric].partition(" (")[0], format=".3~g"),
        alt.Tooltip("fdt:Q", title="FDT", format=".1f"),
        alt.Tooltip("sdt:Q", title="SDT", format=".2f"),
        alt.Tooltip("num_weights:Q", title="weights", format=","),
    ]
    colour = alt.Color("value:Q", scale=scale, legend=legend)
    chart = _layers_by_kinds(name, cells, kinds).encode(color=colour, tooltip=tooltip)
    return _sized(chart, _ROW_HEIGHT * len(kinds), f"Heat map of layers by kinds: {_DAMAGES[metric]}")


def _is_wide(domain: tuple[float, float]) -> bool:
    """Damages lie decades apart; where they can be zero or below, a logarithm has no place for them."""
    return domain[0] > 0 and domain[1] > 8 * domain[0]


def _marks(domain: tuple[float, float]) -> list[float]:
    """Values that a ramp names: its ends and its middle."""
    low, high = domain
    return [low, math.sqrt(low * high) if _is_wide(domain) else (low + high) / 2, high]


def _layers_by_kinds(name: str, cells: Sequence[Row], kinds: Sequence[str]) -> Any:
    layers = sorted({row["layer"] for row in cells})
    # A label for each layer where there is room, otherwise for every fourth.
    shown = layers if len(layers) <= 24 else [layer for layer in layers if layer % 4 == 0]
    axis = alt.Axis(values=shown, labelAngle=0, ticks=False, domain=False, labelOverlap=True)
    return (
        _named(name)
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


def _ramp_legend(title: str, values: Sequence[float] = ()) -> Any:
    return alt.Legend(
        title=title,
        orient="bottom",
        gradientLength=180,
        gradientThickness=8,
        titleLimit=400,
        format=".2~g",
        values=list(values) or alt.Undefined,
    )


def _plan_figures(facts: RunFacts) -> list[Figure]:
    if not facts.plan_rows:
        return []
    cells = _plan_cells(facts.plan_rows)
    kinds = kinds_of(facts.plan_rows)
    chart = _layers_by_kinds("plan", cells, kinds).encode(
        color=_scheme_colour(cells),
        tooltip=[
            alt.Tooltip("component:N"),
            alt.Tooltip("scheme:N"),
            alt.Tooltip("bits:Q", title="bits a weight", format=".2f"),
            alt.Tooltip("num_weights:Q", title="weights", format=","),
        ],
    )
    chart = _sized(chart, _ROW_HEIGHT * len(kinds), "Heat map of layers by kinds: the plan's schemes")
    return [Figure("plan", "plan", chart, {"plan": cells})]


def _plan_cells(rows: Sequence[Row]) -> list[Row]:
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
        return alt.Color("bits:Q", legend=_ramp_legend("bits a weight"))
    colours = iter(PALETTE)
    palette = [_DENSE if scheme == DENSE else next(colours) for scheme in schemes]
    return alt.Color(
        "scheme:N",
        scale=alt.Scale(domain=schemes, range=palette),
        legend=alt.Legend(title=None, orient="bottom", columns=4, symbolType="square"),
    )


# The course of the search


def _course_figures(facts: RunFacts) -> list[Figure]:
    if not facts.points and not facts.path:
        return []
    held_out = [{**row, "name": plan_name(row["label"])} for row in facts.uniform if row["label"] != "base"]
    data = {"points": facts.points, "path": facts.path, "held_out": held_out}
    found = []
    for metric in facts.metrics:
        for x, title in (("bits", "bits a weight"), ("share", "share of weights compressed")):
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
        f"{metric}:Q", title=TITLES[metric], scale=y_scale, axis=_decades(values) if logarithmic else alt.Axis()
    )
    numbers = [
        alt.Tooltip("bits:Q", title="bits a weight", format=".2f"),
        alt.Tooltip("share:Q", title="share", format=".1%"),
        *(alt.Tooltip(f"{m}:Q", title=m.upper(), format=".4~g") for m in facts.metrics),
    ]
    edge = [alt.Tooltip("edge:N", title="last choice"), alt.Tooltip("num_compressed:Q", title="components"), *numbers]
    points = _named("points").mark_circle(size=9, opacity=0.3, color=_FAINT, clip=True, aria=False)
    line = _named("path").mark_line(
        color=PALETTE[0], strokeWidth=2, point=alt.OverlayMarkDef(size=22, color=PALETTE[0])
    )
    held_out = _named("held_out").encode(x=at_x, y=at_y, tooltip=[alt.Tooltip("name:N", title="held out"), *numbers])
    whose = alt.condition("datum.label === 'plan'", alt.value(PALETTE[0]), alt.value(PALETTE[5]))
    layers = [
        points.encode(x=at_x, y=at_y, tooltip=edge),
        line.encode(x=at_x, y=at_y, order="step:Q", tooltip=[alt.Tooltip("step:Q"), *edge]),
        held_out.encode(color=whose).mark_point(shape="diamond", size=90, filled=True, opacity=1),
        _beside(held_out.transform_filter("datum.label != 'plan'"), "right", PALETTE[5]),
        _beside(held_out.transform_filter("datum.label == 'plan'"), "left", PALETTE[0]),
    ]
    description = f"{TITLES[metric]} of every candidate against {x_title}"
    return _sized(alt.layer(*layers), _PLOT_HEIGHT, description)


def _beside(points: Any, align: Literal["left", "right"], colour: str) -> Any:
    """Names of points, in their colour, on the side where there is room."""
    dx = -9 if align == "right" else 9
    return points.mark_text(align=align, dx=dx, dy=-4, fontSize=11, color=colour).encode(text="name:N")


def _decades(values: Sequence[float]) -> Any:
    """An axis with ticks at powers of ten, and between them where there are few."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    return alt.Axis(values=[step * 10.0**power for power in range(low, high + 1) for step in steps], format="~g")


# Divergence


def _survival_figures(facts: RunFacts) -> list[Figure]:
    if not facts.survival:
        return []
    rows = [{**row, "label": plan_name(row["label"])} for row in facts.survival]
    return [Figure("divergence", "survival", _survival(rows, "survival"), {"survival": rows})]


def _survival(rows: Sequence[Row], name: str) -> Any:
    labels = list(dict.fromkeys(row["label"] for row in rows))
    legend = alt.Legend(title=None, orient="bottom", columns=3, symbolSize=300)
    chart = (
        _named(name)
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
    return _sized(chart, 260, "Share of held-out prompts whose text is still the base model's, by tokens generated")


# Interaction


def _interaction_figures(facts: RunFacts) -> list[Figure]:
    if not facts.sums:
        return []
    metric = facts.sums[0]["metric"]
    sums = [row for row in facts.sums if row["sum"] > 0 and row["measured"] > 0]
    if not sums:
        return []
    values = [row[key] for row in sums for key in ("sum", "measured")]
    low, high = min(values), max(values)
    scale, axis = alt.Scale(type="log", domain=[low, high], nice=False), _decades(values)
    points = (
        _named("sums")
        .mark_circle(size=18, opacity=0.7, aria=False)
        .encode(
            x=alt.X("sum:Q", title=f"sum of its components' {metric.upper()}, each alone", scale=scale, axis=axis),
            y=alt.Y("measured:Q", title=f"measured {TITLES[metric]}", scale=scale, axis=axis),
            color=alt.Color("num_compressed:Q", legend=_ramp_legend("components compressed")),
            tooltip=[
                alt.Tooltip("num_compressed:Q", title="components"),
                alt.Tooltip("sum:Q", title="sum of parts", format=".3~g"),
                alt.Tooltip("measured:Q", title="measured", format=".3~g"),
            ],
        )
    )
    diagonal = (
        _named("diagonal")
        .mark_line(strokeDash=[4, 4], color=_FAINT, strokeWidth=1)
        .encode(x=alt.X("a:Q", scale=scale, axis=axis), y=alt.Y("a:Q", scale=scale, axis=axis))
    )
    description = "Measured damage of plans against the sum of their components' damages"
    chart = _sized(alt.layer(diagonal, points), _PLOT_HEIGHT, description)
    return [Figure("interaction", "interaction", chart, {"sums": sums, "diagonal": [{"a": low}, {"a": high}]})]


# The tree


def _tree_figures(facts: RunFacts) -> list[Figure]:
    if not facts.nodes:
        return []
    fates = ["chosen", "kept", "dropped"]
    colour = alt.Color(
        "fate:N",
        scale=alt.Scale(domain=fates, range=[PALETTE[0], PALETTE[1], _FAINT]),
        legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1, symbolSize=60),
    )
    x = alt.X("step:Q", title="round", scale=alt.Scale(nice=False, padding=10), axis=alt.Axis(grid=False))
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
    nodes = _named("nodes").encode(x=x, y=y, color=colour, tooltip=tooltip)
    edges = _named("edges").mark_rule(strokeWidth=1.2, clip=True, aria=False)
    zoomable = alt.layer(
        nodes.transform_filter("datum.fate == 'dropped'").mark_circle(size=10, opacity=0.4, clip=True, aria=False),
        edges.encode(x=x, y=y, x2="step2:Q", y2="rank2:Q", color=colour),
        nodes.transform_filter("datum.fate != 'dropped'").mark_circle(size=32, opacity=1, clip=True, aria=False),
    ).add_params(alt.selection_interval(bind="scales", name="zoom"))
    chart = _sized(zoomable, 340, "The tree of plans: rounds by rank, kept plans joined")
    return [Figure("tree", "tree", chart, {"nodes": facts.nodes, "edges": facts.edges})]


# Sparsity


def _sparsity_figures(facts: RunFacts) -> list[Figure]:
    """What each component loses, how quality falls from round to round, and what training regains."""
    if not any(row["pruned"] for row in facts.plan_rows):
        return []
    kinds = kinds_of(facts.plan_rows)
    cells = _plan_cells(facts.plan_rows)
    chart = _layers_by_kinds("pruned", cells, kinds).encode(
        color=alt.Color(
            "pruned:Q", scale=alt.Scale(domain=[0, 1]), legend=_ramp_legend("share of weights pruned", (0, 0.5, 1))
        ),
        tooltip=[alt.Tooltip("component:N"), alt.Tooltip("scheme:N"), alt.Tooltip("pruned:Q", format=".1%")],
    )
    chart = _sized(chart, _ROW_HEIGHT * len(kinds), "Heat map of layers by kinds: the share of weights that is pruned")
    found = [Figure("sparsity", "pruned", chart, {"pruned": cells})]
    path = [row for row in facts.path if row["sparsity"] and row.get(facts.rank_by) is not None]
    if len(path) > 1:
        found.append(Figure("sparsity", "rounds", _rounds(facts.rank_by), {"path": facts.path}))
    if facts.losses:
        found.append(Figure("sparsity", "losses", _losses(), {"losses": facts.losses}))
    return found


def _rounds(metric: str) -> Any:
    chart = (
        _named("path")
        .mark_line(color=PALETTE[0], strokeWidth=2, point=alt.OverlayMarkDef(size=40, color=PALETTE[0]))
        .encode(
            x=alt.X("sparsity:Q", title="sparsity after the round", axis=alt.Axis(format="%", grid=False)),
            y=alt.Y(f"{metric}:Q", title=TITLES[metric], scale=alt.Scale(zero=False)),
            order="step:Q",
            tooltip=[
                alt.Tooltip("step:Q", title="round"),
                alt.Tooltip("sparsity:Q", format=".1%"),
                alt.Tooltip(f"{metric}:Q", title=metric.upper(), format=".4~g"),
            ],
        )
    )
    return _sized(chart, 220, f"{TITLES[metric]} after each round, against sparsity")


def _losses() -> Any:
    chart = (
        _named("losses")
        .mark_line(strokeWidth=1.2, aria=False)
        .encode(
            x=alt.X("step:Q", title="training step", axis=alt.Axis(grid=False)),
            y=alt.Y("loss:Q", title="training loss (nats a token)", scale=alt.Scale(zero=False)),
            color=alt.Color("round:N", legend=alt.Legend(title=None, orient="bottom")),
            tooltip=[alt.Tooltip("round:N"), alt.Tooltip("step:Q"), alt.Tooltip("loss:Q", format=".4~g")],
        )
    )
    return _sized(chart, 220, "Loss of the trainings between rounds, by step")


# Sweeps


def _sweep_figures(facts: RunFacts) -> list[Figure]:
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
    axis = _decades(values) if logarithmic else alt.Axis()
    whose = ["this run", "another run", "uniform plan"]
    x = alt.X(
        "bits:Q",
        title="bits a weight",
        scale=alt.Scale(zero=False, nice=False, padding=12),
        axis=alt.Axis(grid=False, format="~g", tickCount=8),
    )
    y = alt.Y(f"{metric}:Q", title=TITLES[metric], scale=scale, axis=axis)
    points = _named("sweep").encode(
        x=x,
        y=y,
        color=alt.Color(
            "whose:N",
            scale=alt.Scale(domain=whose, range=[PALETTE[0], PALETTE[1], _FAINT]),
            legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1),
        ),
        tooltip=[
            alt.Tooltip("name:N", title="plan"),
            alt.Tooltip("bits:Q", title="bits a weight", format=".2f"),
            *(alt.Tooltip(f"{m}:Q", title=m.upper(), format=".4~g") for m in ("fdt", "sdt", "kl")),
        ],
    )
    line = _named(f"front-{metric}").mark_line(color=_FAINT, strokeWidth=1.2, strokeDash=[4, 4], aria=False)
    chart = alt.layer(
        line.encode(x=x, y=y, order="bits:Q"),
        points.mark_point(filled=True, opacity=1, size=70, cursor="pointer"),
    )
    return _sized(
        chart, _PLOT_HEIGHT, f"{TITLES[metric]} of every run's plan on the same held-out prompts, against size"
    )


# Two runs


def compared_plans(rows: Sequence[Row], runs: tuple[str, str]) -> list[Figure]:
    """Where two plans choose alike, and where not. `rows` as `comparison.plan_differences` gives them."""
    if not rows:
        return []
    choices = ["dense in both", "the same scheme", "different schemes", *(f"only in {run}" for run in runs)]
    scale = alt.Scale(domain=choices, range=[_DENSE, PALETTE[4], PALETTE[3], PALETTE[0], PALETTE[1]])
    kinds = kinds_of(rows)
    cells = list({(row["layer"], row["kind"]): row for row in rows}.values())
    chart = _layers_by_kinds("choices", cells, kinds).encode(
        color=alt.Color("choice:N", scale=scale, legend=alt.Legend(title=None, orient="bottom", columns=3)),
        tooltip=[
            alt.Tooltip("component:N"),
            alt.Tooltip("scheme:N", title=runs[0]),
            alt.Tooltip("other_scheme:N", title=runs[1]),
        ],
    )
    description = "Heat map of layers by kinds: where the two plans choose alike"
    return [Figure("plans", "plans", _sized(chart, _ROW_HEIGHT * len(kinds), description), {"choices": cells})]


def compared_course(paths: Sequence[tuple[str, Sequence[Row]]], metrics: Sequence[str]) -> list[Figure]:
    """The decisions of runs, a line each, by their metrics on their own prompts."""
    rows = [{**row, "run": run} for run, path in paths for row in path]
    if not rows:
        return []
    runs = [run for run, _ in paths]
    found = []
    for metric in metrics:
        values = [row[metric] for row in rows if row.get(metric) is not None]
        logarithmic = metric in ("kl", "sdt") and bool(values) and min(values) > 0
        scale = alt.Scale(type="log", nice=False) if logarithmic else alt.Scale(zero=False)
        axis = _decades(values) if logarithmic else alt.Axis()
        chart = (
            _named("paths")
            .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18), aria=False)
            .encode(
                x=alt.X(
                    "bits:Q",
                    title="bits a weight",
                    scale=alt.Scale(reverse=True, zero=False, nice=False, padding=8),
                    axis=alt.Axis(format="~g", grid=False, tickCount=8),
                ),
                y=alt.Y(f"{metric}:Q", title=TITLES[metric], scale=scale, axis=axis),
                color=alt.Color("run:N", sort=runs, legend=alt.Legend(title=None, orient="bottom")),
                order="step:Q",
                tooltip=[
                    alt.Tooltip("run:N"),
                    alt.Tooltip("step:Q"),
                    alt.Tooltip("edge:N", title="choice"),
                    alt.Tooltip("bits:Q", format=".2f"),
                    alt.Tooltip(f"{metric}:Q", title=metric.upper(), format=".4~g"),
                ],
            )
        )
        chart = _sized(chart, _PLOT_HEIGHT, f"{TITLES[metric]} of both runs' decisions against bits a weight")
        found.append(Figure("course", f"courses-{metric}", chart, {"paths": rows}, metric.upper()))
    return found


def compared_survival(plans: Sequence[tuple[str, Sequence[Row]]]) -> list[Figure]:
    """How long texts stay the base model's, under the plans of runs."""
    rows = [{**row, "label": run} for run, curve in plans for row in curve]
    return [Figure("divergence", "survivals", _survival(rows, "survivals"), {"survivals": rows})] if rows else []
