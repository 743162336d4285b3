"""`fisher`, and `auto` where prices can be had: plans from backward passes, corrected by slopes and measured plans.

`fisher`: prices of every option (see `dtmsearch.core.prices`), and the solver's plan for them.

`auto` begins with the same plan, and measures it. Prices say what options cost alone. What the rest of a plan adds to
each, a slope of KL at the plan shows: a gradient of KL(base || plan), whose products with all options are taken on a
few prompts. Round by round the slope at the plan that leads sharpens what is believed of these forces (see `Forces`),
and the solver moves as many units at once as are expected to gain most together. What is so expected is measured, and
leads from there on if it gains by both. Where a plan costs much more than its prices, second order is not enough, and
more careful steps, of fewer units, are measured beside. Swaps may follow as without prices, and a comparison of the
leading plans on as many prompts as tell them apart.

Where all is ruined and the plan that prices lead to costs as much as a uniform one, prices are no guide, and what is
found is one local optimum of many. Two ways down are then gone side by side, on the same prompts: from the better of
these plans, and from half-way to the budget. The one that is behind after two rounds is left, or sooner if it is far
behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import EvalFailure, Outcome
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PriceKind
from dtmsearch.core.schemes import DENSE
from dtmsearch.core.strategy_settings import AutoSettings, FisherSettings
from dtmsearch.search.solver.choices import Options
from dtmsearch.search.solver.damage_model import family_of
from dtmsearch.search.solver.fisher_form import Forces, Prices, expected_gain
from dtmsearch.search.solver.posterior import Posterior, Spread
from dtmsearch.search.strategies.auto import Auto
from dtmsearch.search.strategies.auto_schedule import FINALISTS, HELD_AGAINST, CorrectionRound, PricedSchedule
from dtmsearch.search.strategies.generator import Part, Script, Trial, losses, mean_loss
from dtmsearch.search.strategies.solver_based import Solver, paired
from dtmsearch.search.strategies.task import Task

Floats = NDArray[np.float64]
# (kind, plan around which, samples) -> products [samples, components, schemes] of the whole space, in its order; of
# slopes those of dense come first.
TakePrices = Callable[[PriceKind, Plan, tuple[int, int]], NDArray[np.float32]]

# By how much measured damages are off their prices (docs/search-quality.md), beside the prices' own standard errors.
_SPREAD = Spread(common=0.3, family=0.1, option=0.12, interaction=0.15)
# A step counts the curvature of each unit's move so many times over: the more, the fewer units move. How many times is
# best, what is expected of a step says; that one is measured, and more careful ones beside it.
_CAUTIONS = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0)
_FURTHER, _FURTHER_STILL = (1.0, 1.4, 2.2), (1.0, 1.3, 1.7, 2.5, 4.0, 8.0)
# A round whose steps are expected to gain less than this part of the plan's KL is the last.
_WORTHWHILE = 0.01
# Prices hold while the plan that they lead to costs no more than this many times what they say.
_HOLDS = 1.15
# Where plans cost more nats per token than this (perplexity e times the base model's) and a uniform one the same to
# within that part, prices are no guide. A way down that is behind the other by more than the last part is left at once.
_RUINED, _ALIKE, _FAR_BEHIND = 1.0, 0.05, 0.15
# The half of the way to a budget: where prices come to this part of the budget's.
_HALF_WAY = 0.5
# Rounds that may gain nothing; lots of swaps that may.
_MOST_FAILURES, _PATIENCE = 2, 2


class Fisher(Solver):
    """See the module."""

    def __init__(self, task: Task, take: TakePrices | None, settings: FisherSettings = FisherSettings()) -> None:
        super().__init__(task)
        self._price, self._samples, self._length = take, settings.samples, task.continuation_tokens

    def script(self) -> Script:
        self._foresee((1 + len(self._rivals()), self.num_prompts))
        assert self._price is not None, "whoever makes the strategy says by what prices are taken"
        products = self._price("fisher", Plan(), (0, self._samples))
        space = self._choices.space
        names = [component.name for component in space.components]
        prices = Prices.of(self._choices, names, space.schemes, products, self._length)
        found, answer = yield from self._measurable(list(prices.pooled().damages()), self._first(HELD_AGAINST))
        self._lead(found, answer)
        yield from self._told_apart([found])


@dataclass
class _Way:
    """How far a way down has come: the plan that leads, its KL, the forces that are known on it, and whether the plan
    is within the budget; the plans that led so far, the last first; rounds in a row that gained nothing."""

    leader: Options
    total: float
    forces: Forces
    within: bool = True
    pool: list[Options] = field(default_factory=list)
    failures: int = 0
    ended: bool = False

    def led_by(self, options: Options, total: float) -> None:
        """After a round."""
        self.failures = self.failures + 1 if options == self.leader else 0
        self.ended = self.failures > _MOST_FAILURES
        if options != self.leader:
            self.pool.insert(0, options)
        self.leader, self.total, self.within = options, total, True


class PricedAuto(Auto):
    """See the module."""

    def __init__(self, task: Task, take: TakePrices, effort: AutoSettings = AutoSettings()) -> None:
        super().__init__(task, None, effort)
        self._price = take
        self._products: NDArray[np.float32] | None = None
        self._barred: list[NDArray[np.bool_]] | None = None

    @cached_property
    def _schedule(self) -> PricedSchedule:
        units, rivals, steps = len(self._choices.units), len(self._rivals()), (len(_FURTHER), len(_FURTHER_STILL))
        return PricedSchedule(self._effort, units, self.num_prompts, rivals, steps)

    def script(self) -> Script:
        self._foresee(*self._usual(0))
        self._take_prices()
        if self._min_fdt is not None:
            yield from self._smallest(self._posterior(), self._min_fdt)
            return
        tables = list(self._form.damages())
        self.stage = "first plan by prices"
        first, answer = yield from self._measurable(tables, self._first(HELD_AGAINST))
        self._barred = [~np.isfinite(table) for table in tables]
        plans, answers = list(dict.fromkeys([first, *self._rivals()])), [answer]
        if len(plans) > 1:
            answers += yield from self._measured(plans[1:], self._first(HELD_AGAINST))
        values = [mean_loss(answer, "kl") for answer in answers]
        at = int(np.argmin(values))
        self._lead(plans[at], answers[at])
        holds, best = self._prices_hold(first, answer), plans[at]
        if not holds and _no_guide(values):
            pool = yield from self._side_by_side(best, values[at])
        else:
            pool = yield from self._way_down(best, values[at], holds)
        leader = pool[0]
        # Where prices do not hold, slopes do not see everything either.
        swap_prompts = 0 if holds else self._effort.swap_prompts
        better_ones = yield from self._polish(self._posterior(), leader, swap_prompts, _PATIENCE)
        pool = list(dict.fromkeys((*better_ones, *pool)))
        # Leaders before the last differ too little from it to be told apart for what that would cost.
        yield from self._told_apart([*pool[: max(FINALISTS - 2, 1)], first])

    def _way_down(self, leader: Options, total: float, holds: bool) -> Part[list[Options]]:
        """Rounds of steps from a plan of a KL of `total`: the plans that led, the last first."""
        way, sharpened = _Way(leader, total, Forces.none(self._form), pool=[leader]), False
        rounds = self._schedule.rounds()
        for each in rounds:
            self.stage = f"round {each.number + 1} of at most {len(rounds)}"
            way.forces, steps = self._steps(way, holds, each)
            if not steps:
                if sharpened or not holds or not self._in_doubt():
                    break
                self._take_prices()
                sharpened = True
                continue
            better, total, answer = yield from self._step(way, steps, each)
            self._lead(better, answer)
            way.led_by(better, total)
            if way.ended:
                break
        return way.pool

    def _side_by_side(self, leader: Options, total: float) -> Part[list[Options]]:
        """Rounds of steps from a plan of a KL of `total` and from half-way to the budget: the plans that led on the way
        that is the better in the end, the last first."""
        none = Forces.none(self._form)
        half = self._choices.on_the_way(self._allowed(self._form.damages()), _HALF_WAY)
        ways = [_Way(leader, total, none, pool=[leader]), _Way(half, total, none, within=False)]
        rounds = self._schedule.side_by_side()
        for each, num_ways in rounds:
            ways = ways[:num_ways]
            self.stage = f"round {each.number + 1} of at most {len(rounds)}"
            for way in ways:
                yield from self._further(way, each)
            ways = yield from self._foremost(ways, each)
            if all(way.ended for way in ways):
                break
        return ways[0].pool

    def _further(self, way: _Way, each: CorrectionRound) -> Part[None]:
        """A round of one of two ways. From a plan beyond the budget the best step that is within it is taken."""
        if way.ended:
            return
        if not way.within:
            (answer,) = yield [Trial(self._choices.plan(way.leader), each.plans_on)]
            way.total, way.ended = mean_loss(answer, "kl"), isinstance(answer, EvalFailure)
            if way.ended:
                return
        way.forces, steps = self._steps(way, False, each)
        if not steps:
            way.ended = True
        elif way.within:
            better, total, _ = yield from self._step(way, steps, each)
            way.led_by(better, total)
        else:
            answers = yield from self._measured(list(steps), each.plans_on)
            values = [mean_loss(answer, "kl") for answer in answers]
            at = int(np.argmin(values))
            way.led_by(list(steps)[at], values[at])

    def _foremost(self, ways: Sequence[_Way], each: CorrectionRound) -> Part[list[_Way]]:
        """Those that are not far behind, the best first, which leads: all on the same prompts. One that has not come
        to the budget is none."""
        ways = [way for way in ways if way.within]
        answers = yield from self._measured([way.leader for way in ways], each.plans_on)
        values = [mean_loss(answer, "kl") for answer in answers]
        order = [int(at) for at in np.argsort(values, kind="stable")]
        self._lead(ways[order[0]].leader, answers[order[0]])
        return [ways[at] for at in order if values[at] <= (1.0 + _FAR_BEHIND) * values[order[0]]]

    def _take_prices(self) -> None:
        """Prices from as many samples as the effort says, beside those that were taken."""
        taken = 0 if self._products is None else len(self._products)
        found = self._price("fisher", Plan(), (taken, taken + self._effort.samples))
        self._products = found if self._products is None else np.concatenate([self._products, found])
        self._prices = self._prices_of(self._products)
        self._form = self._prices.pooled()
        self._errors = self._form.damages()  # by which options of a unit are ordered

    def _in_doubt(self) -> bool:
        """Whether twice as many samples would be worth it: by how much the plan of one half of the samples is dearer
        than the other half's own, by the other's prices, half of which the plan of all of them may be."""
        assert self._products is not None
        half = len(self._products) // 2
        one, other = (self._prices_of(part).pooled() for part in (self._products[:half], self._products[half:]))
        plans = [self._solve(self._allowed(form.damages())) for form in (one, other)]
        own, crossed = other.cost(plans[1]), other.cost(plans[0])
        return 0.5 * (crossed - own) > _WORTHWHILE * own

    def _prices_of(self, products: NDArray[np.float32], *before: str) -> Prices:
        """Of products of all options, and of schemes `before` those of the space."""
        space = self._choices.space
        names = [component.name for component in space.components]
        return Prices.of(self._choices, names, (*before, *space.schemes), products, self._length)

    def _prices_hold(self, leader: Options, answer: Outcome) -> bool:
        """Whether the plan costs what its prices say."""
        measured, errors = losses(answer, "kl"), self._prices.whole(leader)
        predicted = self._prices.additive(leader).mean
        noise = float(measured.std()) / float(np.sqrt(len(measured)))
        return float(measured.mean()) - noise < _HOLDS * predicted + errors.error

    def _steps(self, way: _Way, holds: bool, each: CorrectionRound) -> tuple[Forces, dict[Options, float]]:
        """Forces after a slope at the plan that leads, and the steps from there that are worth measuring, with the
        change of KL that is expected of each."""
        leader, total, forces = way.leader, way.total, way.forces
        price = self._form.cost(leader)
        scale = max((total - forces.on(leader)) / price, 1.0) if price > 0.0 else 1.0
        slopes = self._prices_of(self._price("slope", self._choices.plan(leader), each.learns_on), DENSE)
        forces = forces.observed(self._form, slopes, leader, scale)
        curvatures = [scale * own for own in self._form.beside(leader)]
        costs = [scale * own + force for own, force in zip(self._form.damages(), forces.means, strict=True)]
        tables = self._allowed(costs)

        def step(caution: float) -> tuple[Options, float]:
            options = self._solve([t + (caution - 1.0) * c for t, c in zip(tables, curvatures, strict=True)])
            curved = np.array([c[o] for c, o in zip(curvatures, options, strict=True)])
            moved = np.array([t[o] - t[k] for t, o, k in zip(costs, options, leader, strict=True)])
            return options, expected_gain(moved - curved, curved, total)

        best = min(_CAUTIONS, key=lambda caution: step(caution)[1])
        steps = dict(step(best * further) for further in (_FURTHER if holds else _FURTHER_STILL))
        steps.pop(leader, None)
        return forces, steps if not holds or min(steps.values(), default=0.0) < -_WORTHWHILE * total else {}

    def _step(
        self, way: _Way, steps: Mapping[Options, float], each: CorrectionRound
    ) -> Part[tuple[Options, float, Outcome]]:
        """The step that gains most, or the leader where none does, its KL and its answer. What is measured and what was
        expected count by how well they are known; what is expected may be off by itself. What is best of several by
        chance must gain more than chance would."""
        leader, total, candidates = way.leader, way.total, list(steps)
        plan = self._choices.plan(leader)
        base, *answers = yield from self._measured([leader, *candidates], each.plans_on, plan)
        gains = []
        for options, answer in zip(candidates, answers, strict=True):
            (mean, variance), expected = paired(answer, base, "kl"), steps[options]
            share = variance / (variance + expected**2) if np.isfinite(mean) and expected else 0.0
            gains.append((1.0 - share) * mean + share * expected + float(np.sqrt((1.0 - share) * variance)))
        at = int(np.argmin(gains))
        if not gains[at] < 0.0:
            return leader, total, base
        return candidates[at], total * mean_loss(answers[at], "kl") / mean_loss(base, "kl"), answers[at]

    def _posterior(self) -> Posterior:
        """What is believed of options by their prices alone."""
        families = [[family_of(scheme) for scheme in schemes] for schemes in self._choices.schemes]
        relative = np.concatenate(
            [
                e[1:] / np.maximum(d[1:], 1e-30)
                for d, e in zip(self._prices.damages(), self._prices.errors(), strict=True)
            ]
        )
        own = float(np.hypot(_SPREAD.family, min(float(np.nanmedian(relative)), 1.0)))
        return Posterior.of(self._allowed(self._errors), self._errors, families, replace(_SPREAD, family=own))

    def _allowed(self, damages: Sequence[Floats]) -> list[Floats]:
        """Damages, infinite for options that cannot be measured."""
        if self._barred is None:
            return list(damages)
        return [np.where(barred, np.inf, own) for own, barred in zip(damages, self._barred, strict=True)]


def _no_guide(values: Sequence[float]) -> bool:
    """Whether plans are ruined, and the first, that of the prices, is no better and no worse than the best other: by
    the KL of each."""
    other = min(values[1:], default=float("inf"))
    least, most = sorted((values[0], other))
    return least > _RUINED and most < (1.0 + _ALIKE) * least
