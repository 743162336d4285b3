"""The loop of a search: ask the strategy, have evaluated, write, then tell.

Owns the protocols that the rest implements: `Strategy` (chooses), `Evaluator` (measures), `ResultLog` (remembers),
`Observer` (watches). Knows neither how plans are chosen nor where they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

from dtmsearch.core.evaluation import EvalRequest, EvalResult, Outcome
from dtmsearch.core.metrics import Summary
from dtmsearch.core.plan import Perturbation, Plan, PlanSize
from dtmsearch.core.records import EvaluationRecord, Purpose, StepRecord
from dtmsearch.errors import SearchStopped
from dtmsearch.search.eta import Workload

# How long a wait for outcomes may last before the stop request is looked at again.
_POLL_SECONDS = 0.5


class SearchStalled(RuntimeError):
    """Nothing in flight, nothing to ask, not done: a fault of ours, never a quiet end."""


@dataclass(frozen=True)
class Ask:
    """One candidate of a round: the request, and the edge from its parent.

    `answer` is given where the strategy has put the result together from others: it is recorded, not measured.
    `on_part` of the prompts only, as races begin: recorded under a purpose of its own, not to be taken for the whole.
    """

    request: EvalRequest
    perturbation: Perturbation | None = None
    answer: EvalResult | None = None
    on_part: bool = False


@dataclass(frozen=True)
class TrainRequest:
    """A plan's model, over some weights (empty: the base model's), to be trained under its masks. `number` is the round
    that it ends, from 0."""

    number: int
    plan: Plan
    weights_id: str


@dataclass(frozen=True)
class Decision:
    """What a strategy concluded from a complete round."""

    step: int
    plan: Plan
    perturbation: Perturbation | None
    score: float
    size: PlanSize
    summary: Summary


class Strategy(Protocol):
    """Chooses. Deterministic: the order in which the outcomes of a round are told changes nothing."""

    @property
    def done(self) -> bool: ...

    @property
    def step(self) -> int:
        """The round that is being measured, from 0."""

    @property
    def best(self) -> Plan | None:
        """The plan that the search has come to so far; None if this strategy chooses none, or has not yet."""

    @property
    def decisions(self) -> Sequence[Decision]:
        """All decisions so far, one for each step, in order."""

    def expected_evaluations(self) -> int | None:
        """An estimate of all evaluations that this search asks for, those made included; None if it cannot tell."""

    def ask(self) -> list[Ask]:
        """Candidates that were not asked yet; empty while the round waits for outcomes."""

    def tell(self, request_id: str, outcome: Outcome) -> None: ...


@runtime_checkable
class Remarking(Protocol):
    """A strategy that has something to say of its result: what it left out, and with what guarantee."""

    @property
    def remarks(self) -> Sequence[str]: ...


def remarks_of(strategy: Strategy) -> Sequence[str]:
    return strategy.remarks if isinstance(strategy, Remarking) else ()


@runtime_checkable
class Training(Protocol):
    """A strategy that has models trained between its rounds."""

    def training(self) -> TrainRequest | None:
        """The training that it waits for; it asks for nothing else meanwhile."""

    def tell_trained(self, weights_id: str) -> None:
        """The weights that the training came to."""


# Answers a training: finds it, or has it made; the weights that it came to.
Trainer = Callable[[TrainRequest], str]


@runtime_checkable
class Guessing(Protocol):
    """A strategy that can say what it will probably ask for next, so that replicas need not idle at a round's end."""

    def guesses(self) -> Iterator[Ask]:
        """What the next round asks for if the present one ends as it stands, the most certain first. Tells it nothing,
        changes nothing."""


@runtime_checkable
class Foreseeing(Protocol):
    """A strategy whose evaluations do not all run over as many prompts."""

    def expected_prompts(self) -> int:
        """As `expected_evaluations`, each counted as the prompts that it runs over."""
        ...


@runtime_checkable
class Offering(Protocol):
    """An evaluator that says when it has nothing better to do."""

    def num_idle(self) -> int:
        """How many requests more could be begun at once, with none that wait."""

    def submit_guesses(self, requests: Sequence[EvalRequest]) -> None:
        """Measure these when there is nothing else to do. One that is submitted later is measured no second time, and
        waits no longer than others."""


class Evaluator(Protocol):
    """Measures, in any order, on whatever it has."""

    def submit(self, requests: Sequence[EvalRequest]) -> None: ...

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        """Outcomes that have arrived since the last call; waits for the first, at most `timeout_seconds`."""


class ResultLog(Protocol):
    """Remembers. What `append` and `decide` were given is durable when they return."""

    def replay(self) -> Iterable[Outcome]:
        """Every outcome that this run has recorded, in recorded order."""

    def recorded_elsewhere(self, request_ids: Sequence[str]) -> Mapping[str, tuple[str, Outcome]]:
        """Of these requests, those that other runs have measured: request id -> (run, outcome). Failures never."""

    def append(self, records: Sequence[EvaluationRecord]) -> None: ...

    def decisions(self) -> Sequence[StepRecord]: ...

    def decide(self, steps: Sequence[StepRecord]) -> None: ...


@dataclass(frozen=True)
class Progress:
    """How far a search is. `evaluations` counts those answered, recorded ones included; rates are of this session;
    `seconds_left` is None where nothing is known yet."""

    step: int
    decision: Decision | None
    evaluations: int
    replayed: int
    in_flight: int
    evaluations_per_second: float
    seconds_left: float | None


class Observer(Protocol):
    """Watches; called from the driver's loop."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_decision(self, decision: Decision, replayed: bool) -> None: ...

    def on_note(self, text: str) -> None:
        """A line worth knowing: a replica was replaced, a damaged segment was set aside."""


class Silent:
    """An observer that looks away."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_decision(self, decision: Decision, replayed: bool) -> None: ...

    def on_note(self, text: str) -> None: ...


class _Loop:
    """The state of one session of a search: what is known, what is in flight, how fast it goes."""

    def __init__(
        self,
        strategy: Strategy,
        evaluator: Evaluator,
        log: ResultLog,
        observer: Observer,
        guess_share: float,
        cost_of: Callable[[EvalRequest], float],
    ) -> None:
        self.strategy, self.evaluator, self.log, self.observer = strategy, evaluator, log, observer
        self.guess_share = guess_share
        self.guessed: set[str] = set()  # under way, asked for by nobody yet
        self.elsewhere: set[str] = set()  # what need not be guessed, for other runs have measured it
        # What is recorded is read as the strategy comes to ask for it, and let go when it is told.
        self.recorded = iter(log.replay())
        self.known: dict[str, Outcome] = {}
        self.recorded_steps = list(log.decisions())
        self.earlier_seconds = self.recorded_steps[-1].wall_seconds if self.recorded_steps else 0.0
        self.work = Workload(cost_of)
        self.in_flight: dict[str, tuple[Ask, int]] = {}
        self.answered = 0
        self.replayed = 0
        self.measured = 0
        self.asked = 0
        self.put_together = 0

    @property
    def wall_seconds(self) -> float:
        return self.earlier_seconds + self.work.seconds

    def ask(self) -> bool:
        """Take the strategy's candidates; answer the known ones, send the rest. False if there were none."""
        asks = self.strategy.ask()
        self._recall({a.request.id for a in asks})
        unknown = [a for a in asks if a.request.id not in self.known]
        elsewhere = self.log.recorded_elsewhere([a.request.id for a in unknown]) if unknown else {}
        step = self.strategy.step
        given = {a.request.id: (None, a.answer) for a in unknown if a.answer is not None}
        answers: dict[str, tuple[str | None, Outcome]] = {**given, **elsewhere}
        fresh = [a for a in unknown if a.request.id not in answers]
        # Guesses that are under way: asked for from now on, or answered by somebody else meanwhile.
        for request_id in self.in_flight.keys() & {a.request.id for a in unknown}:
            self.work.drop(self.in_flight.pop(request_id)[0].request)
        self.in_flight |= {a.request.id: (a, step) for a in fresh}
        self.asked += len(asks)
        self.work.ask(a.request for a in asks if a.answer is None)
        self.work.begin(a.request for a in fresh)
        self.guessed.difference_update(a.request.id for a in asks)
        self.put_together += len(given.keys() - elsewhere.keys())
        self._take([(a, step, answers[a.request.id]) for a in unknown if a.request.id in answers])
        for ask in asks:
            if ask.request.id in self.known:
                self._tell(ask.request.id)
        self.evaluator.submit([a.request for a in fresh])
        return bool(asks)

    def train(self, trainer: Trainer | None) -> bool:
        """Answer the training that the strategy waits for. False if there is none."""
        if not isinstance(self.strategy, Training) or (request := self.strategy.training()) is None:
            return False
        assert trainer is not None, "whoever makes the strategy says what trains"
        self.strategy.tell_trained(trainer(request))
        return True

    def receive(self, outcomes: Sequence[Outcome]) -> None:
        # An outcome may come twice, and one that nobody waits for any more may come late.
        arrived = {o.request_id: o for o in outcomes if o.request_id in self.in_flight}
        answers = [(*self.in_flight.pop(request_id), (None, outcome)) for request_id, outcome in arrived.items()]
        self._take(answers)
        self.measured += len(arrived)
        self.work.measure(ask.request for ask, _, _ in answers)
        for request_id in arrived:
            if request_id in self.guessed:
                self.guessed.remove(request_id)  # from now on it is known, and waits until it is asked for
            else:
                self._tell(request_id)

    def guess(self) -> None:
        """Give replicas that idle what the next round will probably ask for.

        As many as nobody has asked for yet can have been in vain: never more than `guess_share` of the evaluations that
        the search will ask for in all, as it looks now.
        """
        if not (self.guess_share and isinstance(self.strategy, Guessing) and isinstance(self.evaluator, Offering)):
            return
        to_be_asked = max(self.asked, self.strategy.expected_evaluations() or 0)
        allowed = int(self.guess_share * to_be_asked) - len(self.known) - len(self.guessed)
        most = min(allowed, self.evaluator.num_idle())
        if most <= 0:
            return
        new = (ask for ask in self.strategy.guesses() if not self._is_known(ask.request.id))
        guesses = {ask.request.id: ask for ask in islice(new, most)}
        self.elsewhere |= self.log.recorded_elsewhere(list(guesses)).keys()
        fresh = {i: ask for i, ask in guesses.items() if i not in self.elsewhere}
        self.in_flight |= {i: (ask, self.strategy.step + 1) for i, ask in fresh.items()}
        self.work.begin(ask.request for ask in fresh.values())
        self.guessed |= fresh.keys()
        self.evaluator.submit_guesses([ask.request for ask in fresh.values()])

    def _recall(self, request_ids: set[str]) -> None:
        """Read on in the records until all of these are known; to the end where one is not recorded."""
        missing = request_ids - self.known.keys() - self.in_flight.keys()
        while missing and (outcome := next(self.recorded, None)) is not None:
            self.known[outcome.request_id] = outcome
            missing.discard(outcome.request_id)

    def _is_known(self, request_id: str) -> bool:
        return request_id in self.known or request_id in self.in_flight or request_id in self.elsewhere

    def _take(self, answers: Sequence[tuple[Ask, int, tuple[str | None, Outcome]]]) -> None:
        """Write first: nothing is known before it is durable."""
        records = [
            _record(ask, outcome, "race" if ask.on_part else "search", step, reused_from=source)
            for ask, step, (source, outcome) in answers
        ]
        if records:
            self.log.append(records)
        self.known |= {record.outcome.request_id: record.outcome for record in records}

    def _tell(self, request_id: str) -> None:
        # No request is asked twice, so what was told need not be held any longer.
        self.answered += 1
        self.strategy.tell(request_id, self.known.pop(request_id))

    def record_decisions(self) -> None:
        """Write decisions that are new, and hold the replayed ones against what was recorded."""
        told = len(self.recorded_steps)
        for decision in self.strategy.decisions[self.replayed : told]:
            recorded = self.recorded_steps[decision.step]
            if recorded.plan_id != decision.plan.id:
                raise RuntimeError(
                    f"step {decision.step} of this run chose plan {recorded.plan_id}, but its records now give "
                    f"{decision.plan.id}: records are missing, or were made by another version. Use another run name"
                )
            self.observer.on_decision(decision, replayed=True)
            self.replayed += 1
        new = self.strategy.decisions[len(self.recorded_steps) :]
        if not new:
            return
        steps = [_step_record(d, self.answered, self.wall_seconds) for d in new]
        self.log.decide(steps)
        self.recorded_steps += steps
        self.replayed = len(self.recorded_steps)
        for decision in new:
            self.observer.on_decision(decision, replayed=False)

    def progress(self) -> Progress:
        elapsed = self.work.seconds
        rate = self.measured / elapsed if elapsed > 0 else 0.0
        decisions = self.strategy.decisions
        return Progress(
            step=self.strategy.step,
            decision=decisions[-1] if decisions else None,
            evaluations=self.answered,
            replayed=self.answered - self.measured - self.put_together,
            in_flight=len(self.in_flight),
            evaluations_per_second=rate,
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float | None:
        expected = self.strategy.expected_evaluations()
        if expected is None or not self.asked:
            return None
        if isinstance(self.strategy, Foreseeing):
            return self.work.seconds_left(self.strategy.expected_prompts() / max(self.work.prompts_asked, 1) - 1.0)
        return self.work.seconds_left(expected / self.asked - 1.0)


def search(
    strategy: Strategy,
    evaluator: Evaluator,
    log: ResultLog,
    observer: Observer,
    stop_requested: Callable[[], bool] = lambda: False,
    limit_seconds: float | None = None,
    guess_share: float = 0.15,
    cost_of: Callable[[EvalRequest], float] = lambda request: float(request.prompts[1] - request.prompts[0]),
    trainer: Trainer | None = None,
) -> Plan | None:
    """Run a strategy to its end and return the plan that it comes to.

    What the log holds is answered from it, in this session or any later one, so running again after a kill resumes.
    `limit_seconds` bounds the search's own time over all its sessions. Raises `SearchStopped` when
    `stop_requested` turns true, `SearchStalled` rather than ending without being done.

    `guess_share`: how many evaluations more may be made to keep replicas busy at a round's end, where strategy and
    evaluator know how. They are results like any other, and change no decision. `cost_of` says what a request takes of
    a replica, in any unit: the time left is estimated from it. `trainer` answers the trainings of a strategy that has
    models trained: it has recorded what it came to when it returns, as a log has.
    """
    loop = _Loop(strategy, evaluator, log, observer, guess_share, cost_of)
    while True:
        # Before a training, which may take hours, and before the strategy is told what is known already.
        loop.record_decisions()
        while not strategy.done and (loop.train(trainer) or loop.ask()):
            loop.record_decisions()
        loop.record_decisions()
        observer.on_progress(loop.progress())
        if strategy.done or (limit_seconds is not None and loop.wall_seconds >= limit_seconds):
            return strategy.best
        if stop_requested():
            raise SearchStopped
        loop.guess()
        if not loop.in_flight:
            raise SearchStalled(f"round {strategy.step} waits for outcomes that nobody measures")
        loop.receive(evaluator.poll(_POLL_SECONDS))


def measure(
    requests: Mapping[str, EvalRequest],
    evaluator: Evaluator,
    log: ResultLog,
    purpose: Purpose,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Outcome]:
    """Measure named requests outside a search, what is recorded already from the records. Keeps the names."""
    labels = {request.id: name for name, request in requests.items()}
    known = {outcome.request_id: outcome for outcome in log.replay() if outcome.request_id in labels}
    missing = {r.id: r for r in requests.values() if r.id not in known}
    elsewhere = log.recorded_elsewhere(list(missing))
    reused = [
        _record(Ask(missing.pop(i)), outcome, purpose, reused_from=run, label=labels[i])
        for i, (run, outcome) in elsewhere.items()
    ]
    if reused:
        log.append(reused)
        known |= {record.outcome.request_id: record.outcome for record in reused}
    evaluator.submit(list(missing.values()))
    while missing:
        if stop_requested():
            raise SearchStopped
        arrived = {o.request_id: o for o in evaluator.poll(_POLL_SECONDS) if o.request_id in missing}
        log.append([_record(Ask(missing.pop(i)), o, purpose, label=labels[i]) for i, o in arrived.items()])
        known |= arrived
    return {name: known[request.id] for name, request in requests.items()}


def _record(
    ask: Ask,
    outcome: Outcome,
    purpose: Purpose,
    step: int | None = None,
    reused_from: str | None = None,
    label: str | None = None,
) -> EvaluationRecord:
    perturbation = None if ask.perturbation is None else str(ask.perturbation)
    return EvaluationRecord(ask.request, outcome, purpose, step, perturbation, reused_from, label)


def _step_record(decision: Decision, evaluations: int, wall_seconds: float) -> StepRecord:
    return StepRecord(
        step=decision.step,
        plan_id=decision.plan.id,
        perturbation=None if decision.perturbation is None else str(decision.perturbation),
        score=decision.score,
        num_compressed=decision.size.num_compressed,
        share=decision.size.share,
        bits_per_weight=decision.size.bits_per_weight,
        sparsity=decision.size.sparsity,
        evaluations=evaluations,
        wall_seconds=wall_seconds,
    )


class InProcess:
    """An `Evaluator` in this process, one request at each poll: for tests, and for debugging without a cluster."""

    def __init__(self, evaluate: Callable[[Sequence[EvalRequest]], list[Outcome]]) -> None:
        self._evaluate = evaluate
        self._pending: list[EvalRequest] = []

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self._pending += requests

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        return self._evaluate([self._pending.pop(0)]) if self._pending else []
