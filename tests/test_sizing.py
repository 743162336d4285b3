"""How much work goes into one call."""

from __future__ import annotations

import pytest

from dtmsearch.cluster.sizing import APART_SECONDS, CALL_SECONDS, call_seconds, guess_seconds, usual_seconds


def test_few_replicas_get_calls_of_the_usual_length() -> None:
    assert call_seconds(1e6, 8) == CALL_SECONDS


def test_calls_to_many_replicas_leave_the_driver_time_for_the_rest() -> None:
    assert usual_seconds(2000) / 2000 == pytest.approx(APART_SECONDS)


def test_a_replica_takes_at_most_half_its_fair_part_where_the_driver_has_time() -> None:
    assert call_seconds(waiting_seconds=8.0, num_replicas=8) == pytest.approx(0.5)


def test_a_rounds_last_calls_are_as_long_as_sending_them_all_takes() -> None:
    length = call_seconds(waiting_seconds=20.0, num_replicas=512)
    assert length == pytest.approx(APART_SECONDS * 20.0 / length)


def test_no_work_is_no_time() -> None:
    assert call_seconds(0.0, 8) == 0.0


def test_guesses_are_shared_by_those_who_are_free() -> None:
    assert (guess_seconds(2.0, 8), guess_seconds(80.0, 8)) == (0.25, CALL_SECONDS)
