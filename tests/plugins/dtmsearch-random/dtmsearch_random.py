"""Random search for dtmsearch: plans drawn within the budget, the best of which is kept."""

from __future__ import annotations

import random

from dtmsearch.core.plan import Plan
from dtmsearch.errors import UserError
from dtmsearch.search.strategies.generator import Procedure, Script, Trial, mean_loss
from dtmsearch.search.strategies.strategy_registry import StrategyInputs, StrategyType


class RandomSearch(Procedure):
    """Draws `plans` plans, measures each on the search's prompts, and keeps the best."""

    def __init__(self, inputs: StrategyInputs, plans: int) -> None:
        super().__init__(inputs.space, inputs.request_for, [inputs.rank_by])
        self._rank_by, self._plans = inputs.rank_by, plans
        self._random = random.Random(inputs.seed)  # derived from the run's seed, so that a replay draws the same

    def script(self) -> Script:
        plans = [self._drawn() for _ in range(self._plans)]
        answers = yield [Trial(plan, (0, self.num_prompts)) for plan in plans]
        best = min(range(len(plans)), key=lambda i: mean_loss(answers[i], self._rank_by))
        self._conclude(plans[best], answers[best], self._rank_by)

    def _drawn(self) -> Plan:
        plan = Plan()
        while not self._space.budget.reached(self._space.size(plan)):
            plan = plan.with_(self._random.choice(self._space.perturbations(plan)))
        return plan


def make(inputs: StrategyInputs) -> RandomSearch:
    unknown = inputs.options.keys() - {"plans"}
    if unknown:
        raise UserError(f"search.options of random: plans is the only one, got {', '.join(sorted(unknown))}")
    return RandomSearch(inputs, int(inputs.options.get("plans", 20)))


STRATEGY = StrategyType(make)
