"""The swaps of a choice (one unit moved, or one to fewer and another to more) that by a posterior may gain most."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from dtmsearch.search.solver.choices import Choices, Options
from dtmsearch.search.solver.posterior import Posterior

Floats = NDArray[np.float64]

# With more moves than this, only those to a neighbouring size are paired.
_MOST_MOVES = 1_500


def promising(
    choices: Choices, posterior: Posterior, leader: Options, tried: Collection[Options], count: int
) -> list[Options]:
    """Up to `count` swaps within the budget that were not tried, those first whose believed difference to the leader
    less its standard deviation is least."""
    known = ((u, k) for u, k in _moves(choices, leader) if np.isfinite(posterior.damages[u][k]))
    moves = [(-1, 0), *known]  # the first moves nothing: single moves are pairs with it
    believed = posterior.differences([leader, *(choices.canonical(moved(leader, *m)) for m in moves[1:])], leader)
    means, own = believed.means, believed.variances
    variance = own[:, None] + own[None, :] + 2.0 * believed.covariance
    value = means[:, None] + means[None, :] - np.sqrt(np.maximum(variance, 0.0))
    units = np.array([unit for unit, _ in moves])
    first, second = np.nonzero((units[:, None] != units[None, :]) & np.triu(_meets(choices, leader, moves), 1))
    found: list[Options] = []
    for at in np.argsort(value[first, second], kind="stable"):
        options = moved(leader, *moves[second[at]])
        if first[at]:
            options = moved(options, *moves[first[at]])
        options = choices.canonical(options)
        if options not in tried:
            found.append(options)
            if len(found) == count:
                break
    return found


def moved(options: Options, unit: int, option: int) -> Options:
    """The choice with one unit under another option."""
    return (*options[:unit], option, *options[unit + 1 :])


def _moves(choices: Choices, leader: Options) -> list[tuple[int, int]]:
    gone = choices.nest.gone(leader)
    every = [
        (u, k)
        for u, schemes in enumerate(choices.schemes)
        for k in range(len(schemes))
        if k != leader[u] and u not in gone
    ]
    if len(every) <= _MOST_MOVES:
        return every
    near = [(u, choices.neighbour(leader, u, direction)) for u in range(len(leader)) for direction in (-1, 1)]
    return [(u, k) for u, k in near if k is not None]


def _meets(choices: Choices, leader: Options, moves: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Whether both moves together meet a rule [moves, moves]."""
    found = np.zeros((len(moves), len(moves)), np.bool_)
    for rule in choices.rules:
        now = choices.cost(rule.costs, leader)
        if choices.nest.inside:
            costs = (choices.cost(rule.costs, choices.canonical(moved(leader, *move))) - now for move in moves[1:])
        else:
            costs = (int(rule.costs[u][k] - rule.costs[u][leader[u]]) for u, k in moves[1:])
        change = np.array([0, *costs])
        found |= change[:, None] + change[None, :] <= rule.capacity - now
    return found
