"""Intervals of means over prompts, paired or alone: the one place where they are made.

Losses per prompt are skewed, and some are rare: most prompts unchanged, a few ruined. Resampling what was seen says
nothing of what was not, so these intervals leave room for it. Knows arrays of values, nothing of metrics or plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

# With fewer values nothing is said: skewed losses would be called a difference in more than one of twenty cases.
FEWEST = 8
# Values that were not seen are taken to lie up to so many times as far from the mean as the farthest that was seen.
_UNSEEN_REACH = 2.5
# Below so many values that carry the variance, the farthest of them says too little of how far others may lie.
_FEW_CARRIERS = 8.0
_RESAMPLES = 5_000
# Weights of one draw hold at most so many numbers (64 MB); of more values there are fewer resamples, which need fewer.
_MOST_WEIGHTS, _FEWEST_RESAMPLES = 1 << 24, 1_000
# A spread below this part of the values is rounding.
_ROUNDING = 1e-12

Values = NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over prompts with its interval; the interval is infinite where there are too few prompts to say."""

    mean: float
    low: float
    high: float
    confidence: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0.0 or self.high < 0.0

    @property
    def is_known(self) -> bool:
        """Whether there were enough prompts to say how far the mean may be off."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def paired_difference(
    a: NDArray[np.generic],
    b: NDArray[np.generic],
    seed: int,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> PairedDifference:
    """Mean difference a - b, both [num_prompts] on the same prompts, with its interval (see `mean_intervals`).

    `limits` are those that no single difference can leave: of FDT minus and plus the continuation's length.
    Fewer than `FEWEST` prompts, values that are not finite, and differences that are all the same between values that
    do not vary either give an infinite interval.
    """
    ours, theirs = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        difference = ours - theirs
    mean = float(difference.mean()) if len(difference) else math.nan
    if len(difference) < FEWEST or not np.isfinite(difference).all():
        return PairedDifference(mean, -math.inf, math.inf, confidence)
    spread = max(float(abs(values - values.mean()).max()) for values in (ours, theirs))
    largest = max(float(abs(values).max()) for values in (ours, theirs))
    spread = spread if spread > _ROUNDING * largest else math.inf
    low, high = mean_intervals(difference[None], seed, confidence, resamples, limits, spread)
    return PairedDifference(mean, float(low[0]), float(high[0]), confidence)


def mean_interval(values: NDArray[np.generic], seed: int, limits: tuple[float, float]) -> PairedDifference:
    """The mean of `values` [num_prompts], none of which can leave `limits`, with its 95% interval."""
    return paired_difference(values, np.zeros(len(values)), seed, limits=limits)


def mean_intervals(
    values: Values,
    seed: int,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    limits: tuple[float, float] = (-math.inf, math.inf),
    spread_if_equal: float = math.inf,
) -> tuple[Values, Values]:
    """Lower and upper ends [sets] of intervals for the means that each row of `values` [sets, num_values] was drawn
    around.

    The upper end is the larger of two, the lower end their mirror image:

    - The upper quantile of the mean of the sorted values and one more, placed above them, under weights that are
      spacings of uniform order statistics (Learned-Miller and Thomas, arXiv 1905.06208). With that value at a known
      limit this is exact for values that are either of two, and conservative wherever it was tried. Limits are rarely
      known closely, so the value stands as far above the mean as the farthest of the others lies from it; farther
      where few of them carry the variance.
    - The mean, if a share of values as large as may well not have been seen (the `rule of three`, at this confidence)
      lies `_UNSEEN_REACH` times as far out as the farthest.

    Of values that are all equal `spread_if_equal` stands for the farthest. Both ends of fewer than `FEWEST` values are
    infinite. Coverage at 95%, measured by
    `tests/test_statistics.py`: at least 93% for normal, t3, lognormal and rare losses from 64 values on, and at most
    one of twenty false claims from `FEWEST` on.
    """
    num_values = values.shape[1]
    if num_values < FEWEST:
        return np.full(len(values), -np.inf), np.full(len(values), np.inf)
    mean = values.mean(axis=1, keepdims=True)
    deviation = values - mean
    farthest = abs(deviation).max(axis=1, keepdims=True)
    equal = farthest <= _ROUNDING * abs(values).max(axis=1, keepdims=True)
    # Deviations are scaled to the farthest, so that single precision holds them.
    scaled = np.where(equal, 0.0, deviation / np.where(equal, 1.0, farthest))
    reach = np.where(equal, spread_if_equal, farthest)
    carriers = (scaled**2).sum(axis=1, keepdims=True) ** 2 / np.maximum((scaled**4).sum(axis=1, keepdims=True), 1e-300)
    factor = np.where(equal, 1.0, np.sqrt(np.maximum(_FEW_CARRIERS / np.maximum(carriers, 1e-300), 1.0)))
    resamples = min(resamples, max(_MOST_WEIGHTS // (num_values + 1), _FEWEST_RESAMPLES))
    weights = _spacings(seed, num_values, resamples)
    seen = scaled.astype(np.float32) @ weights[:, :-1].T
    tail = (1.0 - confidence) / 2.0
    unseen_share = 1.0 - tail ** (1.0 / num_values)

    def end(sign: float, limit: float) -> Values:
        room = abs(limit - mean)
        near = np.minimum(factor * reach, room)
        far = unseen_share * np.minimum(np.where(equal, 1.0, _UNSEEN_REACH) * reach, room)
        known = np.isfinite(near)
        scale = np.where(equal | ~known, 1.0, farthest)
        one_more = np.where(known, near, 0.0) / scale
        means = sign * seen + one_more.astype(np.float32) * weights[:, -1]
        quantile = np.quantile(means, 1.0 - tail, axis=1)[:, None] * scale
        distance = np.where(known, np.maximum(quantile, far), np.inf)
        return np.asarray(mean + sign * distance)[:, 0]

    return end(-1.0, limits[0]), end(1.0, limits[1])


def lower_bound(values: NDArray[np.generic], limit: float, confidence: float, seed: int = 0) -> float:
    """What the mean that `values` [num_values] were drawn around is at least, at this confidence, where none can be
    below `limit`: the lower quantile of the mean of the values and one more at the limit, under spacings
    (Learned-Miller and Thomas, arXiv 1905.06208). So it stays below the values' own mean however equal they are: by the
    rule of three.
    """
    weights = _spacings(seed, len(values), min(_RESAMPLES, max(_MOST_WEIGHTS // (len(values) + 1), _FEWEST_RESAMPLES)))
    means = weights @ np.append(np.asarray(values, np.float32), np.float32(limit))
    return float(np.quantile(means, 1.0 - confidence))


@lru_cache(maxsize=8)
def _spacings(seed: int, num_values: int, resamples: int) -> NDArray[np.float32]:
    """Spacings of `num_values` uniform order statistics [resamples, num_values + 1]: each row positive, its sum 1.
    Drawn once for all the intervals of so many values."""
    weights = np.random.default_rng(seed).standard_exponential((resamples, num_values + 1), dtype=np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    weights.flags.writeable = False
    return weights


def wilson_interval(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share that `successes` of `trials` independent ones were drawn around (E. B. Wilson, Probable
    inference, the law of succession, and statistical inference, 1927); of no trials, from 0 to 1."""
    if trials <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    share, scale = successes / trials, 1.0 + z * z / trials
    middle = (share + z * z / (2.0 * trials)) / scale
    reach = z * math.sqrt(share * (1.0 - share) / trials + z * z / (4.0 * trials * trials)) / scale
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def kendall_tau(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """How far two rankings [values] agree, from -1 to 1, with ties accounted for (Kendall's tau-b); NaN where one of
    them ranks nothing."""
    one, other = (np.sign(np.subtract.outer(x, x)) for x in (np.asarray(a, np.float64), np.asarray(b, np.float64)))
    scale = math.sqrt(float(np.square(one).sum()) * float(np.square(other).sum()))
    return float((one * other).sum()) / scale if scale else math.nan
