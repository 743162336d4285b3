"""What compressing a unit costs, without measuring every scheme: damage(unit, scheme) = alpha(unit) x error(scheme).

The error is that of the weights, known without a forward pass; alpha, the unit's sensitivity, follows from one measured
scheme. It is one number for all schemes of a family, for a family's errors do alike; where a family's errors lie far
apart, two schemes are measured and alpha goes from the one to the other with the logarithm of the error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.schemes import DROP
from dtmsearch.search.solver.choices import Choices

Floats = NDArray[np.float64]
# (component, scheme) -> relative error of its weights.
WeightErrors = Mapping[tuple[str, str], float]

# Errors at which a family is probed: strong enough to be seen on a few prompts, not yet ruin.
_PROBED_ERRORS = (0.1, 0.5)
# A family is probed a second time if its largest error is beyond the first probe's by this factor.
_FAR = 3.0
# What passes for no damage: a probe whose KL is zero says that a unit is insensitive, not that it does not matter.
_LEAST = 1e-9


@dataclass(frozen=True)
class Probing:
    """A unit under one option, from which the options of its family follow."""

    unit: int
    option: int
    family: str


def family_of(scheme: str) -> str:
    """Schemes whose errors do alike: the name without its numbers, granularities of rounding taken together."""
    parts = [re.sub(r"int#-(tensor|channel|g#)(-asym)?", "int#", part) for part in _numberless(scheme).split("+")]
    return "+".join(parts)


def _numberless(scheme: str) -> str:
    return re.sub(r"[0-9]+(\.[0-9]+)?(:[0-9]+)?", "#", scheme)


def unit_errors(choices: Choices, errors: WeightErrors) -> tuple[Floats, ...]:
    """Errors [options] of each unit, those of its components weighted by their weights; 0 for dense.

    Raises `ValueError` where an error is missing.
    """
    found: list[Floats] = []
    for unit, schemes in zip(choices.units, choices.schemes, strict=True):
        if unit.is_block:  # the share of it that goes
            whole = unit.components[0].num_weights
            gone = [unit.sizes[scheme].removed_weights / whole for scheme in schemes]
            found.append(np.array([1.0 if s == DROP else share for s, share in zip(schemes, gone, strict=True)]))
            continue
        weights = np.array([c.num_weights for c in unit.components], np.float64)
        rows = [[_error(errors, c.name, s) for s in schemes[1:]] for c in unit.components]
        mean = (weights[:, None] * np.array(rows).reshape(len(weights), -1)).sum(axis=0) / weights.sum()
        found.append(np.concatenate([[0.0], mean]))
    return tuple(found)


def _error(errors: WeightErrors, component: str, scheme: str) -> float:
    if (component, scheme) not in errors:
        raise ValueError(f"no weight error of {component} under {scheme}: measure the errors of all schemes first")
    return errors[component, scheme]


def probings(choices: Choices, errors: Sequence[Floats]) -> list[Probing]:
    """What to measure of each unit: of every family the option whose error is nearest to the one aimed at; of a block
    every option, for what goes of it is beyond the law."""
    found: list[Probing] = []
    for unit, (schemes, error) in enumerate(zip(choices.schemes, errors, strict=True)):
        if choices.units[unit].is_block:
            found += [Probing(unit, k, family_of(schemes[k])) for k in range(1, len(schemes))]
            continue
        families = [family_of(scheme) for scheme in schemes]
        for family in dict.fromkeys(families[1:]):
            members = [k for k in range(1, len(schemes)) if families[k] == family]
            first = min(members, key=lambda k: _distance(float(error[k]), _PROBED_ERRORS[0]))
            found.append(Probing(unit, first, family))
            far = [k for k in members if error[k] > _FAR * max(error[first], _LEAST)]
            if far:
                found.append(
                    Probing(unit, min(far, key=lambda k: _distance(float(error[k]), _PROBED_ERRORS[1])), family)
                )
    return found


def _distance(error: float, aim: float) -> float:
    return abs(float(np.log(max(error, _LEAST) / aim)))


def predicted(
    choices: Choices, errors: Sequence[Floats], probed: Sequence[Probing], damages: Sequence[float]
) -> tuple[Floats, ...]:
    """Damage [options] of each unit by the law, from the damages of what was probed.

    A damage that is infinite says that the probed option cannot be taken, nor one of its family with a larger error.
    """
    tables = tuple(np.full(len(schemes), np.nan) for schemes in choices.schemes)
    groups: dict[tuple[int, str], list[tuple[float, float, float]]] = {}
    for probing, damage in zip(probed, damages, strict=True):
        error = float(errors[probing.unit][probing.option])
        groups.setdefault((probing.unit, probing.family), []).append((error, damage, max(damage, 0.0)))
    for unit, schemes in enumerate(choices.schemes):
        tables[unit][0] = 0.0
        for option in range(1, len(schemes)):
            points = groups[unit, family_of(schemes[option])]
            tables[unit][option] = _by_law(float(errors[unit][option]), sorted(points))
    return tables


def _by_law(error: float, points: Sequence[tuple[float, float, float]]) -> float:
    """The damage at an error, alpha interpolated between the probed errors and constant beyond them."""
    finite = [(e, d) for e, _, d in points if np.isfinite(d)]
    ruined = [e for e, _, d in points if not np.isfinite(d)]
    if not finite or (ruined and error >= min(ruined)):
        return np.inf
    at = np.log([max(e, _LEAST) for e, _ in finite])
    alphas = np.log([max(d, _LEAST) / max(e, _LEAST) for e, d in finite])
    return float(error * np.exp(np.interp(np.log(max(error, _LEAST)), at, alphas)))


def expected_sdt(kl: float, length: int, factor: float) -> float:
    """Divergent tokens of `length` that a KL leads to: `factor` sqrt(KL) of them, whatever caused the damage. The
    factor is the model's and the text's: 0.28 on one of 22 million weights and code, 0.55 on one of 0.3 million."""
    return length * min(factor * math.sqrt(max(kl, 0.0)), 1.0)


def expected_fdt(kl: float, length: int, factor: float) -> float:
    """First divergent token of `length` if tokens diverge each with the same chance: a waiting time, cut off."""
    share = min(max(expected_sdt(kl, length, factor) / length, 1e-12), 1.0)
    return float((1.0 - (1.0 - share) ** length) / share)
