"""What a search is made of, as the loop sees it: `Strategy` (chooses), `Evaluator` (measures), `ResultLog` (remembers),
`Observer` (watches), and what goes to and fro between them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dtmsearch.core.evaluation import EvalRequest, EvalResult, Outcome
from dtmsearch.core.metrics import Summary
from dtmsearch.core.plan import Perturbation, Plan, PlanSize
from dtmsearch.core.records import EvaluationRecord, Purpose, StepRecord


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

    @property
    def purpose(self) -> Purpose:
        return "race" if self.on_part else "search"


@dataclass(frozen=True)
class TrainRequest:
    """A plan's model, over some weights (empty: the base model's), to be trained under its masks. `number` is the round
    that it ends, from 0."""

    number: int
    plan: Plan
    weights_id: str


@dataclass(frozen=True)
class Decision:
    """What a strategy concluded from a complete round; `score` is the plan's value in `metric`, by which it ranks."""

    step: int
    plan: Plan
    perturbation: Perturbation | None
    score: float
    size: PlanSize
    summary: Summary
    metric: str = "fdt"


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
    """What a strategy has to say about its result; nothing where it has no remarks."""
    return strategy.remarks if isinstance(strategy, Remarking) else ()


@dataclass(frozen=True)
class AgainstUniform:
    """The best plan that a search has measured beside the best uniform one within the budget, on the same of its own
    prompts: their values in `metric`."""

    metric: str
    plan: float
    scheme: str
    uniform: float


@runtime_checkable
class Staged(Protocol):
    """A strategy that says where it is."""

    @property
    def stage(self) -> str:
        """What it does now, in a few words; empty where a number of the step says it all."""

    @property
    def against_uniform(self) -> AgainstUniform | None:
        """None while there is nothing to compare."""


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


@runtime_checkable
class Indexed(Protocol):
    """A log that tells what it holds without going through it."""

    def holds_any(self, request_ids: Collection[str]) -> bool:
        """Whether `replay` may give an outcome of any of these requests; False where it gives none."""


@dataclass(frozen=True)
class Progress:
    """How far a search is. `evaluations` counts those answered, recorded ones included; rates are of this session;
    `seconds_left` is None where nothing is known yet. `stage` and `against_uniform` are those of a `Staged`
    strategy."""

    step: int
    decision: Decision | None
    evaluations: int
    replayed: int
    in_flight: int
    evaluations_per_second: float
    seconds_left: float | None
    stage: str = ""
    against_uniform: AgainstUniform | None = None


class Observer(Protocol):
    """Watches; called from the driver's loop."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_decision(self, decision: Decision, replayed: bool) -> None: ...

    def on_note(self, text: str) -> None:
        """A line worth knowing: a replica was replaced, a damaged segment was set aside."""


@runtime_checkable
class StageObserver(Protocol):
    """An observer that hears also what goes on beside evaluations: what is loaded, made, priced."""

    def on_stage(self, text: str, done: str = "") -> None:
        """`text` begins, or goes on: then `done` says how far it is."""


def tell_stage(observer: Observer, text: str, done: str = "") -> None:
    """Tell an observer that hears of stages what begins, and what was done before."""
    if isinstance(observer, StageObserver):
        observer.on_stage(text, done)


class Silent:
    """An observer that looks away."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_decision(self, decision: Decision, replayed: bool) -> None: ...

    def on_note(self, text: str) -> None: ...
