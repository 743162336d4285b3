"""Two compared models as a terminal shows them, and as values for JSON."""

from __future__ import annotations

from typing import Any

from dtmsearch.analysis.format import plain
from dtmsearch.analysis.model_comparison import ModelComparison, value_text
from dtmsearch.analysis.serve_comparison import TITLES, ServeComparison
from dtmsearch.console.terminal_tables import table
from dtmsearch.core.statistics import PairedDifference

# Metric -> what it is called and says.
_ROWS = {
    "fdt": ("FDT", "tokens before the first divergence"),
    "sdt": ("SDT", "divergent tokens a prompt"),
    "flips": ("flips", "positions with another choice"),
    "kl": ("KL", "nats per token"),
    "dppl": ("DPPL", "perplexity of BASE's text"),
    "ppl": ("PPL", "perplexity of human text"),
    "ppl_base": ("PPL of BASE", "the same, of BASE"),
    "ppl_ratio": ("PPL ratio", "paired over prompts"),
}
_SHOWN_TOKENS = 12
_PROMPT_LETTERS = 60


def comparison_text(found: ModelComparison) -> str:
    """The verdict, both models, values with intervals beside the noise floor, percentiles of KL, and the most divergent
    prompts."""
    parts = [
        found.verdict,
        table(
            ["model", "name", "holds", "run"],
            [[role, each.name, each.holds, each.way] for role, each in (("BASE", found.base), ("OTHER", found.other))],
        ),
        table(["metric", "value [95% interval]", "BASE itself", "is"], value_rows(found)),
    ]
    if found.kl_percentiles:
        names = [_share(name) for name in found.kl_percentiles]
        parts.append(table(["KL at", *names], [["nats", *found.kl_percentiles.values()]]))
    if found.texts:
        parts.append(table(["prompt", "after", "BASE goes on", "OTHER goes on"], text_rows(found)))
    parts += [f"note: {note}" for note in found.notes]
    return "\n\n".join(parts)


def value_rows(found: ModelComparison) -> list[list[str]]:
    """(metric, value and interval, that of BASE against itself, meaning) of what was measured."""
    return [
        [title, value_text(name, found.values[name]), _floor(found, name), says]
        for name, (title, says) in _ROWS.items()
        if name in found.values
    ]


def _floor(found: ModelComparison, name: str) -> str:
    return value_text(name, found.floor[name]) if name in found.floor else ""


def _share(percentile: str) -> str:
    return "most" if percentile == "100" else "median" if percentile == "50" else f"{percentile}%"


def text_rows(found: ModelComparison) -> list[list[str]]:
    """Of each written prompt: its number, the position at which the texts part, and what either goes on with there."""
    rows = []
    for text in found.texts:
        at = diverges_at(text.base.tokens, text.own.tokens)
        shown = ["".join(side.pieces[at : at + _SHOWN_TOKENS]) or "(ends)" for side in (text.base, text.own)]
        rows.append([str(text.prompt), str(at), *shown])
    return rows


def diverges_at(base: tuple[int, ...], own: tuple[int, ...]) -> int:
    """The first position at which two continuations differ."""
    pairs = enumerate(zip(base, own, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(base), len(own)))


def comparison_values(found: ModelComparison) -> dict[str, Any]:
    """Everything, for programs: `kl_is` says whether KL is exact or a lower bound."""
    values: dict[str, Any] = plain(found)
    kl = found.values.get("kl")
    values["kl_is"] = None if kl is None else "lower bound" if kl.at_least else "exact"
    return {"verdict": found.verdict, **values}


def serve_check_text(found: ServeComparison) -> str:
    """The verdict, values beside the recorded ones, and the prompts that differ most."""
    rows = [
        [
            TITLES[name],
            value.recorded,
            value.served.mean,
            _span(value.difference),
            value.floor,
        ]
        for name, value in found.values.items()
    ]
    parts = [
        found.verdict,
        table(["tokens", "recorded", "served", "difference [95%]", "base moves by"], rows),
        f"{found.folder} and {found.base} in {found.dtype}; {found.expected}; {found.seconds:.0f} s",
    ]
    if found.examples:
        shown = [[str(e.prompt), str(e.recorded), str(e.served), e.base_text, e.served_text] for e in found.examples]
        parts.append(table(["prompt", "recorded", "served", "BASE goes on", "served"], shown))
    parts += [f"note: {note}" for note in found.notes]
    return "\n\n".join(parts)


def _span(difference: PairedDifference) -> str:
    if not difference.is_known:
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def serve_check_values(found: ServeComparison) -> dict[str, Any]:
    """Everything, for programs."""
    values: dict[str, Any] = plain(found)
    return {"outcome": found.outcome, "verdict": found.verdict, **values}
