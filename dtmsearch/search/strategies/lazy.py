"""Lazy greedy and lazy beam: what a perturbation cost earlier orders the queue, and only its head is measured again.

The first round measures all. From then on a child's loss is predicted from its parent's and from what its perturbation
added when it was last measured; the most promising are measured until the best `width` of them are no worse than what
is predicted of any other. That is exact where damage grows with depth and predictions are sound; where not, an audit of
a random sample says what was missed. After Minoux's accelerated greedy algorithm (1978), for costs that may shrink.
Knows neither where a plan is measured nor what is recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from dtmsearch.core.evaluation import Outcome
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.metrics import Summary, rank_key
from dtmsearch.core.plan import Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import SearchFailed
from dtmsearch.search.protocols import Ask
from dtmsearch.search.strategies.rounds import Answer, Candidate, Round, all_failed, distinct_candidates
from dtmsearch.search.strategies.task import Task
from dtmsearch.search.strategies.tree_search import TreeSearch

# A perturbation adds less where much is damaged already, or more: how fast what was seen of that is believed.
_DRIFT_WEIGHT = 0.5
_MOST_DRIFT = 2.0


@dataclass(frozen=True)
class _Stale:
    """What a component's scheme added to the loss when it was last measured, and the search's drift then."""

    added: float
    drift: float


@dataclass
class LazyCount:
    """How the queue did, over the rounds after the first. `children` are all that were legal; `wrong_rounds` those
    whose best were not at the head of the queue; of `audited` children `missed` were better than what was chosen
    without them, by at most `regret` in the metric."""

    rounds: int = 0
    children: int = 0
    measured: int = 0
    wrong_rounds: int = 0
    audited: int = 0
    missed: int = 0
    regret: float = 0.0


class Lazy(TreeSearch):
    """Keeps the `width` best plans of every round, as `Beam` does, but measures few children.

    `expand` bounds how many children a round measures for each plan kept; `audit` is the share of the others that is
    measured all the same, drawn by the task's `seed`. What an audit finds is used. The task's `continuation_tokens` are
    the FDT of the unquantized model.
    """

    def __init__(self, task: Task, settings: TreeSettings = TreeSettings()) -> None:
        super().__init__(task, settings)
        self._expand = inf if settings.expand == "all" else settings.expand
        self._audit, self._seed = settings.audit, task.seed
        self._kept = [(Plan(), -float(task.continuation_tokens) if task.rank_by == "fdt" else 0.0)]
        self._stale: dict[tuple[str, str], _Stale] = {}
        self._drift = 1.0
        self._known: dict[str, Answer] = {}
        self._queue: list[Candidate] = []
        self._num_asked = 0
        self.count = LazyCount()
        self._round = Round(0, (), task.request_for)
        self._course = self._search()
        self._go_on()

    @property
    def remarks(self) -> list[str]:
        """How much was measured, and how far the stale order can be trusted."""
        count = self.count
        lazy = (
            f"lazy: after the first round {count.measured:,} of {count.children:,} children were measured; the stale "
            f"order was wrong in {count.wrong_rounds} of {count.rounds} rounds"
        )
        if not count.audited:
            return [f"{lazy}; nothing was audited"]
        return [
            f"{lazy}; of {count.audited:,} others audited at random {count.missed} were better than the choice, by at "
            f"most {count.regret:.4g} in {self._rank_by}"
        ]

    def expected_evaluations(self) -> int:
        if self._done:
            return self._num_asked
        to_come = max(self._space.expected_steps - max(len(self._decisions), 1), 0.0)
        after_first = self._num_asked - len(self._space.perturbations(Plan()))
        rounds = len(self._decisions) - 1
        return self._num_asked + round(to_come * (after_first / rounds if rounds > 0 else self._width))

    def ask(self) -> list[Ask]:
        return self._round.ask()

    def guesses(self) -> Iterator[Ask]:
        """The plans of the rounds to come if the stale order holds: the queue's head, extended by what follows it.

        One after the other, a queue's heads would keep a single replica busy.
        """
        plan = self._queue[0].plan if self._queue and not self._done else Plan()
        for following in self._queue[1:]:
            if self._space.budget.reached(self._space.size(plan)):
                return
            edge = following.perturbation
            if edge in self._space.perturbations(plan):
                parent, plan = plan, plan.with_(edge)
                if plan.id not in self._known:
                    yield Ask(self._request_for(plan, parent), edge)

    def tell(self, request_id: str, outcome: Outcome) -> None:
        self._round.tell(request_id, outcome)
        self._go_on()

    def _go_on(self) -> None:
        while self._round.complete and not self._done:
            next(self._course)

    def _search(self) -> Iterator[None]:
        """The whole search; yields where it waits for a round."""
        while not self._space.budget.reached(self._space.size(self._kept[0][0])):
            edges = [(plan, edge) for plan, _ in self._kept for edge in self._space.perturbations(plan)]
            children = list(distinct_candidates(edges))
            if not children:
                break
            yield from self._measured_children(children)
            if not self._decide(children):
                break
        self._best, self._done = self._best or Plan(), True
        yield

    def _measured_children(self, children: list[Candidate]) -> Iterator[None]:
        """Give the children that count an answer: all in the first round, then the head of the queue."""
        if not self._decisions:
            yield from self._measure(children)
            if self._rank_by not in ("fdt", "sdt", "kl"):
                # The base model's own value is not measured: no child can be told from it by less than the least.
                self._kept = [(Plan(), min(map(self._loss, children)))]
            self._learn(children, drifting=False)
            return
        predicted = {child.plan.id: self._predict(child) for child in children}
        queue = self._queue = sorted(children, key=lambda child: predicted[child.plan.id])
        most = self._expand * len(self._kept)
        at = 0
        while at < len(queue):
            best = sorted(self._loss(child) for child in queue[:at])[: self._width]
            enough = len(best) == min(self._width, len(queue)) and best[-1] < inf
            if enough and (best[-1] <= predicted[queue[at].plan.id] or at >= most):
                break
            following = queue[at : at + max(self._width - at, 1)]
            yield from self._measure(following)
            at += len(following)
        yield from self._audited(queue[:at], queue[at:])
        self._learn(queue, drifting=True)

    def _audited(self, measured: list[Candidate], rest: list[Candidate]) -> Iterator[None]:
        """Measure a random sample of the rest, and note how the queue did."""
        step, count = len(self._decisions), self.count
        chosen = self._by_rank(measured)[: self._width]
        if not chosen:
            return
        sample = [child for child in rest if _chance(self._seed, step, child.plan.id) < self._audit]
        yield from self._measure(sample)
        count.rounds += 1
        count.children += len(measured) + len(rest)
        count.measured += len(measured) + len(sample)
        count.wrong_rounds += {c.plan.id for c in chosen} != {c.plan.id for c in measured[: self._width]}
        regrets = [self._loss(chosen[-1]) - self._loss(child) for child in sample]
        count.audited += len(sample)
        count.missed += sum(regret > 0 for regret in regrets)
        count.regret = max([count.regret, *regrets])

    def _measure(self, children: list[Candidate]) -> Iterator[None]:
        """Have children measured, those apart that are known from earlier rounds."""
        self._round = Round(
            len(self._decisions), ((c.parent, c.perturbation) for c in children), self._request_for, self._known
        )
        self._num_asked += self._round.num_asked
        if not self._round.complete:
            yield
        for child, measured in zip(children, self._round.candidates, strict=True):
            child.answer = measured.answer
        if self._space.budget.limits_size:
            self._known |= self._round.answers

    def _predict(self, child: Candidate) -> float:
        """The child's loss if its perturbation adds what it did when it was last measured, but for the drift since."""
        added = self._expected(child.perturbation.component, child.perturbation.scheme)
        return self._parent_loss(child) + added - self._replaced(child)

    def _expected(self, component: str, scheme: str) -> float:
        stale = self._stale[component, scheme]
        return stale.added * self._drift / stale.drift

    def _replaced(self, child: Candidate) -> float:
        """What the component's scheme in the parent, which the child's replaces, is thought to add."""
        scheme = child.parent.schemes.get(child.perturbation.component)
        return 0.0 if scheme is None else self._expected(child.perturbation.component, scheme)

    def _parent_loss(self, child: Candidate) -> float:
        return next(loss for plan, loss in self._kept if plan.id == child.parent.id)

    def _learn(self, children: list[Candidate], drifting: bool) -> None:
        """Take what was measured as what its perturbations add from now on, and how that drifts."""
        fresh = [child for child in children if child.answer is not None]
        replaced = {c.plan.id: self._replaced(c) if drifting else 0.0 for c in fresh}
        added = {c.plan.id: self._loss(c) - self._parent_loss(c) + replaced[c.plan.id] for c in fresh}
        finite = [c for c in fresh if added[c.plan.id] < inf] if drifting else []
        thought = sum(self._expected(c.perturbation.component, c.perturbation.scheme) for c in finite)
        found = sum(added[c.plan.id] for c in finite)
        if found > 0.0 and 0.0 < thought < inf:
            ratio = min(max(found / thought, 1 / _MOST_DRIFT), _MOST_DRIFT)
            self._drift *= ratio**_DRIFT_WEIGHT
        for child in fresh:
            key = child.perturbation.component, child.perturbation.scheme
            self._stale[key] = _Stale(added[child.plan.id], self._drift)

    def _loss(self, child: Candidate) -> float:
        """The metric, turned so that less is better; infinite for what failed."""
        if not isinstance(child.answer, Summary):
            return inf
        value = child.answer.value(self._rank_by)
        return -value if METRICS[self._rank_by].higher_is_better else value

    def _by_rank(self, children: Sequence[Candidate]) -> list[Candidate]:
        measured = [(c, c.answer) for c in children if isinstance(c.answer, Summary)]
        return [c for c, _ in sorted(measured, key=lambda pair: rank_key(pair[1], self._rank_by))]

    def _decide(self, children: list[Candidate]) -> bool:
        """Conclude the round; False when the search ends with the decision before."""
        order, step = self._by_rank(children), len(self._decisions)
        if not order:
            raise SearchFailed(all_failed(step, children))
        leader = order[0]
        assert isinstance(leader.answer, Summary)
        if self._falls_below(leader.answer):
            return False
        self._conclude(leader, leader.answer)
        self._kept = [(child.plan, self._loss(child)) for child in order[: self._width]]
        return True


def _chance(*parts: object) -> float:
    """A number in [0, 1) that follows from the parts alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
