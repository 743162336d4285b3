"""What `auto` measures and on which prompts, before anything is measured."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dtmsearch.core.strategy_settings import AutoSettings
from dtmsearch.search.strategies.auto_schedule import PricedSchedule, ProbedSchedule, Schedule

EFFORT = AutoSettings(prompts=16, plans=8, correction_prompts=2_000)
SCHEDULES = [ProbedSchedule(EFFORT, 84, 1_000, 2), PricedSchedule(EFFORT, 84, 1_000, 2, num_steps=(4, 8))]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["probed", "priced"])
def test_rounds_forward_no_more_than_they_may(schedule: Schedule) -> None:
    rounds = schedule.rounds()
    spent = sum(each.cost for each in rounds)
    assert 0 < len(rounds) < EFFORT.rounds
    assert spent <= EFFORT.correction_prompts < spent + schedule.correction_round(len(rounds)).cost


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["probed", "priced"])
def test_what_a_round_learns_by_it_is_not_confirmed_on(schedule: Schedule) -> None:
    stretches = [stretch for number in range(2) for stretch in _stretches(schedule, number)]
    assert all(a[1] <= b[0] for a, b in pairwise(stretches))


def _stretches(schedule: Schedule, number: int) -> list[tuple[int, int]]:
    each = schedule.correction_round(number)
    return [each.learns_on, each.plans_on]


@pytest.mark.parametrize("prompts", [1, 7, 40])
def test_no_stretch_is_longer_than_the_prompts(prompts: int) -> None:
    for schedule in (ProbedSchedule(EFFORT, 8, prompts, 1), PricedSchedule(EFFORT, 8, prompts, 1, num_steps=(4, 8))):
        stretches = [s for number in range(4) for s in _stretches(schedule, number)] + schedule.swap_lots(3_000)
        assert all(0 <= first < end <= prompts for first, end in stretches)


def test_each_round_that_probes_takes_twice_the_prompts_of_the_last() -> None:
    rounds = [SCHEDULES[0].correction_round(number) for number in range(3)]
    assert [end - first for first, end in (each.plans_on for each in rounds)] == [16, 32, 64]
    assert [each.num_moves for each in rounds] == [42, 21, 21]


def test_what_is_foreseen_of_a_round_is_what_it_measures() -> None:
    schedule = ProbedSchedule(AutoSettings(correction_prompts=100_000), 84, 1_000, 2)
    foreseen = list(schedule.usual(num_probed=84))[1:3]
    assert foreseen == [(each.num_measured, each.cost // each.num_measured) for each in schedule.rounds()[:2]]


def test_two_plans_side_by_side_forward_no_more_than_one_alone() -> None:
    schedule = PricedSchedule(AutoSettings(), 84, 1_000, 2, num_steps=(3, 6))
    alone, together = schedule.rounds(), schedule.side_by_side()
    assert [ways for _, ways in together] == [2, 2, 1, 1, 1]
    assert sum(each.cost * ways for each, ways in together) <= sum(each.cost for each in alone)
    first = together[0][0]
    assert first.learns_on == (0, 24) and first.plans_on == (24, 56)
    short = PricedSchedule(AutoSettings(correction_prompts=1_100), 84, 1_000, 2, num_steps=(3, 6))
    assert [ways for _, ways in short.side_by_side()] == [2]
