"""What every unit is pruned more, from what a round's probes measured: curves over shares, and the allocation by them
(`dtmsearch.search.solver.allocation`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dtmsearch.core.metrics import Summary
from dtmsearch.search.solver import allocation as allocate
from dtmsearch.search.solver.allocation import Allocation, Curve, DamageCurve
from dtmsearch.search.solver.pruned_units import PrunedUnit

# Relative weight errors of a component at pruned shares, in order of the shares.
Errors = Mapping[str, Sequence[tuple[float, float]]]

# Statistics that the threshold allocation ranks by, each with those that divide its plateaus.
RANKINGS: dict[str, tuple[str, ...]] = {
    "fdt75": ("fdt75", "fdt_mean", "kl"),
    "fdt_mean": ("fdt_mean", "kl"),
    "sdt": ("sdt", "kl"),
    "kl": ("kl",),
}
_CURVE_STEPS = 50


@dataclass(frozen=True)
class Probed:
    """What is known when shares are allocated: of the present model, whose units are pruned by `shares`, its summary
    (None for the unpruned one), and the summaries of probes, by (unit, its pruned share)."""

    shares: Sequence[float]
    present: Summary | None
    probes: Mapping[tuple[int, float], Summary]

    @property
    def present_kl(self) -> float:
        return 0.0 if self.present is None else _kl(self.present)

    def of(self, unit: int, value: Callable[[Summary], float]) -> list[tuple[float, float]]:
        """(Pruned share, value) of a unit's probes, in order of the shares."""
        return sorted((share, value(found)) for (number, share), found in self.probes.items() if number == unit)


@dataclass(frozen=True)
class ShareAllocation:
    """One way to allocate, by its `kind`: a statistic of the threshold allocation, `sensitivity` or `knapsack` (least
    sum of KL damages, with the error model or without), or `owl`.

    `cap` is the most that any unit is pruned, `continuation_tokens` the most that FDT can be. `errors` are what
    `sensitivity` knows of the weights; without them they count as normally distributed. `outliers` gives the part of
    each layer's weights that `owl` calls outliers.
    """

    kind: str
    units: Sequence[PrunedUnit]
    cap: float
    continuation_tokens: int
    errors: Errors | None = None
    outliers: Mapping[int, float] | None = None

    def added(self, probed: Probed, wanted: int) -> Allocation:
        """What is to be pruned more of each unit, so that `wanted` weights are pruned in all."""
        weights = [unit.num_weights for unit in self.units]
        left = max(wanted - sum(now * number for now, number in zip(probed.shares, weights, strict=True)), 0.0)
        caps = [max(self.cap - now, 0.0) for now in probed.shares]
        if self.kind == "sensitivity":
            return allocate.knapsack_allocation(self._modelled_damages(probed), weights, left, caps)
        if self.kind == "knapsack":
            return allocate.knapsack_allocation(_measured_damages(probed), weights, left, caps)
        if self.kind == "owl":
            assert self.outliers is not None
            by_unit = [self.outliers[unit.components[0].layer] for unit in self.units]
            return allocate.owl_allocation(by_unit, weights, probed.shares, wanted)
        rankings = [self._curves(probed, statistic) for statistic in RANKINGS[self.kind]]
        return allocate.threshold_allocation(rankings, weights, left, caps)

    def _curves(self, probed: Probed, statistic: str) -> list[Curve]:
        """Every unit's quality over its added share."""
        quality = _QUALITIES[statistic]
        largest_kl = max((_kl(summary) for summary in probed.probes.values()), default=0.0)
        tokens = float(self.continuation_tokens)
        best, worst = {"sdt": (0.0, -tokens), "kl": (0.0, -2.0 * largest_kl)}.get(statistic, (tokens, 0.0))
        if probed.present is not None and statistic != "fdt75":  # the published one assumes its maximum in every round
            best = quality(probed.present)
        curves = []
        for number, now in enumerate(probed.shares):
            points = [(share - now, value) for share, value in probed.of(number, quality)]
            curves.append(allocate.curve(points, 1.0 - now, best, min(worst, best)))
        return curves

    def _modelled_damages(self, probed: Probed) -> list[DamageCurve]:
        present = probed.present_kl
        measured = [[(share, kl - present) for share, kl in probed.of(n, _kl)] for n in range(len(self.units))]
        grid = [step / _CURVE_STEPS for step in range(1, _CURVE_STEPS + 1)]
        error = self._error if self.errors is not None else _gaussian_error
        return allocate.modelled_damages(measured, probed.shares, [grid] * len(self.units), error)

    def _error(self, number: int, share: float) -> float:
        """The relative weight error of a unit's first component, in a straight line between the shares known."""
        assert self.errors is not None
        points = [(0.0, 0.0), *self.errors[self.units[number].name], (1.0, 1.0)]
        for (left, low), (right, high) in pairwise(points):
            if share <= right:
                return low + (high - low) * (share - left) / (right - left)
        return points[-1][1]


def _measured_damages(probed: Probed) -> list[DamageCurve]:
    """KL damages beyond that of the present model, as far as they were measured."""
    present = probed.present_kl
    curves = []
    for number, now in enumerate(probed.shares):
        points = [(share - now, kl - present) for share, kl in probed.of(number, _kl)]
        curves.append(allocate.power_curve(points, 1.0 - now))
    return curves


def _gaussian_error(_number: int, share: float) -> float:
    return allocate.gaussian_pruning_error(share)


def _kl(summary: Summary) -> float:
    return summary.value("kl")


_QUALITIES: dict[str, Callable[[Summary], float]] = {
    "fdt75": lambda summary: summary.fdt_p75,
    "fdt_mean": lambda summary: summary.fdt_mean,
    "sdt": lambda summary: -summary.sdt_mean,
    "kl": lambda summary: -_kl(summary),
}
