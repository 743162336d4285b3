"""What each metric takes of a replica's time, on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture
from dtmsearch.core.statistics import mean_interval
from dtmsearch.errors import UserError
from dtmsearch.search.strategies.measuring import METRIC_SETS
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.evidence import components_of, measured
from dtmsearch.studies.study import PartRun, Study

# Of a set of metrics: the first evaluation, and one that the others' time is told by.
_FEWEST = 2
_NAMES = {
    (): "FDT, SDT, DPPL",
    ("kl",): "with KL",
    ("ppl",): "with PPL",
    ("kl", "ppl"): "with KL and PPL",
}


def _seconds(store: ResultStore, part: PartRun) -> dict[tuple[str, ...], list[float]]:
    """Set of metrics -> seconds of each of the study's own evaluations, in recorded order. Raises `UserError` where
    other runs have measured most of them."""
    taken: dict[tuple[str, ...], list[float]] = {}
    for row in measured(store, part.run, ()):
        # What another run measured was measured beside other work, from another layer on.
        if row.row["reused_from"] is None:
            taken.setdefault(tuple(sorted(row.row["extra_metrics"])), []).append(float(row.row["wall_seconds"]))
    if any(len(taken.get(metrics, ())) < _FEWEST for metrics in METRIC_SETS):
        raise UserError(
            f"run {part.run!r} times its own evaluations, and other runs of this store have measured most of them "
            "before: name a new store by --store"
        )
    return taken


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """Seconds of an evaluation in each set of metrics, and of the first, which makes what the set needs of the base
    model."""
    (part,) = parts
    prompts = part.file.prompts
    tokens = prompts.count * (prompts.prompt_tokens + prompts.continuation_tokens)
    rows, points, taken = [], [], _seconds(store, part)
    alone = float(np.median(taken[()][1:]))
    for metrics in METRIC_SETS:
        first, *others = taken[metrics]
        middle = float(np.median(others))
        over = mean_interval(np.array(others), 0, (0.0, np.inf))
        rows.append(
            (
                _NAMES[metrics],
                f"{middle:.4f}",
                f"{over.low:.4f} to {over.high:.4f}" if over.is_known else "-",
                f"{middle / alone:.2f}",
                f"{max(first - middle, 0.0):.3f}",
                f"{1e6 * middle / tokens:.1f}",
            )
        )
        points += [{"metrics": _NAMES[metrics], "seconds": seconds} for seconds in others]
    parameters = sum(each.num_weights for each in components_of(store, part.record.manifest_id).values())
    ratios = ", ".join(f"{row[0]} {row[3]}" for row in rows[1:])
    said = (
        f"On {prompts.count} prompts of {prompts.prompt_tokens} + {prompts.continuation_tokens} tokens, a model of "
        f"{parameters / 1e6:.1f} million weights in components: FDT, SDT and DPPL take {alone:.3f} s an evaluation; as "
        f"parts of that, {ratios}.",
    )
    table = FoundTable(
        "Seconds of an evaluation through all layers",
        (
            "metrics",
            "median",
            "95% interval of the mean",
            "of the first row",
            "once, for the base model",
            "us per token",
        ),
        tuple(rows),
        f"{len(taken[()]) - 1} plans that change the first layer, measured one at a time. KL keeps what goes into the "
        "base model's head at every predicted position and runs the head twice; PPL passes human text.",
    )
    picture = Picture(
        "seconds",
        "dots",
        points,
        Axis("metrics", "measured"),
        Axis("seconds", "seconds of an evaluation", from_zero=True),
        "Seconds of single evaluations by the metrics that they measure",
    )
    return Findings(said, (table,), (picture,))


STUDY = Study(
    "metric-cost",
    "What metrics cost",
    "How many seconds does each metric take on the same prompts?",
    conclude,
)
