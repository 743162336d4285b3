"""Strategies written as procedures: a generator that yields the trials of a round and is handed their answers.

What a strategy decides then reads from top to bottom. A procedure is replayed like any other strategy, for it sees
nothing but answers, a round at a time, in the order of its trials.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome
from dtmsearch.core.metric_registry import ALWAYS, METRICS
from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.errors import SearchFailed
from dtmsearch.search.protocols import Ask, Decision, TrainRequest
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.base import Course
from dtmsearch.search.strategies.rounds import RequestFactory

Floats = NDArray[np.float64]
DENSE_PLAN = Plan()


@dataclass(frozen=True)
class Trial:
    """A plan to be measured on prompts from `prompts[0]` up to `prompts[1]`; `parent` is a plan close to it, and
    `weights_id` names the trained weights that it is over, if not the base model's; `metrics` are what is measured
    beside fdt, sdt and dppl in the place of what the search measures."""

    plan: Plan
    prompts: tuple[int, int]
    parent: Plan = DENSE_PLAN
    perturbation: Perturbation | None = None
    weights_id: str = ""
    metrics: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Milestone:
    """A model that a round came to: a plan, over the base model's weights (``) or trained ones."""

    label: str
    plan: Plan
    weights_id: str


_T = TypeVar("_T")
# Yields rounds of trials, is sent their outcomes in the same order; a part of a script comes to something.
Part = Generator[Sequence[Trial], Sequence[Outcome], _T]
Script = Part[None]


class Procedure(Course, ABC):
    """A strategy that follows the script of its subclass.

    A script says what it has come to by `_conclude`; `_metrics` are measured of every trial beside the search's own.
    No request is asked twice: what a script asks for again it is told again.
    """

    def __init__(self, space: SearchSpace, request_for: RequestFactory, metrics: Iterable[str] = ()) -> None:
        super().__init__()
        self._space = space
        self._request_for = request_for
        self._metrics = tuple(metric for metric in metrics if metric not in ALWAYS)
        self._told: dict[str, Outcome] = {}
        self._waiting: set[str] = set()
        self._unasked: list[Ask] = []
        self._round: list[str] = []
        self._num_asked = 0
        self._prompts_asked = 0
        self._to_come, self._prompts_to_come = 0, 0
        self._script: Script | None = None
        self._training: TrainRequest | None = None
        self._trained = ""
        # Models of rounds with trainings between them, the last one's among them.
        self.milestones: list[Milestone] = []

    @abstractmethod
    def script(self) -> Script:
        """The search from beginning to end."""

    @property
    def done(self) -> bool:
        self._begin()
        return super().done

    @property
    def best(self) -> Plan | None:
        self._begin()
        return super().best

    def expected_evaluations(self) -> int:
        self._begin()
        return self._num_asked + self._to_come

    def expected_prompts(self) -> int:
        """As `expected_evaluations`, each counted as the prompts that it runs over, which are not always all."""
        self._begin()
        return self._prompts_asked + self._prompts_to_come

    def ask(self) -> list[Ask]:
        self._begin()
        asks, self._unasked = self._unasked, []
        return asks

    def tell(self, request_id: str, outcome: Outcome) -> None:
        self._told[request_id] = outcome
        self._waiting.discard(request_id)
        if not self._waiting and not self._unasked:
            self._go_on()

    def training(self) -> TrainRequest | None:
        """See `dtmsearch.search.protocols.Training`."""
        self._begin()
        return self._training

    def tell_trained(self, weights_id: str) -> None:
        """See `dtmsearch.search.protocols.Training`."""
        self._training, self._trained = None, weights_id
        self._go_on()

    def _train(self, request: TrainRequest) -> Part[str]:
        """Have a model trained; the weights that it comes to."""
        self._training = request
        yield ()
        return self._trained

    def _begin(self) -> None:
        if self._script is None:
            self._script = self.script()
            self._go_on()

    def _go_on(self) -> None:
        """Hand the round's answers to the script, and take its next round, until there is something to measure or to
        train."""
        assert self._script is not None
        try:
            while not self._waiting and self._training is None:
                answers = [self._told[request_id] for request_id in self._round]
                trials = self._script.send(answers) if self._round else next(self._script)
                self._take(trials)
        except StopIteration:
            self._done, self._round = True, []
            self._foresee()

    def _take(self, trials: Sequence[Trial]) -> None:
        assert trials or self._training is not None, "a round holds a trial at least"
        self._round = []
        for trial in trials:
            request = self._request(trial)
            self._round.append(request.id)
            if request.id not in self._told and request.id not in self._waiting:
                self._waiting.add(request.id)
                self._unasked.append(Ask(request, trial.perturbation))
                self._count(trial.prompts[1] - trial.prompts[0])

    def _count(self, prompts: int) -> None:
        self._num_asked += 1
        self._prompts_asked += prompts
        self._to_come = max(self._to_come - 1, 0)
        self._prompts_to_come = max(self._prompts_to_come - prompts, 0)

    def _foresee(self, *lots: tuple[int, int]) -> None:
        """What the script will still ask for, what it asks for next included: (trials, prompts of each)."""
        self._to_come = sum(trials for trials, _ in lots)
        self._prompts_to_come = sum(trials * min(prompts, self.num_prompts) for trials, prompts in lots)

    def _request(self, trial: Trial) -> EvalRequest:
        request = self._request_for(trial.plan, trial.parent)
        extra = trial.metrics
        if extra is None:
            extra = tuple(dict.fromkeys((*request.extra_metrics, *self._metrics)))
        return replace(request, prompts=trial.prompts, extra_metrics=extra, weights_id=trial.weights_id)

    @property
    def num_prompts(self) -> int:
        """How many prompts the search has."""
        return self._request_for(Plan(), Plan()).prompts[1]

    def _conclude(self, plan: Plan, answer: Outcome, metric: str, perturbation: Perturbation | None = None) -> None:
        """A decision: `plan` leads from here on, as `answer` has it."""
        if isinstance(answer, EvalFailure):
            raise SearchFailed(f"the plan that leads cannot be measured ({answer.kind}): {answer.message}")
        summary = summarize(answer)
        size, score = self._space.size(plan), summary.value(metric)
        self._decisions.append(Decision(self.step, plan, perturbation, score, size, summary, metric))
        self._best = plan


def losses(outcome: Outcome, metric: str) -> Floats:
    """A metric's value of every prompt, turned so that less is better: [num_prompts], infinite where it failed.

    FDT with its sign changed, SDT as it is, perplexities as nats per token, KL in nats; see `Metric.losses`.
    """
    if isinstance(outcome, EvalFailure):
        return np.array([np.inf])
    return _losses(outcome, metric)


def _losses(result: EvalResult, metric: str) -> Floats:
    return METRICS[metric].losses(result.metrics[metric])


def mean_loss(outcome: Outcome, metric: str) -> float:
    """The mean over prompts of `losses`: less is better, infinite for what failed."""
    return float(losses(outcome, metric).mean())
