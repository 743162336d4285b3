"""The probe: every perturbation of the base model alone, ranked. It measures sensitivities and chooses no plan."""

from __future__ import annotations

from collections.abc import Sequence

from dtmsearch.core.evaluation import Outcome
from dtmsearch.core.plan import Plan
from dtmsearch.search.protocols import Ask, Decision
from dtmsearch.search.strategies.rounds import Round
from dtmsearch.search.strategies.task import Task


class Probe:
    """One round over all perturbations; a decision for each that could be measured, in order of rank."""

    def __init__(self, task: Task) -> None:
        self._space, self._rank_by = task.space, task.rank_by
        self._round = Round(0, ((Plan(), edge) for edge in task.space.perturbations(Plan())), task.request_for)
        self._decisions: list[Decision] = []

    @property
    def done(self) -> bool:
        return self._round.complete

    @property
    def step(self) -> int:
        return self._round.step

    @property
    def best(self) -> None:
        return None

    @property
    def decisions(self) -> Sequence[Decision]:
        return self._decisions

    def expected_evaluations(self) -> int:
        return self._round.num_asked

    def ask(self) -> list[Ask]:
        return self._round.ask()

    def tell(self, request_id: str, outcome: Outcome) -> None:
        self._round.tell(request_id, outcome)
        if self._round.complete:
            self._conclude()

    def _conclude(self) -> None:
        for rank, (candidate, summary) in enumerate(self._round.ranked(self._rank_by)):
            size, score = self._space.size(candidate.plan), summary.value(self._rank_by)
            edge = candidate.perturbation
            self._decisions.append(Decision(rank, candidate.plan, edge, score, size, summary, self._rank_by))
