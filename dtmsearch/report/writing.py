"""A report as one HTML page that needs nothing else: text, tables, and charts drawn by scripts that it carries.

All that comes from a store is escaped: by the template where it is text, as JSON where it is data. Knows how a page is
put together, nothing of how its facts were found.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from dtmsearch import __version__
from dtmsearch.analysis.failure import failed_evaluations, headline
from dtmsearch.analysis.format import components, counted, duration, number, plain, with_error, with_interval
from dtmsearch.analysis.metric_text import metric_number
from dtmsearch.analysis.verdict import ValidationRow
from dtmsearch.core.statistics import PairedDifference
from dtmsearch.report.charts import Figure, figures, plan_name, save, schemes_of, title_of
from dtmsearch.report.charts.heatmaps import MOST_COLOURS
from dtmsearch.report.charts.scheme_colours import by_bits
from dtmsearch.report.extra import jinja2, vl_convert
from dtmsearch.report.facts import Row, RunFacts, ceiling_of, gather, interval, per_prompt, recipe_command
from dtmsearch.store.store import ResultStore


def write_report(store: ResultStore, run: str, out: Path, figures_folder: Path | None = None) -> list[Path]:
    """Write a run's page to `out`, and its figures into a folder; the files written.

    Raises `UserError` when the store has no such run, or a library of the extra `report` is missing.
    """
    facts = gather(store, run)
    drawn = figures(facts)
    out.write_text(page(store, facts, drawn), encoding="utf-8")
    return [out] + ([] if figures_folder is None else save(drawn, figures_folder))


def page(store: ResultStore, facts: RunFacts, drawn: list[Figure], live: str | None = None) -> str:
    """The whole HTML text of a run's report; `live` as `render` has it."""
    summary = facts.summary
    context = {
        "facts": facts,
        "summary": summary,
        "held_out": _held_out_rows(store, facts),
        "places": places(drawn),
        "components": _component_rows(facts),
        "alone": schemes_of(facts.sensitivity) or by_bits(row["scheme"] for row in facts.story.prices),
        "alone_in": facts.rank_by if facts.sensitivity else "kl",
        "failed": _failed(facts),
        "recipe": recipe_command(summary.run, store.url),
        "resume": f"dtmsearch resume {shlex.quote(summary.run)} --store {shlex.quote(store.url)}",
        "solve": f"dtmsearch solve {shlex.quote(summary.run)} --bits BITS --store {shlex.quote(store.url)}",
        "vanished": [row["component"] for row in facts.plan_rows if row["pruned"] == 1.0],
        "texts": [side_by_side(row) for row in facts.texts],
        "unmeasured": _unmeasured(facts),
        "many_schemes": len({row["scheme"] for row in facts.plan_rows}) > MOST_COLOURS,
        "titles": {metric: title_of(metric) for metric in facts.metrics},
        "tiles": _tiles(facts),
        "store": store.url,
        "live": live,
    }
    return render("run.html", context, page_data(drawn) | {"store": store.url})


def page_data(drawn: Iterable[Figure]) -> dict[str, Any]:
    """What a page's script draws: the charts, and the rows that they name."""
    drawn = list(drawn)
    return {
        "figures": {figure.name: figure.spec for figure in drawn},
        "datasets": {name: _columns(rows) for figure in drawn for name, rows in figure.data.items()},
    }


def render(template: str, context: dict[str, Any], data: dict[str, Any]) -> str:
    """A page from its template, with the charts' library, our script and its data inside. Only these two scripts run:
    the page's own policy names them by their hashes, and forbids every request. A page that a server gives has `live`
    in its context, the path at which its script asks how far runs are (`-`: it asks nothing)."""
    scripts = [_library(), _asset("page.js")] + ([_asset("live.js")] if context.get("live") else [])
    text: str = (
        _templates()
        .get_template(template)
        .render(
            **context,
            version=__version__,
            style=_safe(_asset("page.css")),
            scripts=[_safe(script) for script in scripts],
            hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
            data=_safe(_json(data)),
        )
    )
    return text


@cache
def _templates() -> Any:
    """Templates, each compiled once, with what they write values by."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Callable[..., Any]] = {
        "duration": duration,
        "number": lambda value: "-" if value is None else number(value),
        "percent": lambda value: "-" if value is None else f"{value:.1%}",
        "count": lambda value: f"{value:,}",
        "counted": counted,
        "metric": lambda value, name: "-" if value is None else metric_number(name, value),
        "mean": lambda said: said.partition(" [")[0],
        "span": lambda said: "".join(said.partition(" [")[1:]).strip(),
        "tokens": lambda value: f"{value:,}" if value < 1e6 else f"{value / 1e6:.1f} million",
        "steady": lambda value: "-" if value is None else f"{value:#.4g}".rstrip("."),
        "ticked": lambda text: [(at % 2 == 1, part) for at, part in enumerate(text.split("`"))],
        "plan_name": plan_name,
        "choice_parts": _choice_parts,
        "blanks": _runs,
    }
    environment.filters |= filters
    return environment


def _safe(text: str) -> Any:
    """Text of our own, or escaped already."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 (never text from a store)


def _json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever the strings in it are."""
    text = json.dumps(plain(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows as columns, numbers with as many digits as a picture shows: a third of the bytes."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [_short(row.get(name)) for row in rows] for name in names}


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _asset(name: str) -> str:
    return (files("dtmsearch.report") / "page" / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # Inside an HTML page nothing may look like the script's end, nor hide what follows.
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


# What the tables show


def _held_out_rows(store: ResultStore, facts: RunFacts) -> list[Row]:
    """Each validated plan with its values and their intervals over prompts, and how far the plan is ahead."""
    lists = per_prompt(store, facts.record, facts.summary)
    length = ceiling_of(store, facts.record, held_out=True)
    rows = []
    for row in facts.summary.validation:
        values = lists.get(row.label, {})
        spans = {
            metric: interval(values[column], metric, length) if values.get(column) is not None else None
            for metric, column in (("fdt", "fdt"), ("sdt", "sdt"), ("kl", "kl_list"))
        }
        rows.append({"row": row, "spans": {m: _span(s, m) for m, s in spans.items()}, "ahead": _ahead(row.fdt_vs_plan)})
    return rows


def _span(found: PairedDifference | None, metric: str) -> str:
    if found is None:
        return "-"
    digits = {"fdt": 1, "sdt": 2, "kl": 4}[metric]
    if not found.is_known:
        return f"{found.mean:.{digits}f}"
    return with_interval(found.mean, found.low, found.high, digits)


def _ahead(difference: PairedDifference | None) -> str:
    if difference is None:
        return ""
    if not difference.is_known:
        return f"{difference.mean:+.1f} (too few prompts to say)"
    return with_interval(difference.mean, difference.low, difference.high, 1, sign="+")


def _tiles(facts: RunFacts) -> list[tuple[str, str, str]]:
    """The headline's numbers: (value, what it is, what it stands beside)."""
    summary, tiles = facts.summary, []
    if summary.share is None:  # of a search without a plan: what leads it is shown below
        return []
    if summary.bits_per_weight is not None:
        dense = facts.components[0]["dense_bits"] if facts.components else 16
        tiles.append((f"{summary.share:.1%}", "of the weights compressed", components(summary.num_compressed)))
        tiles.append((f"{summary.bits_per_weight:.2f}", "bits per weight", _beside(facts, dense)))
        active = summary.active_bits_per_weight
        if active is not None:
            tiles.append((f"{active:.2f}", "bits per weight that a token reads", f"{dense} in the base model"))
    if facts.size_mb is not None and facts.dense_size_mb is not None:
        beside = f"{facts.dense_size_mb:.3g} MB in the base model"
        tiles.append((f"{facts.size_mb:.3g} MB", "of searched components", beside))
    plan, rival = (next((r for r in summary.validation if r.label == label), None) for label in ("plan", summary.rival))
    for metric in dict.fromkeys((summary.rank_by, "fdt", "sdt", "kl")):
        value, other = _value(plan, metric), _value(rival, metric)
        if value is not None:
            beside = "" if other is None or rival is None else f"{plan_name(rival.label)}: {other:.3g}"
            tiles.append((f"{value:.3g}", f"{metric.upper()}, held out", beside))
    return tiles


def _beside(facts: RunFacts, dense: int) -> str:
    """What a weight of the searched components takes in the base model, and in the source that this comes from."""
    if not facts.summary.source:
        return f"{dense} in the base model"
    weights = sum(row["num_weights"] for row in facts.components)
    own = sum(row["source_bits"] or row["num_weights"] * dense for row in facts.components) / weights
    return f"{own:.2f} in the source, {dense} unquantized"


def _value(row: ValidationRow | None, metric: str) -> float | None:
    return None if row is None or row.summary is None else row.summary.metrics.get(metric)


def places(drawn: list[Figure]) -> dict[str, dict[str, list[Figure]]]:
    """section -> choice -> figures that are shown together."""
    found: dict[str, dict[str, list[Figure]]] = {}
    for figure in drawn:
        found.setdefault(figure.section, {}).setdefault(figure.choice, []).append(figure)
    return found


def _choice_parts(choices: Iterable[str]) -> list[list[str]]:
    """What there is to choose from in each part of choices such as `KL|share`."""
    parts = zip(*(choice.split("|") for choice in choices), strict=True)
    return [list(dict.fromkeys(values)) for values in parts]


def _component_rows(facts: RunFacts) -> list[Row]:
    """The components of the plan with what each scheme does to them alone, for the table that a click filters."""
    alone: dict[str, dict[str, str]] = {}
    for row in facts.sensitivity:
        if row.get(facts.rank_by) is not None:
            alone.setdefault(row["component"], {})[row["scheme"]] = metric_number(facts.rank_by, row[facts.rank_by])
    if not facts.sensitivity:
        for row in facts.story.prices:
            alone.setdefault(row["component"], {})[row["scheme"]] = with_error(row["kl"], row["error"])
    return [{**row, "alone": alone.get(row["component"], {})} for row in facts.plan_rows]


def _unmeasured(facts: RunFacts) -> bool:
    """Whether a heat map of what compressing components costs has cells that nothing was measured of."""
    pairs = {(row["component"], row["scheme"]) for row in facts.sensitivity}
    return len(pairs) < len(facts.components) * len({scheme for _, scheme in pairs})


def _failed(facts: RunFacts) -> list[str]:
    """Everything that failed, in words: what ended the run, and evaluations."""
    summary = facts.summary
    ended = [headline(summary.message)] if summary.status == "failed" and summary.message else []
    return ended + failed_evaluations(facts.cost.failures)


# Whitespace that is shown as a mark of its own -> the mark's class.
_BLANKS = {" ": "sp", "\t": "tab", "\n": "nl", "\r": "cr", "\N{NO-BREAK SPACE}": "nbsp"}


def _runs(text: str) -> list[tuple[str, str]]:
    """A text as (class, characters): each blank by itself, the rest in one piece."""
    found: list[tuple[str, str]] = []
    for character in text:
        kind = _BLANKS.get(character, "")
        if kind == "" and found and found[-1][0] == "":
            found[-1] = "", found[-1][1] + character
        else:
            found.append((kind, character))
    return found


# Letters of the prompt's end, and tokens before the divergence, that are always in sight.
_CONTEXT_LETTERS, _CONTEXT_TOKENS, _TOKENS_AFTER = 240, 10, 8


def _excerpt(row: Row, side: str) -> Row:
    """What stands around the divergence in a text: the common tokens before it, the first that differs, those after;
    where few come before, the prompt's end too."""
    at, pieces = row["diverges_at"], row[f"{side}_pieces"]
    before = "".join(pieces[max(0, at - _CONTEXT_TOKENS) : at])
    if at < _CONTEXT_TOKENS:
        before = row["prompt_text"][-_CONTEXT_LETTERS // 2 :] + before
    first, after = (pieces[at : at + 1], pieces[at + 1 : at + 1 + _TOKENS_AFTER])  # none of a text that has ended
    return {"before": before, "first": "".join(first), "after": "".join(after)}


def side_by_side(row: Row, names: tuple[str, str] = ("base model", "compressed")) -> Row:
    """A prompt's two texts as lists of (piece, same, margin), equal up to the first divergence."""
    at = row["diverges_at"]
    sides = {}
    for side in ("base", "own"):
        tokens = zip(row[f"{side}_pieces"], row[f"{side}_tokens"], row[f"{side}_margins"], strict=True)
        other = row["own_tokens" if side == "base" else "base_tokens"]
        sides[side] = [
            {"piece": piece, "state": "same" if n < at else "first" if n == at else "after", "margin": margin}
            for n, (piece, token, margin) in enumerate(tokens)
            if n < len(other) or token is not None
        ]
    prompt = row["prompt_text"]
    shown: Row = {"prompt_end": prompt[-_CONTEXT_LETTERS:], "prompt_is_cut": len(prompt) > _CONTEXT_LETTERS}
    if at < len(row["base_tokens"]):
        shown["excerpts"] = list(zip(names, (_excerpt(row, "base"), _excerpt(row, "own")), strict=True))
    return {**row, **sides, **shown, "length": len(row["base_tokens"])}
