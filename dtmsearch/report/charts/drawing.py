"""What the figures of a report share: names of metrics, colours, sizes, scales; and how they become files.

Charts name their rows, which stand beside them, so that figures share what they show. Channels are objects
(`alt.Order("step:Q")`): a string in their place is looked up in all of Vega-Lite's schema, at 5 ms each. Colours are
left to the theme, which the page sets for light and dark and `save` for paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dtmsearch.core.metric_registry import METRICS
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.extra import vl_convert
from dtmsearch.report.facts import Row

# A metric as an axis names it, with its unit.
_TITLES = {
    "fdt": "FDT (tokens before the first divergence)",
    "sdt": "SDT (divergent tokens a prompt)",
    "dppl": "DPPL (perplexity on the base model's text)",
    "ppl": "PPL (perplexity on human text)",
    "kl": "KL (nats per token)",
}
ROW_HEIGHT = 22
PLOT_HEIGHT = 300
# Figures for paper: pixels wide, and pixels of a PNG for each of them.
_PAPER_WIDTH = 560
_PNG_SCALE = 3.0
# The palette of Okabe and Ito, which the colour-blind tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
FAINT, DENSE_COLOUR = "#8a8f98", "#a7abb2"
# The plan of the page; schemes have colours of their own (`scheme_colours`), which are blue, green and brown.
PLAN_COLOUR = "#D55E00"
# Two runs of a comparison.
RUN_COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#E69F00")
# Dashes by which lines are told apart without colour, the first a whole line.
DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (7, 3), (2, 2), (9, 2, 2, 2), (4, 4), (12, 3), (1, 4))
_PAPER = {
    "background": "white",
    "font": "Helvetica, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#e8e8e8", "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"},
    "legend": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"},
    "title": {"fontSize": 12, "anchor": "start", "fontWeight": "normal"},
    "text": {"fill": "#333333"},
    "range": {"category": list(PALETTE), "heatmap": {"scheme": "yelloworangebrown"}, "ramp": {"scheme": "viridis"}},
}


def title_of(metric: str) -> str:
    """A metric as an axis names it, with its unit."""
    if metric in _TITLES or metric not in METRICS:
        return _TITLES.get(metric, metric)
    title, unit = METRICS[metric].title or metric, METRICS[metric].unit
    return f"{title} ({unit})" if unit else title


def damage_title_of(metric: str) -> str:
    """The same for what a compression costs."""
    if metric not in METRICS or not METRICS[metric].higher_is_better:
        return title_of(metric)
    unit = METRICS[metric].unit
    return f"{METRICS[metric].title or metric} lost" + (f" ({unit})" if unit else "")


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

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The chart in Vega-Lite. That it is right by its schema is for tests to check: it takes longer than all else
        of a page."""
        found: dict[str, Any] = self.chart.to_dict(validate=False)
        return found


def save(found: Iterable[Figure], folder: Path) -> list[Path]:
    """Write each figure as SVG and PNG for paper into `folder`, which is made; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in found:
        spec = figure.spec | {"config": _PAPER, "datasets": {name: list(rows) for name, rows in figure.data.items()}}
        spec["width"] = _PAPER_WIDTH
        svg, png = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        svg.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
        png.write_bytes(vl_convert.vegalite_to_png(spec, scale=_PNG_SCALE))
        written += [svg, png]
    return written


def plan_name(label: str) -> str:
    """A validated plan as a reader calls it."""
    kind, _, rest = label.partition(":")
    if kind.startswith("uniform"):
        return f"uniform {rest}"
    if kind == "preset":
        return f"llama.cpp's {rest}"
    if kind.startswith("round-"):  # of a search in rounds: `round-2:35.0%:trained`
        pruned, _, trained = rest.partition(":")
        return f"round {kind.removeprefix('round-')}, {pruned} pruned" + (", trained" if trained else "")
    return {"plan": "this plan", "base": "base model"}.get(label, label)


class _Shared(alt.Chart):
    """A chart whose copies have its channels in common. Layers are copied twice with all that is in them, down to each
    key that is not set: half of the time of a report."""

    def __deepcopy__(self, _: Any) -> Any:
        return self.copy(deep=False)


def named(name: str) -> Any:
    """A chart over data that the page holds under a name."""
    return _Shared(alt.NamedData(name))


def unchecked() -> AbstractContextManager[None]:
    """Within, no part of a chart is checked by Vega-Lite's schema as it is made; see `Figure.spec`."""
    found: AbstractContextManager[None] = alt.utils.schemapi.debug_mode(False)
    return found


def sized(chart: Any, height: int, description: str) -> Any:
    """A chart as wide as its place, `height` pixels high, described for those who cannot see it."""
    chart.width, chart.height, chart.description = "container", height, description  # `properties` would copy it
    return chart


def ramp_legend(title: str, values: Sequence[float] = ()) -> Any:
    """A legend below the chart for a colour that runs with a number."""
    return alt.Legend(
        title=title,
        orient="bottom",
        gradientLength=180,
        gradientThickness=8,
        titleLimit=400,
        format=".2~g",
        values=list(values) or alt.Undefined,
    )


def counts(values: Sequence[float] = ()) -> Any:
    """An axis of what is counted (tokens, rounds, steps): its ticks are whole numbers. Where `values` are means that
    lie nearer to each other than two whole numbers, ticks between them are needed."""
    if len(values) and max(values) - min(values) < 2:
        return alt.Axis()
    return alt.Axis(format=",d", tickMinStep=1, grid=False) if not len(values) else alt.Axis(format=",d", tickMinStep=1)


def metric_axis(metric: str, values: Sequence[float], logarithmic: bool) -> Any:
    """The axis of a metric's values."""
    if logarithmic:
        return decades(values)
    return counts(values) if metric in ("fdt", "sdt") else alt.Axis()


def decades(values: Sequence[float]) -> Any:
    """An axis with ticks at powers of ten, and between them where there are few."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    return alt.Axis(values=[step * 10.0**power for power in range(low, high + 1) for step in steps], format="~g")
