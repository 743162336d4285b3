"""The rows of a study's searches, as arrays to reckon with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtmsearch.core.components import Component
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.statistics import mean_interval
from dtmsearch.store.store import ResultStore

Floats = NDArray[np.float64]
_COLUMNS = ("evaluation_id", "plan_id", "component", "scheme", "step", "purpose", "label", "status", "num_prompts")
_LARGEST_LOG = 700.0
_SIZES = ("num_compressed", "share", "bits_per_weight", "wall_seconds", "extra_metrics", "reference_id", "reused_from")


@dataclass(frozen=True)
class Measured:
    """An evaluation that came to something. `row` has the columns of the store; `component` and `scheme` are None
    unless one component alone was compressed."""

    row: dict[str, Any]

    @property
    def component(self) -> str | None:
        """The component, where it was alone."""
        name: str | None = self.row["component"]
        return name

    @property
    def scheme(self) -> str:
        """The scheme of that component."""
        return self.row["scheme"] or ""

    @property
    def plan_id(self) -> str:
        """The plan that was measured."""
        return str(self.row["plan_id"])

    def values(self, metric: str) -> Floats:
        """Its value on each prompt [num_prompts], of perplexities the logarithms."""
        return METRICS[metric].comparable(np.asarray(self.row[METRICS[metric].list_column]))

    def has(self, metric: str) -> bool:
        """Whether it was measured."""
        return self.row.get(METRICS[metric].list_column) is not None


def measured(store: ResultStore, run: str, metrics: Sequence[str], purpose: str = "search") -> list[Measured]:
    """The evaluations of a run that came to something, in recorded order, with the values of some metrics on each
    prompt."""
    lists = [METRICS[name].list_column for name in metrics]
    where = (pc.field("purpose") == purpose) & (pc.field("status") == "ok")
    table = store.table("evaluations", [*_COLUMNS, *_SIZES, *lists], run, where)
    return [Measured(row) for row in table.to_pylist()]


def components_of(store: ResultStore, manifest_id: str | None) -> dict[str, Component]:
    """Name -> component of a model, as far as its searches have them."""
    rows = store.table("components", ["manifest_id", "component", "layer", "kind", "rows", "cols"]).to_pylist()
    return {
        row["component"]: Component(row["component"], row["layer"], row["kind"], (row["rows"], row["cols"]))
        for row in rows
        if row["manifest_id"] == manifest_id
    }


def interval_of(
    values: Sequence[Floats], of_means: Callable[[Floats], float], resamples: int = 1_000, seed: int = 0
) -> tuple[float, float, float]:
    """What follows from the means over prompts of several values [num_prompts] each, with its 95% interval: percentiles
    over resampled prompts, the same for all values."""
    table = np.array(values, np.float64)
    random = np.random.default_rng(seed)
    weights = random.multinomial(table.shape[1], np.full(table.shape[1], 1.0 / table.shape[1]), resamples)
    drawn = [of_means(means) for means in weights @ table.T / table.shape[1]]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return of_means(table.mean(axis=1)), float(low), float(high)


def told(values: Floats, metric: str, length: int) -> str:
    """The mean of a metric's values on prompts (of perplexities, logarithms), as it is written, with its 95% interval.
    `length` is that of the continuations."""
    found = METRICS[metric]
    if found.mean == "geometric":
        mean = mean_interval(values, 0, (-math.inf, math.inf))
        ends = [math.exp(end) if end < _LARGEST_LOG else math.inf for end in (mean.mean, mean.low, mean.high)]
    else:
        mean = mean_interval(values, 0, found.limits(length))
        ends = [mean.mean, mean.low, mean.high]
    if not all(math.isfinite(end) for end in ends):
        return _short(ends[0])
    return f"{_short(ends[0])} [{_short(ends[1])}, {_short(ends[2])}]"


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10.0 else f"{value:.3g}"
