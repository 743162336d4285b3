"""The loop of a search: ask the strategy, have evaluated, write, then tell.

Knows neither how plans are chosen nor where they are measured. A request is in one place at a time: under way in the
loop, guessed in `Speculating`, durable and not told yet in `Memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dtmsearch.core.evaluation import EvalRequest, Outcome
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import Purpose
from dtmsearch.errors import SearchStopped
from dtmsearch.search.eta import Workload
from dtmsearch.search.memory import Decisions, Memory, record_of
from dtmsearch.search.protocols import (
    Ask,
    Evaluator,
    Foreseeing,
    Indexed,
    Observer,
    Progress,
    ResultLog,
    Staged,
    Strategy,
    Trainer,
    Training,
)
from dtmsearch.search.speculation import Speculating

# How long a wait for outcomes may last before the stop request is looked at again.
_POLL_SECONDS = 0.5


class SearchStalled(RuntimeError):
    """Nothing in flight, nothing to ask, not done: a fault of ours, never a quiet end."""


class _Loop:
    """One session of a search: what is under way, and what has come of it."""

    def __init__(
        self, strategy: Strategy, evaluator: Evaluator, log: ResultLog, observer: Observer, work: Workload, share: float
    ) -> None:
        self.strategy, self.log, self.work = strategy, log, work
        # What the strategy is besides, found out once: it is asked at every outcome.
        self.training = strategy if isinstance(strategy, Training) else None
        self.staged = strategy if isinstance(strategy, Staged) else None
        self.foreseeing = strategy if isinstance(strategy, Foreseeing) else None
        self.memory, self.decisions = Memory(log), Decisions(log, observer)
        self.evaluator = Speculating(evaluator, strategy, log, self.memory, work, share)
        self.earlier_seconds = self.decisions.wall_seconds
        self.under_way: dict[str, tuple[Ask, int]] = {}  # by request, with the round that asked
        self.answered = 0

    @property
    def wall_seconds(self) -> float:
        return self.earlier_seconds + self.work.seconds

    def train(self, trainer: Trainer | None) -> bool:
        """Answer the training that the strategy waits for. False if there is none."""
        if self.training is None or (request := self.training.training()) is None:
            return False
        assert trainer is not None, "whoever makes the strategy says what trains"
        self.training.tell_trained(trainer(request))
        return True

    def ask(self) -> bool:
        """Take the strategy's candidates; answer the known ones, send the rest. False if there were none."""
        step, asks = self.strategy.step, {ask.request.id: ask for ask in self.strategy.ask()}
        self.memory.recall(request_id for request_id in asks if request_id not in self.evaluator)
        unknown = [request_id for request_id in asks if request_id not in self.memory]
        given = {i: answer for i in unknown if (answer := asks[i].answer) is not None}
        elsewhere = self.log.recorded_elsewhere(unknown) if unknown else {}
        answers: dict[str, tuple[str | None, Outcome]] = {}
        answers |= {i: (None, answer) for i, answer in given.items()}
        answers |= elsewhere
        fresh = {i: (asks[i], step) for i in unknown if i not in answers}
        self.evaluator.withdraw(unknown)
        self.under_way |= fresh
        self.work.ask([ask.request for ask in asks.values() if ask.answer is None])
        self.work.begin([ask.request for ask, _ in fresh.values()])
        self.work.put_together(len(asks), len(given.keys() - elsewhere.keys()))
        self._write({i: (asks[i], step, *answers[i]) for i in unknown if i in answers})
        for request_id in asks:
            if request_id in self.memory:
                self._tell(request_id)
        self.evaluator.submit([ask.request for ask, _ in fresh.values()])
        return bool(asks)

    def receive(self, outcomes: Sequence[Outcome]) -> None:
        # An outcome may come twice, and one that nobody waits for any more may come late.
        arrived = {o.request_id: o for o in outcomes if o.request_id in self.under_way}
        answers = {i: (*self.under_way.pop(i), None, outcome) for i, outcome in arrived.items()}
        self._write(answers)
        self.work.measure([ask.request for ask, *_ in answers.values()])
        for request_id in arrived:
            self._tell(request_id)

    def _write(self, answers: Mapping[str, tuple[Ask, int, str | None, Outcome]]) -> None:
        self.memory.write(
            [record_of(ask, outcome, ask.purpose, step, source) for ask, step, source, outcome in answers.values()]
        )

    def _tell(self, request_id: str) -> None:
        self.answered += 1
        self.strategy.tell(request_id, self.memory.take(request_id))

    def record_decisions(self) -> None:
        self.decisions.record(self.strategy.decisions, self.answered, self.wall_seconds)

    def progress(self) -> Progress:
        decisions, elapsed = self.strategy.decisions, self.work.seconds
        return Progress(
            step=self.strategy.step,
            decision=decisions[-1] if decisions else None,
            evaluations=self.answered,
            replayed=self.answered - self.work.num_measured - self.work.num_put_together,
            in_flight=len(self.under_way) + len(self.evaluator),
            evaluations_per_second=self.work.num_measured / elapsed if elapsed > 0 else 0.0,
            seconds_left=self._seconds_left(),
            stage="" if self.staged is None else self.staged.stage,
            against_uniform=None if self.staged is None else self.staged.against_uniform,
        )

    def _seconds_left(self) -> float | None:
        expected = self.strategy.expected_evaluations()
        if expected is None or not self.work.num_asked:
            return None
        if self.foreseeing is not None:
            return self.work.seconds_left(self.foreseeing.expected_prompts() / max(self.work.prompts_asked, 1) - 1.0)
        return self.work.seconds_left(expected / self.work.num_asked - 1.0)


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
    loop = _Loop(strategy, evaluator, log, observer, Workload(cost_of), guess_share)
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
        if not loop.under_way:
            raise SearchStalled(f"round {strategy.step} waits for outcomes that nobody measures")
        loop.receive(loop.evaluator.poll(_POLL_SECONDS))


def measure(
    requests: Mapping[str, EvalRequest],
    evaluator: Evaluator,
    log: ResultLog,
    purpose: Purpose,
    stop_requested: Callable[[], bool] = lambda: False,
    on_answers: Callable[[int, int], None] = lambda answered, asked: None,
) -> dict[str, Outcome]:
    """Measure named requests outside a search, what is recorded already from the records. Keeps the names. `on_answers`
    hears, as they come, how many of all are answered."""
    labels = {request.id: name for name, request in requests.items()}
    recorded = log.replay() if not isinstance(log, Indexed) or log.holds_any(labels) else ()
    known = {outcome.request_id: outcome for outcome in recorded if outcome.request_id in labels}
    missing = {r.id: r for r in requests.values() if r.id not in known}
    elsewhere = log.recorded_elsewhere(list(missing))
    reused = [
        record_of(Ask(missing.pop(i)), outcome, purpose, reused_from=run, label=labels[i])
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
        log.append([record_of(Ask(missing.pop(i)), o, purpose, label=labels[i]) for i, o in arrived.items()])
        known |= arrived
        if arrived:
            on_answers(len(requests) - len(missing), len(requests))
    return {name: known[request.id] for name, request in requests.items()}


class InProcess:
    """An `Evaluator` in this process, one request at each poll: for tests, and for debugging without a cluster."""

    def __init__(self, evaluate: Callable[[Sequence[EvalRequest]], list[Outcome]]) -> None:
        self._evaluate = evaluate
        self._pending: list[EvalRequest] = []

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self._pending += requests

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        return self._evaluate([self._pending.pop(0)]) if self._pending else []
