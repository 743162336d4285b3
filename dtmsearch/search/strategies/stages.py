"""Plans that are measured on more and more prompts: on few at first, and those on more that the noise of the few does
not rule out (a race: Maron and Moore, 1993; here by the standard error of paired differences)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dtmsearch.core.evaluation import EvalResult, Outcome, combine
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.search.strategies.generator import Floats, Part, Trial, losses

# Of plans that are tried at a time, how many go on to a further stage at most.
MOST_HOPEFUL = 3


@dataclass(frozen=True, eq=False)
class Found:
    """A plan that was measured: its progress towards the budget, and its losses on the prompts of a stage, [prompts],
    infinite where it cannot be measured."""

    plan: Plan
    progress: float
    losses: Floats

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


class Stages:
    """What is known of plans at each stage, the first on `prompts[0]` prompts, the next on `prompts[1]`, ... `progress`
    says how far a plan comes, 1.0 being the budget; `weights_id` names trained weights that plans are over."""

    def __init__(
        self, prompts: Sequence[int], progress: Callable[[Plan], float], rank_by: str, weights_id: str
    ) -> None:
        self.prompts = tuple(prompts)
        self._progress, self._rank_by, self._weights_id = progress, rank_by, weights_id
        self._known: list[dict[Plan, Found]] = [{} for _ in self.prompts]
        self._answers: dict[Plan, Outcome] = {}

    @property
    def last(self) -> int:
        return len(self.prompts) - 1

    def __contains__(self, plan: Plan) -> bool:
        """Whether a plan was measured, be it on the fewest prompts."""
        return plan in self._known[0]

    def at(self, stage: int, plan: Plan) -> Found:
        return self._known[stage][plan]

    def known(self, stage: int) -> list[Found]:
        """All plans that were measured as far as a stage."""
        return list(self._known[stage].values())

    def answer(self, plan: Plan) -> Outcome:
        """What was measured of a plan, on all prompts that it was measured on."""
        return self._answers[plan]

    def take(self, found: Found, stage: int) -> None:
        """Take over what is known of a plan as far as a stage."""
        for at in range(stage + 1):
            self._known[at][found.plan] = Found(found.plan, found.progress, found.losses[: self.prompts[at]])

    def measure(self, parent: Plan, plans: Mapping[Plan, Perturbation | None], stage: int) -> Part[list[Found]]:
        """Plans that came as far as the stage before, measured on the prompts that this one has more; with the step
        from `parent` that leads to each, if it is one. What is known is not measured again."""
        prompts = (0, *self.prompts)[stage], self.prompts[stage]
        known = self._known[stage]
        unknown = [plan for plan in plans if plan not in known]
        if unknown:
            answers = yield [Trial(plan, prompts, parent, plans[plan], self._weights_id) for plan in unknown]
            for plan, answer in zip(unknown, answers, strict=True):
                self._answers[plan] = _joined(self._answers[plan], answer) if stage else answer
                own = losses(self._answers[plan], self._rank_by)
                own = own if len(own) == prompts[1] else np.full(prompts[1], np.inf)
                known[plan] = Found(plan, min(self._progress(plan), 1.0), own)
        return [known[plan] for plan in plans]

    def race(
        self, parent: Plan, tried: Sequence[Found], rivals: Sequence[Found], last: int
    ) -> Part[list[tuple[int, Found]]]:
        """Of plans of the first stage those that may be better than what each is held against, with their places,
        measured stage by stage up to the last; `rivals` were measured as far."""
        places = list(range(len(tried)))
        for stage in range(1, last + 1):
            known = self._known[stage - 1]
            differences = [known[tried[at].plan].losses - known[rivals[at].plan].losses for at in places]
            places = [places[at] for at in hopeful(differences)]
            yield from self.measure(parent, dict.fromkeys(tried[at].plan for at in places), stage)
        return [(at, self._known[last][tried[at].plan]) for at in places]

    def on_all(self, plans: Sequence[Plan], num_prompts: int) -> Part[list[Outcome]]:
        """What is measured of plans on all prompts of a search; `plans[0]` is close to the others."""
        measured = [
            max(p for p, known in zip(self.prompts, self._known, strict=True) if plan in known) for plan in plans
        ]
        rest = {at: prompts for at, prompts in enumerate(measured) if prompts < num_prompts}
        found = [self._answers[plan] for plan in plans]
        if rest:
            trials = [
                Trial(plans[at], (p, num_prompts), plans[0], weights_id=self._weights_id) for at, p in rest.items()
            ]
            for at, more in zip(rest, (yield trials), strict=True):
                found[at] = _joined(found[at], more)
        return found


def hopeful(differences: Sequence[Floats], most: int = MOST_HOPEFUL) -> list[int]:
    """The places of those, at most `most` and the least first, whose mean may be zero or less.

    `differences`: of each candidate, its loss less that of what it is held against, by prompt. It is ruled out where
    the mean is above zero by more than its standard error, or not finite.
    """
    means = {at: float(own.mean()) for at, own in enumerate(differences) if np.isfinite(own).all()}
    order = sorted(means, key=means.__getitem__)
    return [at for at in order if means[at] <= _standard_error(differences[at])][:most]


def contenders(values: Sequence[Floats], most: int = MOST_HOPEFUL) -> list[int]:
    """The places of those, at most `most` and the least first, that may be the least of all; values by prompt."""
    finite = [own for own in values if np.isfinite(own).all()]
    if not finite:
        return []
    least = min(finite, key=lambda own: float(own.mean()))
    return hopeful([own - least for own in values], most)


def _joined(first: Outcome, rest: Outcome) -> Outcome:
    """What was measured of one plan on some prompts and on those after them."""
    if isinstance(first, EvalResult) and isinstance(rest, EvalResult):
        return combine(rest.request_id, [first, rest])
    return rest if isinstance(first, EvalResult) else first


def _standard_error(values: Floats) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
