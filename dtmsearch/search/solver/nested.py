"""Choices of which some rule others out: a block that is dropped leaves nothing to choose for what lies in it.

A block's loss and cost are beside the options of what lies in it, whose first option stands for none. So sums over
units hold for every choice that is canonical: nothing is chosen for what lies in a dropped block. What lies in a block,
and the block, are folded into one unit of the knapsack: every sum of their options that no other beats in both, and the
block dropped; layers are folded from what their blocks were folded to. The solution is exact as long as no fold holds
more than `_MOST_SUMS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.components import Component
from dtmsearch.search.solver.knapsack import Solution, solve

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Of more sums than this, those are kept that lie evenly among them by cost.
_MOST_SUMS = 4_096


class _Unit(Protocol):
    @property
    def components(self) -> tuple[Component, ...]: ...

    @property
    def is_block(self) -> bool: ...


@dataclass(frozen=True)
class _Fold:
    """Options of several units together: `losses` and `costs` [options], `options` [options, units] of the `units`."""

    units: tuple[int, ...]
    losses: Floats
    costs: Ints
    options: Ints

    def beside(self, other: _Fold) -> _Fold:
        """Every option of one with every one of the other, those left out that another beats in both."""
        losses = (self.losses[:, None] + other.losses[None, :]).ravel()
        costs = (self.costs[:, None] + other.costs[None, :]).ravel()
        at = _unbeaten(losses, costs)
        mine, theirs = np.divmod(at, len(other.losses))
        options = np.concatenate([self.options[mine], other.options[theirs]], axis=1)
        return _Fold((*self.units, *other.units), losses[at], costs[at], options)


def _unbeaten(losses: Floats, costs: Ints) -> Ints:
    order = np.lexsort((losses, costs))
    order = order[np.isfinite(losses[order])]
    best = np.minimum.accumulate(losses[order])
    kept = order[np.concatenate(([True], losses[order][1:] < best[:-1]))] if len(order) else order
    if len(kept) > _MOST_SUMS:
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, _MOST_SUMS).round().astype(np.int64))]
    return np.asarray(kept, np.int64)


@dataclass(frozen=True)
class Nest:
    """`inside[b]`: the units that lie in block b, other blocks among them; empty of what is no block. `outer`: units
    that lie in no block, in their order."""

    inside: dict[int, tuple[int, ...]]
    outer: tuple[int, ...]
    size: int

    @staticmethod
    def of(units: Sequence[_Unit]) -> Nest:
        blocks = {unit.components[0].name: at for at, unit in enumerate(units) if unit.is_block}
        inside: dict[int, list[int]] = {at: [] for at in blocks.values()}
        for at, unit in enumerate(units):
            first = unit.components[0]
            for name in {first.block, first.layer_name} - {first.name}:
                if name in blocks:
                    inside[blocks[name]].append(at)
        held = {at for own in inside.values() for at in own}
        outer = tuple(at for at in range(len(units)) if at not in held)
        return Nest({at: tuple(own) for at, own in inside.items()}, outer, len(units))

    def canonical(self, options: Sequence[int]) -> tuple[int, ...]:
        """Options with the first one for all that lies in a dropped block."""
        gone = {unit for block, own in self.inside.items() if options[block] for unit in own}
        return tuple(0 if unit in gone else option for unit, option in enumerate(options)) if gone else tuple(options)

    def solve(self, losses: Sequence[Floats], costs: Sequence[Ints], capacity: int) -> Solution:
        """See `knapsack.solve`. Raises `Infeasible`."""
        if not self.inside:
            return solve(losses, costs, capacity)
        folds = [self._fold(unit, losses, costs) for unit in self.outer]
        found = solve([fold.losses for fold in folds], [fold.costs for fold in folds], capacity)
        options = [0] * self.size
        for fold, at in zip(folds, found.options, strict=True):
            for unit, option in zip(fold.units, fold.options[at].tolist(), strict=True):
                options[unit] = option
        return Solution(tuple(options), found.loss, found.cost, found.bound)

    def _fold(self, unit: int, losses: Sequence[Floats], costs: Sequence[Ints]) -> _Fold:
        if unit not in self.inside:
            own = np.asarray(losses[unit], np.float64)
            return _Fold((unit,), own, np.asarray(costs[unit], np.int64), np.arange(len(own))[:, None])
        within = self._directly_in(unit)
        stays = _Fold((unit,), np.zeros(1), np.zeros(1, np.int64), np.zeros((1, 1), np.int64))
        for each in within:
            stays = stays.beside(self._fold(each, losses, costs))
        cost = int(costs[unit][1]) + sum(int(costs[each][0]) for each in self.inside[unit])
        dropped = np.zeros((1, len(stays.units)), np.int64)
        dropped[0, 0] = 1
        return _Fold(
            stays.units,
            np.append(stays.losses, losses[unit][1]),
            np.append(stays.costs, cost),
            np.concatenate([stays.options, dropped]),
        )

    def _directly_in(self, block: int) -> list[int]:
        """What lies in a block and in no smaller one."""
        deeper = {unit for other in self.inside[block] if other in self.inside for unit in self.inside[other]}
        return [unit for unit in self.inside[block] if unit not in deeper]
