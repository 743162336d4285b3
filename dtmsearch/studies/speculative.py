"""What one pass says of a compressed model as a draft for its base, and which plan is the best draft of its size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture, spanned
from dtmsearch.core.drafting import DRAFT_TOKENS, DRAFTS, WIDTHS
from dtmsearch.core.statistics import mean_interval, paired_difference
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Measured, measured
from dtmsearch.studies.study import Part, PartRun, Study

# Draft lengths -> the metric that says what is accepted of them.
ACCEPTED = {length: "accepted" if length == DRAFT_TOKENS else f"accepted{length}" for length in sorted({*DRAFTS, 5})}
_RUNS = tuple(f"{what}{width}" for what in ("starts", "clear") for width in WIDTHS)
_BASE_BITS = 16.0


@dataclass(frozen=True)
class Widths:
    """How far it is from a start or a divergence to the next divergence: the share of widths of at least `at` tokens,
    as counted and as it would be if every token diverged independently of the others."""

    at: tuple[int, ...]
    counted: tuple[float, ...]
    memoryless: tuple[float, ...]


def widths_of(row: Measured, length: int) -> Widths:
    """Of a plan over continuations of a length. Widths without a start that has room for them are left out."""
    rate = float(row.values("sdt").mean()) / length
    known = [width for width in WIDTHS if row.values(f"starts{width}").sum() > 0]
    counted = [float(row.values(f"clear{width}").sum() / row.values(f"starts{width}").sum()) for width in known]
    return Widths(tuple(known), tuple(counted), tuple((1.0 - rate) ** width for width in known))


def speedup(accepted: float, draft_tokens: int, cost: float) -> float:
    """Tokens per time against plain decoding, where a pass of the base model over a draft takes what a token takes
    and each drafted token `cost` of that (Leviathan, Kalman and Matias, arXiv 2211.17192, theorem 3.8)."""
    return (accepted + 1.0) / (draft_tokens * cost + 1.0)


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """Widths, accepted tokens a step for each draft length, and the drafts that two searches have found."""
    by_label = {part.label: part for part in parts}
    said: list[str] = []
    tables: list[FoundTable] = []
    pictures: list[Picture] = []
    if "greedy" in by_label:
        part = by_label["greedy"]
        ladder = _ladder(store, part, (*ACCEPTED.values(), *_RUNS))
        rows = ladder.rows
        said += _said_of_widths(rows, part.file.prompts.continuation_tokens)
        tables += [_drafts("Greedy drafts", ladder), _widths(rows, part.file.prompts.continuation_tokens)]
        pictures += _pictures(rows, part.file.prompts.continuation_tokens)
    if "sampled" in by_label:
        tables.append(_drafts("Sampled drafts, temperature 1", _ladder(store, by_label["sampled"], ACCEPTED.values())))
    searched = [label for label in by_label if label in ("by-accepted", "by-kl")]
    found = {label: _judged(store, by_label[label]) for label in searched}
    if len(found) == 2:
        said.append(_which_is_better(*found.values()))
        tables.append(_searched(found))
    return Findings(tuple(said), tuple(tables), tuple(pictures))


@dataclass(frozen=True)
class _Ladder:
    """Plans that change something, mild ones first; what the base model's weights take, in bits each."""

    rows: list[Measured]
    base_bits: float


def _ladder(store: ResultStore, part: PartRun, metrics: Iterable[str]) -> _Ladder:
    rows = measured(store, part.run, ("fdt", "sdt", "kl", *metrics))
    changed = [row for row in rows if row.row["num_compressed"]]
    base = [float(row.row["bits_per_weight"]) for row in rows if not row.row["num_compressed"]]
    return _Ladder(sorted(changed, key=lambda row: float(row.values("kl").mean())), base[0] if base else _BASE_BITS)


def _drafts(title: str, ladder: _Ladder) -> FoundTable:
    found = []
    for row in ladder.rows:
        accepted = {length: float(row.values(name).mean()) for length, name in ACCEPTED.items()}
        cost = row.row["bits_per_weight"] / ladder.base_bits
        best = max(accepted, key=lambda length: speedup(accepted[length], length, cost))
        told = f"{speedup(accepted[best], best, cost):.2f} ({best})"
        means = f"{row.values('kl').mean():.3g}", f"{row.values('fdt').mean():.1f}"
        lengths = (f"{value:.2f}" for value in accepted.values())
        found.append((f"{row.row['bits_per_weight']:.2f}", *means, *lengths, told))
    columns = ("bits per weight", "KL", "FDT", *(f"of {length}" for length in ACCEPTED), "speed (best length)")
    note = (
        "Mean tokens accepted a step of drafts of each length, along the base model's continuations. Speed: tokens per "
        f"time against the base model alone, if a drafted token takes what its bits are of {ladder.base_bits:g} and a "
        "pass over a draft what a token takes; at the best of these lengths."
    )
    return FoundTable(title, columns, tuple(found), note)


def _widths(rows: Sequence[Measured], length: int) -> FoundTable:
    found = []
    for row in rows:
        widths = widths_of(row, length)
        cells = {
            at: f"{counted:.3f} ({guess:.3f})"
            for at, counted, guess in zip(widths.at, widths.counted, widths.memoryless, strict=True)
        }
        found.append((f"{row.values('kl').mean():.3g}", *(cells.get(width, "-") for width in WIDTHS)))
    note = "In brackets: if every token diverged with the plan's share of divergent tokens, whatever came before it."
    return FoundTable(
        "Share of widths between divergences of at least so many tokens",
        ("KL", *(str(width) for width in WIDTHS)),
        tuple(found),
        note,
    )


def _said_of_widths(rows: Sequence[Measured], length: int) -> list[str]:
    over = []
    for row in rows:
        widths, rate = widths_of(row, length), float(row.values("sdt").mean()) / length
        if rate > 0.0 and widths.at[:1] == (1,):
            over.append((1.0 - widths.counted[0]) / rate)
    if not over:
        return []
    return [
        f"The token after a divergence, or the first of a continuation, diverges {min(over):.2f} to {max(over):.2f} "
        f"times as often as any (median {np.median(over):.2f}, {len(over)} plans; 1 where they come independently)."
    ]


def _pictures(rows: Sequence[Measured], length: int) -> list[Picture]:
    chosen = rows[:: max(1, len(rows) // 4)]
    lines = [
        {"plan": f"KL {row.values('kl').mean():.2g}", "width": at, "share": counted}
        for row in chosen
        for at, counted in zip(widths_of(row, length).at, widths_of(row, length).counted, strict=True)
    ]
    drafts = [
        {
            "draft": f"of {draft}",
            "kl": float(row.values("kl").mean()),
            "accepted": float(row.values(name).mean()) / draft,
        }
        for row in rows
        for draft, name in ACCEPTED.items()
        if row.values("kl").mean() > 0.0
    ]
    return [
        Picture(
            "widths", "lines", lines, Axis("width", "tokens without a divergence", logarithmic=True),
            Axis("share", "share of widths", from_zero=True),
            "Share of widths between divergences of at least so many tokens", series="plan", choice="widths",
        ),
        Picture(
            "accepted", "dots", drafts, Axis("kl", "KL (nats per token)", logarithmic=True),
            Axis("accepted", "accepted share of a draft", from_zero=True),
            "Accepted share of drafts of several lengths against KL", series="draft", choice="accepted",
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Judged:
    """The plan that a search has found, beside the best of the uniform plans of at most its size (and 1%), on held-out
    prompts."""

    plan: Measured
    rival: Measured | None


def _judged(store: ResultStore, part: PartRun) -> _Judged:
    rows = measured(store, part.run, ("fdt", "sdt", "kl", "accepted"), purpose="validation")
    # The run may have ended with a uniform plan; asked is what the search came to.
    plan = next((row for row in rows if row.row["label"] == "plan"), None)
    if plan is None:
        raise UserError(f"run {part.run!r} has judged no plan: give it held-out text (--held-out)")
    most = 1.01 * plan.row["bits_per_weight"]
    others = [row for row in rows if row is not plan and row.row["num_compressed"] and row.has("accepted")]
    fitting = [row for row in others if row.row["bits_per_weight"] <= most]
    return _Judged(plan, max(fitting, key=lambda row: float(row.values("accepted").mean()), default=None))


def _which_is_better(by_accepted: _Judged, by_kl: _Judged) -> str:
    own, other = (found.plan.values("accepted") for found in (by_accepted, by_kl))
    paired = paired_difference(own, other, 0)
    apart = "more than" if paired.low > 0.0 else "less than" if paired.high < 0.0 else "not told apart from"
    return (
        f"On held-out prompts the plan that was found by accepted tokens has {own.mean():.3f} of {DRAFT_TOKENS} "
        f"accepted a step, {apart} the {other.mean():.3f} of the plan found by KL at the same size (difference "
        f"{spanned(paired.mean, paired.low, paired.high)})."
    )


def _searched(found: Mapping[str, _Judged]) -> FoundTable:
    rows = []
    for label, judged in found.items():
        for name, row in ((label, judged.plan), (f"{label}: best uniform plan of its size", judged.rival)):
            if row is None:
                continue
            accepted = mean_interval(row.values("accepted"), 0, (0.0, float(DRAFT_TOKENS)))
            values = (row.values(metric).mean() for metric in ("fdt", "sdt", "kl"))
            fdt, sdt, kl = values
            rows.append((name, f"{row.row['bits_per_weight']:.2f}", spanned(accepted.mean, accepted.low, accepted.high),
                         f"{fdt:.1f}", f"{sdt:.2f}", f"{kl:.3g}"))  # fmt: skip
    columns = ("plan", "bits per weight", f"accepted of {DRAFT_TOKENS}", "FDT", "SDT", "KL")
    return FoundTable("Drafts on held-out prompts", columns, tuple(rows), "95% intervals over prompts.")


def _search(metric: str) -> tuple[str, ...]:
    return (
        "search.strategy=evolution",
        f"search.rank_by={metric}",
        "search.metrics=[kl, accepted]",
        "search.schemes=[int3-g64, int4-g64, int5-g64]",
        "search.stop={bits_per_weight: 4.26}",
        "search.evolution={generations: 40}",
        "search.options={}",
    )


STUDY = Study(
    "speculative",
    "The compressed model as a draft",
    "How far is it between divergences, how many drafted tokens does the base model accept, and which plan is the best "
    "draft of its size?",
    conclude,
    (
        Part("greedy"),
        Part("sampled", ("search.decoding.temperature=1", f"search.metrics=[kl, {', '.join(ACCEPTED.values())}]")),
        Part("by-accepted", _search("accepted")),
        Part("by-kl", _search("kl")),
    ),
)
