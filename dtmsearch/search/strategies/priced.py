"""`fisher`, and `auto` where prices can be had: plans from backward passes, corrected by slopes and measured plans.

`fisher`: prices of every option (see `dtmsearch.core.prices`), and the solver's plan for them.

`auto` begins with the same plan. Then, round by round: the slope of KL at the plan that leads, taken with the prices'
curvature, says what every move from there costs. How far the two are believed against the prices, the two say
themselves, by how much they differ beyond their standard errors (empirical Bayes). Plans drawn from the belief and
cautious steps towards its best are measured, each difference corrects it, and the best leads. Rounds go on while they
pay. Then switches, and a last comparison, as without prices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PASSES, PriceKind
from dtmsearch.search.solver.choices import Options
from dtmsearch.search.solver.damage_model import family_of
from dtmsearch.search.solver.fisher_form import Prices, combined
from dtmsearch.search.solver.posterior import Belief, Measured, Spread
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.auto import _GROWTH, Auto, Effort
from dtmsearch.search.strategies.generator import Part, Script
from dtmsearch.search.strategies.rounds import RequestFactory
from dtmsearch.search.strategies.solver_based import Solver, paired

Floats = NDArray[np.float64]
# (kind, plan around which, samples) -> products [samples, components, schemes] of the whole space, in its order.
TakePrices = Callable[[PriceKind, Plan, tuple[int, int]], NDArray[np.float32]]

# By how much measured damages are off their prices (docs/search-quality.md), beside the prices' own standard errors.
_SPREAD = Spread(common=0.3, family=0.1, option=0.12, interaction=0.15)
# Steps from the leader are penalised by the curvature so many times over: cautious ones go less far.
_CAUTION = (2.0, 4.0, 8.0)
# Another round follows if the last one gained more than this part of the leader's damage.
_GAINED = 0.01


class Fisher(Solver):
    """See the module."""

    def __init__(
        self,
        space: SearchSpace,
        request_for: RequestFactory,
        take: TakePrices | None,
        rank_by: str = "kl",
        samples: int = 512,
        continuation_tokens: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(space, request_for, rank_by, seed)
        self._price, self._samples, self._length = take, samples, continuation_tokens

    def script(self) -> Script:
        self._foresee((1 + len(self._rivals()), self.num_prompts))
        prices = prices_of(self, "fisher", Plan(), (0, self._samples))
        found = self._solve(prices.damages())
        self._best = self._choices.plan(found)
        yield from self._told_apart([found])


def prices_of(strategy: Fisher | PricedAuto, kind: PriceKind, around: Plan, samples: tuple[int, int]) -> Prices:
    """Prices of a strategy's space."""
    choices, space = strategy._choices, strategy._choices.space
    assert strategy._price is not None, "whoever makes the strategy says by what prices are taken"
    products = strategy._price(kind, around, samples)
    names = [component.name for component in space.components]
    return Prices.of(choices, names, space.schemes, products, strategy._length)


class PricedAuto(Auto):
    """See the module."""

    def __init__(
        self,
        space: SearchSpace,
        request_for: RequestFactory,
        take: TakePrices,
        rank_by: str = "kl",
        effort: Effort = Effort(),
        seed: int = 0,
        min_fdt: float | None = None,
        continuation_tokens: int = 100,
    ) -> None:
        super().__init__(space, request_for, None, rank_by, effort, seed, min_fdt, continuation_tokens)
        self._price = take
        self._seen: list[tuple[list[Options], Options, list[Measured]]] = []
        self._slopes: dict[Options, list[NDArray[np.float32]]] = {}

    def _probe(self) -> Part[Belief]:
        self._foresee(*self._usual())
        self._prices = prices_of(self, "fisher", Plan(), (0, self._effort.samples))
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
        own = float(np.hypot(_SPREAD.family, min(float(np.median(relative)), 1.0)))
        belief = Belief.of(damages, self._prices.damages(), families, replace(_SPREAD, family=own))
        for choices, other, seen in self._seen:
            belief = belief.observed(choices, other, seen)
        return belief

    def _correct(self, belief: Belief, leader: Options, number: int) -> Part[tuple[Belief, list[Options], float]]:
        """A round: (belief; candidates, the best first; what it gained, as a part of the leader's damage)."""
        damages, curvature = self._around(leader, number)
        belief = self._belief(damages)
        random = self._random(number)
        tables = belief.tables()
        cautious = [[t + (caution - 1.0) * c for t, c in zip(tables, curvature, strict=True)] for caution in _CAUTION]
        drawn = [tables, *cautious]
        drawn += [belief.tables(belief.sample(random)) for _ in range(self._effort.plans - len(drawn))]
        candidates = [o for o in dict.fromkeys(self._solve(each) for each in drawn) if o != leader]
        if not candidates:
            return belief, [leader], 0.0
        prompts = self._block(number, 1)
        base, *answers = yield from self._measured([leader, *candidates], prompts, self._choices.plan(leader))
        self._lead(leader, base)
        seen = [paired(answer, base, "kl") for answer in answers]
        self._seen.append((candidates, leader, seen))
        belief = belief.observed(candidates, leader, seen)
        field = list(dict.fromkeys([self._solve(belief.tables()), leader, *candidates]))
        measured = {leader: (0.0, 0.0)} | dict(zip(candidates, seen, strict=True))
        estimates = belief.estimates(field, leader, [measured.get(options) for options in field])
        order = [field[at] for at in np.argsort(estimates, kind="stable")]
        total = self._decisions[-1].summary.kl or 1.0
        gained = -float(estimates.min()) / total
        return belief, order, gained if gained > _GAINED else 0.0

    def _around(self, leader: Options, number: int) -> tuple[list[Floats], tuple[Floats, ...]]:
        """Damages of options as slopes and curvature at a plan have them, the differences to its own options shrunk
        towards the prices'; and the curvature."""
        first, end = self._block(number, 0)
        products = self._price("slope", self._choices.plan(leader), (first, end))
        self._slopes.setdefault(leader, []).append(products)
        space = self._choices.space
        names = [component.name for component in space.components]
        together = np.concatenate(self._slopes[leader])
        slopes = Prices.of(self._choices, names, space.schemes, together, self._length, leader)
        return combined(self._prices, slopes, leader), self._prices.damages(leader)

    def _block(self, number: int, half: int) -> tuple[int, int]:
        """The stretch of the prompts on which a round takes slopes (0) or measures plans (1)."""
        slopes = min(self._effort.slopes, self.num_prompts)
        if half == 0:
            first = number * slopes % (self.num_prompts - slopes + 1)
            return first, first + slopes
        count = min(2 * self._effort.prompts * _GROWTH**number, self.num_prompts)
        first = (slopes + number * count) % (self.num_prompts - count + 1)
        return first, first + count

    def _affordable_rounds(self) -> int:
        left = self._effort.correction_prompts
        for number in range(self._effort.rounds):
            (a, b), (first, end) = self._block(number, 0), self._block(number, 1)
            left -= PASSES["slope"] * (b - a) + (end - first) * (self._effort.plans + 1)
            if left < 0:
                return number
        return self._effort.rounds

    def _num_measured(self, number: int) -> int:
        return self._effort.plans + 1
