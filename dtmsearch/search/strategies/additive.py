"""`knapsack` and `spdy`: plans from sums over units.

`knapsack` measures every unit alone under every scheme, and has the solver choose. Losses are KL, whatever metric
ranks: a sum of FDT losses buys ruin cheaply, for a ruined component costs no more than the continuation's length.

`spdy` (Frantar and Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees", arXiv 2201.13096, section 3.2) takes
errors that are known without measuring, times a coefficient for each unit, and searches for the coefficients by
measuring the plans that they lead to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import Outcome
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.strategy_settings import KnapsackSettings, SpdySettings
from dtmsearch.search.solver.choices import Options
from dtmsearch.search.solver.damage_model import Probing, WeightErrors, unit_errors
from dtmsearch.search.strategies.generator import Part, Script, mean_loss
from dtmsearch.search.strategies.solver_based import Solver
from dtmsearch.search.strategies.task import Task

# The part of the coefficients that a first generation draws anew; it falls to a single one.
_SHARE = 0.1

Floats = NDArray[np.float64]


class Knapsack(Solver):
    """Every unit under every scheme alone."""

    def __init__(self, task: Task, settings: KnapsackSettings = KnapsackSettings()) -> None:
        super().__init__(task)
        self._prompts = settings.prompts
        self._summed = task.rank_by if METRICS[task.rank_by].can_be_summed else "kl"

    def script(self) -> Script:
        probed = [
            Probing(unit, option, scheme)
            for unit, schemes in enumerate(self._choices.schemes)
            for option, scheme in enumerate(schemes)
            if option > 0
        ]
        self._foresee((len(probed), self._prompts), (1 + len(self._rivals()), self.num_prompts))
        answers = yield from self._alone(probed, self._first(self._prompts))
        tables = [np.zeros(len(schemes)) for schemes in self._choices.schemes]
        for probing, answer in zip(probed, answers, strict=True):
            tables[probing.unit][probing.option] = mean_loss(answer, self._summed)
        found = self._solve(tables)
        self._best = self._choices.plan(found)
        yield from self._final([found])


class Spdy(Solver):
    """Coefficients are drawn evenly from 0 to 1, as published."""

    def __init__(self, task: Task, errors: WeightErrors, settings: SpdySettings = SpdySettings()) -> None:
        super().__init__(task)
        self._errors = unit_errors(self._choices, errors)
        self._settings = settings

    def script(self) -> Script:
        settings, units = self._settings, len(self._choices.units)
        last = (1 + len(self._rivals()), self.num_prompts)
        self._foresee((settings.starts + settings.generations * settings.children, settings.prompts), last)
        starts = [self._random(0, index).random(units) for index in range(settings.starts)]
        best, score, answer = yield from self._try(starts)
        self._lead(self._solution(best), answer)
        for generation in range(settings.generations):
            left = 1.0 - generation / settings.generations
            changed = max(1, round(_SHARE * units * left))
            children = [self._child(best, changed, generation, index) for index in range(settings.children)]
            child, value, answer = yield from self._try(children)
            self._foresee(((settings.generations - generation - 1) * settings.children, settings.prompts), last)
            if value < score:
                best, score = child, value
                self._lead(self._solution(best), answer)
        yield from self._final([self._solution(best)])

    def _child(self, parent: Floats, changed: int, generation: int, index: int) -> Floats:
        random = self._random(1 + generation, index)
        child = parent.copy()
        child[random.choice(len(parent), changed, replace=False)] = random.random(changed)
        return child

    def _try(self, coefficients: list[Floats]) -> Part[tuple[Floats, float, Outcome]]:
        """The best of some coefficients, by what its plan measures: (coefficients, loss, answer)."""
        plans = [self._solution(each) for each in coefficients]
        answers = yield from self._measured(plans, self._first(self._settings.prompts))
        values = [mean_loss(answer, self._rank_by) for answer in answers]
        at = int(np.argmin(values))
        return coefficients[at], values[at], answers[at]

    def _solution(self, coefficients: Floats) -> Options:
        tables = [error * each for error, each in zip(self._errors, coefficients, strict=True)]
        return self._solve(tables)
