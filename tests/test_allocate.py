from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtmsearch.search.solver.allocation import (
    Curve,
    DamageCurve,
    curve,
    gaussian_pruning_error,
    knapsack_allocation,
    modelled_damages,
    power_curve,
    threshold_allocation,
)

BEST = 100.0


def published(curves: list[Curve], weights: list[float], target: float, step: float = 0.02) -> list[float]:
    """The published pseudo-code, word for word: lower a level from the maximum; each component's added sparsity is
    where its curve, linearly interpolated, meets it; stop when the weighted average reaches the target."""
    grid = np.linspace(0.0, 1.0, 1001)
    lines = {id(c): list(zip(grid, np.interp(grid, c.shares, c.values), strict=True)) for c in curves}
    level = BEST
    while True:
        added = []
        for line in curves:
            share = 0.0
            for x, quality in lines[id(line)]:
                if quality < level:
                    break
                share = x
            added.append(share)
        if sum(share * number for share, number in zip(added, weights, strict=True)) >= target:
            return added
        level -= step


def falling(seed: int, number: int, plateau: bool = False) -> list[Curve]:
    """Curves of two measured points and assumed ends, as a round of the paper makes them."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(number):
        first, second = sorted(random.uniform(1, 99, 2), reverse=True)
        lines.append(curve([(0.1, BEST if plateau else first), (0.3, second)], 1.0, BEST, 0.0))
    return lines


def pruned(shares: tuple[float, ...], weights: list[float]) -> float:
    return sum(share * number for share, number in zip(shares, weights, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_without_plateaus_it_is_the_published_allocation(seed: int) -> None:
    curves, weights = falling(seed, 5), [100.0, 200.0, 50.0, 400.0, 100.0]
    found = threshold_allocation([curves], weights, 0.2 * sum(weights))
    assert found.shares == pytest.approx(published(curves, weights, 0.2 * sum(weights)), abs=4e-3)


def test_on_a_plateau_the_published_allocation_prunes_beyond_the_target() -> None:
    curves, weights = falling(0, 4, plateau=True), [100.0] * 4
    assert sum(published(curves, weights, 20.0)) * 100 == pytest.approx(40.0, abs=0.5)


def test_on_a_plateau_the_target_is_met_and_the_rest_reported() -> None:
    found = threshold_allocation([falling(0, 4, plateau=True)], [100.0] * 4, 20.0)
    assert (pruned(found.shares, [100.0] * 4), found.plateau) == (pytest.approx(20.0), pytest.approx(20.0))


def test_on_a_plateau_the_next_ranking_decides() -> None:
    flat = falling(0, 2, plateau=True)
    means = [curve([(0.1, 99.0)], 1.0, BEST, 0.0), curve([(0.1, 20.0)], 1.0, BEST, 0.0)]
    found = threshold_allocation([flat, means], [100.0, 100.0], 10.0)
    assert found.shares[0] > 5 * found.shares[1]


def test_what_no_ranking_tells_apart_is_divided_evenly() -> None:
    flat = falling(0, 2, plateau=True)
    assert threshold_allocation([flat], [100.0, 300.0], 20.0).shares == pytest.approx((0.05, 0.05))


curves_of_any_shape = st.lists(
    st.lists(st.integers(0, 100), min_size=2, max_size=3).map(
        lambda values: curve([(0.2, values[0]), (0.5, values[1])], 1.0, BEST, 0.0)
    ),
    min_size=1,
    max_size=5,
)


@given(curves_of_any_shape, st.floats(0.01, 0.99))
def test_the_target_is_met_exactly_whatever_the_curves(curves: list[Curve], share: float) -> None:
    weights = [float(10 * (index + 1)) for index in range(len(curves))]
    found = threshold_allocation([curves], weights, share * sum(weights))
    assert pruned(found.shares, weights) == pytest.approx(share * sum(weights))


@given(curves_of_any_shape, st.floats(0.01, 0.9))
def test_a_higher_target_never_lowers_a_share(curves: list[Curve], share: float) -> None:
    weights = [10.0] * len(curves)
    less = threshold_allocation([curves], weights, share * sum(weights)).shares
    more = threshold_allocation([curves], weights, (share + 0.05) * sum(weights)).shares
    assert all(b >= a - 1e-9 for a, b in zip(less, more, strict=True))


@settings(max_examples=30)
@given(curves_of_any_shape.filter(lambda lines: len(lines) < 4), st.sampled_from([0.1, 0.3, 0.55]))
def test_no_other_allocation_keeps_the_worst_component_better(curves: list[Curve], share: float) -> None:
    weights = [30.0, 10.0, 20.0][: len(curves)]
    target = share * sum(weights)
    found = threshold_allocation([curves], weights, target)
    grid = np.linspace(0.0, 1.0, 11)
    best = max(
        min(line.at(x) for line, x in zip(curves, shares, strict=True))
        for shares in itertools.product(grid, repeat=len(curves))
        if pruned(shares, weights) >= target - 1e-9
    )
    assert found.level >= best - 1e-6


def test_caps_are_kept_and_others_give_more() -> None:
    curves, weights = falling(1, 3), [100.0] * 3
    found = threshold_allocation([curves], weights, 90.0, [0.1, 1.0, 1.0])
    assert (found.shares[0] <= 0.1, pruned(found.shares, weights)) == (True, pytest.approx(90.0))


def test_a_cap_that_leaves_too_little_is_named() -> None:
    with pytest.raises(ValueError, match=r"90 weights are to be pruned, but the components leave 30"):
        threshold_allocation([falling(1, 3)], [100.0] * 3, 90.0, [0.1] * 3)


def test_a_measured_rise_is_taken_as_flat() -> None:
    assert curve([(0.1, 40.0), (0.3, 60.0)], 1.0, BEST, 0.0).values == (100.0, 40.0, 40.0, 0.0)


def test_points_beyond_what_is_left_give_way_to_the_assumed_end() -> None:
    assert curve([(0.1, 40.0), (0.3, 30.0)], 0.2, BEST, 0.0).shares == (0.0, 0.1, 0.2)


def convex(seed: int, number: int) -> list[DamageCurve]:
    random = np.random.default_rng(seed)
    shares = tuple(np.linspace(0.0, 1.0, 6))
    rises = np.sort(random.uniform(0.0, 1.0, (number, 5)), axis=1)
    return [DamageCurve(shares, (0.0, *np.cumsum(row))) for row in rises]


@pytest.mark.parametrize("seed", range(5))
def test_the_knapsack_finds_the_least_sum(seed: int) -> None:
    curves, weights = convex(seed, 4), [50.0] * 4
    best = min(
        sum(curves[c].damages[level] for c, level in enumerate(levels))
        for levels in itertools.product(range(6), repeat=4)
        if sum(levels) == 8
    )
    found = knapsack_allocation(curves, weights, 0.2 * 8 * 50.0).shares
    damage = sum(np.interp(x, line.shares, line.damages) for x, line in zip(found, curves, strict=True))
    assert damage == pytest.approx(best)


def test_the_knapsack_weighs_damage_by_weights() -> None:
    line = DamageCurve((0.0, 1.0), (0.0, 1.0))
    assert knapsack_allocation([line, line], [10.0, 30.0], 30.0).shares == (0.0, 1.0)


def test_the_knapsack_never_stops_before_the_target_on_curves_that_are_not_convex() -> None:
    lines = [DamageCurve((0.0, 0.5, 1.0), (0.0, 1.0, 1.2)), DamageCurve((0.0, 0.5, 1.0), (0.0, 0.7, 3.0))]
    assert pruned(knapsack_allocation(lines, [10.0, 10.0], 7.0).shares, [10.0, 10.0]) == pytest.approx(7.0)


def test_the_knapsack_keeps_caps() -> None:
    found = knapsack_allocation(convex(0, 3), [10.0] * 3, 15.0, [0.3, 1.0, 1.0]).shares
    assert (found[0] <= 0.3, sum(found)) == (True, pytest.approx(1.5))


def test_the_error_of_normally_distributed_weights() -> None:
    weights = np.sort(np.abs(np.random.default_rng(0).normal(size=200_000)))
    assert gaussian_pruning_error(0.6) == pytest.approx((weights[:120_000] ** 2).sum() / (weights**2).sum(), rel=0.02)


def test_modelled_damages_pass_through_what_was_measured() -> None:
    [line] = modelled_damages([[(0.5, 0.04), (0.85, 0.5)]], [0.0], [(0.3, 0.5, 0.85, 1.0)])
    assert (line.damages[2], line.damages[3]) == (pytest.approx(0.04), pytest.approx(0.5))


def test_modelled_damages_count_from_the_present_share() -> None:
    [line] = modelled_damages([[(0.6, 0.04)]], [0.4], [(0.2, 0.4, 0.6)])
    assert (line.shares, line.damages) == ((0.0, pytest.approx(0.2)), (0.0, pytest.approx(0.04)))


def test_damages_follow_the_given_errors() -> None:
    errors = {0.0: 0.0, 0.5: 0.1, 0.6: 0.2}
    [line] = modelled_damages([[(0.5, 1.0)]], [0.0], [(0.5, 0.6)], lambda _, share: errors[share])
    assert line.damages[2] / line.damages[1] == pytest.approx(2 * math.exp(0.1))


def test_a_component_without_measurements_is_left_alone() -> None:
    curves = modelled_damages([[], [(0.5, 1.0)]], [0.0, 0.0], [(0.5, 1.0)] * 2)
    assert knapsack_allocation(curves, [10.0, 10.0], 5.0).shares == (0.0, pytest.approx(0.5))


def test_a_power_curve_passes_through_what_was_measured_and_ends_there() -> None:
    line = power_curve([(0.1, 0.01), (0.4, 0.64)], 1.0)
    assert (line.shares[-1], line.damages[-1], line.damages[4]) == (0.4, pytest.approx(0.64), pytest.approx(0.01))


def test_below_the_first_point_a_power_curve_goes_on_as_a_power() -> None:
    line = power_curve([(0.2, 0.04), (0.4, 0.16)], 1.0)
    assert line.damages[4] == pytest.approx(0.01)


def test_a_power_curve_without_damage_is_free_as_far_as_it_was_measured() -> None:
    assert power_curve([(0.1, -0.001), (0.3, 0.0)], 1.0) == DamageCurve((0.0, 0.3), (0.0, 0.0))
