from __future__ import annotations

import numpy as np
import pytest

from dtmsearch.search.solver.sequential_test import Values, log_evidence, log_evidence_above

ORDERS = 2_000
ERROR = 0.05
# What a rate of `ERROR` can look like in so many orders, once in ten thousand times.
MOST_WRONG = ERROR + 3.7 * np.sqrt(ERROR * (1 - ERROR) / ORDERS)


def population(kind: str, size: int = 80) -> Values:
    rng = np.random.default_rng(3)
    return {
        "rare and large": np.where(rng.random(size) < 0.05, 100.0, 0.0),
        "skewed": rng.exponential(size=size),
        "heavy tailed": rng.lognormal(sigma=2.0, size=size),
        "nearly equal": 10.0 + 0.1 * rng.random(size),
        "counts": rng.poisson(1.0, size).astype(np.float64),
    }[kind]


def orders(size: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    return np.stack([rng.permutation(size) for _ in range(ORDERS)])


KINDS = ("rare and large", "skewed", "heavy tailed", "nearly equal", "counts")


@pytest.mark.parametrize("kind", KINDS)
def test_a_true_claim_is_rarely_refuted_however_often_one_looks(kind: str) -> None:
    values = population(kind)
    shuffled = values[orders(len(values))]
    evidence = log_evidence(shuffled, np.zeros_like(shuffled), len(values), values.mean())
    assert (evidence >= np.log(1 / ERROR)).mean() <= MOST_WRONG


@pytest.mark.parametrize("kind", KINDS)
def test_a_true_claim_is_rarely_refuted_with_a_covariate(kind: str) -> None:
    covariate = population(kind)
    values = covariate + np.random.default_rng(8).exponential(size=len(covariate)) * covariate.mean()
    order = orders(len(values))
    evidence = log_evidence_above(values[order][:, :60], covariate[order], values.mean())
    assert (evidence >= np.log(1 / ERROR)).mean() <= MOST_WRONG


def test_the_error_is_nearly_used_where_every_look_counts() -> None:
    """Evidence that never misled anybody would be too weak."""
    values = population("counts")
    shuffled = values[orders(len(values))]
    evidence = log_evidence(shuffled, np.zeros_like(shuffled), len(values), values.mean())
    assert (evidence >= np.log(1 / ERROR)).mean() >= ERROR / 5


def test_a_mean_of_twice_the_claimed_one_is_told_from_a_small_part() -> None:
    values = np.random.default_rng(1).exponential(size=1_000)
    evidence = log_evidence(values[None, :100], np.zeros((1, 100)), 1_000, values.mean() / 2)
    assert evidence[0] >= np.log(100)


def test_a_covariate_tells_sooner() -> None:
    rng = np.random.default_rng(1)
    covariate = rng.random(500)[np.stack([rng.permutation(500) for _ in range(100)])]
    values = covariate + 0.2 * covariate.mean()
    alone = log_evidence_above(values[:, :100], np.zeros((100, 500)), covariate.mean())
    together = log_evidence_above(values[:, :100], covariate, covariate.mean())
    assert np.quantile(together, 0.1) > np.quantile(alone, 0.1) + np.log(10)


def test_what_was_seen_can_rule_a_claim_out_for_certain() -> None:
    assert log_evidence(np.array([[3.0, 3.0]]), np.zeros((1, 2)), 4, 1.0)[0] == np.inf


def test_values_that_just_meet_the_claim_rule_nothing_out() -> None:
    values = np.full((1, 7), 0.1)
    assert log_evidence(values, np.zeros((1, 7)), 7, float(values.mean()))[0] == pytest.approx(0.0, abs=1e-6)


def test_a_larger_claim_has_less_against_it() -> None:
    values = np.random.default_rng(1).exponential(size=(1, 50))
    evidence = [log_evidence(values, np.zeros_like(values), 200, mean)[0] for mean in np.linspace(0.2, 2.0, 30)]
    assert evidence == sorted(evidence, reverse=True)
