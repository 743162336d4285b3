"""Choices of which some rule others out: a block that is dropped leaves nothing to choose for what lies in it.

A block's loss and cost are beside the options of what lies in it, whose first option stands for none. So sums over
units hold for every choice that is canonical: nothing is chosen for what lies in a dropped block. What lies in a block,
and the block, are folded into one unit of the knapsack: every sum of their options that no other beats in both, and the
block dropped; layers are folded from what their blocks were folded to. The solution is exact as long as no fold holds
more than `_MOST_SUMS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.components import Component
from dtmsearch.core.schemes import DROP
from dtmsearch.search.solver.knapsack import Solution, solve

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Costs(tuple[Ints, ...]):
    """Costs [units][options] that add up, but for what lies in blocks that are cut: `inside` of block b and unit u
    [options of b, options of u] is what more u costs under an option beside one of b than both come to."""

    inside: Mapping[int, Mapping[int, Ints]]

    def __new__(cls, alone: Iterable[Ints], inside: Mapping[int, Mapping[int, Ints]] | None = None) -> Self:
        made = super().__new__(cls, alone)
        made.inside = inside or {}
        return made

    def of(self, options: Sequence[int]) -> int:
        """What a choice costs."""
        found = sum(int(cost[k]) for cost, k in zip(self, options, strict=True))
        for block, units in self.inside.items():
            if options[block]:
                found += sum(int(more[options[block], options[unit]]) for unit, more in units.items())
        return found


# Of more sums than this, those are kept that lie evenly among them by cost.
_MOST_SUMS = 4_096


class _Unit(Protocol):
    @property
    def components(self) -> tuple[Component, ...]: ...

    @property
    def is_block(self) -> bool: ...


def negated(costs: Costs) -> Costs:
    """Costs of which a choice has as much less as it had more."""
    inside = {b: {u: -more for u, more in units.items()} for b, units in costs.inside.items()}
    return Costs((-cost for cost in costs), inside)


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
    that lie in no block, in their order; `drop[b]`: the option that drops a block, -1 where none does."""

    inside: dict[int, tuple[int, ...]]
    outer: tuple[int, ...]
    size: int
    drop: dict[int, int]

    @staticmethod
    def of(units: Sequence[_Unit], schemes: Sequence[Sequence[str]]) -> Nest:
        blocks = {unit.components[0].name: at for at, unit in enumerate(units) if unit.is_block}
        inside: dict[int, list[int]] = {at: [] for at in blocks.values()}
        for at, unit in enumerate(units):
            first = unit.components[0]
            for name in {first.block, first.layer_name} - {first.name}:
                if name in blocks:
                    inside[blocks[name]].append(at)
        held = {at for own in inside.values() for at in own}
        outer = tuple(at for at in range(len(units)) if at not in held)
        drop = {at: schemes[at].index(DROP) if DROP in schemes[at] else -1 for at in inside}
        return Nest({at: tuple(own) for at, own in inside.items()}, outer, len(units), drop)

    def canonical(self, options: Sequence[int]) -> tuple[int, ...]:
        """Options with the first one for all that lies in a dropped block."""
        gone = self.gone(options)
        return tuple(0 if unit in gone else option for unit, option in enumerate(options)) if gone else tuple(options)

    def gone(self, options: Sequence[int]) -> set[int]:
        """The units that lie in a dropped block."""
        return {unit for block, own in self.inside.items() if options[block] == self.drop[block] for unit in own}

    def solve(self, losses: Sequence[Floats], costs: Costs, capacity: int) -> Solution:
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

    def _fold(self, unit: int, losses: Sequence[Floats], costs: Costs) -> _Fold:
        if unit not in self.inside:
            own = np.asarray(losses[unit], np.float64)
            return _Fold((unit,), own, np.asarray(costs[unit], np.int64), np.arange(len(own))[:, None])
        folds = [self._with(unit, option, losses, costs) for option in range(len(losses[unit]))]
        return _Fold(
            folds[0].units,
            np.concatenate([fold.losses for fold in folds]),
            np.concatenate([fold.costs for fold in folds]),
            np.concatenate([fold.options for fold in folds]),
        )

    def _with(self, block: int, option: int, losses: Sequence[Floats], costs: Costs) -> _Fold:
        """A block under one option, with all that may be chosen for what lies in it then."""
        own = int(costs[block][option])
        if option == self.drop[block]:
            within = self.inside[block]
            none = np.zeros((1, 1 + len(within)), np.int64)
            none[0, 0] = option
            cost = own + sum(int(costs[each][0]) for each in within)
            # In the order of the folds of what stays.
            order = self._fold_order(block)
            return _Fold(order, np.array([losses[block][option]]), np.array([cost], np.int64), none)
        more = costs.inside.get(block, {})
        found = _Fold(
            (block,), np.array([losses[block][option]]), np.array([own], np.int64), np.full((1, 1), option, np.int64)
        )
        for each in self._directly_in(block):
            fold = self._fold(each, losses, costs)
            if option and each in more:
                fold = replace(fold, costs=fold.costs + more[each][option])
            found = found.beside(fold)
        return found

    def _fold_order(self, block: int) -> tuple[int, ...]:
        """The units of a block's fold: the block, then what lies in it, block by block."""
        found = [block]
        for each in self._directly_in(block):
            found += self._fold_order(each) if each in self.inside else [each]
        return tuple(found)

    def _directly_in(self, block: int) -> list[int]:
        """What lies in a block and in no smaller one."""
        deeper = {unit for other in self.inside[block] if other in self.inside for unit in self.inside[other]}
        return [unit for unit in self.inside[block] if unit not in deeper]
