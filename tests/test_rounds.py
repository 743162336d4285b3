"""Candidates that are measured side by side, and their order while the round goes on."""

from __future__ import annotations

import random

import pytest
from fakes import evaluate, request_for, toy_components

from dtmsearch.core.metrics import Summary, rank_key
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.search.strategies.rounds import Round


def round_of(num_layers: int = 6) -> Round:
    edges = [(Plan(), Perturbation(c.name, "int4-g32")) for c in toy_components(num_layers)]
    return Round(0, edges, request_for)


@pytest.mark.parametrize("metric", ["fdt", "kl"])
def test_leaders_are_the_best_of_those_told_whenever_they_are_asked_for(metric: str) -> None:
    round_ = round_of()
    asks = round_.ask()
    random.Random(0).shuffle(asks)
    for ask in asks:
        round_.tell(ask.request.id, evaluate(ask.request))
        told = [c for c in round_.candidates if isinstance(c.answer, Summary)]
        best = sorted(told, key=lambda c: rank_key(c.answer, metric) if isinstance(c.answer, Summary) else ())
        assert [candidate for candidate, _ in round_.leaders(metric, 3)] == best[:3]


def test_a_round_ranks_by_one_metric_after_the_other() -> None:
    asked_twice, asked_once = round_of(), round_of()
    for round_ in (asked_twice, asked_once):
        for ask in round_.ask():
            round_.tell(ask.request.id, evaluate(ask.request))
    asked_twice.ranked("kl")
    order = [[str(c.perturbation) for c, _ in each.ranked("fdt")] for each in (asked_twice, asked_once)]
    assert order[0] == order[1]


def test_answers_that_were_known_before_are_ranked_too() -> None:
    first = round_of()
    for ask in first.ask():
        first.tell(ask.request.id, evaluate(ask.request))
    again = Round(1, [(c.parent, c.perturbation) for c in first.candidates], request_for, first.answers)
    assert [c.plan.id for c, _ in again.ranked("fdt")] == [c.plan.id for c, _ in first.ranked("fdt")]
