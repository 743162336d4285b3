"""The multiple-choice knapsack: one option of every unit, the least total loss, costs within a capacity. Exactly.

Knows numbers only: what a unit, a loss or a cost stands for is the caller's. The bounds are those of the linear
relaxation (Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", 1979), the rest is dynamic programming over the
few options that the bounds leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# States that the dynamic programme holds at most; beyond it the worst by their bound are let go.
_MOST_STATES = 1 << 18


class Infeasible(ValueError):
    """No choice fits the capacity."""


@dataclass(frozen=True)
class Solution:
    """`options` has an index for each unit; `bound` is what no choice can be below: `loss` itself where it is optimal,
    but for rounding."""

    options: tuple[int, ...]
    loss: float
    cost: int
    bound: float


@dataclass(frozen=True)
class _Unit:
    """The options of a unit that no other beats in both, by rising cost: falling losses; `index` in the caller's."""

    losses: Floats
    costs: Ints
    index: Ints


def solve(losses: Sequence[Floats], costs: Sequence[Ints], capacity: int) -> Solution:
    """The choice of least total loss whose total cost is at most `capacity`.

    `losses[u]` and `costs[u]` run over the options of unit u; a loss that is not finite is an option that cannot be
    taken. Raises `Infeasible` when nothing fits.
    """
    units = [_undominated(np.asarray(loss, np.float64), cost) for loss, cost in zip(losses, costs, strict=True)]
    cheapest = sum(int(unit.costs[0]) for unit in units)
    if cheapest > capacity:
        raise Infeasible(f"the cheapest choice costs {cheapest}, more than the {capacity} there are")
    price = _price(units, capacity)
    picked = _greedy(units, price, capacity)
    bound = _bound(units, price, capacity)
    gap = _loss(units, picked) - bound
    if gap > 1e-12 * max(1.0, abs(bound)):
        better, proven = _search(units, price, capacity, gap)
        picked = better if better is not None else picked
        bound = max(bound, _loss(units, picked)) if proven else bound
    return Solution(
        options=tuple(int(unit.index[k]) for unit, k in zip(units, picked, strict=True)),
        loss=_loss(units, picked),
        cost=sum(int(unit.costs[k]) for unit, k in zip(units, picked, strict=True)),
        bound=bound,
    )


def front(losses: Sequence[Floats], costs: Sequence[Ints]) -> list[tuple[int, ...]]:
    """The choices on the lower convex hull of all choices' costs and losses, from the cheapest on, each an option of
    one unit from the one before: none of its cost or less has a smaller loss."""
    units = [_undominated(np.asarray(loss, np.float64), cost) for loss, cost in zip(losses, costs, strict=True)]
    picked = [int(unit.index[0]) for unit in units]
    moves: list[tuple[float, int, int]] = []
    for u, unit in enumerate(units):
        hull = _lower_hull(unit)
        slopes = (unit.losses[hull[:-1]] - unit.losses[hull[1:]]) / np.diff(unit.costs[hull])
        moves += [(-float(slope), u, int(unit.index[k])) for slope, k in zip(slopes, hull[1:], strict=True)]
    found = [tuple(picked)]
    # Sorting keeps the moves of a unit in order: along a hull they gain ever less.
    for _, u, option in sorted(moves, key=lambda move: move[0]):
        picked[u] = option
        found.append(tuple(picked))
    return found


def _undominated(losses: Floats, costs: Ints) -> _Unit:
    order = np.lexsort((losses, costs))
    order = order[np.isfinite(losses[order])]
    if not len(order):
        raise Infeasible("a unit has no option that can be taken")
    best = np.minimum.accumulate(losses[order])
    kept = order[np.concatenate(([True], losses[order][1:] < best[:-1]))]
    return _Unit(losses[kept], np.asarray(costs, np.int64)[kept], kept.astype(np.int64))


def _loss(units: Sequence[_Unit], picked: Sequence[int]) -> float:
    return float(sum(unit.losses[k] for unit, k in zip(units, picked, strict=True)))


def _at_price(unit: _Unit, price: float) -> int:
    """The option of least loss plus priced cost, the cheaper of equals."""
    return int(np.argmin(unit.losses + price * unit.costs))


def _price(units: Sequence[_Unit], capacity: int) -> float:
    """The price of a unit of cost at which the relaxation's bound is the highest: the slope of the convex hull's piece
    at which the capacity runs out, 0 when everything fits."""
    slopes: list[float] = []
    widths: list[int] = []
    for unit in units:
        hull = _lower_hull(unit)
        slopes += ((unit.losses[hull[:-1]] - unit.losses[hull[1:]]) / np.diff(unit.costs[hull])).tolist()
        widths += np.diff(unit.costs[hull]).tolist()
    left = capacity - sum(int(unit.costs[0]) for unit in units)
    for at in np.argsort(-np.array(slopes), kind="stable").tolist():
        left -= widths[at]
        if left < 0:
            return float(slopes[at])
    return 0.0


def _lower_hull(unit: _Unit) -> list[int]:
    hull: list[int] = []
    for k in range(len(unit.costs)):
        while len(hull) > 1 and _turns_up(unit, hull[-2], hull[-1], k):
            hull.pop()
        hull.append(k)
    return hull


def _turns_up(unit: _Unit, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return bool(
        (unit.losses[b] - unit.losses[a]) * float(unit.costs[c] - unit.costs[a])
        >= (unit.losses[c] - unit.losses[a]) * float(unit.costs[b] - unit.costs[a])
    )


def _bound(units: Sequence[_Unit], price: float, capacity: int) -> float:
    return float(sum((unit.losses + price * unit.costs).min() for unit in units) - price * capacity)


def _greedy(units: Sequence[_Unit], price: float, capacity: int) -> list[int]:
    """A choice that fits: the best at the price, cheapened where that goes at the least loss, then improved by what
    room is left."""
    picked = [_at_price(unit, price) for unit in units]
    used = sum(int(unit.costs[k]) for unit, k in zip(units, picked, strict=True))
    while used > capacity:
        at, to = min(
            ((u, k) for u, unit in enumerate(units) for k in range(picked[u])),
            key=lambda move: _loss_per_saving(units[move[0]], picked[move[0]], move[1], used - capacity),
        )
        used -= int(units[at].costs[picked[at]] - units[at].costs[to])
        picked[at] = to
    while True:
        moves = [
            (unit.losses[k] - unit.losses[picked[u]], u, k)
            for u, unit in enumerate(units)
            for k in range(picked[u] + 1, len(unit.costs))
            if used + unit.costs[k] - unit.costs[picked[u]] <= capacity
        ]
        if not moves:
            return picked
        _, at, to = min(moves)
        used += int(units[at].costs[to] - units[at].costs[picked[at]])
        picked[at] = to


def _loss_per_saving(unit: _Unit, now: int, to: int, needed: int) -> float:
    saving = min(int(unit.costs[now] - unit.costs[to]), needed)
    return float(unit.losses[to] - unit.losses[now]) / saving


@dataclass
class _Stage:
    """The states after a unit: where each came from, and by which option."""

    unit: int
    before: NDArray[Any]
    option: NDArray[Any]


def _search(units: Sequence[_Unit], price: float, capacity: int, gap: float) -> tuple[list[int] | None, bool]:
    """The best choice whose loss is within `gap` above the bound, None if there is none; and whether that is proven.

    An option is charged what it costs above the best at the price; whatever is charged more than the gap in all cannot
    beat the choice that is known, and so is left out.
    """
    best = [_at_price(unit, price) for unit in units]
    charges = [unit.losses + price * unit.costs - (unit.losses[k] + price * unit.costs[k])
               for unit, k in zip(units, best, strict=True)]  # fmt: skip
    slack = gap * (1 + 1e-9) + 1e-15
    kept = [np.flatnonzero(charge <= slack) for charge in charges]
    open_units = sorted((u for u in range(len(units)) if len(kept[u]) > 1), key=lambda u: len(kept[u]))
    fixed = sum(int(units[u].costs[best[u]]) for u in range(len(units)) if len(kept[u]) == 1)
    least = [int(units[u].costs[kept[u]].min()) for u in open_units]
    most = [int(units[u].costs[kept[u]].max()) for u in open_units]
    costs, charged = np.array([fixed], np.int64), np.zeros(1)
    stages: list[_Stage] = []
    proven = True
    for number, u in enumerate(open_units):
        options = kept[u]
        new_costs = (costs[:, None] + units[u].costs[options][None, :]).ravel()
        new_charged = (charged[:, None] + charges[u][options][None, :]).ravel()
        to_come_least, to_come_most = sum(least[number + 1 :]), sum(most[number + 1 :])
        # What stays unused is paid for too, at the price.
        unused = np.maximum(capacity - new_costs - to_come_most, 0) * price
        alive = np.flatnonzero((new_costs + to_come_least <= capacity) & (new_charged + unused <= slack))
        alive = alive[_undominated_states(new_costs[alive], new_charged[alive], price)]
        if len(alive) > _MOST_STATES:
            proven = False
            alive = alive[np.sort(np.argsort(new_charged[alive] + unused[alive], kind="stable")[:_MOST_STATES])]
        costs, charged = new_costs[alive], new_charged[alive]
        stages.append(_Stage(u, alive // len(options), options[alive % len(options)]))
    if not len(costs):
        return None, proven
    at = int(np.argmin(charged + (capacity - costs) * price))
    for stage in reversed(stages):
        best[stage.unit] = int(stage.option[at])
        at = int(stage.before[at])
    return best, proven


def _undominated_states(costs: Ints, charged: Floats, price: float) -> NDArray[Any]:
    """Indices of the states that none beats in both cost and loss, in order of cost."""
    losses = charged - price * costs.astype(np.float64)
    order = np.lexsort((losses, costs))
    if not len(order):
        return order
    best = np.minimum.accumulate(losses[order])
    return order[np.concatenate(([True], losses[order][1:] < best[:-1]))]
