from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dtmsearch.core.evaluation import EvalResult
from dtmsearch.core.metrics import (
    METRICS,
    Summary,
    first_divergent_token,
    perplexity,
    rank_key,
    share_of_divergent_tokens,
    summarize,
)

divergences = arrays.arrays(np.bool_, st.tuples(st.integers(1, 6), st.integers(1, 30)))


def result(fdt: list[int], sdt: list[int] | None = None, dppl: list[float] | None = None) -> EvalResult:
    return EvalResult(
        "request",
        fdt=np.array(fdt, np.int32),
        sdt=np.array(sdt or fdt, np.int32),
        dppl=np.array(dppl or [1.5] * len(fdt), np.float32),
    )


@given(divergences)
def test_fdt_lies_between_zero_and_the_length(diverged: np.ndarray) -> None:
    fdt = first_divergent_token(diverged)
    assert ((fdt >= 0) & (fdt <= diverged.shape[1])).all()


@given(divergences)
def test_nothing_diverges_before_the_first_divergent_token_and_there_it_does(diverged: np.ndarray) -> None:
    for row, first in zip(diverged, first_divergent_token(diverged), strict=True):
        assert not row[:first].any()
        assert first == len(row) or row[first]


@given(divergences)
def test_sdt_counts_divergent_tokens(diverged: np.ndarray) -> None:
    assert share_of_divergent_tokens(diverged).tolist() == [sum(map(bool, row)) for row in diverged]


@given(divergences)
def test_no_token_diverges_exactly_where_fdt_is_the_length(diverged: np.ndarray) -> None:
    whole = first_divergent_token(diverged) == diverged.shape[1]
    assert ((share_of_divergent_tokens(diverged) == 0) == whole).all()


@given(divergences)
def test_tokens_before_the_first_divergence_never_diverge(diverged: np.ndarray) -> None:
    together = first_divergent_token(diverged) + share_of_divergent_tokens(diverged)
    assert (together <= diverged.shape[1]).all()


@given(
    logits=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(2, 9)),
        elements=st.floats(-8, 8, width=32),
    ),
    data=st.data(),
)
def test_sdt_is_bounded_by_the_length_times_the_binary_logarithm_of_dppl(
    logits: np.ndarray, data: st.DataObject
) -> None:
    num_prompts, length, vocabulary = logits.shape
    chosen = data.draw(arrays.arrays(np.int64, (num_prompts, length), elements=st.integers(0, vocabulary - 1)))
    log_sum = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    nats = log_sum - np.take_along_axis(logits, chosen[..., None], -1)[..., 0]
    sdt = share_of_divergent_tokens(logits.argmax(-1) != chosen)
    dppl = perplexity(nats.astype(np.float32)).astype(np.float64)
    assert (sdt <= length * np.log2(dppl) + 1e-4 * length).all()


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 20)), elements=st.floats(0, 20, width=32)))
def test_perplexity_is_the_exponential_of_the_mean(nats: np.ndarray) -> None:
    literal = [math.exp(math.fsum(map(float, row)) / len(row)) for row in nats]
    assert perplexity(nats).tolist() == pytest.approx(literal, rel=1e-5)


def test_a_perplexity_too_large_to_write_is_infinite() -> None:
    assert perplexity(np.full((1, 4), 1000.0, np.float32)).tolist() == [math.inf]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40))
def test_the_percentiles_of_a_summary_are_those_of_numpy(fdt: list[int]) -> None:
    summary = summarize(result(fdt))
    assert [summary.fdt_p25, summary.fdt_p50, summary.fdt_p75] == np.percentile(fdt, (25, 50, 75)).tolist()


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40))
def test_the_mean_of_a_summary_is_that_of_numpy(fdt: list[int]) -> None:
    assert summarize(result(fdt)).fdt_mean == np.mean(fdt)


@given(st.lists(st.floats(1, 1e6, width=32), min_size=1, max_size=40))
def test_the_perplexity_of_a_summary_is_that_of_all_tokens_together(dppl: list[float]) -> None:
    nats = [math.log(value) for value in dppl]
    summary = summarize(result([1] * len(dppl), dppl=dppl))
    assert summary.dppl == pytest.approx(math.exp(math.fsum(nats) / len(nats)), rel=1e-9)


def test_one_infinite_perplexity_makes_the_summary_infinite() -> None:
    assert summarize(result([1, 2], dppl=[2.0, math.inf])).dppl == math.inf


def test_what_was_not_measured_is_no_number() -> None:
    assert (summarize(result([1])).kl, summarize(result([1])).ppl) == (None, None)


def test_ranking_by_what_was_not_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="kl was not measured"):
        rank_key(summarize(result([1])), "kl")


summaries = st.builds(
    Summary,
    num_prompts=st.just(8),
    fdt_p25=st.just(0.0),
    fdt_p50=st.just(0.0),
    fdt_p75=st.just(0.0),
    fdt_mean=st.integers(0, 3).map(float),
    sdt_mean=st.integers(0, 3).map(float),
    dppl=st.integers(1, 3).map(float),
    ppl=st.integers(1, 3).map(float),
    kl=st.integers(0, 3).map(float),
)


FIELDS = {"fdt": "fdt_mean", "sdt": "sdt_mean"}


def with_value(summary: Summary, metric: str, value: float) -> Summary:
    changes: dict[str, Any] = {FIELDS.get(metric, metric): value}
    return replace(summary, **changes)


@pytest.mark.parametrize("metric", METRICS)
@given(one=summaries, other=summaries, more=st.integers(1, 3))
def test_the_better_value_of_the_metric_ranks_first(metric: str, one: Summary, other: Summary, more: int) -> None:
    larger = with_value(other, metric, (one.value(metric) or 0.0) + more)
    assert (rank_key(larger, metric) < rank_key(one, metric)) == (metric == "fdt")


@pytest.mark.parametrize("metric", ["ppl", "kl", "dppl", "sdt"])
@given(one=summaries, other=summaries, more=st.integers(1, 3))
def test_ties_are_broken_by_mean_fdt(metric: str, one: Summary, other: Summary, more: int) -> None:
    tied = with_value(other, metric, one.value(metric) or 0.0)
    assert rank_key(with_value(tied, "fdt", one.fdt_mean + more), metric) < rank_key(one, metric)


def test_a_tie_in_fdt_is_broken_by_sdt() -> None:
    few, many = summarize(result([5, 5], [1, 1])), summarize(result([5, 5], [2, 2]))
    assert rank_key(few, "fdt") < rank_key(many, "fdt")
