"""What a search believes of damages, and how measured plans change it: Bayesian linear regression.

A plan's damage is the sum over units of predicted damage x theta. An option's theta is 1, plus what all units have in
common, plus what all of the unit's options of one family have in common, plus a piecewise linear function of the
logarithm of its error: options of like errors deviate alike. All of these are normal. Differences between measured
plans are observations of sums of thetas. Knows neither plans nor prompts.

The weights are standard normal before anything is observed. The posterior is kept by its observations (Rasmussen and
Williams, Gaussian Processes for Machine Learning, 2006, section 2.2), of which there are fewer than weights; samples
are drawn by Matheron's rule (Wilson et al., arXiv 2002.09309, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtmsearch.search.solver.choices import Options

Floats = NDArray[np.float64]
# A difference as measured: its value, infinite where measuring failed, and its variance.
Measured = tuple[float, float]

# No option is believed to cost less than this part of what the law says.
_LEAST_THETA = 0.05
# Between nodes of the piecewise linear function errors grow by this factor: about that from a bit to the next.
_NODES_APART = 4.0
_LEAST_ERROR = 1e-12
# Added to the variances of observations, as a part of their sum: two of the same choices are no contradiction.
_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True)
class Spread:
    """Standard deviations of theta: what all units have in common, what a unit's family, and an option's own. And
    `interaction`: the part of each unit's own difference by which the difference between two plans is off the sum."""

    common: float
    family: float
    option: float
    interaction: float


class Differences(NamedTuple):
    """Of choices less another: `means` [choices] and `covariance` [choices, choices] of what sums over units are
    believed to be, and `interactions` [choices], the variances of what is beside these sums."""

    means: Floats
    covariance: Floats
    interactions: Floats

    @property
    def variances(self) -> Floats:
        """[choices], of both together."""
        return np.maximum(np.diag(self.covariance), 0.0) + self.interactions


@dataclass(frozen=True)
class Posterior:
    """`damages[u]` [options] as predicted by the law. `features[u]` [options, the unit's weights] times normal weights
    is by how much each is off, beside `common` times them all. `rows` [observations, all weights], `residuals` and
    `variances` [observations] are what was observed: differences between choices less what the law predicts."""

    damages: tuple[Floats, ...]
    features: tuple[Floats, ...]
    common: float
    interaction: float
    rows: Floats
    residuals: Floats
    variances: Floats

    @staticmethod
    def of(
        damages: Sequence[Floats], errors: Sequence[Floats], families: Sequence[Sequence[str]], spread: Spread
    ) -> Posterior:
        """Nothing observed yet. `families[u]` names an option's family, `errors[u]` [options] are the law's."""
        features = tuple(
            np.nan_to_num(damage, posinf=0.0)[:, None] * _deviations(error, names, spread)
            for damage, error, names in zip(damages, errors, families, strict=True)
        )
        rows = np.zeros((0, 1 + sum(table.shape[1] for table in features)))
        return Posterior(tuple(damages), features, spread.common, spread.interaction, rows, np.zeros(0), np.zeros(0))

    @cached_property
    def mean(self) -> Floats:
        """The weights' expectation."""
        return self._given(self.residuals)

    def tables(self, weights: Floats | None = None) -> tuple[Floats, ...]:
        """Damages [options] of each unit, under the mean or under given weights."""
        weights = self.mean if weights is None else weights
        own = np.split(weights[1:], np.cumsum([table.shape[1] for table in self.features])[:-1])
        return tuple(
            np.maximum(damage * (1.0 + self.common * weights[0]) + table @ each, _LEAST_THETA * damage)
            for damage, table, each in zip(self.damages, self.features, own, strict=True)
        )

    def differences(self, choices: Sequence[Options], other: Options) -> Differences:
        """The believed damages of choices less that of another."""
        rows, predicted, interactions = self._compared(choices, other)
        crossed = rows @ self.rows.T
        covariance = rows @ rows.T - crossed @ np.linalg.solve(self._observed_covariance, crossed.T)
        return Differences(predicted + rows @ self.mean, covariance, interactions)

    def estimates(self, choices: Sequence[Options], other: Options, seen: Sequence[Measured | None]) -> Floats:
        """The damages of choices less that of another, by posterior and by own measurement where there is one, each by
        its precision: [choices]."""
        believed = self.differences(choices, other)
        found = believed.means.copy()
        for at, (measured, variance) in enumerate(zip(seen, believed.variances, strict=True)):
            if measured is not None and variance + measured[1] > 0.0:
                share = variance / (variance + measured[1])
                found[at] = measured[0] if share == 1.0 else (1.0 - share) * found[at] + share * measured[0]
        return found

    def observed(self, choices: Sequence[Options], other: Options, seen: Sequence[Measured]) -> Posterior:
        """The posterior after differences between choices and another were measured. What failed teaches nothing."""
        known = [at for at, (value, _) in enumerate(seen) if np.isfinite(value)]
        rows, predicted, interactions = self._compared([choices[at] for at in known], other)
        values, variances = np.array([seen[at] for at in known]).reshape(-1, 2).T
        return replace(
            self,
            rows=np.concatenate([self.rows, rows]),
            residuals=np.concatenate([self.residuals, values - predicted]),
            variances=np.concatenate([self.variances, variances + interactions]),
        )

    def surprise(self, choices: Sequence[Options], other: Options, seen: Sequence[Measured]) -> float:
        """By how many times its variance the posterior is off what was measured, less what measuring itself adds
        (method of moments); 1 where nothing was in doubt."""
        believed = self.differences(choices, other)
        values, noise = np.array(seen).reshape(-1, 2).T
        known = np.isfinite(values)
        expected = float(np.diag(believed.covariance)[known].sum())
        return float((np.square(values - believed.means) - noise)[known].sum()) / expected if expected > 0.0 else 1.0

    def scaled(self, factor: float) -> Posterior:
        """With so many times the variance. For a posterior that has observed nothing."""
        assert not len(self.rows), "what was observed was weighed by the variance"
        spread = float(np.sqrt(factor))
        features = tuple(table * spread for table in self.features)
        return replace(self, features=features, common=self.common * spread, interaction=self.interaction * spread)

    def sample(self, random: np.random.Generator) -> Floats:
        """Weights drawn from the posterior."""
        weights = random.standard_normal(self.rows.shape[1])
        noise = np.sqrt(self.variances) * random.standard_normal(len(self.variances))
        return weights + self._given(self.residuals - self.rows @ weights - noise)

    def _given(self, residuals: Floats) -> Floats:
        found: Floats = self.rows.T @ np.linalg.solve(self._observed_covariance, residuals)
        return found

    @cached_property
    def _observed_covariance(self) -> Floats:
        found: Floats = self.rows @ self.rows.T + np.diag(self.variances)
        return found + _LEAST_VARIANCE * max(float(np.trace(found)), _LEAST_ERROR) * np.eye(len(found))

    def _compared(self, choices: Sequence[Options], other: Options) -> tuple[Floats, Floats, Floats]:
        """Of choices less another: rows [choices, weights], what the law predicts [choices], and the variances of what
        is beside the sums [choices]."""
        places = 1 + np.cumsum([0, *(table.shape[1] for table in self.features)])
        rows, own = np.zeros((len(choices), int(places[-1]))), np.zeros((len(choices), len(self.damages)))
        for at, options in enumerate(choices):
            for unit, (k, before) in enumerate(zip(options, other, strict=True)):
                if k != before:
                    own[at, unit] = self.damages[unit][k] - self.damages[unit][before]
                    rows[at, places[unit] : places[unit + 1]] = self.features[unit][k] - self.features[unit][before]
        rows[:, 0] = self.common * own.sum(axis=1)
        return rows, own.sum(axis=1), self.interaction**2 * np.square(own).sum(axis=1)


def _deviations(errors: Floats, families: Sequence[str], spread: Spread) -> Floats:
    """[options, weights] of one unit: an indicator of the option's family, and the hat functions of the two nodes
    between which the logarithm of its error lies."""
    names = {name: at for at, name in enumerate(dict.fromkeys(families))}
    family = np.array([names[name] for name in families])
    place = np.log(np.maximum(errors, _LEAST_ERROR)) / np.log(_NODES_APART)
    node = np.floor(place).astype(np.int64)
    keys = [(f, n + side) for f, n in zip(family.tolist(), node.tolist(), strict=True) for side in (0, 1)]
    columns = {key: len(names) + at for at, key in enumerate(dict.fromkeys(keys))}
    found = np.zeros((len(errors), len(names) + len(columns)))
    options = np.arange(len(errors))
    found[options, family] = spread.family
    share = place - node
    for side, weight in ((0, 1.0 - share), (1, share)):
        found[options, [columns[key] for key in keys[side::2]]] = spread.option * weight
    return found
