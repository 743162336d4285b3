"""How many prompts make a ranking of components that another draw of prompts would repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture, Row, spanned
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.statistics import kendall_tau
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import Floats, measured
from dtmsearch.studies.study import Part, PartRun, Study

# Statistics of a component's values over prompts by which it is ranked, each the worse the larger.
Statistic = Callable[[Floats], Floats]
STABLE = 0.9
_SPLITS = 40
_FEWEST = 8
# A statistic that tells fewer pairs of components apart ranks nothing: tau would be of the few that it does.
_LEAST_TOLD_APART = 0.1


def _mean(values: Floats) -> Floats:
    found: Floats = values.mean(axis=1)
    return found


def _fdt75(values: Floats) -> Floats:
    found: Floats = -np.percentile(-values, 75, axis=1)
    return found


# name -> the metric whose losses [components, prompts] it is of, and how it follows from them
STATISTICS: Mapping[str, tuple[str, Statistic]] = {
    "KL": ("kl", _mean),
    "SDT": ("sdt", _mean),
    "FDT mean": ("fdt", _mean),
    "FDT 75th percentile": ("fdt", _fdt75),
    "DPPL": ("dppl", _mean),
}


def agreement(losses: Floats, statistic: Statistic, prompts: int, splits: int = _SPLITS, seed: int = 0) -> Floats:
    """Kendall's tau [splits] between the rankings of components by losses [components, prompts] on two disjoint draws
    of so many prompts; NaN where most of them are tied. Splits draw from the same prompts: their spread says how far
    one draw is off, no more."""
    random = np.random.default_rng((seed, prompts))
    found = []
    for _ in range(splits):
        order = random.permutation(losses.shape[1])
        halves = (order[:prompts], order[prompts : 2 * prompts])
        own = [statistic(losses[:, half]) for half in halves]
        ranks = min(map(_told_apart, own)) >= _LEAST_TOLD_APART
        found.append(kendall_tau(*own) if ranks else math.nan)
    return np.array(found)


def _told_apart(values: Floats) -> float:
    """The share of pairs with different values."""
    _, counts = np.unique(values, return_counts=True)
    return 1.0 - float((counts * (counts - 1)).sum()) / (len(values) * (len(values) - 1))


def prompts_needed(tau: float, prompts: int, wanted: float = STABLE) -> float:
    """How many prompts make two rankings agree by `wanted`, where so many make them agree by `tau`: the correlation of
    two noisy means falls with n / (n + k) for noise of k prompts (Spearman and Brown), and tau of what is about normal
    is 2 / pi times the arcsine of the correlation. Infinite where nothing agrees."""
    if tau <= 0.0 or math.isnan(tau):
        return math.inf
    if tau >= 1.0:
        return 0.0
    own, aim = (math.sin(math.pi * value / 2.0) for value in (tau, wanted))
    noise = prompts * (1.0 - own) / own
    return noise * aim / (1.0 - aim)


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """Agreement of rankings against the number of prompts; between metrics, lengths of prompts and of continuations."""
    tables, said, points, ranks = [], [], [], {}
    for part in parts:
        names, values = _losses(store, part)
        ranks[part.label] = dict(zip(names, _mean(values["kl"]), strict=True))
        rows, own_points, needs = _settling(part, values)
        points += own_points if part is parts[0] else []
        tables.append(_settling_table(part, rows))
        said.append(_sentence(part, needs))
    tables.append(_lengths_table(parts, ranks))
    tables.append(_values_table(_losses(store, parts[0])[1]))
    lines = Picture(
        "rankings-settle",
        "lines",
        points,
        Axis("prompts", "prompts of each ranking", logarithmic=True),
        Axis("tau", "Kendall's tau of two rankings on different prompts"),
        "How far two rankings of components on different prompts agree, against the number of prompts of each; spans "
        "hold 95% of splits",
        series="statistic",
        low="low",
        high="high",
    )
    return Findings(tuple(said), tuple(tables), (lines,))


def _losses(store: ResultStore, part: PartRun) -> tuple[list[tuple[str | None, str]], dict[str, Floats]]:
    """The components that were measured alone, with their schemes, as they were recorded; metric -> their losses
    [components, prompts]."""
    rows = [row for row in measured(store, part.run, ("fdt", "sdt", "dppl", "kl")) if row.component is not None]
    rows = [row for row in rows if row.row["num_prompts"] == part.file.prompts.count]
    if len(rows) < 3:
        raise UserError(f"run {part.run!r} has measured {len(rows)} components alone: 3 at least are ranked")
    losses = {
        name: np.array([METRICS[name].losses(np.asarray(row.row[METRICS[name].list_column])) for row in rows])
        for name in ("fdt", "sdt", "dppl", "kl")
    }
    return [(row.component, row.scheme) for row in rows], losses


def _settling(
    part: PartRun, values: Mapping[str, Floats]
) -> tuple[list[tuple[str, int, Floats]], list[Row], dict[str, float]]:
    count = values["kl"].shape[1]
    sizes = []
    size = count // 2
    while size >= _FEWEST:
        sizes.append(size)
        size //= 2
    rows, points, needs = [], [], {}
    for name, (metric, statistic) in STATISTICS.items():
        for size in reversed(sizes):
            found = agreement(values[metric], statistic, size)
            rows.append((name, size, found))
            mean, low, high = _mean_and_span(found)
            if not math.isnan(mean):
                points.append({"statistic": name, "prompts": size, "tau": mean, "low": low, "high": high})
        needs[name] = prompts_needed(_mean_and_span(found)[0], sizes[0])
    return rows, points, needs


def _mean_and_span(found: Floats) -> tuple[float, float, float]:
    """Of splits the mean, and what holds 95% of them; NaN where none ranks anything."""
    known = found[~np.isnan(found)]
    if not len(known):
        return math.nan, math.nan, math.nan
    low, high = np.percentile(known, (2.5, 97.5))
    return float(known.mean()), float(low), float(high)


def _settling_table(part: PartRun, rows: Sequence[tuple[str, int, Floats]]) -> FoundTable:
    sizes = list(dict.fromkeys(size for _, size, _ in rows))
    lines = []
    for name in STATISTICS:
        own = {size: found for row, size, found in rows if row == name}
        cells = [spanned(*_mean_and_span(own[size]), 2) for size in sizes]
        need = [prompts_needed(tau, sizes[-1]) for tau in _mean_and_span(own[sizes[-1]])]
        lines.append((name, *cells, f"{_number(need[0])} [{_number(need[2])}, {_number(need[1])}]"))
    return FoundTable(
        f"Agreement of two rankings on different prompts{_lengths(part)}",
        ("ranked by", *(f"{size} prompts" for size in sizes), f"prompts for tau {STABLE:g}"),
        tuple(lines),
        f"Kendall's tau, mean and 95% of {_SPLITS} splits; prompts needed are inferred from the largest split.",
    )


def _number(value: float) -> str:
    return "-" if math.isinf(value) else f"{value:,.0f}" if value < 1e4 else f"{value:.1e}"


def _lengths(part: PartRun) -> str:
    prompts = part.file.prompts
    return f", {prompts.prompt_tokens} + {prompts.continuation_tokens} tokens"


def _sentence(part: PartRun, needs: Mapping[str, float]) -> str:
    known = sorted((need, name) for name, need in needs.items() if math.isfinite(need))
    listed = ", ".join(f"{name} {_number(need)}" for need, name in known)
    nothing = [name for name, need in needs.items() if not math.isfinite(need)]
    said = f"Prompts for a ranking that agrees with another of its kind by tau {STABLE:g}{_lengths(part)}: {listed}."
    return said + (f" Nothing that other prompts would repeat is ranked by {' or '.join(nothing)}." if nothing else "")


def _lengths_table(parts: Sequence[PartRun], ranks: Mapping[str, Mapping[tuple[str | None, str], float]]) -> FoundTable:
    columns = [_lengths(part).removeprefix(", ") for part in parts]
    everywhere = sorted(set.intersection(*(set(own) for own in ranks.values())), key=str)
    by_part = {label: np.array([own[name] for name in everywhere]) for label, own in ranks.items()}
    rows = [
        (name, *(f"{kendall_tau(by_part[one.label], by_part[other.label]):.2f}" for other in parts))
        for name, one in zip(columns, parts, strict=True)
    ]
    return FoundTable("Rankings by KL on all prompts, between lengths (Kendall's tau)", ("", *columns), tuple(rows))


def _values_table(values: Mapping[str, Floats]) -> FoundTable:
    """How far a component's own value is off on a draw of prompts, and rankings by other metrics are from KL's."""
    count = values["kl"].shape[1]
    rows = []
    by_kl = _mean(values["kl"])
    for name, (metric, statistic) in STATISTICS.items():
        random = np.random.default_rng(0)
        drawn = np.array([statistic(values[metric][:, random.integers(count, size=count)]) for _ in range(200)])
        whole = statistic(values[metric])
        spread = float(np.median(drawn.std(axis=0)))
        between = float(whole.std())
        distinct = len(np.unique(np.round(whole, 9)))
        rows.append((name, f"{spread:.3g}", f"{between:.3g}", f"{distinct}", f"{kendall_tau(whole, by_kl):.2f}"))
    return FoundTable(
        f"A component's own value on {count} prompts",
        ("statistic", "standard error (median)", "spread between components", "different values", "tau with KL"),
        tuple(rows),
        "In the metric's own unit, of perplexities in nats; standard errors by resampling prompts. Where many "
        "components have one value, the statistic stands at its limit and ranks nothing.",
    )


STUDY = Study(
    "prompts",
    "How many prompts a ranking needs",
    "How do FDT's mean and 75th percentile, SDT, KL and the rankings by them settle with the number and length of "
    "prompts?",
    conclude,
    (
        Part(),
        Part("half-continuation", ("prompts.continuation_tokens=50",)),
        Part("quarter-prompt", ("prompts.prompt_tokens=25",)),
    ),
    least_prompts=2 * _FEWEST,
)
