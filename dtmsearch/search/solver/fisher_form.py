"""What is concluded from prices: damages of options and of whole plans, and how well they are known. Pure.

A sample's product with a plan is the sum of its options' products; half the mean square over samples, per predicted
token, is the plan's KL to second order. The square of one component's product is its own damage; what the square of the
sum has beside is interaction. Around a plan, a slope is the change of KL to first order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtmsearch.search.solver.choices import Choices, Options

Floats = NDArray[np.float64]
# No option is believed to cost less than this part of its price.
_LEAST_SHARE = 0.05


class Estimate(NamedTuple):
    """A mean over samples, and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True, eq=False)
class Prices:
    """`products[u]` [samples, options] of each unit, of which option 0 is dense; `positions` are the predicted tokens
    of a sample."""

    products: tuple[Floats, ...]
    positions: int

    @staticmethod
    def of(
        choices: Choices,
        components: Sequence[str],
        schemes: Sequence[str],
        products: NDArray[np.floating],
        positions: int,
        around: Options | None = None,
    ) -> Prices:
        """From products [samples, components, schemes]: those of components that change together are summed.

        Products taken `around` a plan are of differences to its own options; what dense would change there is not known
        (nan).
        """
        place = {component: at for at, component in enumerate(components)}
        column = {scheme: at for at, scheme in enumerate(schemes)}
        found: list[Floats] = []
        for unit, names in zip(choices.units, choices.schemes, strict=True):
            rows = [place[component.name] for component in unit.components]
            own = products[:, rows, :].sum(axis=1, dtype=np.float64)
            dense = np.full((len(own), 1), 0.0 if around is None or around[len(found)] == 0 else np.nan)
            found.append(np.concatenate([dense, own[:, [column[name] for name in names[1:]]]], axis=1))
        return Prices(tuple(found), positions)

    @property
    def num_samples(self) -> int:
        return len(self.products[0])

    def damages(self, around: Options | None = None) -> tuple[Floats, ...]:
        """KL [options] of each unit alone under every option; beside the options of a plan if one is given."""
        return tuple(np.square(own).mean(axis=0) / (2 * self.positions) for own in self._beside(around))

    def errors(self, around: Options | None = None) -> tuple[Floats, ...]:
        """Standard errors of `damages`."""
        scale = 2 * self.positions * np.sqrt(self.num_samples)
        return tuple(np.square(own).std(axis=0, ddof=1) / scale for own in self._beside(around))

    def means(self) -> tuple[Floats, ...]:
        """Means over samples per token: of slopes, the change of KL to first order."""
        return tuple(own.mean(axis=0) / self.positions for own in self.products)

    def mean_errors(self) -> tuple[Floats, ...]:
        """Standard errors of `means`."""
        scale = self.positions * np.sqrt(self.num_samples)
        return tuple(own.std(axis=0, ddof=1) / scale for own in self.products)

    def whole(self, options: Options) -> Estimate:
        """KL of a choice, with all interactions of second order."""
        total = sum(own[:, k] for own, k in zip(self.products, options, strict=True))
        squares = np.square(total) / (2 * self.positions)
        return Estimate(float(squares.mean()), float(squares.std(ddof=1)) / float(np.sqrt(self.num_samples)))

    def additive(self, options: Options) -> Estimate:
        """KL of a choice as the sum over its units."""
        squares = sum(np.square(own[:, k]) for own, k in zip(self.products, options, strict=True)) / (
            2 * self.positions
        )
        values = np.asarray(squares, np.float64)
        return Estimate(float(values.mean()), float(values.std(ddof=1)) / float(np.sqrt(self.num_samples)))

    def _beside(self, around: Options | None) -> tuple[Floats, ...]:
        if around is None:
            return self.products
        return tuple(own - own[:, [k]] for own, k in zip(self.products, around, strict=True))


def combined(prices: Prices, slopes: Prices, around: Options) -> list[Floats]:
    """Damages [options] of each unit as they are around a plan.

    What a move from the plan costs is known twice: as the prices' difference, which leaves out what other units do to
    it, and as slope and curvature there, which see that but through the noise of samples. The spread of the first about
    the truth, relative to the move's curvature, is what the two differ by beyond that noise, by moments; each move is
    then the mean of both, weighted by precision (empirical Bayes: Efron and Morris, JASA 1973). An option's damage is
    that of its plan's option by price, plus what the move costs, and not below a twentieth of its price.
    """
    damages, curvature = prices.damages(), prices.damages(around)
    first, noise = slopes.means(), slopes.mean_errors()
    gaps = [(a + c) - (d - d[k]) for a, c, d, k in zip(first, curvature, damages, around, strict=True)]
    known = [np.isfinite(gap) & (c > 0.0) for gap, c in zip(gaps, curvature, strict=True)]
    ratio = np.concatenate([gap[at] ** 2 / c[at] ** 2 for gap, c, at in zip(gaps, curvature, known, strict=True)])
    own = np.concatenate([n[at] ** 2 / c[at] ** 2 for n, c, at in zip(noise, curvature, known, strict=True)])
    # Weighted by how well each is known: of moves that change little the noise is all that is seen.
    weight = 1.0 / (1.0 + own) ** 2
    spread = max(float(((ratio - own) * weight).sum() / weight.sum()), 0.0) if len(ratio) else 0.0
    found = []
    for d, c, gap, n, at, k in zip(damages, curvature, gaps, noise, known, around, strict=True):
        variance = spread * c**2
        share = np.where(at, variance / np.maximum(variance + n**2, 1e-300), 0.0)
        table = d + np.where(at, share * np.nan_to_num(gap), 0.0)
        table[k] = d[k]
        found.append(np.maximum(table, _LEAST_SHARE * d))
    return found
