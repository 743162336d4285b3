"""What is concluded from prices and slopes: forces of a plan on options, what steps gain, prices that share what they
have in common."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from dtmsearch.search.solver.fisher_form import Forces, Prices, expected_gain

UNITS, OPTIONS, POSITIONS = 12, 4, 10
Floats = NDArray[np.float64]


def changes(seed: int) -> Floats:
    """What options change, in a space of 60 directions: [units, options, directions]; dense, the first, nothing."""
    found = np.random.default_rng(seed).standard_normal((UNITS, OPTIONS, 60)) * 0.02
    found *= 4.0 ** -np.arange(OPTIONS)[None, :, None]
    found[:, 0] = 0.0
    return found


def prices_of(changes: Floats, samples: int, seed: int) -> Prices:
    """Products with gradients drawn from the standard normal distribution, whose Fisher form is the identity."""
    drawn = np.random.default_rng((seed, 1)).standard_normal((samples, changes.shape[2])) * np.sqrt(POSITIONS)
    return Prices(tuple(drawn @ unit.T for unit in changes), POSITIONS)


def slopes_of(changes: Floats, plan: tuple[int, ...], samples: int, noise: float, seed: int) -> Prices:
    """Products of a gradient at a plan, which is the plan's own change, with noise on every prompt."""
    own = sum(unit[k] for unit, k in zip(changes, plan, strict=True))
    random = np.random.default_rng((seed, 2))
    gradients = own + random.standard_normal((samples, changes.shape[2])) * noise
    return Prices(tuple(gradients @ unit.T * POSITIONS for unit in changes), POSITIONS)


def true_forces(changes: Floats, plan: tuple[int, ...]) -> Floats:
    """[units, options]: cross terms with what the other units change."""
    whole = sum(unit[k] for unit, k in zip(changes, plan, strict=True))
    return np.stack([unit @ (whole - unit[k]) for unit, k in zip(changes, plan, strict=True)])


PLAN = (1, 2, 3) * (UNITS // 3)


def test_forces_are_the_cross_terms_with_the_other_units() -> None:
    made = changes(0)
    prices = prices_of(made, 40_000, 0)
    known = Forces.none(prices.pooled()).observed(prices.pooled(), slopes_of(made, PLAN, 50, 1e-6, 0), PLAN, 1.0)
    wanted = true_forces(made, PLAN)
    scale = np.abs(wanted).max()
    assert np.stack(known.means) == pytest.approx(wanted, abs=0.02 * scale)
    assert all(force[0] == 0.0 for force in known.means)


def test_slopes_that_are_all_noise_are_not_believed() -> None:
    made = changes(0)
    prices = prices_of(made, 4_000, 0)
    noisy = slopes_of(made, PLAN, 50, 5.0, 0)
    known = Forces.none(prices.pooled()).observed(prices.pooled(), noisy, PLAN, 1.0)
    raw = np.stack([s.mean(axis=0) / POSITIONS for s in noisy.products])
    assert np.abs(np.stack(known.means)).max() < 0.3 * np.abs(raw).max()


def test_slopes_at_one_plan_after_the_other_add_up() -> None:
    made = changes(0)
    prices = prices_of(made, 40_000, 0)
    later = (PLAN[0] + 1, *PLAN[1:])
    known, errors = Forces.none(prices.pooled()), []
    for seed, plan in enumerate((PLAN, later, later, later, later, later)):
        known = known.observed(prices.pooled(), slopes_of(made, plan, 40, 0.1, seed), plan, 1.0)
        errors.append(float(np.abs(np.stack(known.means) - true_forces(made, plan)).mean()))
    assert errors[-1] < 0.8 * errors[0]


def test_what_moves_together_along_the_plans_own_direction_is_foreseen_exactly() -> None:
    # KL is the square of a sum: a plan's own changes x, each taken back by a part of it.
    own = np.array([0.5, 1.0, 1.5, 0.2])
    back = own * np.array([0.1, 0.6, 0.3, 0.0])
    total = 0.5 * own.sum() ** 2
    moves, curvatures = -back * own.sum(), 0.5 * back**2
    assert expected_gain(moves, curvatures, total) == pytest.approx(0.5 * (own - back).sum() ** 2 - total)


def test_a_step_of_one_unit_is_its_slope_and_curvature() -> None:
    assert expected_gain(np.array([0.0, -0.3, 0.0]), np.array([0.0, 0.1, 0.0]), 1.0) == pytest.approx(-0.2)


def test_pooled_prices_of_few_samples_are_nearer_the_truth() -> None:
    made = changes(3)[:, :, :] * np.exp(np.random.default_rng(4).standard_normal(UNITS))[:, None, None]
    truth = 0.5 * np.square(made).sum(axis=2)[:, 1:]
    off = {"own": 0.0, "pooled": 0.0}
    for seed in range(20):
        prices = prices_of(made, 24, seed)
        for name, tables in (("own", prices.damages()), ("pooled", prices.pooled().damages())):
            off[name] += float(np.square(np.log(np.stack(tables)[:, 1:] / truth)).mean())
    assert off["pooled"] < 0.75 * off["own"]


def test_pooled_prices_of_many_samples_are_their_own() -> None:
    prices = prices_of(changes(0), 20_000, 0)
    assert np.stack(prices.pooled().damages()) == pytest.approx(np.stack(prices.damages()), rel=0.03)


def test_a_unit_that_costs_nothing_is_left_as_it_is() -> None:
    made = changes(0)
    made[5] = 0.0
    prices = prices_of(made, 30, 0)
    assert (prices.pooled().damages()[5] == 0.0).all() and np.isfinite(np.stack(prices.pooled().damages())).all()


def test_an_expert_that_no_sample_reached_is_not_for_nothing() -> None:
    made = changes(0)
    made[5] = 0.0
    prices = replace(prices_of(made, 30, 0), experts=tuple(unit == 5 for unit in range(UNITS)))
    damages = np.stack(prices.pooled().damages())
    others = np.delete(damages, 5, axis=0)
    assert damages[5] == pytest.approx(others.min(axis=0))
    assert (damages[5, 1:] > 0.0).all()
