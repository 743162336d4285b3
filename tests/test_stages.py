"""Plans that are measured on few prompts first, and which of them on more: `floating` with noise between prompts."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from test_exchanges import BLOCKS, MATRICES, landscape

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Budget, Plan, cut_by
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.core.times import Times
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.floating import Floating
from dtmsearch.search.strategies.stages import contenders, hopeful
from dtmsearch.search.strategies.task import Task

PROMPTS = 64
SPACE = SearchSpace(MATRICES, (), budget=Budget(parameters=0.7), blocks=BLOCKS)


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
        self.foreseen = 0

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

    def searched(self, space: SearchSpace = SPACE, rank_by: str = "kl", **settings: int) -> Plan:
        def request_for(plan: Plan, parent: Plan) -> EvalRequest:
            return EvalRequest(plan, "r", (0, PROMPTS), ("kl",), parent)

        strategy = Floating(Task(space, request_for, rank_by), FloatingSettings(**settings))
        for round_number in itertools.count():
            if strategy.done:
                break
            for ask in strategy.ask():
                strategy.tell(ask.request.id, self.answered(ask.request))
            if round_number == 0:
                self.foreseen = strategy.expected_prompts()
        assert strategy.best is not None and space.budget.reached(space.size(strategy.best))
        return strategy.best

    @property
    def ranges(self) -> list[tuple[tuple[int, int], ...]]:
        """The prompts that each plan but the base model was measured on, stage by stage."""
        return [tuple(own) for plan, own in self.asked.items() if plan]

    @property
    def prompts_asked(self) -> int:
        return sum(high - low for ranges in self.asked.values() for low, high in ranges)


def test_plans_are_measured_on_the_first_prompts_and_those_that_may_be_better_on_the_others() -> None:
    noisy = Noisy(landscape(0))
    best = noisy.searched(prompts=48, first_prompts=8)
    whole = [(0, 8), (8, 48)]
    assert set(noisy.ranges) <= {((0, 8),), (*whole,), (*whole, (48, 64))}
    assert noisy.asked[best] == [*whole, (48, 64)]
    assert sum(len(ranges) == 1 for ranges in noisy.ranges) > len(noisy.ranges) / 2


def test_exchanges_are_judged_by_more_prompts_than_blocks_are_chosen_by() -> None:
    stages, judged = [(0, 8), (8, 24), (24, 40), (40, 64)], 0
    for seed in range(4):
        noisy = Noisy(landscape(seed))
        best = noisy.searched(prompts=24, first_prompts=8, exchange_prompts=40)
        assert noisy.asked[best][-1][1] == PROMPTS
        for own in noisy.ranges:
            assert list(own) == stages[: len(own)] or own == (*stages[:2], (24, 64))
        judged += sum((24, 40) in own for own in noisy.ranges)
    assert judged > 4, "the leader of each search, and others"
    noisy = Noisy(landscape(3))
    noisy.searched(prompts=24, first_prompts=8, exchange_prompts=40, patience=0)
    assert {own[2] for own in noisy.ranges if len(own) == 3} == {(24, 64)}, "nothing is exchanged"


@pytest.mark.parametrize(("prompts", "first"), [(48, 0), (16, 8)])
def test_without_first_prompts_or_with_few_more_all_are_measured_at_once(prompts: int, first: int) -> None:
    noisy = Noisy(landscape(0))
    noisy.searched(prompts=prompts, first_prompts=first)
    assert {ranges[0] for ranges in noisy.ranges} == {(0, prompts)}


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


def test_a_plan_that_fails_on_further_prompts_is_passed_over() -> None:
    loss = landscape(1)
    bad = sorted(Noisy(loss).searched(prompts=48).dropped)

    class Failing(Noisy):
        def by_prompt(self, plan: Plan) -> NDArray[np.float64]:
            found = super().by_prompt(plan)
            found[10] = math.nan if plan.dropped & set(bad[:2]) else found[10]
            return found

    assert not set(bad[:2]) & Failing(loss).searched(prompts=48).dropped


def test_tried_plans_that_meet_the_budget_are_compared_with_the_one_that_leads() -> None:
    lost = []
    for seed in range(12):
        noisy = Noisy(landscape(seed))
        best = noisy.searched(prompts=48)
        for plan, ranges in noisy.asked.items():
            if plan and len(ranges) == 1 and SPACE.budget.reached(SPACE.size(plan)):
                more = (noisy.by_prompt(plan) - noisy.by_prompt(best))[:8]
                lost.append(more.mean() < -more.std(ddof=1))
    assert len(lost) > 20 and np.mean(lost) < 0.02


@pytest.mark.parametrize("rank_by", ["kl", "fdt"])
def test_a_width_may_be_slower_than_the_one_before_it(rank_by: str) -> None:
    """A step back goes further then than all that is known."""
    matrices = [Component(f"{b.name}.{k}_proj", b.layer, k, (64, 128) if k == "down" else (128, 64))
                for b in BLOCKS if b.kind == "mlp" for k in ("gate", "up", "down")]  # fmt: skip
    blocks = tuple(Component(b.name, b.layer, "mlp", (1, 3 * 64 * 128)) for b in BLOCKS if b.kind == "mlp")
    widths = ("channels-0.25-magnitude", "channels-0.5-magnitude")
    seconds = {None: 1_000_000_000, widths[0]: 1_100_000_000, widths[1]: 500_000_000}
    rows = {}
    for scheme, own in seconds.items():
        for matrix in matrices[:3]:
            shape = cut_by(Plan.of({matrix.block: scheme}), matrix).shape if scheme else matrix.shape
            rows["dense", *shape] = own, own
    budget = Budget(decode_ms=len(blocks) * 3 * 0.6)
    space = SearchSpace(matrices, (), budget=budget, blocks=(), cut=blocks, cuts=widths, times=Times(rows, 8))

    def loss(plan: Plan, chance: np.random.Generator) -> float:
        levels = np.array([1 + widths.index(plan.schemes[b.name]) if b.name in plan.schemes else 0 for b in blocks])
        return max(0.01, float(levels @ chance.exponential(0.3, len(blocks))
                               + levels @ np.triu(chance.normal(0, 0.15, (len(blocks),) * 2), 1) @ levels))  # fmt: skip

    slower = 0
    for seed in range(6):
        noisy = Noisy(lambda plan, seed=seed: loss(plan, np.random.default_rng(seed)))
        best = noisy.searched(space, rank_by, prompts=24)
        assert budget.reached(space.size(best)) and noisy.asked[best][-1][1] == PROMPTS
        slower += any(space.progress(plan) < 0.0 for plan in noisy.asked)
    assert slower, "none of these searches tried a width that makes the model slower"


def test_what_is_foreseen_is_near_what_is_asked() -> None:
    ratios = []
    for seed in range(12):
        noisy = Noisy(landscape(seed))
        noisy.searched(prompts=24, exchange_prompts=48)
        ratios.append(noisy.foreseen / noisy.prompts_asked)
    assert 0.7 < np.mean(ratios) < 2.0
