from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from dtmsearch.search.solver.knapsack import Infeasible, Solution, front, solve

OPTION = st.tuples(st.integers(0, 40).map(lambda n: n / 8), st.integers(0, 30))
UNITS = st.lists(st.lists(OPTION, min_size=1, max_size=5), min_size=1, max_size=5)


def solved(units: list[list[tuple[float, int]]], capacity: int) -> Solution:
    losses = [np.array([loss for loss, _ in unit]) for unit in units]
    costs = [np.array([cost for _, cost in unit], np.int64) for unit in units]
    return solve(losses, costs, capacity)


def least_loss(units: list[list[tuple[float, int]]], capacity: int) -> float | None:
    """By trying every choice."""
    fitting = [choice for choice in product(*units) if sum(cost for _, cost in choice) <= capacity]
    return min((sum(loss for loss, _ in choice) for choice in fitting), default=None)


@settings(max_examples=300, deadline=None)
@given(UNITS, st.integers(0, 120))
def test_the_solution_is_optimal(units: list[list[tuple[float, int]]], capacity: int) -> None:
    expected = least_loss(units, capacity)
    try:
        found = solved(units, capacity).loss
    except Infeasible:
        found = None
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


@settings(max_examples=100, deadline=None)
@given(UNITS, st.integers(0, 120))
def test_the_solution_is_what_its_options_say_and_fits(units: list[list[tuple[float, int]]], capacity: int) -> None:
    try:
        found = solved(units, capacity)
    except Infeasible:
        return
    chosen = [unit[option] for unit, option in zip(units, found.options, strict=True)]
    loss, cost = sum(c[0] for c in chosen), sum(c[1] for c in chosen)
    assert (found.loss, found.cost, cost <= capacity) == (pytest.approx(loss, abs=1e-12), cost, True)


@pytest.mark.parametrize("num_units", [60, 224])
def test_what_it_finds_among_many_schemes_is_proven(num_units: int) -> None:
    random = np.random.default_rng(num_units)
    sizes = random.integers(1, 90, num_units) * 4096
    bits = np.sort(random.uniform(2.0, 8.0, 100))
    costs = [(size * bits).astype(np.int64) for size in sizes]
    losses = [random.lognormal() * 4.0**-bits * random.lognormal(0, 0.1, len(bits)) for _ in sizes]
    found = solve(losses, costs, int(sizes.sum() * 3.7))
    assert found.loss <= found.bound * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_highs_finds_no_better_solution(seed: int) -> None:
    """An integer programme of a zero or a one for every option, solved by another's code."""
    random = np.random.default_rng(seed)
    num_units, num_options = 40, 8
    costs = random.integers(1, 2_000, (num_units, num_options))
    losses = random.lognormal(size=(num_units, 1)) * 3.0 ** (-costs / 300) * random.lognormal(0, 0.5, costs.shape)
    capacity = int(costs.min(axis=1).sum() * 2.5)
    one_each = np.kron(np.eye(num_units), np.ones(num_options))
    rules = [LinearConstraint(one_each, 1, 1), LinearConstraint(costs.reshape(1, -1), ub=capacity)]
    options = {"mip_rel_gap": 0.0}
    oracle = milp(
        losses.ravel(), integrality=np.ones(costs.size), bounds=Bounds(0, 1), constraints=rules, options=options
    )
    assert oracle.success
    assert solve(list(losses), list(costs), capacity).loss == pytest.approx(oracle.fun, rel=1e-6)


def test_an_option_without_a_finite_loss_is_never_taken() -> None:
    assert solved([[(np.inf, 0), (2.0, 3)], [(np.nan, 0), (1.0, 4)]], 10).options == (1, 1)


def test_units_that_do_not_fit_are_infeasible() -> None:
    with pytest.raises(Infeasible, match="costs 7, more than the 6"):
        solved([[(1.0, 3)], [(1.0, 4)]], 6)


def test_a_unit_without_options_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="no option"):
        solved([[(np.nan, 0)]], 6)


@settings(max_examples=200, deadline=None)
@given(UNITS)
def test_every_choice_of_the_front_is_the_best_of_its_cost(units: list[list[tuple[float, int]]]) -> None:
    losses = [np.array([loss for loss, _ in unit]) for unit in units]
    costs = [np.array([cost for _, cost in unit], np.int64) for unit in units]
    found = front(losses, costs)
    chosen = [[unit[k] for unit, k in zip(units, options, strict=True)] for options in found]
    sizes = [sum(cost for _, cost in choice) for choice in chosen]
    kept = [sum(loss for loss, _ in choice) for choice in chosen]
    assert kept == [pytest.approx(least_loss(units, size), abs=1e-12) for size in sizes]
    # From the smallest size that there is to the best of all.
    assert sizes[0] == sum(min(cost for _, cost in unit) for unit in units)
    assert kept[-1] == pytest.approx(sum(min(loss for loss, _ in unit) for unit in units), abs=1e-12)
    assert sizes == sorted(sizes)
