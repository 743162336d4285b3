"""Quality against size, against text length, against the sum of parts: the course of a search, how long texts stay the
base model's, how damages add up, and the plans of a whole store.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtmsearch.core.metric_registry import METRICS
from dtmsearch.report.charts.drawing import (
    DASHES,
    FAINT,
    PALETTE,
    PLAN_COLOUR,
    PLOT_HEIGHT,
    RUN_COLOURS,
    Figure,
    counts,
    decades,
    metric_axis,
    named,
    plan_name,
    ramp_legend,
    sized,
    title_of,
)
from dtmsearch.report.charts.scheme_colours import colour_of
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import Row, RunFacts

# A chart of fewer points than this says nothing that a number does not.
_FEWEST_POINTS = 3


def course_figures(facts: RunFacts) -> list[Figure]:
    """Size against quality along the search."""
    if facts.ranking or not _goes_somewhere(facts):
        return []
    held_out = [row | labelled(row["label"]) for row in facts.uniform if row["label"] != "base"]
    data = {"points": facts.points, "path": facts.path, "held_out": held_out}
    found = []
    for metric in facts.metrics:
        for x, title in (("bits", "bits per weight"), ("share", "share of weights compressed")):
            chart = _course(facts, metric, x, title)
            found.append(Figure("course", f"course-{metric}-{x}", chart, data, f"{metric.upper()}|{title}"))
    return found


def _goes_somewhere(facts: RunFacts) -> bool:
    """Whether decisions lead from size to size: plans of one size are a clump, a decision alone is a point."""
    sizes = {round(row["bits"], 2) for row in facts.path}
    return len(sizes) > 2


def _course(facts: RunFacts, metric: str, x: str, x_title: str) -> Any:
    # Bits fall as a search goes on: its time runs from left to right in either picture.
    x_scale = alt.Scale(reverse=x == "bits", zero=False, nice=False, padding=8)
    x_axis = alt.Axis(format="%" if x == "share" else "~f", grid=False, tickCount=8)
    at_x = alt.X(f"{x}:Q", title=x_title, scale=x_scale, axis=x_axis)
    shown = (*facts.points, *facts.path, *(row for row in facts.uniform if row["label"] != "base"))
    values = [row[metric] for row in shown if row.get(metric) is not None]
    logarithmic = metric in ("kl", "sdt") and min(values) > 0
    y_scale = alt.Scale(type="log", nice=False) if logarithmic else alt.Scale(zero=False)
    axis = metric_axis(metric, values, logarithmic)
    at_y = alt.Y(f"{metric}:Q", title=title_of(metric), scale=y_scale, axis=axis)
    numbers = [
        alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
        alt.Tooltip("share:Q", title="share", format=".1%"),
        *(alt.Tooltip(f"{m}:Q", title=m.upper(), format=".4~g") for m in facts.metrics),
    ]
    edge = [alt.Tooltip("edge:N", title="last choice"), alt.Tooltip("num_compressed:Q", title="components"), *numbers]
    points = named("points").mark_circle(size=9, opacity=0.3, color=FAINT, clip=True, aria=False)
    line = named("path").mark_line(
        color=PLAN_COLOUR, strokeWidth=2, point=alt.OverlayMarkDef(size=22, color=PLAN_COLOUR)
    )
    held_out = named("held_out").encode(x=at_x, y=at_y, tooltip=[alt.Tooltip("name:N", title="held out"), *numbers])
    layers = [
        points.encode(x=at_x, y=at_y, tooltip=edge),
        line.encode(x=at_x, y=at_y, order=alt.Order("step:Q"), tooltip=[alt.Tooltip("step:Q"), *edge]),
    ]
    if facts.uniform:
        layers += [
            held_out.encode(color=alt.Color("colour:N", scale=None)).mark_point(
                shape="diamond", size=90, filled=True, opacity=1
            ),
            *_named_beside(held_out, facts, x),
        ]
    description = f"{title_of(metric)} of every candidate against {x_title}"
    return sized(alt.layer(*layers), PLOT_HEIGHT, description)


def _named_beside(points: Any, facts: RunFacts, x: str) -> list[Any]:
    """Names of the plan and of uniform plans, the plan's to its right, theirs to their left where there is room. Rounds
    have their names in the table, and would lie on each other here."""
    labels = [
        row["label"]
        for row in facts.uniform
        if row["label"] == "plan" or row["label"].startswith(("uniform", "preset"))
    ]
    places = {row["label"]: row[x] for row in facts.uniform}
    drawn = [row[x] for row in (*facts.points, *facts.path, *facts.uniform) if row.get("label") != "base"]
    least, span = min(drawn), max(max(drawn) - min(drawn), 1e-9)
    found = []
    for align, dx in (("left", 9), ("right", -9)):
        at_left = [
            (places[label] - least) / span > 0.7 if x == "bits" else (places[label] - least) / span < 0.3
            for label in labels
        ]
        own = [n for n, left in zip(labels, at_left, strict=True) if (n == "plan" or left) == (align == "left")]
        if own:
            named_ones = points.transform_filter(alt.FieldOneOfPredicate("label", own))
            text = named_ones.mark_text(align=align, dx=dx, dy=-4, fontSize=11)
            found.append(text.encode(text=alt.Text("name:N")))
    return found


def held_out_figures(facts: RunFacts) -> list[Figure]:
    """The plan and uniform ones by size and quality on held-out prompts, each uniform one in its scheme's colour."""
    rows = [row | labelled(row["label"]) for row in facts.uniform if row["label"] != "base"]
    found = []
    for metric in facts.metrics:
        shown = [row for row in rows if row.get(metric) is not None]
        if len(shown) < 2:
            continue
        shown = named_apart(shown, metric)
        values = [row[metric] for row in shown]
        logarithmic = metric in ("kl", "sdt") and min(values) > 0
        scale = alt.Scale(type="log", padding=18) if logarithmic else alt.Scale(zero=False, padding=18)
        name = f"sizes-{metric}"
        at_x = alt.X(
            "bits:Q",
            title="bits per weight",
            scale=alt.Scale(zero=False, padding=45),
            axis=alt.Axis(grid=False, format="~f", tickCount=6),
        )
        axis = metric_axis(metric, values, logarithmic)
        base = named(name).encode(
            x=at_x,
            y=alt.Y(f"{metric}:Q", title=title_of(metric), scale=scale, axis=axis),
            tooltip=[
                alt.Tooltip("name:N", title="plan"),
                alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
                alt.Tooltip(f"{metric}:Q", title=metric.upper(), format=".4~g"),
            ],
        )
        whose = alt.Shape("whose:N", scale=alt.Scale(domain=["this plan", "other"], range=["diamond", "circle"]))
        chart = alt.layer(
            base.mark_point(filled=True, opacity=1, size=110).encode(
                color=alt.Color("colour:N", scale=None), shape=whose.legend(None)
            ),
            *written(base, shown),
        )
        description = f"{title_of(metric)} of plans on held-out prompts, against bits per weight"
        found.append(Figure("sizes", name, sized(chart, 260, description), {name: shown}, metric.upper()))
    return found


def written(points: Any, rows: Sequence[Row]) -> list[Any]:
    """Names of the points that have any (`named_apart`): inward of those at the sides; that of the plan below it."""
    found = []
    for side, dx in (("left", -6), ("center", 0), ("right", 6)):
        for whose, dy in (("other", -13), ("this plan", 17)):
            if any(row["named"] and (row["side"], row["whose"]) == (side, whose) for row in rows):
                own = points.transform_filter(f"datum.named && datum.side === '{side}' && datum.whose === '{whose}'")
                text = own.mark_text(align=side, dx=dx, dy=dy, fontSize=11, aria=False)
                found.append(text.encode(text=alt.Text("name:N")))
    return found


def named_apart(rows: Sequence[Row], metric: str) -> list[Row]:
    """Rows of which those are `named` whose names do not lie on another's: the plan, and of others about as large as
    each other the best. `side`: how a name is aligned that stays within the picture."""
    higher = metric in METRICS and METRICS[metric].higher_is_better
    ordered = sorted(rows, key=lambda row: (row["whose"] != "this plan", -row[metric] if higher else row[metric]))
    least = min(row["bits"] for row in rows)
    span = max(row["bits"] for row in rows) - least
    taken: list[float] = []
    found = []
    for row in ordered:
        is_plan = row["whose"] == "this plan"  # its name stands below it, those of others above
        named_here = is_plan or all(abs(row["bits"] - at) >= span / 8 for at in taken)
        taken += [row["bits"]] if named_here and not is_plan else []
        place = (row["bits"] - least) / span if span else 0.5
        side = "left" if place < 0.15 else "right" if place > 0.85 else "center"
        found.append({**row, "named": named_here, "side": side})
    return found[::-1]  # the plan is drawn last, on top


def labelled(label: str) -> Row:
    """How a validated plan is drawn: its name, its colour, and the dashes of a line; the same wherever it is."""
    kind, _, scheme = label.partition(":")
    is_scheme = kind.startswith("uniform") and bool(scheme)
    colour = colour_of(scheme) if is_scheme else PLAN_COLOUR if label == "plan" else FAINT
    return {"name": plan_name(label), "colour": colour, "whose": "this plan" if label == "plan" else "other"}


def survival_figures(facts: RunFacts) -> list[Figure]:
    """The share of prompts that have not diverged, by position."""
    if not facts.survival:
        return []
    rows = [{**row, **labelled(row["label"]), "label": plan_name(row["label"])} for row in facts.survival]
    return [Figure("divergence", "survival", survival(rows, "survival"), {"survival": rows})]


def survival(rows: Sequence[Row], name: str) -> Any:
    """Lines in the colours of their rows, where they have any, and each in dashes of its own."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    own = {row["label"]: row["colour"] for row in rows if "colour" in row}
    palette = [own.get(label, RUN_COLOURS[at % len(RUN_COLOURS)]) for at, label in enumerate(labels)]
    legend = alt.Legend(title=None, orient="bottom", columns=3, symbolSize=300, labelLimit=220)
    chart = (
        named(name)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("token:Q", title="tokens generated", scale=alt.Scale(nice=False), axis=counts()),
            y=alt.Y("same:Q", title="texts still the base model's", axis=alt.Axis(format="%")),
            color=alt.Color("label:N", sort=labels, scale=alt.Scale(domain=labels, range=palette), legend=legend),
            strokeDash=alt.StrokeDash(
                "label:N",
                sort=labels,
                scale=alt.Scale(domain=labels, range=[DASHES[at % len(DASHES)] for at in range(len(labels))]),
                legend=legend,
            ),
            tooltip=[
                alt.Tooltip("label:N", title="plan"),
                alt.Tooltip("token:Q", title="after token"),
                alt.Tooltip("same:Q", title="still the same", format=".1%"),
            ],
        )
    )
    return sized(chart, 260, "Share of held-out prompts whose text is still the base model's, by tokens generated")


def interaction_figures(facts: RunFacts) -> list[Figure]:
    """What components cost together against the sum of what each costs alone."""
    if not facts.sums:
        return []
    metric = facts.sums[0]["metric"]
    sums = [row for row in facts.sums if row["sum"] > 0 and row["measured"] > 0]
    if len({(row["sum"], row["measured"]) for row in sums}) < _FEWEST_POINTS:
        return []
    sizes = {row["num_compressed"] for row in sums}
    shade = alt.Color("num_compressed:Q", legend=ramp_legend("components compressed"))
    values = [row[key] for row in sums for key in ("sum", "measured")]
    low, high = min(values), max(values)
    scale, axis = alt.Scale(type="log", domain=[low, high], nice=False), decades(values)
    points = (
        named("sums")
        .mark_circle(size=18, opacity=0.7, aria=False)
        .encode(
            x=alt.X("sum:Q", title=f"sum of its components' {metric.upper()}, each alone", scale=scale, axis=axis),
            y=alt.Y("measured:Q", title=f"measured {title_of(metric)}", scale=scale, axis=axis),
            color=shade if len(sizes) > 1 else alt.value(PALETTE[0]),
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


def store_figures(rows: Sequence[Row]) -> list[Figure]:
    """The same of a whole store: a choice for each set of held-out prompts that more plans than one share."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["reference_id"], []).append(row)
    found = []
    # Those that most plans share come first.
    for at, group in enumerate(own for own in sorted(groups.values(), key=len, reverse=True) if len(own) > 1):
        prompts = f"{at + 1}: {Path(group[0]['model']).name}, {group[0]['num_prompts']} prompts"
        for metric in ("fdt", "sdt", "kl"):
            own = [row for row in group if row[metric] is not None]
            if own:
                data = {f"plans-{at}": group, f"front-{at}-{metric}": [row for row in own if metric in row["fronts"]]}
                chart = _sweep(own, metric, *data)
                found.append(Figure("sweep", f"sweep-{at}-{metric}", chart, data, f"{prompts}|{metric.upper()}"))
    return found


def _sweep(rows: Sequence[Row], metric: str, plans: str = "sweep", front: str | None = None) -> Any:
    values = [row[metric] for row in rows]
    logarithmic = metric != "fdt" and min(values) > 0
    scale = alt.Scale(type="log", nice=False, padding=12) if logarithmic else alt.Scale(zero=False)
    axis = metric_axis(metric, values, logarithmic)
    owners = {"this run": (PLAN_COLOUR, "diamond"), "another run": (PALETTE[1], "square")}
    owners |= {"a run": (PALETTE[1], "square"), "uniform plan": (FAINT, "circle")}
    whose = [name for name in owners if any(row["whose"] == name for row in rows)]
    x = alt.X(
        "bits:Q",
        title="bits per weight",
        scale=alt.Scale(zero=False, nice=False, padding=12),
        axis=alt.Axis(grid=False, format="~f", tickCount=8),
    )
    y = alt.Y(f"{metric}:Q", title=title_of(metric), scale=scale, axis=axis)
    points = named(plans).encode(
        x=x,
        y=y,
        color=alt.Color(
            "whose:N",
            scale=alt.Scale(domain=whose, range=[owners[name][0] for name in whose]),
            legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1),
        ),
        shape=alt.Shape("whose:N", scale=alt.Scale(domain=whose, range=[owners[name][1] for name in whose])),
        tooltip=[
            alt.Tooltip("name:N", title="plan"),
            alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
            *(alt.Tooltip(f"{m}:Q", title=m.upper(), format=".4~g") for m in ("fdt", "sdt", "kl")),
        ],
    )
    line = named(front or f"front-{metric}").mark_line(color=FAINT, strokeWidth=1.2, strokeDash=[4, 4], aria=False)
    chart = alt.layer(
        line.encode(x=x, y=y, order=alt.Order("bits:Q")),
        points.mark_point(filled=True, opacity=1, size=70, cursor="pointer"),
    )
    return sized(
        chart, PLOT_HEIGHT, f"{title_of(metric)} of every run's plan on the same held-out prompts, against size"
    )
