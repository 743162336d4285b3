"""A round: candidates that are measured side by side, and ranked once all of them are told.

Knows nothing of the round before it or after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, Outcome
from dtmsearch.core.metrics import Summary, rank_key, summarize
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.errors import SearchFailed
from dtmsearch.search.protocols import Ask

# The request that measures a plan (first) which came from a parent (second).
RequestFactory = Callable[[Plan, Plan], EvalRequest]
# What stays of an outcome: no array over prompts.
Answer = Summary | EvalFailure


@dataclass
class Candidate:
    """A plan of a round and the edge from its parent; `answer` is None until it is told."""

    plan: Plan
    perturbation: Perturbation
    parent: Plan
    answer: Answer | None = None


def distinct_candidates(edges: Iterable[tuple[Plan, Perturbation]]) -> tuple[Candidate, ...]:
    """Candidates from edges (parent, perturbation); of equal plans the first."""
    distinct: dict[str, Candidate] = {}
    for parent, perturbation in edges:
        candidate = Candidate(parent.with_(perturbation), perturbation, parent)
        distinct.setdefault(candidate.plan.id, candidate)
    return tuple(distinct.values())


class Round:
    """Candidates from edges (parent, perturbation); of equal plans the first keeps its place.

    `known` answers, by plan id, are not asked for again.
    """

    def __init__(
        self,
        step: int,
        edges: Iterable[tuple[Plan, Perturbation]],
        request_for: RequestFactory,
        known: Mapping[str, Answer] | None = None,
    ) -> None:
        self.step = step
        self.candidates = distinct_candidates(edges)
        self._waiting: dict[str, int] = {}  # places among the candidates
        self._unasked: list[Ask] = []
        self._order = _Order()
        for place, candidate in enumerate(self.candidates):
            candidate.answer = known.get(candidate.plan.id) if known else None
            if candidate.answer is None:
                request = request_for(candidate.plan, candidate.parent)
                self._waiting[request.id] = place
                self._unasked.append(Ask(request, candidate.perturbation))
            elif isinstance(candidate.answer, Summary):
                self._order.add(place, candidate.answer)
        self.num_asked = len(self._unasked)

    @property
    def complete(self) -> bool:
        return not self._waiting

    def ask(self) -> list[Ask]:
        asks, self._unasked = self._unasked, []
        return asks

    def tell(self, request_id: str, outcome: Outcome) -> None:
        answer = outcome if isinstance(outcome, EvalFailure) else summarize(outcome)
        place = self._waiting.pop(request_id)
        self.candidates[place].answer = answer
        if isinstance(answer, Summary):
            self._order.add(place, answer)

    @property
    def answers(self) -> dict[str, Answer]:
        """Plan id -> answer, of the candidates that have one."""
        return {c.plan.id: c.answer for c in self.candidates if c.answer is not None}

    @property
    def failed(self) -> list[Candidate]:
        return [c for c in self.candidates if isinstance(c.answer, EvalFailure)]

    def ranked(self, metric: str) -> list[tuple[Candidate, Summary]]:
        """The measured candidates, best first, ties in order of the candidates.

        Raises `SearchFailed` when none of them could be measured.
        """
        measured = self.ranked_so_far(metric)
        if not measured:
            raise SearchFailed(all_failed(self.step, self.candidates))
        return measured

    def ranked_so_far(self, metric: str) -> list[tuple[Candidate, Summary]]:
        """As `ranked`, of those that are told; none before the first."""
        return self.leaders(metric, len(self.candidates))

    def leaders(self, metric: str, number: int) -> list[tuple[Candidate, Summary]]:
        """The first of `ranked_so_far`, which is asked for often while a round goes on."""
        best = (self.candidates[place] for place in self._order.first(metric, number))
        return [(candidate, candidate.answer) for candidate in best if isinstance(candidate.answer, Summary)]


class _Order:
    """Places in the order of their summaries by a metric, ties in order of the places; kept from one time to the next,
    for sorting all of a round's candidates each time that a few are told takes the driver's time."""

    def __init__(self) -> None:
        self._metric = ""
        self._sorted: list[tuple[tuple[float, ...], int]] = []
        self._summaries: list[tuple[int, Summary]] = []
        self._num_sorted = 0

    def add(self, place: int, summary: Summary) -> None:
        self._summaries.append((place, summary))

    def first(self, metric: str, number: int) -> list[int]:
        if metric != self._metric:
            self._metric, self._sorted, self._num_sorted = metric, [], 0
        new = self._summaries[self._num_sorted :]
        self._num_sorted += len(new)
        self._sorted += [(rank_key(summary, metric), place) for place, summary in new]
        self._sorted.sort()  # quick where all but the last few are in order
        return [place for _, place in self._sorted[:number]]


def all_failed(step: int, candidates: Sequence[Candidate]) -> str:
    """What to say of a round in which nothing could be measured."""
    failures = [c.answer for c in candidates if isinstance(c.answer, EvalFailure)]
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(f.kind for f in failures).most_common())
    return (
        f"all {len(failures)} candidates of round {step} failed ({kinds}); the first, "
        f"{candidates[0].perturbation}: {failures[0].message}"
    )
