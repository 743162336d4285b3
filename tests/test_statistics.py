"""Intervals hold their level for losses as they are: skewed, heavy-tailed, rare. Simulated, all data sets at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from dtmsearch.core.statistics import FEWEST, Values, mean_interval, mean_intervals, paired_difference

SETS, RESAMPLES = 1_000, 1_000
# What a rate of 5% can look like in so many sets, once in a thousand times.
MOST_FALSE = 0.05 + 3.1 * math.sqrt(0.05 * 0.95 / SETS)


def rare(generator: np.random.Generator, shape: tuple[int, int]) -> Values:
    return np.asarray(generator.random(shape) < 0.03, np.float64)


# name -> (losses, their true mean)
LOSSES: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], Values], float]] = {
    "normal": (lambda g, shape: g.normal(size=shape), 0.0),
    "t3": (lambda g, shape: g.standard_t(3, shape), 0.0),
    "lognormal": (lambda g, shape: g.lognormal(size=shape), math.exp(0.5)),
    "3% rare": (rare, 0.03),
    "3% rare, of any size": (lambda g, shape: rare(g, shape) * g.exponential(size=shape), 0.03),
    "3% rare, over noise": (lambda g, shape: 10.0 * rare(g, shape) + g.normal(size=shape), 0.3),
}


def losses(kind: str, num_prompts: int) -> Values:
    """[SETS, num_prompts], less their true mean."""
    draw, mean = LOSSES[kind]
    return draw(np.random.default_rng(num_prompts), (SETS, num_prompts)) - mean


@pytest.mark.parametrize("num_prompts", [64, 128, 512])
@pytest.mark.parametrize("kind", LOSSES)
def test_intervals_cover_the_true_mean(kind: str, num_prompts: int) -> None:
    low, high = mean_intervals(losses(kind, num_prompts), 0, resamples=RESAMPLES)
    assert ((low <= 0.0) & (high >= 0.0)).mean() >= 0.93


@pytest.mark.parametrize("num_prompts", [2, 5, 9, 10, 12, 16, 24, 32, 48])
@pytest.mark.parametrize("kind", LOSSES)
def test_few_prompts_rarely_make_a_difference_where_there_is_none(kind: str, num_prompts: int) -> None:
    low, high = mean_intervals(losses(kind, num_prompts), 0, resamples=RESAMPLES)
    assert ((low > 0.0) | (high < 0.0)).mean() <= MOST_FALSE


@pytest.mark.parametrize("num_prompts", [64, 512])
def test_intervals_of_well_behaved_losses_are_not_much_wider_than_they_need_be(num_prompts: int) -> None:
    values = losses("normal", num_prompts)
    low, high = mean_intervals(values, 0, resamples=RESAMPLES)
    needed = 2 * 1.96 / math.sqrt(num_prompts)
    assert np.median(high - low) <= needed * (1.6 if num_prompts == 64 else 1.15)


@pytest.mark.parametrize(("ones", "low", "high"), [(0, 0.0, 0.0560), (1, 0.000396, 0.0840), (7, 0.0451, 0.2125)])
def test_a_rate_between_known_limits_has_the_exact_interval(ones: int, low: float, high: float) -> None:
    """Clopper and Pearson's, for so many of 64."""
    found = mean_interval(np.arange(64) < ones, 0, (0.0, 1.0))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, rel=0.03))


def test_below_the_fewest_prompts_nothing_is_said() -> None:
    values = 100.0 + np.random.default_rng(0).normal(size=FEWEST)
    nothing = np.zeros(FEWEST)
    few, enough = (paired_difference(values[:n], nothing[:n], 0) for n in (FEWEST - 1, FEWEST))
    assert (few.is_known, few.excludes_zero, enough.is_known, enough.excludes_zero) == (False, False, True, True)


def test_the_interval_holds_the_mean() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(1.0, 1.0, 50), generator.normal(0.0, 1.0, 50)
    found = paired_difference(a, b, seed=1)
    assert found.low < (a - b).mean() < found.high


def test_swapped_plans_have_the_mirrored_difference() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.lognormal(size=50), generator.lognormal(size=50)
    one, other = paired_difference(a, b, 0), paired_difference(b, a, 0)
    assert (one.low, one.high) == (pytest.approx(-other.high, rel=0.05), pytest.approx(-other.low, rel=0.05))


def test_equal_values_differ_by_no_more_than_what_may_not_have_been_seen() -> None:
    found = paired_difference(np.arange(20), np.arange(20), seed=0)
    assert (found.mean, found.excludes_zero) == (0.0, False)
    assert (found.low, found.high) == (
        pytest.approx(-found.high),
        pytest.approx(9.5 * (1 - 0.025 ** (1 / 20)), rel=0.03),
    )


def test_equal_values_that_do_not_vary_say_nothing_unless_limits_are_known() -> None:
    ceiling = np.full(100, 64)
    unknown = paired_difference(ceiling, ceiling, 0)
    known = paired_difference(ceiling, ceiling, 0, limits=(-64.0, 64.0))
    assert (unknown.is_known, known.is_known, known.excludes_zero) == (False, True, False)


def test_rounding_is_no_difference() -> None:
    base = np.random.default_rng(0).normal(50.0, 10.0, 64)
    found = paired_difference((base + 0.1) - 0.1, base, 0)
    assert found.high > 0.1


def test_a_constant_difference_excludes_zero() -> None:
    assert paired_difference(np.arange(20) + 3, np.arange(20), seed=0).excludes_zero


def test_an_interval_stays_within_the_limits() -> None:
    values = np.where(np.arange(16) < 2, 60.0, 64.0)
    assert mean_interval(values, 0, (0.0, 64.0)).high <= 64.0


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_values_that_are_not_finite_say_nothing(odd: float) -> None:
    values = np.ones(64)
    values[3] = odd
    found = paired_difference(values, np.ones(64), 0)
    assert (found.is_known, found.excludes_zero) == (False, False)


def test_the_interval_follows_from_the_seed() -> None:
    a, b = np.arange(30) % 7, np.arange(30) % 5
    assert paired_difference(a, b, seed=3) == paired_difference(a, b, seed=3)


def test_weights_are_drawn_once_for_all_intervals_of_a_seed_and_a_number_of_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []
    make = np.random.default_rng
    values = make(0).normal(size=(5, 77))
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or make(seed))
    for row in values:
        paired_difference(row, -row, seed=4_242)
    assert drawn == [4_242]
