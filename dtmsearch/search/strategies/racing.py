"""Racing: the candidates of a round are measured on the same prompts in growing blocks, and leave when they cannot win.

What is known for certain are the mean losses of the candidates that were measured on all prompts. A candidate leaves
as soon as there is enough evidence that its own mean over all prompts is above that of the `width`-th best of them. For
one of the best `width` to leave, the evidence against its own true mean must mislead: so the error is shared among
`width` candidates, however many there are. Holds over the random order in which prompts are drawn, at any number of
blocks. Knows nothing of what the round is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import ceil, inf, log

import numpy as np

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome, combine
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.metrics import Summary, rank_key, summarize
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import SearchFailed, UserError
from dtmsearch.search.protocols import Ask
from dtmsearch.search.solver.sequential_test import Values, log_evidence_above
from dtmsearch.search.strategies.rounds import Answer, Candidate, RequestFactory, all_failed, distinct_candidates

# The first block is this part of the prompts, or as many prompts as tell anything; each reaches further by a factor.
_FIRST_BLOCK = 1 / 64
_FEWEST_PROMPTS = 16
_GROWTH = 1.5


def block_ends(num_prompts: int) -> list[int]:
    """How far the blocks of a race reach: a geometric series that ends with all prompts."""
    ends = []
    end = float(max(_FEWEST_PROMPTS, ceil(num_prompts * _FIRST_BLOCK)))
    while round(end) < num_prompts:
        ends.append(round(end))
        end *= _GROWTH
    return [*ends, num_prompts]


@dataclass
class RaceCount:
    """What races have spent and saved: `prompts` measured of `all_prompts` (both summed over candidates)."""

    rounds: int = 0
    candidates: int = 0
    left: int = 0
    prompts: int = 0
    all_prompts: int = 0


@dataclass
class Racer:
    """A candidate and what is measured of it: blocks that join up, from prompt 0 on."""

    candidate: Candidate
    whole: EvalRequest
    covariate: Values
    parts: list[EvalResult] = field(default_factory=list)
    losses: Values = field(default_factory=lambda: np.empty(0))
    racing: bool = True

    @property
    def seen(self) -> int:
        return len(self.losses)

    @property
    def is_whole(self) -> bool:
        return isinstance(self.candidate.answer, Summary)

    def estimate(self) -> float:
        """Its mean loss over all prompts as it looks now, corrected for what the covariate does on those seen."""
        if not self.seen:
            return np.inf
        ahead = self.covariate[: self.seen].mean() - self.covariate.mean()
        return float(self.losses.mean() - ahead)


class Racing:
    """Makes the rounds of one search, which race. `confidence` is that of each round: with at least this probability
    no candidate leaves that would be among the best `width` when all were measured on all prompts, or with an
    `indifference`, in units of the metric, that would be better than the worst of those kept by more than that.

    `remember` is for searches whose rounds may share plans: nothing is measured again then.
    """

    def __init__(
        self,
        metric: str,
        width: int,
        confidence: float,
        continuation_tokens: int,
        remember: bool = False,
        indifference: float = TreeSettings.indifference,
    ) -> None:
        loss_of = METRICS[metric].loss_from_zero(continuation_tokens)
        if loss_of is None:
            raise UserError(f"racing ranks by a metric whose values have a bound, such as fdt, sdt, kl, got {metric}")
        self.metric, self.loss_of = metric, loss_of
        self.width = width
        self.confidence = confidence
        self.indifference = indifference
        self.continuation_tokens = continuation_tokens
        self.count = RaceCount()
        self._remember = remember
        self._racers: dict[str, Racer] = {}

    def round(self, step: int, edges: Iterable[tuple[Plan, Perturbation]], request_for: RequestFactory) -> RacedRound:
        """A round over these edges; parents must be dense or come from the round before."""
        racers = [self._racer(candidate, request_for) for candidate in distinct_candidates(edges)]
        known = {racer.candidate.plan.id: racer for racer in racers}
        self._racers = self._racers | known if self._remember else known
        return RacedRound(step, racers, self)

    def _racer(self, candidate: Candidate, request_for: RequestFactory) -> Racer:
        whole = request_for(candidate.plan, candidate.parent)
        earlier = self._racers.get(candidate.plan.id)
        if earlier is not None:
            candidate.answer = earlier.candidate.answer
            usable = not isinstance(candidate.answer, EvalFailure)
            return replace(earlier, candidate=candidate, parts=list(earlier.parts), racing=usable)
        parent = self._racers.get(candidate.parent.id)
        return Racer(candidate, whole, np.zeros(whole.prompts[1]) if parent is None else parent.losses)

    @property
    def remark(self) -> str:
        """What was left out, and with what guarantee."""
        count = self.count
        measured = count.prompts / max(count.all_prompts, 1)
        more = f", differences of at most {self.indifference:g} aside" if self.indifference else ""
        return (
            f"racing: {count.left:,} of {count.candidates:,} candidates left early in {count.rounds} rounds; "
            f"{measured:.1%} of their values by prompt were measured. In each round, with a probability of at least "
            f"{self.confidence:g} over the order of the prompts, none left that would be among the best {self.width} "
            f"by {self.metric} on all of these prompts{more}"
        )


class RacedRound:
    """A round (see `rounds.Round`) whose candidates leave early. Starts from blocks that are known."""

    def __init__(self, step: int, racers: list[Racer], racing: Racing) -> None:
        self.step = step
        self.num_asked = 0
        self._racers = racers
        self._racing = racing
        self._waiting: dict[str, Racer] = {}
        self._unasked: list[Ask] = []
        self._known_prompts = sum(racer.seen for racer in racers)
        self._course = self._race()
        self._go_on()

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return tuple(racer.candidate for racer in self._racers)

    @property
    def complete(self) -> bool:
        return not self._waiting

    @property
    def failed(self) -> list[Candidate]:
        return [c for c in self.candidates if isinstance(c.answer, EvalFailure)]

    @property
    def answers(self) -> dict[str, Answer]:
        """Plan id -> answer, of the candidates that were measured on all prompts, or failed."""
        return {c.plan.id: c.answer for c in self.candidates if c.answer is not None}

    def ask(self) -> list[Ask]:
        asks, self._unasked = self._unasked, []
        return asks

    def tell(self, request_id: str, outcome: Outcome) -> None:
        racer = self._waiting.pop(request_id)
        if isinstance(outcome, EvalFailure):
            racer.candidate.answer, racer.racing = outcome, False
        elif request_id == racer.whole.id:
            self._take_whole(racer, outcome)
        else:
            self._take_part(racer, outcome)
        self._go_on()

    def ranked(self, metric: str) -> list[tuple[Candidate, Summary]]:
        """Best first: the candidates that were measured on all prompts, then those that left, by what is known of them.

        Raises `SearchFailed` when none could be measured.
        """
        whole = [(r.candidate, r.candidate.answer) for r in self._racers if isinstance(r.candidate.answer, Summary)]
        if not whole:
            raise SearchFailed(all_failed(self.step, self.candidates))
        left = [(r.candidate, summarize(combine("", r.parts))) for r in self._racers if r.candidate.answer is None]
        by_rank = [sorted(pairs, key=lambda pair: rank_key(pair[1], metric)) for pairs in (whole, left)]
        return by_rank[0] + by_rank[1]

    def _go_on(self) -> None:
        """Once nothing is waited for, to the next point at which something is."""
        if not self._waiting:
            next(self._course, None)

    def _race(self) -> Iterator[None]:
        num_prompts = self._racers[0].whole.prompts[1] if self._racers else 0
        for end in block_ends(num_prompts):
            yield from self._measure([r for r in self._racers if r.racing], end)
            yield from self._measure(self._leaders(), num_prompts)
            self._let_go()
            if all(r.is_whole for r in self._racers if r.racing):
                break
        self._count(num_prompts)

    def _measure(self, racers: list[Racer], end: int) -> Iterator[None]:
        """Ask for what these lack up to `end`, and wait for it."""
        for racer in racers:
            if racer.seen < end:
                prompts = racer.seen, end
                whole = prompts == racer.whole.prompts
                self._ask(racer, racer.whole if whole else replace(racer.whole, prompts=prompts))
        if self._waiting:
            yield

    def _ask(self, racer: Racer, request: EvalRequest, answer: EvalResult | None = None) -> None:
        self._waiting[request.id] = racer
        on_part = request.prompts != racer.whole.prompts
        self._unasked.append(Ask(request, racer.candidate.perturbation, answer, on_part))
        self.num_asked += 1

    def _take_part(self, racer: Racer, result: EvalResult) -> None:
        racer.parts.append(result)
        racer.losses = np.concatenate([racer.losses, self._losses(result)])
        if racer.seen == racer.whole.prompts[1]:
            # Recorded as what it is, the evaluation of all prompts, so that nobody has to measure or join it again.
            self._ask(racer, racer.whole, combine(racer.whole.id, racer.parts))

    def _take_whole(self, racer: Racer, result: EvalResult) -> None:
        racer.candidate.answer = summarize(result)
        racer.losses = self._losses(result)
        racer.parts = []

    def _losses(self, result: EvalResult) -> Values:
        return self._racing.loss_of(result.metrics[self._racing.metric])

    def _leaders(self) -> list[Racer]:
        """Those that look best, ties in order of the candidates; all that race when they are no more than `width`."""
        return sorted((r for r in self._racers if r.racing), key=Racer.estimate)[: self._racing.width]

    def _let_go(self) -> None:
        """Drop those that are told, with enough confidence, to be behind the `width`-th best of all prompts."""
        width = self._racing.width
        known = sorted(float(r.losses.mean()) for r in self._racers if r.is_whole)
        others = [r for r in self._racers if r.racing and not r.is_whole]
        if len(known) < width or not others:
            return
        confidence = self._racing.confidence
        enough = log(width / (1.0 - confidence)) if confidence < 1.0 else inf
        bound = known[width - 1] - self._racing.indifference
        # What an earlier round has measured of a plan may reach further than this round's blocks.
        for seen in {r.seen for r in others}:
            alike = [r for r in others if r.seen == seen]
            losses, covariates = np.stack([r.losses for r in alike]), np.stack([r.covariate for r in alike])
            for racer, evidence in zip(alike, log_evidence_above(losses, covariates, bound), strict=True):
                racer.racing = bool(evidence < enough)

    def _count(self, num_prompts: int) -> None:
        count = self._racing.count
        count.rounds += 1
        count.candidates += len(self._racers)
        count.left += sum(r.candidate.answer is None for r in self._racers)
        count.prompts += sum(r.seen for r in self._racers) - self._known_prompts
        count.all_prompts += num_prompts * len(self._racers)
