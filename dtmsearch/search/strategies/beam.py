"""The paper's tree search ("Divergent Token Metrics", arXiv 2311.01544): at each depth the best plans are kept.

Knows neither where a plan is measured nor what is recorded. A round is decided when all its candidates are told, so
the order of the answers changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from dtmsearch.core.evaluation import Outcome
from dtmsearch.core.metrics import Summary
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.search.protocols import Ask
from dtmsearch.search.strategies.racing import RacedRound, Racing
from dtmsearch.search.strategies.rounds import Answer, Candidate, Round
from dtmsearch.search.strategies.task import Task
from dtmsearch.search.strategies.tree_search import TreeSearch


class Beam(TreeSearch):
    """Keeps the `width` best plans of every round and extends each by every legal perturbation.

    With a number for `expand`, a plan is extended by that many perturbations only, the best by their rank in the
    latest round that measured them; one that no round has measured is always taken, so the first round measures all.
    Of equal plans the best-ranked parent keeps its child. The search ends when the leader meets the budget, when
    nothing is legal any more, or when the leader's mean FDT falls below `min_fdt`: then the leader before it is the
    best, and the dense plan if there is none. Width 1 is the greedy search. With `racing`, whose width must be this
    one, candidates leave a round as soon as they cannot be among its best.
    """

    def __init__(self, task: Task, settings: TreeSettings = TreeSettings(), racing: Racing | None = None) -> None:
        super().__init__(task, settings)
        space, request_for = task.space, task.request_for
        self._expand, self._racing = settings.expand, racing
        self._kept = [Plan()]
        self._latest_rank: dict[Perturbation, int] = {}
        # Where a component may be compressed more than once, rounds can share plans. Each is asked for once.
        self._known: dict[str, Answer] = {}
        # Children of this round's candidates, as far as they were guessed.
        self._children: dict[str, list[Ask]] = {}
        # In rounds that are over: evaluations asked for, and candidates.
        self._num_asked = 0
        self._num_candidates = 0
        self._num_to_come = 0
        self._round: Round | RacedRound
        if space.budget.reached(space.size(Plan())):
            self._round = Round(0, (), request_for)
            self._end(Plan())
        else:
            self._round = self._next_round()

    @property
    def step(self) -> int:
        return self._round.step

    @property
    def remarks(self) -> list[str]:
        """What a reader of the result should know."""
        return [] if self._racing is None else [self._racing.remark]

    def expected_evaluations(self) -> int:
        asked = self._num_asked + self._round.num_asked
        if self._racing is None:
            return asked + self._num_to_come
        # A candidate of a race is asked for in blocks: in as many as so far.
        return asked + round(self._num_to_come * asked / max(self._num_candidates + len(self._round.candidates), 1))

    def ask(self) -> list[Ask]:
        return self._round.ask()

    def guesses(self) -> Iterator[Ask]:
        """Children of the candidates that are the best so far, the leader's first; none where the leader would end the
        search. (Races decide too early in a round to guess anything.)"""
        if isinstance(self._round, RacedRound):
            return
        best = self._round.leaders(self._rank_by, self._width)
        if not best or self._ends_with(*best[0]):
            return
        told = self._known | self._round.answers if self._space.budget.limits_size else {}
        for candidate, _ in best:
            yield from (ask for ask in self._children_of(candidate.plan) if ask.request.plan.id not in told)

    def _children_of(self, plan: Plan) -> list[Ask]:
        """Guesses are asked for many times in a round, mostly the same."""
        if plan.id not in self._children:
            edges = self._chosen(self._space.perturbations(plan))
            self._children[plan.id] = [Ask(self._request_for(plan.with_(edge), plan), edge) for edge in edges]
        return self._children[plan.id]

    def _ends_with(self, leader: Candidate, summary: Summary) -> bool:
        return self._falls_below(summary) or self._space.budget.reached(self._space.size(leader.plan))

    def tell(self, request_id: str, outcome: Outcome) -> None:
        self._round.tell(request_id, outcome)
        while self._round.complete and not self._done:
            self._decide()
            self._children = {}
            if not self._done:
                self._num_asked += self._round.num_asked
                self._num_candidates += len(self._round.candidates)
                self._round = self._next_round()

    def _next_round(self) -> Round | RacedRound:
        edges = ((parent, edge) for parent in self._kept for edge in self._chosen(self._space.perturbations(parent)))
        step = len(self._decisions)
        candidates: Round | RacedRound
        if self._racing is None:
            candidates = Round(step, edges, self._request_for, self._known)
        else:
            candidates = self._racing.round(step, edges, self._request_for)
        if candidates.candidates:
            self._num_to_come = self._estimate_to_come(len(candidates.candidates))
        else:
            self._end(self._kept[0])
        return candidates

    def _chosen(self, legal: list[Perturbation]) -> list[Perturbation]:
        if self._expand == "all":
            return legal
        num_unknown = sum(perturbation not in self._latest_rank for perturbation in legal)
        by_rank = sorted(legal, key=lambda perturbation: self._latest_rank.get(perturbation, -1))
        return by_rank[: max(self._expand, num_unknown)]

    def _decide(self) -> None:
        """Conclude the round: its best plans are kept, the first of them is the decision."""
        order = self._round.ranked(self._rank_by)
        leader, summary = order[0]
        if self._falls_below(summary):
            self._end(self._kept[0])
            return
        size = self._conclude(leader, summary)
        self._kept = [candidate.plan for candidate, _ in order[: self._width]]
        self._remember([candidate.perturbation for candidate, _ in order])
        if self._space.budget.reached(size):
            self._end(leader.plan)

    def _remember(self, best_first: list[Perturbation]) -> None:
        """A perturbation's rank is that of the best candidate it led to, behind all others where it failed."""
        failed = [candidate.perturbation for candidate in self._round.failed]
        self._latest_rank |= {edge: rank for rank, edge in enumerate(dict.fromkeys([*best_first, *failed]))}
        if self._space.budget.limits_size:
            self._known |= self._round.answers

    def _end(self, best: Plan) -> None:
        self._best, self._done, self._num_to_come = best, True, 0

    def _estimate_to_come(self, num_candidates: int) -> int:
        """Evaluations after a round of so many candidates if the search keeps its pace so far.

        What `min_fdt` cuts off cannot be foreseen.
        """
        space, leader = self._space, self._kept[0]
        legal_now, reached = len(space.perturbations(leader)), space.progress(leader)
        # The last step ends the search: nothing is asked for from its plan.
        to_come = [legal for progress, legal in space.expected_course[:-1] if progress > reached]
        most = legal_now if self._expand == "all" else self._expand
        per_plan = sum(min(most, legal) for legal in to_come)
        # Plans that lie close together share children; how many, this round shows.
        distinct = num_candidates / max(len(self._kept) * min(most, legal_now), 1) if self._decisions else 1.0
        return round(min(self._width, num_candidates) * per_plan * min(distinct, 1.0))
