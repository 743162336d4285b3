"""Units that are pruned by parts, the schemes that prune them, and the schemes nearest to wanted shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor

from dtmsearch.core.components import Component
from dtmsearch.core.plan import Perturbation
from dtmsearch.core.schemes import DENSE, DROP, parse_scheme
from dtmsearch.core.strategy_settings import PruningSettings
from dtmsearch.search.space import SearchSpace

# A scheme says the share that it prunes to so many digits.
SHARE_DIGITS = 6
# Saliencies that prune as many weights in every row.
_ROWS_ALIKE = ("wanda",)


@dataclass(frozen=True)
class PrunedUnit:
    """Components that change together."""

    components: tuple[Component, ...]

    @property
    def name(self) -> str:
        return self.components[0].name

    @cached_property
    def num_weights(self) -> int:
        return sum(component.num_weights for component in self.components)

    def edge(self, scheme: str) -> Perturbation:
        return Perturbation(self.name, scheme, tuple(component.name for component in self.components[1:]))

    def pruned(self, scheme: str) -> int:
        return sum(parse_scheme(scheme).pruned_weights(component.shape) for component in self.components)


def units_of(space: SearchSpace) -> tuple[PrunedUnit, ...]:
    """What is pruned together: tied components are one unit."""
    return tuple(PrunedUnit(unit.components) for unit in space.units)


def scheme_name(prune: str, share: float) -> str:
    """The scheme that prunes a share of a component: `dense` at none, `drop` at all of it."""
    digits = f"{share:.{SHARE_DIGITS}f}"
    if float(digits) <= 0.0:
        return DENSE
    return DROP if float(digits) >= 1.0 else f"{prune}-{digits.rstrip('0')}"


def share_of(scheme: str) -> float:
    """The share that a scheme of `scheme_name` prunes."""
    return parse_scheme(scheme).pruned_share


def fitted_schemes(
    shares: Sequence[float], units: Sequence[PrunedUnit], prune: str, wanted: int, cap: float = PruningSettings.cap
) -> list[str]:
    """Schemes nearest to shares, none above `cap`, that together prune no more than `wanted` weights, and less by no
    more than a step of one unit: a weight in every row where rows are pruned alike, elsewhere one weight or one of a
    million parts."""
    steps = [_num_steps(unit, prune) for unit in units]
    counts = [floor(share * number + 1e-6) for share, number in zip(shares, steps, strict=True)]
    rests = [share * number - count for share, number, count in zip(shares, steps, counts, strict=True)]

    def scheme(at: int) -> str:
        return scheme_name(prune, counts[at] / steps[at])

    def move(at: int, by: int) -> int:
        """Weights that are pruned more after moving a unit's share by some steps."""
        before = units[at].pruned(scheme(at))
        counts[at] += by
        return units[at].pruned(scheme(at)) - before

    total = sum(unit.pruned(scheme(at)) for at, unit in enumerate(units))
    for at in sorted(range(len(units)), key=lambda index: -rests[index]):
        if total > wanted and counts[at]:
            total += move(at, -1)
        elif rests[at] > 0.0 and (counts[at] + 1) / steps[at] <= cap:
            gained = move(at, 1)
            if total + gained > wanted:
                gained += move(at, -1)
            total += gained
    return [scheme(at) for at in range(len(units))]


def _num_steps(unit: PrunedUnit, prune: str) -> int:
    if prune in _ROWS_ALIKE:
        return max(component.shape[1] for component in unit.components)
    return min(int(10**SHARE_DIGITS), unit.num_weights)
