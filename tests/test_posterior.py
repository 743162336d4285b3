from __future__ import annotations

import numpy as np
import pytest

from dtmsearch.search.solver.posterior import Posterior, Spread

DAMAGES = (np.array([0.0, 1.0, 4.0, 0.9]), np.array([0.0, 2.0, 8.0, 1.8]))
# The last option's error is next to the second one's, and it is of another family.
ERRORS = (np.array([0.0, 0.1, 0.4, 0.11]),) * 2
FAMILIES = (["dense", "int", "int", "int"], ["dense", "int", "int", "gptq"])
SPREAD = Spread(common=0.5, family=0.3, option=0.2, interaction=0.0)
DENSE = (0, 0)
SEEN = [(2.0, 0.01), (7.0, 0.04)]
MEASURED = [(1, 0), (1, 1)]


def posterior(spread: Spread = SPREAD) -> Posterior:
    return Posterior.of(DAMAGES, ERRORS, FAMILIES, spread)


def rows(posterior: Posterior, choices: list[tuple[int, ...]]) -> np.ndarray:
    """[choices, weights]: what dense differs by from each, put together option by option."""
    tables = [(damage * posterior.common)[:, None] for damage in posterior.damages]
    return np.array(
        [
            np.concatenate([sum(t[k] for t, k in zip(tables, options, strict=True)),
                            *(table[k] for table, k in zip(posterior.features, options, strict=True))])
            for options in choices
        ]
    )  # fmt: skip


def test_what_was_observed_is_learnt_as_by_regression_over_the_weights() -> None:
    prior, a, b = posterior(), rows(posterior(), MEASURED), rows(posterior(), [(2, 3), (3, 2)])
    values, variances = np.array(SEEN).T
    predicted = np.array([1.0, 3.0])
    precision = np.eye(a.shape[1]) + a.T @ np.diag(1.0 / variances) @ a
    mean = np.linalg.solve(precision, a.T @ ((values - predicted) / variances))
    found = prior.observed(MEASURED, DENSE, SEEN).differences([(2, 3), (3, 2)], DENSE)
    assert found.means == pytest.approx(np.array([5.8, 8.9]) + b @ mean)
    assert found.covariance == pytest.approx(b @ np.linalg.solve(precision, b.T))


def test_samples_are_spread_as_believed() -> None:
    learnt = posterior().observed(MEASURED, DENSE, SEEN)
    random = np.random.default_rng(0)
    drawn = np.array([rows(learnt, [(2, 3)])[0] @ learnt.sample(random) for _ in range(4_000)])
    believed = learnt.differences([(2, 3)], DENSE)
    assert drawn.mean() + 5.8 == pytest.approx(believed.means[0], abs=4 * drawn.std() / 60)
    assert drawn.var() == pytest.approx(believed.variances[0], rel=0.1)


def test_options_of_like_errors_and_one_family_deviate_alike() -> None:
    learnt = posterior().observed([(1, 0)], DENSE, [(3.0, 1e-6)])
    thetas = [table[1:] / damage[1:] for table, damage in zip(learnt.tables(), DAMAGES, strict=True)]
    assert thetas[0][0] == pytest.approx(3.0, abs=1e-3)
    assert thetas[0][0] > thetas[0][2] > thetas[0][1] > thetas[1][0] > 1.0  # like errors, family, other unit
    assert thetas[1][2] == pytest.approx(thetas[1][0])  # of another unit nothing is known but what all have in common


def test_what_failed_teaches_nothing_and_nothing_costs_less_than_a_part_of_the_law() -> None:
    prior = posterior()
    assert prior.observed([(2, 0)], DENSE, [(np.inf, 0.0)]).tables()[0] == pytest.approx(prior.tables()[0])
    found = prior.observed([(2, 0)], DENSE, [(-40.0, 1e-9)]).tables()
    assert found[0][2] == pytest.approx(0.05 * 4.0)


def test_an_option_that_cannot_be_measured_stays_out() -> None:
    damages = (np.array([0.0, 1.0, np.inf, 0.9]), DAMAGES[1])
    learnt = Posterior.of(damages, ERRORS, FAMILIES, SPREAD).observed([(1, 0)], DENSE, [(0.1, 1e-6)])
    assert [np.isinf(table).tolist() for table in learnt.tables()] == [[False, False, True, False], [False] * 4]


def test_surprise_is_how_many_times_the_variance_is_too_small() -> None:
    narrow, random = posterior(), np.random.default_rng(1)
    wide = narrow.scaled(9.0)
    choices = [(1, 0), (2, 0), (0, 1), (0, 2), (3, 3)]
    means = narrow.differences(choices, DENSE).means
    factors = []
    for _ in range(2_000):
        values = means + rows(wide, choices) @ random.standard_normal(wide.rows.shape[1])
        seen = [(value + 0.1 * random.standard_normal(), 0.01) for value in values]
        factors.append(narrow.surprise(choices, DENSE, seen))
    assert np.mean(factors) == pytest.approx(9.0, rel=0.1)
    assert wide.differences(choices, DENSE).variances == pytest.approx(
        9.0 * narrow.differences(choices, DENSE).variances
    )


def test_an_estimate_is_between_belief_and_measurement_by_their_precision() -> None:
    prior = posterior()
    believed = prior.differences([(1, 0)], DENSE)
    variance = float(believed.variances[0])
    assert prior.estimates([(1, 0)], DENSE, [(3.0, variance)]) == pytest.approx([2.0])  # believed: 1
    assert prior.estimates([(1, 0)], DENSE, [None]) == pytest.approx([1.0])
    assert np.isinf(prior.estimates([(1, 0)], DENSE, [(np.inf, 0.0)])).all()
