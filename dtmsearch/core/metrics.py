"""Metrics of an evaluation over its prompts: their aggregates, and how plans rank by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from dtmsearch.core.evaluation import EvalResult, IntArray
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.metric_registry import first_divergent_token as first_divergent_token
from dtmsearch.core.metric_registry import perplexity as perplexity
from dtmsearch.core.metric_registry import share_of_divergent_tokens as share_of_divergent_tokens
from dtmsearch.core.statistics import PairedDifference as PairedDifference  # where they were, for those who look here
from dtmsearch.core.statistics import paired_difference as paired_difference

# Field of a summary that holds a metric of this package's own.
_FIELDS = {"fdt": "fdt_mean", "sdt": "sdt_mean", "dppl": "dppl", "ppl": "ppl", "kl": "kl"}


def value_limits(metric: str, continuation_tokens: int | None) -> tuple[float, float]:
    """What no prompt's value of a metric can leave (see `Metric.limits`); of continuations of unknown length (None),
    what a longer one could have."""
    return METRICS[metric].limits(continuation_tokens)


def difference_limits(metric: str, continuation_tokens: int | None) -> tuple[float, float]:
    """What no difference of two values of a metric on one prompt can leave."""
    low, high = value_limits(metric, continuation_tokens)
    return low - high, high - low


@dataclass(frozen=True)
class Summary:
    """An evaluation's values over all its prompts. Perplexities are those of all tokens together (geometric means);
    unmasked means count the positions at which the base model leaves its own continuation, too (see `EvalResult`);
    `others` are the metrics of other packages."""

    num_prompts: int
    fdt_mean: float
    fdt_p25: float
    fdt_p50: float
    fdt_p75: float
    sdt_mean: float
    dppl: float
    ppl: float | None
    kl: float | None
    fdt_unmasked_mean: float | None = None
    sdt_unmasked_mean: float | None = None
    others: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def metrics(self) -> dict[str, float]:
        """Metric -> its value, of those that were measured."""
        own = {name: getattr(self, where) for name, where in _FIELDS.items()}
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)

    def value(self, metric: str) -> float:
        """The value that a metric ranks by. Raises `ValueError` when it was not measured."""
        where = _FIELDS.get(metric)
        value: float | None = self.others.get(metric) if where is None else getattr(self, where)
        if value is None:
            raise ValueError(f"{metric} was not measured")
        return value


# Each result is summarized for its row in the store and for the strategy.
_SUMMARIES: WeakKeyDictionary[EvalResult, Summary] = WeakKeyDictionary()


def summarize(result: EvalResult) -> Summary:
    """The summary of a result over its prompts; made once for each result."""
    summary = _SUMMARIES.get(result)
    if summary is None:
        summary = _SUMMARIES[result] = _summarize(result)
    return summary


def _summarize(result: EvalResult) -> Summary:
    num_prompts = len(result.fdt)
    values = {name: METRICS[name].over_prompts(found) for name, found in result.metrics.items()}
    ordered = np.sort(result.fdt)
    return Summary(
        num_prompts=num_prompts,
        fdt_mean=values["fdt"],
        fdt_p25=_percentile(ordered, 0.25),
        fdt_p50=_percentile(ordered, 0.5),
        fdt_p75=_percentile(ordered, 0.75),
        sdt_mean=values["sdt"],
        dppl=values["dppl"],
        ppl=values.get("ppl"),
        kl=values.get("kl"),
        fdt_unmasked_mean=None if result.fdt_unmasked is None else int(result.fdt_unmasked.sum()) / num_prompts,
        sdt_unmasked_mean=None if result.sdt_unmasked is None else int(result.sdt_unmasked.sum()) / num_prompts,
        others={name: values[name] for name in result.others},
    )


def _percentile(ordered: IntArray, share: float) -> float:
    """As `np.percentile` gives it, which takes 100 microseconds: too long for every result of a replayed search."""
    below, part = divmod((len(ordered) - 1) * share, 1)
    at = int(below)
    low, high = int(ordered[at]), int(ordered[min(at + 1, len(ordered) - 1)])
    return low + (high - low) * part


def rank_key(summary: Summary, metric: str) -> tuple[float, ...]:
    """Sort key, best first: the metric, ties broken by mean FDT, then SDT, then divergent perplexity."""
    order = [metric, *(m for m in ("fdt", "sdt", "dppl") if m != metric)]
    return tuple(-summary.value(m) if METRICS[m].higher_is_better else summary.value(m) for m in order)
