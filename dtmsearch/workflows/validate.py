"""A search's last act: its plan on held-out prompts beside the uniform ones, and which of them is the plan then.

Knows nothing of how the plan was found, and does not say in the store what the search came to: `run` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.config import SearchFile
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, IntArray, Outcome, Reference
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import siblings
from dtmsearch.search.baselines import better_uniform, law_remarks, rivals_of
from dtmsearch.search.loop import Observer, measure
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.sparsity import Milestone
from dtmsearch.store.store import RunWriter
from dtmsearch.workflows.calibrate import Calibrating
from dtmsearch.workflows.session import whole_request

# A uniform plan counts as one of the same size up to this relative difference in stored bits.
_SAME_SIZE = 0.05
# What the final plan is called among the plans that are validated.
_PLAN = "plan"
# Of the held-out prompts, so many at either end are recorded as text.
_READ_AT_ENDS = 3


@dataclass(frozen=True)
class Judged:
    """What a search ends with: its plan, or the uniform plan of its size that it does not beat, which `said` says."""

    plan: Plan
    outcome: Outcome
    said: str | None


@dataclass(frozen=True)
class Validation:
    """A search's plan against its held-out references, both in use by `pool`: what takes the place of the plan is
    chosen by `choice` (None where nothing can) and reported on `reference`, for the best of several by the same prompts
    looks better than it is. `milestones` are those of a search that prunes in rounds; the last of them is the plan
    itself, over the weights that it ended with."""

    file: SearchFile
    space: SearchSpace
    choice: Reference | None
    reference: Reference
    pool: ReplicaPool
    writer: RunWriter
    observer: Observer
    milestones: Sequence[Milestone]

    def judge(self, plan: Plan, calibrating: Calibrating, stop_requested: Callable[[], bool]) -> Judged:
        """Measure the plan and what it is held against. Raises `SearchStopped` when that is wished."""
        plans = validation_plans(self.space, plan)
        calibration_id = calibrating.for_plans(plans.values())
        better = self._better(plans, calibration_id, stop_requested)
        requests = self._requests(plans, calibration_id)
        outcomes = measure(requests, self.pool, self.writer, "validation", stop_requested)
        for remark in law_remarks(self.space, plans, outcomes, self.file.prompts.continuation_tokens):
            self.observer.on_note(remark)
        if better is None:
            return Judged(plan, outcomes[_PLAN], None)
        said = (
            f"the plan found does not beat {better} in {self.file.search.rank_by} on held-out prompts, so that is the "
            "plan; its values are those on other prompts than the ones it was chosen by"
        )
        self.observer.on_note(said)
        return Judged(plans[better], outcomes[better], said)

    def _better(self, plans: Mapping[str, Plan], calibration_id: str, stop_requested: Callable[[], bool]) -> str | None:
        """The uniform plan that takes the place of the plan."""
        if self.choice is None:
            return None
        rivals = {label: plans[label] for label in (_PLAN, *rivals_of(self.space, plans))}
        requests = {label: whole_request(other, self.choice, calibration_id) for label, other in rivals.items()}
        outcomes = measure(requests, self.pool, self.writer, "choice", stop_requested)
        return better_uniform(self.space, rivals, outcomes, self.file.search.rank_by)

    def _requests(self, plans: Mapping[str, Plan], calibration_id: str) -> dict[str, EvalRequest]:
        requests = {label: whole_request(plan, self.reference, calibration_id) for label, plan in plans.items()}
        for model in self.milestones:
            label = _PLAN if model is self.milestones[-1] else model.label
            requests[label] = replace(requests[_PLAN], plan=model.plan, weights_id=model.weights_id)
        return requests

    def record_continuations(self, judged: Judged) -> None:
        """Have the plan's own texts for a few held-out prompts, the least and the most robust, for people to read."""
        plan, outcome = judged.plan, judged.outcome
        if isinstance(outcome, EvalFailure) or self.writer.has_continuations(self.reference.id, plan.id):
            return
        weights_id = self.milestones[-1].weights_id if self.milestones else ""
        try:
            written = self.pool.continuations(plan, self.reference.id, telling_prompts(outcome.fdt), weights_id)
        except RuntimeError as error:  # they explain the plan; without them it is no worse
            first_line = str(error).splitlines()[0]
            self.observer.on_note(f"the plan's own texts could not be recorded: {first_line}")
        else:
            self.writer.put_continuations(self.reference.id, plan.id, written)


def can_give_way(space: SearchSpace, plan: Plan, milestones: Sequence[Milestone]) -> bool:
    """Whether a uniform plan can take the place of the plan, which must be chosen then."""
    return not milestones and bool(rivals_of(space, validation_plans(space, plan)))


def validation_plans(space: SearchSpace, plan: Plan) -> dict[str, Plan]:
    """What a final plan is held against: label -> plan, itself among them.

    The base model (`base`, whose FDT and SDT say nothing, but whose perplexities do), the uniform plan of each scheme
    of the search (`uniform:SCHEME`) and, where one comes within 5% of the plan's stored bits, the uniform plan nearest
    in real size (`uniform-nearest:SCHEME`), from the same granularities.
    """
    wanted = max(1, space.size(plan).stored_bits)  # nothing is left where all is dropped

    def gap(scheme: str) -> float:
        return abs(space.size(space.uniform(scheme)).stored_bits / wanted - 1.0)

    plans = {f"uniform:{scheme}": space.uniform(scheme) for scheme in space.schemes}
    candidates = dict.fromkeys(sibling for scheme in space.schemes for sibling in siblings(scheme))
    nearest = min(candidates, key=gap)
    if gap(nearest) <= _SAME_SIZE:
        plans.pop(f"uniform:{nearest}", None)
        plans[f"uniform-nearest:{nearest}"] = space.uniform(nearest)
    plans["base"] = Plan()
    return {label: other for label, other in plans.items() if other.id != plan.id} | {_PLAN: plan}


def telling_prompts(fdt: IntArray) -> list[int]:
    """Prompts to read, from the least to the most robust: the ends of the order by `fdt` [num_prompts], and its
    middle."""
    order = np.argsort(fdt, kind="stable").tolist()
    middle = len(order) // 2
    chosen = [*order[:_READ_AT_ENDS], *order[middle - 1 : middle + 1], *order[-_READ_AT_ENDS:]]
    return list(dict.fromkeys(chosen))
