"""What the parts of a report's facts share: metrics as columns, damage, spots that can be told apart, intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dtmsearch.config.recorded_text import other_metrics_of
from dtmsearch.core.metric_registry import BUILT_IN, METRICS
from dtmsearch.core.metrics import value_limits
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import RunRecord
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.statistics import PairedDifference, mean_interval

Row = dict[str, Any]
# Candidates drawn at most: as many spots as a figure of a page's width has apart.
MOST_POINTS = 2_500
_INTERVAL_SEED = 0
DENSE_PLAN = Plan().id
# Attention first, then the feed-forward part, as they come in a layer; other kinds follow in order of name.
_KIND_ORDER = ("qkv", "q", "k", "v", "o", "router", "gate_up", "gate", "up", "down")


def column_of(metric: str) -> str:
    """The column of `evaluations` that holds a metric's value over all prompts; of a package that is not installed here
    as of any other."""
    return METRICS[metric].column if metric in METRICS else metric


def metrics_of(record: RunRecord) -> tuple[str, ...]:
    """The metrics that evaluations of a run may have: this package's, and those that its search file names."""
    return (*BUILT_IN, *other_metrics_of(record.config))


def plain(table: pa.Table, metrics: Sequence[str]) -> list[Row]:
    """Rows with metrics under their own names."""
    names = {"plan_id": "plan_id", "perturbation": "edge", "num_compressed": "num_compressed", "share": "share"}
    names |= {"bits_per_weight": "bits", "step": "step"} | {column_of(m): m for m in metrics}
    rows: list[Row] = table.select(list(names)).rename_columns(list(names.values())).to_pylist()
    return rows


def spread(table: pa.Table, x: str, y: str, most: int) -> pa.Table:
    """At most about `most` rows, one for each spot of an even grid over two columns that has any: what is left out
    would be drawn on top of what stays. Rows where either is null or infinite are left out."""
    xs, ys = (table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in (x, y))
    known = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    if len(known) <= most:
        return table.take(known)
    ranks = [_cells(values[known]) for values in (xs, ys)]
    for cells in (256, 192, 128, 96, 64, 48, 32):
        spots = (ranks[0] * cells).astype(np.int64) * (cells + 1) + (ranks[1] * cells).astype(np.int64)
        _, first = np.unique(spots, return_index=True)
        if len(first) <= most:
            break
    return table.take(known[np.sort(first)])


def _cells(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values from 0 to 1 between their extremes."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def kinds_of(components: Iterable[Row]) -> list[str]:
    """The kinds of components, as they come in a layer."""
    kinds = {row["kind"] for row in components}
    known = [kind for kind in _KIND_ORDER if kind in kinds]
    return known + sorted(kinds - set(known))


def damage(metric: str, value: float, ceiling: int | None) -> float:
    """How far a value is from that of a model that never diverges; perplexities stand for themselves."""
    if metric == "fdt":
        return (ceiling or 0) - value
    if metric not in METRICS or not METRICS[metric].higher_is_better:
        return value
    best = METRICS[metric].limits(ceiling)[1]
    return (best if math.isfinite(best) else 0.0) - value


def interval(values: Sequence[float], metric: str, ceiling: int | None) -> PairedDifference:
    """A mean of a metric over prompts with its 95% interval; `ceiling` is the continuations' length."""
    return mean_interval(np.asarray(values, np.float64), _INTERVAL_SEED, value_limits(metric, ceiling))


# Schemes are ordered by their bits per weight over a matrix of this shape, unquantized weights having 16.
_LARGE, _DENSE_BITS = (4096, 4096), 16


def bits_of(scheme: str) -> float:
    """Bits per weight over a large matrix. Raises `ValueError` for an unknown scheme."""
    return parse_scheme(scheme).stored_bits(_LARGE, _DENSE_BITS) / math.prod(_LARGE)
