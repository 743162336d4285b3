"""`fisher`, and `auto` where prices can be had: plans from backward passes, corrected by slopes and measured plans.

`fisher`: prices of every option (see `dtmsearch.core.prices`), and the solver's plan for them.

`auto` begins with the same plan, and measures it. Where it costs what its prices say, more samples sharpen them. Where
it costs more, second order around the base model is not enough: round by round the slope of KL at the plan that leads,
taken with the prices' curvature, says what every move from there costs. How far slopes are believed against prices, the
two say themselves, by how much they differ beyond their standard errors (empirical Bayes). Steps of several lengths are
measured, each difference corrects the belief, and one that gains more than chance would leads from there on. Switches
follow as without prices, and a comparison of the leading plans on as many prompts as tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import Outcome
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PriceKind
from dtmsearch.search.solver.choices import Options
from dtmsearch.search.solver.damage_model import family_of
from dtmsearch.search.solver.fisher_form import Prices, combined
from dtmsearch.search.solver.posterior import Belief, Measured, Spread
from dtmsearch.search.strategies.auto import Auto
from dtmsearch.search.strategies.auto_schedule import HELD_AGAINST, CorrectionRound, Effort, PricedSchedule, Schedule
from dtmsearch.search.strategies.generator import Part, Script, losses, mean_loss
from dtmsearch.search.strategies.solver_based import Solver, paired
from dtmsearch.search.strategies.task import Task

Floats = NDArray[np.float64]
# (kind, plan around which, samples) -> products [samples, components, schemes] of the whole space, in its order.
TakePrices = Callable[[PriceKind, Plan, tuple[int, int]], NDArray[np.float32]]

# By how much measured damages are off their prices (docs/search-quality.md), beside the prices' own standard errors.
_SPREAD = Spread(common=0.3, family=0.1, option=0.12, interaction=0.15)
# Steps from the leader are penalised by the curvature so many times over, by what is believed of slopes and by slopes
# alone: the larger, the less far they go.
_CAUTION_BELIEVED, _CAUTION = (2.0,), (3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
# Prices hold while the plan that they lead to costs no more than this many times what they say.
_HOLDS = 1.15
# Rounds that may gain nothing; lots of switches that may.
_MOST_FAILURES, _PATIENCE = 1, 2


class Fisher(Solver):
    """See the module."""

    def __init__(self, task: Task, take: TakePrices | None, samples: int = 512) -> None:
        super().__init__(task)
        self._price, self._samples, self._length = take, samples, task.continuation_tokens

    def script(self) -> Script:
        self._foresee((1 + len(self._rivals()), self.num_prompts))
        assert self._price is not None, "whoever makes the strategy says by what prices are taken"
        products = self._price("fisher", Plan(), (0, self._samples))
        space = self._choices.space
        names = [component.name for component in space.components]
        prices = Prices.of(self._choices, names, space.schemes, products, self._length)
        found, answer = yield from self._measurable(prices.damages(), self._first(HELD_AGAINST))
        self._lead(found, answer)
        yield from self._told_apart([found])


class PricedAuto(Auto):
    """See the module."""

    def __init__(self, task: Task, take: TakePrices, effort: Effort = Effort()) -> None:
        super().__init__(task, None, effort)
        self._price = take
        self._seen: list[tuple[list[Options], Options, list[Measured]]] = []
        self._products: NDArray[np.float32] | None = None
        self._slopes_at: dict[Options, NDArray[np.float32]] = {}
        self._barred: list[NDArray[np.bool_]] | None = None

    @cached_property
    def _schedule(self) -> Schedule:
        steps = len(_CAUTION_BELIEVED) + len(_CAUTION)
        return PricedSchedule(self._effort, len(self._choices.units), self.num_prompts, len(self._rivals()), steps)

    def script(self) -> Script:
        belief = yield from self._probe()
        if self._min_fdt is not None:
            yield from self._smallest(belief, self._min_fdt)
            return
        tables = belief.tables()
        first, answer = yield from self._measurable(tables, self._first(HELD_AGAINST))
        self._barred = [~np.isfinite(table) for table in tables]
        leader = first
        field = [leader, *self._rivals()]
        answers = [answer]
        if len(field) > 1:
            answers += yield from self._measured(field[1:], self._first(HELD_AGAINST))
        values = [mean_loss(answer, "kl") for answer in answers]
        best = int(np.argmin(values))
        self._lead(field[best], answers[best])
        pool = list(dict.fromkeys([field[best], leader]))
        if self._prices_hold(leader, answers[0]):
            self._take_prices(self._effort.samples)
            belief = self._belief(self._prices.damages())
            pool.insert(0, self._solve(belief.tables()))
        else:
            leader, failures = field[best], 0
            for each in self._schedule.rounds():
                belief, better, gained = yield from self._correct(belief, leader, each)
                leader, pool = better[0], list(dict.fromkeys((*better[:1], *pool)))
                failures = failures + 1 if gained <= 0.0 else 0
                if failures > _MOST_FAILURES:
                    break
        better = yield from self._polish(belief, pool[0], self._effort.swap_prompts, _PATIENCE)
        pool = list(dict.fromkeys((*better[: self._effort.finalists - 1], *pool)))
        yield from self._told_apart([*pool[: self._effort.finalists], first])

    def _prices_hold(self, leader: Options, answer: Outcome) -> bool:
        """Whether the plan costs what its prices say."""
        measured, errors = losses(answer, "kl"), self._prices.whole(leader)
        predicted = self._prices.additive(leader).mean
        noise = float(measured.std()) / float(np.sqrt(len(measured)))
        return float(measured.mean()) - noise < _HOLDS * predicted + errors.error

    def _take_prices(self, further: int) -> None:
        """Samples beside those that are taken already."""
        taken = 0 if self._products is None else len(self._products)
        found = self._price("fisher", Plan(), (taken, taken + further))
        self._products = found if self._products is None else np.concatenate([self._products, found])
        space = self._choices.space
        names = [component.name for component in space.components]
        self._prices = Prices.of(self._choices, names, space.schemes, self._products, self._length)

    def _probe(self) -> Part[Belief]:
        self._foresee(*self._usual(0))
        self._take_prices(self._effort.samples)
        self._errors = self._prices.damages()  # by which options of a unit are ordered
        yield from ()
        return self._belief(self._prices.damages())

    def _belief(self, damages: Sequence[Floats]) -> Belief:
        """What is believed where options cost so much, after all that was measured."""
        families = [[family_of(scheme) for scheme in schemes] for schemes in self._choices.schemes]
        relative = np.concatenate(
            [
                e[1:] / np.maximum(d[1:], 1e-30)
                for d, e in zip(self._prices.damages(), self._prices.errors(), strict=True)
            ]
        )
        own = float(np.hypot(_SPREAD.family, min(float(np.nanmedian(relative)), 1.0)))
        damages = self._allowed(damages)
        belief = Belief.of(damages, self._prices.damages(), families, replace(_SPREAD, family=own))
        for choices, other, seen in self._seen:
            belief = belief.observed(choices, other, seen)
        return belief

    def _allowed(self, damages: Sequence[Floats]) -> list[Floats]:
        """Damages, infinite for options that cannot be measured."""
        if self._barred is None:
            return list(damages)
        return [np.where(barred, np.inf, own) for own, barred in zip(damages, self._barred, strict=True)]

    def _correct(
        self, belief: Belief, leader: Options, each: CorrectionRound
    ) -> Part[tuple[Belief, list[Options], float]]:
        """A round: (belief; plans, the one that leads first; what it gained, as a part of the leader's damage)."""
        slopes, curvature = self._slopes(leader, each), self._prices.damages(leader)
        belief = self._belief(combined(self._prices, slopes, leader))
        drawn = [
            [t + (caution - 1.0) * c for t, c in zip(tables, curvature, strict=True)]
            for tables, cautions in (
                (belief.tables(), _CAUTION_BELIEVED),
                (self._allowed(_expanded(self._prices, slopes, leader)), _CAUTION),
            )
            for caution in cautions
        ]
        candidates = [o for o in dict.fromkeys(self._solve(each) for each in drawn) if o != leader]
        if not candidates:
            return belief, [leader], 0.0
        base, *answers = yield from self._measured([leader, *candidates], each.plans_on, self._choices.plan(leader))
        seen = [paired(answer, base, "kl") for answer in answers]
        self._seen.append((candidates, leader, seen))
        belief = belief.observed(candidates, leader, seen)
        # What is best of several by chance must be better by more than chance.
        at = min(range(len(seen)), key=lambda i: seen[i][0] + np.sqrt(seen[i][1]))
        gained = -(seen[at][0] + float(np.sqrt(seen[at][1])))
        total = mean_loss(base, "kl")
        if not gained > 0.0:
            self._lead(leader, base)
            return belief, [leader], 0.0
        self._lead(candidates[at], answers[at])
        return belief, [candidates[at], leader], gained / total if total > 0.0 else 0.0

    def _slopes(self, leader: Options, each: CorrectionRound) -> Prices:
        """Slopes at a plan, over all the prompts on which they were taken there."""
        taken = self._price("slope", self._choices.plan(leader), each.learns_on)
        before = self._slopes_at.get(leader)
        products = self._slopes_at[leader] = taken if before is None else np.concatenate([before, taken])
        space = self._choices.space
        names = [component.name for component in space.components]
        return Prices.of(self._choices, names, space.schemes, products, self._length, leader)


def _expanded(prices: Prices, slopes: Prices, around: Options) -> list[Floats]:
    """Damages [options] of each unit beside those of a plan, by slope and curvature alone; what has no slope cannot be
    taken."""
    tables = [a + c for a, c in zip(slopes.means(), prices.damages(around), strict=True)]
    return [np.where(np.isfinite(table), table, np.inf) for table in tables]
