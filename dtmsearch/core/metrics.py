"""Divergent-token metrics on arrays, and their aggregates over prompts.

Definitions: "Divergent Token Metrics" (arXiv 2311.01544), section 3. Arrays run over prompts first, then positions of
the continuation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import EvalResult, FloatArray, IntArray
from dtmsearch.core.statistics import PairedDifference as PairedDifference  # where they were, for those who look here
from dtmsearch.core.statistics import paired_difference as paired_difference

METRICS = ("fdt", "sdt", "dppl", "ppl", "kl")
HIGHER_IS_BETTER = {"fdt"}


def value_limits(metric: str, continuation_tokens: int | None) -> tuple[float, float]:
    """What no prompt's value of a metric can leave: FDT and SDT count tokens of the continuation (None: of unknown
    length), KL and the logarithms of perplexities are no less than 0."""
    if metric not in ("fdt", "sdt") or continuation_tokens is None:
        return 0.0, math.inf
    return 0.0, float(continuation_tokens)


def difference_limits(metric: str, continuation_tokens: int | None) -> tuple[float, float]:
    """What no difference of two values of a metric on one prompt can leave."""
    low, high = value_limits(metric, continuation_tokens)
    return low - high, high - low


def first_divergent_token(diverged: NDArray[np.bool_]) -> IntArray:
    """FDT [num_prompts]: position of the first divergent token; the continuation's length where there is none."""
    length = diverged.shape[1]
    first: IntArray = np.where(diverged.any(axis=1), diverged.argmax(axis=1), length).astype(np.int32)
    return first


def share_of_divergent_tokens(diverged: NDArray[np.bool_]) -> IntArray:
    """SDT [num_prompts]: how many tokens diverge, as the paper counts it (divide by the length for a share)."""
    count: IntArray = diverged.sum(axis=1).astype(np.int32)
    return count


def perplexity(negative_log_likelihood: FloatArray) -> FloatArray:
    """exp of the mean over positions of nats [num_prompts, positions]: [num_prompts], infinite where it overflows."""
    with np.errstate(over="ignore"):
        value: FloatArray = np.exp(negative_log_likelihood.mean(axis=1, dtype=np.float64)).astype(np.float32)
    return value


@dataclass(frozen=True)
class Summary:
    """An evaluation's values over all its prompts. Perplexities are those of all tokens together (geometric means);
    unmasked means count the positions at which the base model leaves its own continuation, too (see `EvalResult`)."""

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

    def value(self, metric: str) -> float:
        """The value that `metric` (one of METRICS) ranks by. Raises `UserError` when it was not measured."""
        value = {
            "fdt": self.fdt_mean,
            "sdt": self.sdt_mean,
            "dppl": self.dppl,
            "ppl": self.ppl,
            "kl": self.kl,
        }[metric]
        if value is None:
            raise ValueError(f"{metric} was not measured")
        return value


# Each result is summarized for its row in the store and for the strategy.
_SUMMARIES: WeakKeyDictionary[EvalResult, Summary] = WeakKeyDictionary()


def summarize(result: EvalResult) -> Summary:
    summary = _SUMMARIES.get(result)
    if summary is None:
        summary = _SUMMARIES[result] = _summarize(result)
    return summary


def _summarize(result: EvalResult) -> Summary:
    num_prompts = len(result.fdt)
    ordered = np.sort(result.fdt)
    return Summary(
        num_prompts=num_prompts,
        fdt_mean=int(ordered.sum()) / num_prompts,
        fdt_p25=_percentile(ordered, 0.25),
        fdt_p50=_percentile(ordered, 0.5),
        fdt_p75=_percentile(ordered, 0.75),
        sdt_mean=int(result.sdt.sum()) / num_prompts,
        dppl=_geometric_mean(result.dppl),
        ppl=None if result.ppl is None else _geometric_mean(result.ppl),
        kl=None if result.kl is None else float(result.kl.mean(dtype=np.float64)),
        fdt_unmasked_mean=None if result.fdt_unmasked is None else int(result.fdt_unmasked.sum()) / num_prompts,
        sdt_unmasked_mean=None if result.sdt_unmasked is None else int(result.sdt_unmasked.sum()) / num_prompts,
    )


def _percentile(ordered: IntArray, share: float) -> float:
    """As `np.percentile` gives it, which takes 100 microseconds: too long for every result of a replayed search."""
    below, part = divmod((len(ordered) - 1) * share, 1)
    at = int(below)
    low, high = int(ordered[at]), int(ordered[min(at + 1, len(ordered) - 1)])
    return low + (high - low) * part


def _geometric_mean(values: FloatArray) -> float:
    return math.exp(float(np.log(values, dtype=np.float64).sum()) / len(values))


def rank_key(summary: Summary, metric: str) -> tuple[float, ...]:
    """Sort key, best first: the metric, ties broken by mean FDT, then SDT, then divergent perplexity."""
    order = [metric, *(m for m in ("fdt", "sdt", "dppl") if m != metric)]
    return tuple(-summary.value(m) if m in HIGHER_IS_BETTER else summary.value(m) for m in order)
