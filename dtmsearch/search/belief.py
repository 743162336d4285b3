"""What a search believes of damages, and how measured plans change it: Bayesian linear regression.

A plan's damage is the sum over units of predicted damage x theta, one theta for each unit and family of schemes, 1 to
begin with. Differences between measured plans are observations of sums of thetas. Knows neither plans nor prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# No unit is believed to be less sensitive than this part of what its probe said.
_LEAST_THETA = 0.05


@dataclass(frozen=True)
class Belief:
    """`damages[u]` [options] as predicted; `parameters[u]` [options] names the theta of each option. `mean` [thetas]
    and `covariance` [thetas, thetas] are those of a normal distribution."""

    damages: tuple[Floats, ...]
    parameters: tuple[Ints, ...]
    mean: Floats
    covariance: Floats

    @staticmethod
    def of(damages: Sequence[Floats], families: Sequence[Sequence[str]], own: float, common: float) -> Belief:
        """Thetas of 1 with a standard deviation `own` each and `common` together. `families[u]` names an option's."""
        numbers: dict[tuple[int, str], int] = {}
        parameters = tuple(
            np.array([numbers.setdefault((u, name), len(numbers)) for name in names], np.int64)
            for u, names in enumerate(families)
        )
        covariance = own**2 * np.eye(len(numbers)) + common**2
        return Belief(tuple(damages), parameters, np.ones(len(numbers)), covariance)

    def tables(self, theta: Floats | None = None) -> tuple[Floats, ...]:
        """Damages [options] of each unit, under the mean or under given thetas."""
        theta = np.maximum(self.mean if theta is None else theta, _LEAST_THETA)
        return tuple(d * theta[p] for d, p in zip(self.damages, self.parameters, strict=True))

    def features(self, options: Sequence[int]) -> Floats:
        """[thetas]: what the damage of a choice is a sum of."""
        row = np.zeros(len(self.mean))
        for damage, parameter, k in zip(self.damages, self.parameters, options, strict=True):
            row[parameter[k]] += damage[k]
        return row

    def difference(self, options: Sequence[int], other: Sequence[int]) -> tuple[float, float]:
        """The believed damage of a choice less that of another: mean and variance."""
        row = self.features(options) - self.features(other)
        return float(row @ self.mean), float(row @ self.covariance @ row)

    def squares(self, options: Sequence[int], other: Sequence[int]) -> float:
        """The sum over thetas of the squared differences in predicted damage."""
        row = self.features(options) - self.features(other)
        return float(row @ row)

    def observed(self, options: Sequence[int], other: Sequence[int], value: float, variance: float) -> Belief:
        """The belief after the difference between two choices was measured."""
        row = self.features(options) - self.features(other)
        if not row.any():
            return self
        gain = self.covariance @ row
        total = float(row @ gain) + variance
        mean = self.mean + gain * (value - float(row @ self.mean)) / total
        return Belief(self.damages, self.parameters, mean, self.covariance - np.outer(gain, gain) / total)

    def scaled(self, factor: float) -> Belief:
        """The same means with so many times the variance."""
        return replace(self, covariance=self.covariance * factor)

    def sample(self, random: np.random.Generator) -> Floats:
        """Thetas drawn from the belief."""
        values, vectors = np.linalg.eigh(self.covariance)
        drawn: Floats = self.mean + vectors @ (np.sqrt(np.maximum(values, 0.0)) * random.standard_normal(len(values)))
        return drawn
