"""Two compared models as one page: the verdict, values beside the base model's own noise, where texts part, and the
most divergent prompts side by side."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from dtmsearch.analysis.model_comparison import ModelComparison, Value, value_text
from dtmsearch.core.evaluation import Continuation
from dtmsearch.report.charts.drawing import Figure, named, save, sized
from dtmsearch.report.charts.quality import survival
from dtmsearch.report.extra import altair as alt
from dtmsearch.report.facts import Row
from dtmsearch.report.writing import page_data, places, render, side_by_side

_TITLES = {
    "fdt": ("FDT", "tokens before the first divergence; higher is better"),
    "sdt": ("SDT", "divergent tokens a prompt"),
    "flips": ("flips", "share of positions with another choice"),
    "kl": ("KL", "nats per token, of OTHER's probabilities from BASE's"),
    "dppl": ("DPPL", "OTHER's perplexity on BASE's text"),
    "ppl": ("PPL", "OTHER's perplexity on human text"),
    "ppl_base": ("PPL of BASE", "BASE's perplexity on human text"),
    "ppl_ratio": ("PPL ratio", "OTHER's to BASE's, paired over prompts"),
}
_TILES = ("fdt", "flips", "kl", "ppl_ratio")
# Bars of a histogram.
_BARS = 24


def write_model_comparison(found: ModelComparison, out: Path, figures_folder: Path | None = None) -> list[Path]:
    """Write the page to `out`, whole or not at all, and its figures into a folder; the files written. Raises
    `UserError` when a library of the extra `report` is missing."""
    text, drawn = model_comparison_page(found)
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return [out] + ([] if figures_folder is None else save(drawn, figures_folder))


def model_comparison_page(found: ModelComparison) -> tuple[str, list[Figure]]:
    """The HTML text about two models, and its figures."""
    drawn = _figures(found)
    context = {
        "found": found,
        "verdict": found.verdict,
        "tiles": [_tile(found, name) for name in _TILES if name in found.values],
        "rows": [
            {
                "title": title,
                "says": says,
                "value": value_text(name, found.values[name]),
                "floor": value_text(name, found.floor[name]) if name in found.floor else "",
            }
            for name, (title, says) in _TITLES.items()
            if name in found.values
        ],
        "percentiles": [(_percentile(name), f"{value:.4g}") for name, value in found.kl_percentiles.items()],
        "texts": [side_by_side(_row(text), ("BASE", "OTHER")) for text in found.texts],
        "places": places(drawn),
        "live": None,
    }
    return render("models.html", context, page_data(drawn)), drawn


def _tile(found: ModelComparison, name: str) -> tuple[str, str, str]:
    """(value, what it is, what it stands beside)."""
    mean, _, span = value_text(name, found.values[name]).partition(" [")
    floor = f"BASE itself: {_short(name, found.floor[name])}" if name in found.floor else ""
    return mean, _TITLES[name][0] + (f", 95% interval {span.rstrip(']').replace(', ', ' to ')}" if span else ""), floor


def _short(name: str, value: Value) -> str:
    return value_text(name, value).partition(" [")[0]


def _percentile(name: str) -> str:
    return {"50": "median", "100": "most"}.get(name, f"{name}%")


def _row(text: Continuation) -> Row:
    """A written prompt as rows of the store's table are."""
    base, own = text.base, text.own
    pairs = enumerate(zip(base.tokens, own.tokens, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), min(len(base.tokens), len(own.tokens)))
    sides = {
        f"{name}_{field}": list(getattr(side, field))
        for name, side in (("base", base), ("own", own))
        for field in ("tokens", "pieces", "margins")
    }
    return {"prompt": text.prompt, "prompt_text": text.prompt_text, "diverges_at": at, **sides}


def _figures(found: ModelComparison) -> list[Figure]:
    curves = (("OTHER", found.survival), ("BASE itself", found.base_survival))
    rows = [
        {"label": label, "token": token, "same": same} for label, curve in curves for token, same in enumerate(curve)
    ]
    drawn = [Figure("divergence", "survival", survival(rows, "survival"), {"survival": rows})]
    kl = found.per_prompt.get("kl")
    if kl is not None and max(kl) > 0.0:
        drawn.append(_histogram(list(kl)))
    return drawn


def _histogram(kl: list[float]) -> Figure:
    """Prompts by their KL, in bars of equal ratio, for it spans decades."""
    least = min(value for value in kl if value > 0.0)
    low, high = math.log10(least), math.log10(max(kl))
    edges = np.logspace(low, max(high, low + 0.1) + 1e-9, _BARS + 1)
    counts, _ = np.histogram(np.maximum(kl, least), edges)
    rows = [
        {"from": float(edges[at]), "to": float(edges[at + 1]), "prompts": int(count), "ground": 0}
        for at, count in enumerate(counts)
        if count
    ]
    chart = (
        named("kl")
        .mark_bar(aria=False)
        .encode(
            x=alt.X(
                "from:Q",
                title="KL of a prompt (nats per token)",
                scale=alt.Scale(type="log", nice=False),
                axis=alt.Axis(format="~g", grid=False, tickCount=6),
            ),
            x2="to:Q",
            y=alt.Y("prompts:Q", title="prompts", axis=alt.Axis(format=",d", tickMinStep=1)),
            y2="ground:Q",
            tooltip=[
                alt.Tooltip("from:Q", format=".3~g"),
                alt.Tooltip("to:Q", format=".3~g"),
                alt.Tooltip("prompts:Q"),
            ],
        )
    )
    return Figure("kl", "kl", sized(chart, 200, "Prompts by their KL from BASE"), {"kl": rows})
