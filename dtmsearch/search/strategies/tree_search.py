"""What searches down the tree of plans share: rounds whose best plans are kept, the first of them as the decision."""

from __future__ import annotations

from dtmsearch.core.metrics import Summary
from dtmsearch.core.plan import PlanSize
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.search.protocols import Decision
from dtmsearch.search.strategies.base import Course
from dtmsearch.search.strategies.rounds import Candidate
from dtmsearch.search.strategies.task import Task


class TreeSearch(Course):
    """Keeps the `width` best plans of every round by the metric that ranks. It ends where the leader meets the budget,
    or where the leader's mean FDT falls below the task's `min_fdt`: then the decision before it stands."""

    def __init__(self, task: Task, settings: TreeSettings) -> None:
        super().__init__()
        self._space, self._request_for = task.space, task.request_for
        self._rank_by, self._width, self._min_fdt = task.rank_by, settings.width, task.min_fdt

    def _falls_below(self, leader: Summary) -> bool:
        return self._min_fdt is not None and leader.fdt_mean < self._min_fdt

    def _conclude(self, leader: Candidate, summary: Summary) -> PlanSize:
        """The round's decision; the leader's size."""
        size, score = self._space.size(leader.plan), summary.value(self._rank_by)
        step = len(self._decisions)
        self._decisions.append(Decision(step, leader.plan, leader.perturbation, score, size, summary, self._rank_by))
        self._best = leader.plan
        return size
