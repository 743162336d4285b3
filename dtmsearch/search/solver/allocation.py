"""How much of each component to prune, from what is known of each alone. Pure functions on numbers.

The paper's threshold allocation ("Divergent Token Metrics", arXiv 2311.01544, section 4: maximise the worst
component's metric) and the knapsack (minimise the sum of damages), with the error model that turns two measured
levels into a whole curve of damages. Knows nothing of plans, schemes or evaluations. Shares are of a component's
weights, `weights` their numbers, targets are numbers of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

from dtmsearch.errors import UserError

# How far the ratio of damage to Hessian-weighted error moves with the pruned share, as a natural logarithm against
# its value at one half: measured over the components of a small Llama.
_DRIFT = ((0.1, -0.25), (0.5, 0.0), (0.7, 0.2), (0.9, 0.57))
# A component whose damage was measured as nothing, or less, still has some: this part of the largest one.
_LEAST_DAMAGE = 1e-4


@dataclass(frozen=True)
class Curve:
    """Quality (higher is better) over the added share: corners of a falling, piecewise linear line that starts at 0."""

    shares: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, share: float) -> float:
        """The quality at a share; beyond the last corner that of the last corner."""
        return _interpolated(list(zip(self.shares, self.values, strict=True)), share)

    def reach(self, level: float) -> float:
        """The largest share at which the quality is still `level`; 0 where it never is."""
        if self.values[0] < level:
            return 0.0
        corners = zip(pairwise(self.shares), pairwise(self.values), strict=True)
        for (left, right), (above, below) in corners:
            if below < level:
                return left + (right - left) * (above - level) / (above - below)
        return self.shares[-1]

    def meets(self, level: float) -> float:
        """The smallest share at which the quality is no more than `level`: before a plateau where `reach` is behind."""
        if self.values[0] <= level:
            return 0.0
        corners = zip(pairwise(self.shares), pairwise(self.values), strict=True)
        for (left, right), (above, below) in corners:
            if below <= level:
                return left + (right - left) * (above - level) / (above - below)
        return self.shares[-1]


def curve(measured: Sequence[tuple[float, float]], full: float, best: float, worst: float) -> Curve:
    """A component's curve from measured (added share, quality), both ends assumed: `best` where nothing is added and
    `worst` at `full`, where all is gone. Made falling by never letting quality rise again; measured points at or
    beyond `full` give way to the assumed end."""
    points = [(0.0, best), *sorted((share, value) for share, value in measured if 0.0 < share < full)]
    values = [best]
    for _, value in points[1:]:
        values.append(max(min(value, values[-1]), worst))
    shares = [share for share, _ in points]
    return Curve((*shares, full), (*values, worst)) if full > 0.0 else Curve((0.0,), (best,))


@dataclass(frozen=True)
class Allocation:
    """Added shares by component. `level` is the quality that the worst component keeps (nan where none is defined).

    `plateau`: the weights beyond the target that all components standing at `level` together could give up without
    leaving it, so many that their curve does not tell them apart; 0 where the level alone decides.
    """

    shares: tuple[float, ...]
    level: float = math.nan
    plateau: float = 0.0


def threshold_allocation(
    rankings: Sequence[Sequence[Curve]],
    weights: Sequence[float],
    target: float,
    caps: Sequence[float] | None = None,
) -> Allocation:
    """The paper's allocation: lower one level over all curves until the shares at which they meet it add up to
    `target`.

    `rankings[0]` holds the components' curves. Where some of them are flat at the level at which the target is met,
    the published algorithm prunes all the way along every flat part, beyond the target. Here the flat parts are
    divided by the curves of the next ranking in the same way, and what none tells apart in equal proportion, so that
    the target is met exactly. `caps` bound the added shares. Raises `UserError` when they leave too little.
    """
    most = [1.0] * len(weights) if caps is None else list(caps)
    if rankings:
        most = [min(cap, line.shares[-1]) for cap, line in zip(most, rankings[0], strict=True)]
    room = _total(most, weights)
    if target > room * (1 + 1e-9):
        raise UserError(
            f"{target:.0f} weights are to be pruned, but the components leave {room:.0f}: raise the cap, or add less"
        )
    least = [0.0] * len(weights)
    return _between(rankings, weights, min(target, room), least, most)


def _between(
    rankings: Sequence[Sequence[Curve]],
    weights: Sequence[float],
    target: float,
    least: Sequence[float],
    most: Sequence[float],
) -> Allocation:
    """The allocation among shares from `least` to `most`."""
    if not rankings:
        return Allocation(_mixed(least, most, weights, target))
    curves, *further = rankings
    above = list(least)  # the shares at the corner level above
    higher = math.inf
    for level in _corner_levels(curves, least, most):
        first = _clipped([line.meets(level) for line in curves], least, most)
        last = _clipped([line.reach(level) for line in curves], least, most)
        if _total(first, weights) >= target:
            start, end = _total(above, weights), _total(first, weights)
            part = (target - start) / (end - start) if end > start else 0.0
            between = level if math.isinf(higher) else higher + (level - higher) * part
            return Allocation(_mixed(above, first, weights, target), between)
        if _total(last, weights) >= target:
            beyond = _total(last, weights) - target
            return Allocation(_between(further, weights, target, first, last).shares, level, beyond)
        above, higher = last, level
    return Allocation(_mixed(above, most, weights, target), higher)


def _corner_levels(curves: Sequence[Curve], least: Sequence[float], most: Sequence[float]) -> list[float]:
    """Levels between which every component's share moves in a straight line, highest first."""
    levels = {value for line in curves for value in line.values}
    for line, low, high in zip(curves, least, most, strict=True):
        levels |= {line.at(low), line.at(high)}
    return sorted(levels, reverse=True)


def _clipped(shares: Sequence[float], least: Sequence[float], most: Sequence[float]) -> list[float]:
    return [min(max(share, low), high) for share, low, high in zip(shares, least, most, strict=True)]


def _total(shares: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(share * number for share, number in zip(shares, weights, strict=True))


def _mixed(first: Sequence[float], last: Sequence[float], weights: Sequence[float], target: float) -> tuple[float, ...]:
    """Shares the same part of the way from `first` to `last` for all, so that they add up to `target`."""
    start, end = _total(first, weights), _total(last, weights)
    part = min(max((target - start) / (end - start), 0.0), 1.0) if end > start else 0.0
    return tuple(low + (high - low) * part for low, high in zip(first, last, strict=True))


def owl_allocation(
    outliers: Sequence[float], weights: Sequence[float], current: Sequence[float], target: float, spread: float = 0.08
) -> Allocation:
    """Shares that add up to `target` with what is pruned already, lower where there are more outliers, at most
    `spread` from the average (OWL, arXiv 2310.05175, section 3: the part of each layer's weights that stand out)."""
    widest = max(outliers) - min(outliers)
    lowered = [2.0 * spread * (part - min(outliers)) / widest if widest else 0.0 for part in outliers]
    average = target / math.fsum(weights)
    shift = _total(lowered, weights) / math.fsum(weights)
    wanted = (min(max(average + shift - less, 0.0), 1.0) for less in lowered)
    return Allocation(tuple(max(share - now, 0.0) for share, now in zip(wanted, current, strict=True)))


@dataclass(frozen=True)
class DamageCurve:
    """Damage (lower is better) at added shares, the first of them 0 with no damage."""

    shares: tuple[float, ...]
    damages: tuple[float, ...]


def knapsack_allocation(
    curves: Sequence[DamageCurve],
    weights: Sequence[float],
    target: float,
    caps: Sequence[float] | None = None,
) -> Allocation:
    """Shares with the least sum of damages that add up to `target`.

    Takes the steps of each curve's lower convex hull in order of damage per weight. Between points a curve counts as
    the straight line, so the sum is the least possible, but for the one component that ends inside a step of its
    hull. Raises `UserError` when caps leave too little.
    """
    steps: list[tuple[float, int, float]] = []
    for index, line in enumerate(curves):
        cap = 1.0 if caps is None else caps[index]
        for (left, low), (right, high) in pairwise(_hull(_up_to(line, cap))):
            steps.append(((high - low) / ((right - left) * weights[index]), index, right - left))
    room = math.fsum(width * weights[index] for _, index, width in steps)
    if target > room * (1 + 1e-9):
        raise UserError(
            f"{target:.0f} weights are to be pruned, but the components leave {room:.0f}: raise the cap, or add less"
        )
    shares = [0.0] * len(curves)
    left = target
    for _, index, width in sorted(steps):
        taken = min(width, left / weights[index])
        shares[index] += taken
        left -= taken * weights[index]
        if left <= 0.0:
            break
    return Allocation(tuple(shares))


def _up_to(line: DamageCurve, cap: float) -> list[tuple[float, float]]:
    """The points of a curve up to `cap`, one at the cap itself among them."""
    points = list(zip(line.shares, line.damages, strict=True))
    inside = [point for point in points if point[0] <= cap]
    for (left, low), (right, high) in pairwise(points):
        if left < cap < right:
            inside.append((cap, low + (high - low) * (cap - left) / (right - left)))
    return inside


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the lower convex hull of points in order of their first coordinate (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def power_curve(measured: Sequence[tuple[float, float]], most: float, points: int = 16) -> DamageCurve:
    """Damage over added share as powers between measured (added share, damage), up to `most` and no further than the
    largest measured share: what lies beyond was not measured. Below the first point the power is that of the first
    two, never less than 1, so that a little is never dearer than it is in proportion."""
    known = [(share, damage) for share, damage in sorted(measured) if damage > 0.0]
    if not known:
        flat = [share for share, _ in measured if share <= most]
        return DamageCurve((0.0, *sorted(flat)[-1:]), (0.0, *([0.0] if flat else [])))
    end = min(max(share for share, _ in measured), most)
    logs = [(math.log(share), math.log(damage)) for share, damage in known]
    slope = max((logs[1][1] - logs[0][1]) / (logs[1][0] - logs[0][0]), 1.0) if len(logs) > 1 else 1.0
    line, damages = [0.0], [0.0]
    for number in range(1, points + 1):
        share = end * number / points
        at = math.log(share)
        value = logs[0][1] + slope * (at - logs[0][0]) if at < logs[0][0] else _interpolated(logs, at)
        line.append(share)
        damages.append(max(math.exp(value), damages[-1]))
    return DamageCurve(tuple(line), tuple(damages))


def gaussian_pruning_error(share: float) -> float:
    """||W - pruned W||^2 / ||W||^2 of a matrix of normally distributed weights whose smallest `share` is pruned: what
    stands for a component's error where nobody has measured it."""
    if share >= 1.0:
        return 1.0
    threshold = NormalDist().inv_cdf((1.0 + share) / 2.0)
    return share - 2.0 * threshold * NormalDist().pdf(threshold)


def modelled_damages(
    measured: Sequence[Sequence[tuple[float, float]]],
    current: Sequence[float],
    shares: Sequence[Sequence[float]],
    error: Callable[[int, float], float] = lambda _, share: gaussian_pruning_error(share),
) -> list[DamageCurve]:
    """Each component's damage at pruned `shares` from a few that were `measured`, both counted with the `current`
    share and beyond it.

    damage(c, S) = alpha(c, S) x (error(c, S) - error(c, current)): a component's alpha follows from a measured
    level, moves with S as it was found to on average, and between two measured levels in a straight line of its
    logarithm. `error` gives the relative weight error of a component (by index) at a share, which takes no forward
    pass. Curves are of added shares and start at 0; that of a component with nothing measured ends there.
    """
    largest = max((damage for points in measured for _, damage in points), default=0.0)
    least = max(largest * _LEAST_DAMAGE, 1e-12)
    curves = []
    for index, points in enumerate(measured):
        now = current[index]
        start = error(index, now)

        def added(share: float, index: int = index, start: float = start) -> float:
            return max(error(index, share) - start, 1e-12)

        known = [(s, math.log(max(d, least) / added(s)) - _interpolated(_DRIFT, s)) for s, d in sorted(points)]
        line, damages = [0.0], [0.0]
        for share in shares[index] if known else ():
            if share > now:
                alpha = math.exp(_interpolated(known, share) + _interpolated(_DRIFT, share))
                line.append(share - now)
                damages.append(max(alpha * added(share), damages[-1]))
        curves.append(DamageCurve(tuple(line), tuple(damages)))
    return curves


def _interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at `at` on the line through points, constant beyond its ends."""
    if at <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[-1][1]
