"""Anytime-valid evidence on the mean of a finite population that is read in random order, without replacement.

A gambler who bets that the mean is larger than claimed cannot expect to win while the claim is true, whatever the
stakes and whenever one looks: capital of 1 / error has a probability of at most `error` (Ville's inequality). Values
need a lower bound only, and no assumption on their distribution. The bets are those of Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting" (arXiv 2010.09686, section 5: without replacement), one
sided, mixed over a grid of stakes. Knows nothing of plans, prompts or metrics.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

# Shares of the capital that are put on "larger". Finer grids change little: the mixture costs log(8) nats at most.
_STAKES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
# How much of the covariate is taken off: none, where it says little of the values, up to all of it.
_COVARIATE_SHARES = (0.0, 0.5, 1.0)
# Sums of 10^4 doubles agree to this relative difference.
_ROUNDING = 1e-9


def log_evidence(values: Values, floor: Values, num_total: int, mean: float) -> Values:
    """Log of the largest capital so far against "the mean of all `num_total` values is at most `mean`", a row each.

    `values` [rows, seen] are the first of each row's `num_total` values, in their random order; `floor` [rows, seen]
    bounds the value there and all later ones from below, and must be known before the value is. Given that every
    order is equally likely and the claim is true, exp of the result reaches 1 / error with a probability of at most
    `error`. Infinite where what is seen rules the claim out. Decreases in `mean`.
    """
    evidence: Values = _log_capital(values, floor, num_total, mean).max(axis=1, initial=0.0)
    return evidence


def log_evidence_above(losses: Values, covariates: Values, mean: float) -> Values:
    """The same against "the mean loss is at most `mean`", a row each, from losses that are never negative.

    `losses` [rows, seen] belong to the first columns of `covariates` [rows, num_total], losses as well, which are
    known for all columns and were fixed without regard to their order. Where the two go together, taking the covariate
    off leaves less noise; how much to take off is mixed over, so that no share has to be chosen.
    """
    num_total, seen = covariates.shape[1], losses.shape[1]
    around = covariates - covariates.mean(axis=1, keepdims=True)
    if not around.any():
        return log_evidence(losses, np.zeros_like(losses), num_total, mean)
    largest_to_come = np.maximum.accumulate(around[:, ::-1], axis=1)[:, ::-1][:, :seen]
    capitals = [
        _log_capital(losses - share * around[:, :seen], -share * largest_to_come, num_total, mean)
        for share in _COVARIATE_SHARES
    ]
    evidence: Values = _log_mean(np.stack(capitals)).max(axis=1, initial=0.0)
    return evidence


def _log_capital(values: Values, floor: Values, num_total: int, mean: float) -> Values:
    """Log capital after each value [rows, seen], from a capital of 1."""
    seen = values.shape[1]
    before = np.cumsum(values, axis=1) - values
    # What the mean of the values to come would be if the claim were just true, above the least that they can be.
    to_come = (num_total * mean - before) / (num_total - np.arange(seen)) - floor
    slack = _ROUNDING * (abs(mean) + np.abs(floor).max(initial=0.0))
    possible = to_come > slack
    ratio = np.where(possible, values - floor, 1.0) / np.where(possible, to_come, 1.0)
    ratio[~possible & (values - floor > slack)] = np.inf
    ratio[to_come < -slack] = np.inf
    capital = _log_mean(np.stack([np.cumsum(np.log1p(stake * (ratio - 1.0)), axis=1) for stake in _STAKES]))
    left = num_total * mean - values.sum(axis=1)
    capital[left - (num_total - seen) * floor[:, -1] < -slack * num_total, -1] = np.inf
    return capital


def _log_mean(logs: Values) -> Values:
    """Log of the mean over the first axis of what `logs` are the logarithms of."""
    most = logs.max(axis=0)
    finite = np.where(np.isinf(most), 0.0, most)
    mean: Values = np.where(np.isinf(most), most, finite + np.log(np.exp(np.minimum(logs - finite, 0.0)).mean(axis=0)))
    return mean
