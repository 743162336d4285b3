"""Plans that are measured on few prompts first, and which of them on more: `floating` with noise between prompts."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from test_exchanges import BLOCKS, MATRICES, landscape

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.floating import Floating
from dtmsearch.search.strategies.stages import contenders, hopeful
from dtmsearch.search.strategies.task import Task

PROMPTS = 64


def test_what_the_noise_rules_out_is_not_measured_further() -> None:
    sure, may, worse = np.full(4, -1.0), np.array([-3.0, 3.5, -3.0, 3.5]), np.array([1.0, 1.2, 1.0, 1.2])
    failed, noughts = np.full(4, np.inf), np.zeros(4)
    assert hopeful([worse, may, failed, sure, noughts], 9) == [3, 4, 1]
    assert hopeful([worse, may, failed, sure, noughts], 2) == [3, 4]
    assert hopeful([np.array([1.0])], 9) == [0], "one prompt rules out nothing"
    assert contenders([worse + 5, failed, worse + 4, may + 5], 9) == [2, 3]
    assert contenders([failed, failed], 9) == [] == hopeful([], 9)


class Noisy:
    """A landscape whose losses differ by prompt, by the same for plans that are alike; NaN where a plan cannot be."""

    def __init__(self, loss: Callable[[Plan], float], noise: float = 0.4) -> None:
        self.loss, self.noise = loss, noise
        self.asked: dict[Plan, list[tuple[int, int]]] = defaultdict(list)

    def by_prompt(self, plan: Plan) -> NDArray[np.float64]:
        found = np.full(PROMPTS, self.loss(plan))
        for name in plan.dropped:
            found *= np.exp(self.noise * np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.3, PROMPTS))
        return found

    def answered(self, request: EvalRequest) -> Outcome:
        self.asked[request.plan].append(request.prompts)
        found = self.by_prompt(request.plan)[slice(*request.prompts)].astype(np.float32)
        if np.isnan(found).any():
            return EvalFailure(request.id, "invalid", "no such plan")
        fdt = np.full(len(found), 50, np.int32)
        return EvalResult(request.id, fdt, fdt, np.exp(found), kl=found, ppl=np.exp(found))

    def searched(self, **settings: int) -> Plan:
        def request_for(plan: Plan, parent: Plan) -> EvalRequest:
            return EvalRequest(plan, "r", (0, PROMPTS), ("kl",), parent)

        budget = Budget(parameters=0.7)
        space = SearchSpace(MATRICES, (), budget=budget, blocks=BLOCKS)
        strategy = Floating(Task(space, request_for, "kl"), FloatingSettings(**settings))
        while not strategy.done:
            for ask in strategy.ask():
                strategy.tell(ask.request.id, self.answered(ask.request))
        assert strategy.best is not None and budget.reached(space.size(strategy.best))
        return strategy.best

    @property
    def prompts_asked(self) -> int:
        return sum(high - low for ranges in self.asked.values() for low, high in ranges)


def test_plans_are_measured_on_the_first_prompts_and_those_that_may_be_better_on_the_others() -> None:
    noisy = Noisy(landscape(0))
    best = noisy.searched(prompts=48, first_prompts=8)
    whole = [(0, 8), (8, 48)]
    assert {tuple(ranges) for ranges in noisy.asked.values()} <= {((0, 8),), (*whole,), (*whole, (48, 64))}
    assert noisy.asked[best] == [*whole, (48, 64)]
    assert sum(len(ranges) == 1 for ranges in noisy.asked.values()) > len(noisy.asked) / 2


def test_exchanges_are_judged_by_more_prompts_than_blocks_are_chosen_by() -> None:
    noisy = Noisy(landscape(3))
    best = noisy.searched(prompts=24, first_prompts=8, exchange_prompts=40)
    judged, ranges = [(0, 8), (8, 24), (24, 40)], [tuple(own) for own in noisy.asked.values()]
    finalists = [own for own in ranges if own[-1] in ((24, 64), (40, 64))]
    assert all(list(own) == judged[: len(own)] for own in ranges if own not in finalists)
    assert all(list(own[:-1]) in (judged, judged[:2]) for own in finalists) and tuple(noisy.asked[best]) in finalists
    assert 1 < len(finalists) <= FloatingSettings().finalists
    assert len(ranges) > sum(len(own) > 1 for own in ranges) > sum((24, 40) in own for own in ranges) >= 1
    noisy = Noisy(landscape(3))
    noisy.searched(prompts=24, first_prompts=8, exchange_prompts=40, patience=0)
    assert {own[2] for own in noisy.asked.values() if len(own) == 3} == {(24, 64)}, "nothing is exchanged"


@pytest.mark.parametrize(("prompts", "first"), [(48, 0), (16, 8)])
def test_without_first_prompts_or_with_few_more_all_are_measured_at_once(prompts: int, first: int) -> None:
    noisy = Noisy(landscape(0))
    noisy.searched(prompts=prompts, first_prompts=first)
    assert {ranges[0] for ranges in noisy.asked.values()} == {(0, prompts)}


def test_screening_finds_as_good_plans_for_half_of_the_prompts() -> None:
    ratios, asked = [], np.zeros(2)
    for seed in range(12):
        by_all, screened = Noisy(landscape(seed)), Noisy(landscape(seed))
        plans = by_all.searched(prompts=PROMPTS, first_prompts=0), screened.searched(prompts=PROMPTS, first_prompts=8)
        means = [by_all.by_prompt(plan).mean() for plan in plans]
        ratios.append(math.log(means[1] / means[0]))
        asked += by_all.prompts_asked, screened.prompts_asked
    assert np.mean(ratios) < 0.02 and asked[1] < asked[0] / 2


def test_plans_that_cannot_be_measured_are_passed_over() -> None:
    loss = landscape(1)
    bad = min(Noisy(loss).searched(prompts=48).dropped)
    noisy = Noisy(lambda plan: math.nan if bad in plan.dropped and len(plan.dropped) > 1 else loss(plan))
    assert bad not in noisy.searched(prompts=48).dropped
    assert all(len(ranges) == 1 for plan, ranges in noisy.asked.items() if math.isnan(noisy.loss(plan)))
