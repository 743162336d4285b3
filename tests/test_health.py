"""How long a replica may take, and what its canary may find."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import MODE, evaluate, toy_components

from dtmsearch.cluster.health import Check, Health, Known, Pace, Record, Sample, tolerated_share
from dtmsearch.core.evaluation import EvalRequest, Reference
from dtmsearch.core.plan import Plan

HEALTH = Health(first_seconds=1000.0, floor_seconds=1.0, factor=20.0)
PLAN = Plan.of({toy_components()[0].name: "int4-g32"})
REQUEST = EvalRequest(PLAN, "reference", (0, 8))
CHECK = Check(PLAN, "reference", 4, continuation_tokens=100, tolerated=0.05)
DENSE = Check(Plan(), "reference", 4, continuation_tokens=100, tolerated=0.05)


def right(num_prompts: int = 4) -> Sample:
    return Sample.of(evaluate(REQUEST), num_prompts)


def sample(sdt: float = 0.0, dppl: float = 1.0) -> Sample:
    return Sample(np.full(4, sdt, np.int32), np.full(4, dppl, np.float32))


def known() -> Known:
    plans = Known(HEALTH)
    plans.learn(REQUEST, evaluate(REQUEST), 4)
    return plans


def test_patience_is_generous_while_nothing_is_measured() -> None:
    assert Pace(HEALTH).limit_seconds(1.0) == 1000.0


def test_patience_follows_the_layers_to_run() -> None:
    pace = Pace(HEALTH)
    pace.learn(cost=10.0, seconds=1.0)
    assert pace.limit_seconds(1000.0) == pytest.approx(20 * 100.0)


def test_patience_has_a_floor() -> None:
    pace = Pace(HEALTH)
    pace.learn(cost=10.0, seconds=1e-6)
    assert pace.limit_seconds(1.0) == 1.0


def test_a_call_as_long_as_the_longest_so_far_is_waited_for() -> None:
    pace = Pace(HEALTH)
    pace.learn(cost=1e6, seconds=500.0)
    for _ in range(99):
        pace.learn(cost=1e6, seconds=0.1)
    assert pace.limit_seconds(1.0) > 500.0


def test_patience_learns_from_replicas_that_grow_slower() -> None:
    pace = Pace(HEALTH)
    for seconds in (1.0, 1.0, *[5.0] * 20):
        pace.learn(cost=10.0, seconds=seconds)
    assert pace.limit_seconds(1000.0) == pytest.approx(20 * 500.0, rel=0.01)


def test_waiting_for_the_driver_makes_no_replica_slower() -> None:
    pace = Pace(HEALTH)
    pace.learn(cost=10.0, seconds=5.0, own_seconds=1.0)
    assert (pace.seconds_per_cost, pace.limit_seconds(10.0)) == pytest.approx((0.1, 20 * 5.0))


def test_canaries_that_take_long_come_rarely() -> None:
    assert Health(canary_seconds=10.0, canary_share=0.02).canary_interval(3.0) == pytest.approx(150.0)


def test_a_canary_that_finds_what_is_known_is_good() -> None:
    assert known().fault(CHECK, right(), None) is None


def test_near_ties_may_fall_differently_on_other_batches() -> None:
    found = right()
    assert known().fault(CHECK, Sample(found.sdt + 2, found.dppl * np.float32(1.01)), None) is None


@pytest.mark.parametrize(("tokens", "factor"), [(10, 1.0), (0, 1.2)])
def test_a_canary_that_finds_something_else_is_a_fault(tokens: int, factor: float) -> None:
    found = right()
    fault = known().fault(CHECK, Sample(found.sdt + tokens, found.dppl * np.float32(factor)), None)
    assert fault is not None and "its canary is off by" in fault


def reference(num_differing: int, size: tuple[int, int] = (256, 100)) -> Reference:
    """One whose base model disagrees with itself on so many of its tokens."""
    agrees = (np.arange(size[0] * size[1]) >= num_differing).reshape(size)
    tokens = np.zeros(size, np.int32)
    return Reference("reference", "toy", MODE, tokens, tokens, agrees, ())


@pytest.mark.parametrize(("share", "tokens"), [(0.0, 1), (0.005, 11), (0.03, 39), (0.1, 107)])
def test_what_is_tolerated_follows_the_models_own_disagreement(share: float, tokens: int) -> None:
    tolerated = tolerated_share(reference(round(share * 25600)), 400)
    assert int(tolerated * 400) == tokens


def test_a_sound_replica_is_tolerated_as_often_as_three_standard_deviations_say() -> None:
    draws = np.random.default_rng(0).binomial(400, 2 * 0.03, 10_000)
    assert (draws / 400 > tolerated_share(reference(768), 400)).mean() < 0.002


def test_one_token_more_of_a_short_canary_dismisses_nobody() -> None:
    assert tolerated_share(reference(0), 12) >= 1 / 12


def test_two_replicas_that_find_no_number_find_the_same() -> None:
    assert Known(HEALTH).alike(DENSE, sample(dppl=float("nan")), sample(sdt=9, dppl=float("inf")))


def test_a_number_and_none_are_not_the_same() -> None:
    assert not Known(HEALTH).alike(DENSE, sample(dppl=float("nan")), sample())


def test_what_two_replicas_contradict_is_not_held_against_a_third() -> None:
    plans = known()
    plans.fault(CHECK, sample(50, 3.0), None)
    assert CHECK.key not in plans


def test_a_dense_model_that_diverges_is_a_fault() -> None:
    assert Known(HEALTH).fault(DENSE, sample(sdt=6), None) is not None


def test_a_replica_must_find_again_what_it_found() -> None:
    fault = Known(HEALTH).fault(DENSE, sample(dppl=1.02), sample(dppl=1.0))
    assert fault is not None and "its canary moved" in fault


@pytest.mark.parametrize("dppl", [float("nan"), float("inf")])
def test_a_perplexity_that_is_no_number_is_a_fault(dppl: float) -> None:
    assert Known(HEALTH).fault(DENSE, sample(dppl=dppl), None) is not None


def test_the_dense_canary_is_remembered_beyond_those_of_parents() -> None:
    record = Record()
    for check in (DENSE, CHECK, Check(Plan.of({"other": "nf4"}), "reference", 4, 100, 0.05)):
        record.keep(check, sample(), now=1.0, seconds=0.1)
    assert set(record.samples) == {DENSE.key, (Plan.of({"other": "nf4"}).id, "reference")}


def test_plans_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtmsearch.cluster.health._MOST_KNOWN", 1)
    plans = known()
    other = EvalRequest(Plan.of({toy_components()[1].name: "nf4"}), "reference", (0, 8))
    plans.learn(other, evaluate(other), 4)
    assert CHECK.key not in plans


def test_a_part_of_the_prompts_that_is_not_the_first_tells_nothing() -> None:
    plans = Known(HEALTH)
    part = EvalRequest(PLAN, "reference", (4, 8))
    plans.learn(part, evaluate(part), 4)
    assert CHECK.key not in plans
