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

from dtmsearch.core.schemes import DENSE
from dtmsearch.search.solver.choices import Choices, Options

Floats = NDArray[np.float64]
# The mean square of correlations between changes of two units, about (docs/search-quality.md).
_USUAL_SPREAD = 1e-3
# Prices whose logarithms are compared are no smaller than this part of the largest.
_LEAST_PRICE = 1e-9


class Estimate(NamedTuple):
    """A mean over samples, and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True, eq=False)
class Prices:
    """`products[u]` [samples, options] of each unit, of which option 0 is dense; `positions` are the predicted tokens
    of a sample. `experts`: whether a unit is of a mixture's experts, which some samples may not reach; none are if it
    is empty."""

    products: tuple[Floats, ...]
    positions: int
    experts: tuple[bool, ...] = ()

    @staticmethod
    def of(
        choices: Choices,
        components: Sequence[str],
        schemes: Sequence[str],
        products: NDArray[np.floating],
        positions: int,
    ) -> Prices:
        """From products [samples, components, schemes]: those of components that change together are summed.

        Of products with dense among the schemes, which were taken around a plan, the result is beside dense.
        """
        place = {component: at for at, component in enumerate(components)}
        column = {scheme: at for at, scheme in enumerate(schemes)}
        found: list[Floats] = []
        for unit, names in zip(choices.units, choices.schemes, strict=True):
            rows = [place[component.name] for component in unit.components]
            own = products[:, rows, :].sum(axis=1, dtype=np.float64)
            dense = own[:, [column[DENSE]]] if DENSE in column else np.zeros((len(own), 1))
            found.append(np.concatenate([dense, own[:, [column[name] for name in names[1:]]]], axis=1) - dense)
        experts = tuple(any(c.mixture for c in unit.components) for unit in choices.units)
        return Prices(tuple(found), positions, experts)

    @property
    def num_samples(self) -> int:
        return len(self.products[0])

    def damages(self, around: Options | None = None) -> tuple[Floats, ...]:
        """KL [options] of each unit alone under every option; beside the options of a plan if one is given."""
        return tuple(np.square(own).mean(axis=0) / (2 * self.positions) for own in self._beside(around))

    def pooled(self) -> Form:
        """The Fisher form within each unit, sharpened by what options have in common.

        The logarithm of a price is that of its unit plus that of its option, a correlation of two options is that of
        these two in all units; deviations are believed by how well they are known beside how far they go in all units
        (empirical Bayes, as in `Forces`). Units of other options than most are left as they are. Of those that no
        sample reached (experts of a mixture) nothing is known: each option costs what it does in the unit where it
        costs least.
        """
        forms = [own.T @ own / (2 * self.positions * len(own)) for own in self.products]
        count = max((len(own) for own in forms), default=0)
        units = [u for u, own in enumerate(forms) if len(own) == count and (np.diag(own)[1:] > 0.0).all()]
        if len(units) < 3 or count < 3 or self.num_samples < 3:
            return Form(tuple(self._with_unreached(forms, count)))
        prices = np.stack([np.diag(forms[u])[1:] for u in units])
        roots = np.sqrt(self._pooled_prices(units, prices))
        found = np.stack([forms[u][1:, 1:] for u in units])
        own = np.sqrt(prices)
        correlations = np.clip(found / (own[:, :, None] * own[:, None, :]), -1.0, 1.0)
        usual = correlations.mean(axis=0)
        noise = np.square(1.0 - np.square(correlations)) / self.num_samples
        spread = np.maximum((np.square(correlations - usual) - noise).mean(axis=0), 0.0)
        correlations = usual + spread / np.maximum(spread + noise, 1e-30) * (correlations - usual)
        for u, root, correlation in zip(units, roots, correlations, strict=True):
            form = np.zeros((count, count))
            form[1:, 1:] = correlation * root[:, None] * root[None, :]
            forms[u] = form
        return Form(tuple(self._with_unreached(forms, count)))

    def _with_unreached(self, forms: Sequence[Floats], count: int) -> list[Floats]:
        """Forms [options, options], where experts of `count` options whose own are all zeros are given the least prices
        of all units."""
        known = [own for own in forms if len(own) == count and own.any()]
        if not known or not any(self.experts):
            return list(forms)
        least = np.diag(np.stack([np.diag(own) for own in known]).min(axis=0))
        experts = self.experts or (False,) * len(forms)
        return [
            least if expert and len(own) == count and not own.any() else own
            for own, expert in zip(forms, experts, strict=True)
        ]

    def _pooled_prices(self, units: Sequence[int], prices: Floats) -> Floats:
        """Prices [units, options] of some units, as `pooled` has them."""
        squares = np.stack([np.square(self.products[u][:, 1:]) for u in units], axis=1)
        squares /= squares.mean(axis=0)
        logs = np.log(np.maximum(prices, _LEAST_PRICE * prices.max()))
        fit = logs.mean(axis=1, keepdims=True) + logs.mean(axis=0) - logs.mean()
        by_unit, by_option = squares.mean(axis=2, keepdims=True), squares.mean(axis=1, keepdims=True)
        whole = squares.mean(axis=(1, 2), keepdims=True)
        noise = (squares - by_unit - by_option + whole).var(axis=0, ddof=1) / self.num_samples
        own = np.maximum((np.square(logs - fit) - noise).mean(axis=0), 0.0)
        pooled: Floats = np.exp(fit + own / np.maximum(own + noise, 1e-30) * (logs - fit))
        return pooled

    def errors(self, around: Options | None = None) -> tuple[Floats, ...]:
        """Standard errors of `damages`."""
        scale = 2 * self.positions * np.sqrt(self.num_samples)
        return tuple(np.square(own).std(axis=0, ddof=1) / scale for own in self._beside(around))

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


@dataclass(frozen=True, eq=False)
class Form:
    """KL to second order within each unit: half of its Fisher form between its options, [options, options]."""

    units: tuple[Floats, ...]

    def damages(self) -> tuple[Floats, ...]:
        """KL [options] of each unit alone under every option."""
        return tuple(np.diag(unit).copy() for unit in self.units)

    def beside(self, around: Options) -> tuple[Floats, ...]:
        """The same beside the options of a plan: the curvature of each move."""
        return tuple(np.diag(unit) + unit[k, k] - 2.0 * unit[:, k] for unit, k in zip(self.units, around, strict=True))

    def crossed(self, around: Options) -> tuple[Floats, ...]:
        """Cross terms [options] with the unit's own option in a plan."""
        return tuple(2.0 * unit[:, k] for unit, k in zip(self.units, around, strict=True))

    def cost(self, options: Options) -> float:
        """KL of a choice as the sum over its units."""
        return float(sum(unit[k, k] for unit, k in zip(self.units, options, strict=True)))


@dataclass(frozen=True, eq=False)
class Forces:
    """What the rest of a plan does to options: by how much it makes each dearer (`means` [options] of each unit) than
    it is alone, with `variances`. Dense, which changes nothing, feels none.

    To second order an option's force is its cross term with all other units' changes. Of a slope (what an option's
    change costs to first order at a plan) it is what is left without the cross term with its own unit's change, which
    prices give. Before a slope is taken forces are normal about zero with a variance of 4 `spread` x the option's price
    x the KL of the changes that exert them, as those of directions that have nothing to do with each other: `spread` is
    the mean square of their correlations, found by moments from what slopes differ beyond their noise (empirical Bayes:
    Efron and Morris, JASA 1973). When a plan moves on, what is known of forces stays, and is in doubt by the forces of
    what moved (a Kalman filter: Kalman, 1960), so slopes at one plan after the other add up.
    """

    means: tuple[Floats, ...]
    variances: tuple[Floats, ...]
    at: Options | None = None
    squares: float = 0.0
    expected: float = 0.0

    @staticmethod
    def none(form: Form) -> Forces:
        zeros = tuple(np.zeros(len(unit)) for unit in form.units)
        return Forces(zeros, zeros)

    def on(self, options: Options) -> float:
        """What the units of a plan do to each other, all together."""
        return 0.5 * float(sum(force[k] for force, k in zip(self.means, options, strict=True)))

    def observed(self, form: Form, slopes: Prices, at: Options, scale: float) -> Forces:
        """Forces at a plan, after `slopes` were taken there (products beside dense, which is option 0). `scale` is by
        how many times units are dearer than their prices."""
        moved = self._moved(form, at) * scale
        gaps, noises, priors = [], [], []
        per_token = slopes.positions
        for price, crossed, slope, before in zip(
            form.damages(), form.crossed(at), slopes.products, self.variances, strict=True
        ):
            gaps.append(slope.mean(axis=0) / per_token - scale * crossed)
            noises.append(slope.var(axis=0, ddof=1) / (len(slope) * per_token**2))
            priors.append((4.0 * moved * scale * price, before))
        squares, expected = self._surprise(gaps, noises, priors)
        spread = squares / expected if expected > 0.0 else 0.0
        means, variances = [], []
        for gap, noise, (unit, before), mean in zip(gaps, noises, priors, self.means, strict=True):
            variance = before + spread * unit
            share = np.divide(variance, variance + noise, out=np.zeros_like(noise), where=variance + noise > 0.0)
            share[0] = 0.0
            means.append(mean + share * (gap - mean))
            variances.append((1.0 - share) * variance)
        return Forces(tuple(means), tuple(variances), at, squares, expected)

    def _moved(self, form: Form, at: Options) -> float:
        """KL of what changed since the forces were known, as a sum over units."""
        if self.at is None:
            return form.cost(at)
        return float(sum(own[k] for own, k in zip(form.beside(self.at), at, strict=True)))

    def _surprise(
        self, gaps: Sequence[Floats], noises: Sequence[Floats], priors: Sequence[tuple[Floats, Floats]]
    ) -> tuple[float, float]:
        """Sums over all slopes so far: of how far they lay from what was believed, squared and less their noise, and of
        what that is for a spread of 1."""
        squares, expected = self.squares, self.expected
        for gap, noise, (unit, before), mean in zip(gaps, noises, priors, self.means, strict=True):
            known = unit > 0.0
            other = (noise + before)[known] / unit[known]
            # Weighted by how well each is known: of what changes little the noise is all that is seen.
            weight = 1.0 / (unit[known] * (1.0 + other / _USUAL_SPREAD) ** 2)
            squares += float((weight * ((gap - mean)[known] ** 2 - (noise + before)[known])).sum())
            expected += float((weight * unit[known]).sum())
        return max(squares, 0.0), expected


def expected_gain(moves: Floats, curvatures: Floats, total: float) -> float:
    """By how much a plan's KL of `total` is expected to change where units move at once, each of which alone has a
    slope and a curvature [units]. Those that go down the same slope hinder each other: two have a cross term of the
    product of their slopes over twice the total, as what they have in common is the plan's own direction."""
    together = (float(moves.sum()) ** 2 - float(np.square(moves).sum())) / (4.0 * total) if total > 0.0 else 0.0
    return float(moves.sum()) + float(curvatures.sum()) + together
