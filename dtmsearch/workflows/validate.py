"""A search's last act: its plan on held-out prompts beside the uniform ones, and which of them is the plan then.

Knows nothing of how the plan was found, and does not say in the store what the search came to: `run` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dtmsearch.config import SearchFile
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, IntArray, Outcome, Reference
from dtmsearch.core.gguf_presets import PRESET
from dtmsearch.core.plan import Plan
from dtmsearch.core.plan_widths import EVENED, LAST_LAYERS, ONE_WIDTH
from dtmsearch.core.records import ContinuationRecord
from dtmsearch.core.variant import Variant
from dtmsearch.errors import reason_of
from dtmsearch.search.baselines import (
    best_rival,
    better_uniform,
    evened,
    law_remarks,
    may_take_its_place,
    preset_rivals,
    rivals_of,
    shape_rivals,
    uniform_rivals,
)
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.generator import Milestone
from dtmsearch.workflows.build import held_out_metrics_of
from dtmsearch.workflows.calibrate import Calibrating
from dtmsearch.workflows.session import Session, whole_request

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
    """A search's plan against its held-out references, both in use by the replicas: what takes the place of the plan is
    chosen by `choice` (None where nothing is), as its rival is, and reported on `reference`, for the best of several by
    the same prompts looks better than it is. `milestones` are those of a search that prunes in rounds; the last of them
    is the plan itself, over the weights that it ended with. Such a plan gives way to none, nor does one that is shown
    to keep an FDT, which others are not."""

    session: Session
    space: SearchSpace
    choice: Reference | None
    reference: Reference
    milestones: Sequence[Milestone]

    def judge(self, plan: Plan, calibrating: Calibrating) -> Judged:
        """Measure the plan and what it is held against. Raises `SearchStopped` when that is wished."""
        plans = validation_plans(self.space, plan)
        if self.milestones:  # trained for its widths as they are
            plans.pop(EVENED, None)
        calibration_id = calibrating.for_plans(plans.values())
        better = None
        if self.choice is not None:
            better, rival = self._chosen(plans, self.choice, calibration_id)
            named = {f"uniform:{scheme}" for scheme in self.space.schemes}
            named |= {label for label in plans if label.startswith((PRESET, LAST_LAYERS, ONE_WIDTH))}
            named |= {EVENED} if better is None else set()
            plans = {k: other for k, other in plans.items() if k in {*named, "base", _PLAN, better, rival}}
        requests = self._requests(plans, calibration_id)
        outcomes = self.session.measure(requests, "validation")
        for remark in law_remarks(self.space, plans, outcomes, self.session.file.prompts.continuation_tokens):
            self.session.note(remark)
        if better is None:
            return Judged(plan, outcomes[_PLAN], None)
        said = (
            f"the plan found does not beat {better} in {self.session.file.search.rank_by} on held-out prompts, so that "
            "is the plan; its values are those on other prompts than the ones it was chosen by"
        )
        self.session.note(said)
        return Judged(plans[better], outcomes[better], said)

    def _chosen(
        self, plans: Mapping[str, Plan], choice: Reference, calibration_id: str
    ) -> tuple[str | None, str | None]:
        """The plan that takes the place of the plan, and its rival: the best known one of at most its size."""
        asked, stays = (
            validation_plans(self.space, plans[_PLAN], only_rivals=True),
            stays_the_plan(self.session.file, self.milestones),
        )
        requests = {
            label: whole_request(Variant(other, "", calibration_id), choice, self._metrics)
            for label, other in asked.items()
            if label != _PLAN or not stays
        }
        outcomes = self.session.measure(requests, "choice")
        metric = self.session.file.search.rank_by
        better = None
        if not stays:
            replacing = {
                label: other
                for label, other in asked.items()
                if label == _PLAN or may_take_its_place(self.space, plans[_PLAN], other)
            }
            better = better_uniform(self.space, replacing, outcomes, metric)
        # What takes the place of the plan has rivals of at most its own size.
        final = asked[better or _PLAN]
        others = {label: other for label, other in asked.items() if label not in (better, _PLAN)} | {_PLAN: final}
        return better, best_rival(self.space, others, outcomes, metric)

    @property
    def _metrics(self) -> tuple[str, ...]:
        return held_out_metrics_of(self.session.file)

    def _requests(self, plans: Mapping[str, Plan], calibration_id: str) -> dict[str, EvalRequest]:
        requests = {
            label: whole_request(Variant(plan, "", calibration_id), self.reference, self._metrics)
            for label, plan in plans.items()
        }
        for model in self.milestones:
            label = _PLAN if model is self.milestones[-1] else model.label
            requests[label] = replace(requests[_PLAN], plan=model.plan, weights_id=model.weights_id)
        return requests

    def record_continuations(self, judged: Judged) -> None:
        """Have the plan's own texts for a few held-out prompts, the least and the most robust, for people to read."""
        plan, outcome = judged.plan, judged.outcome
        recorded = self.session.writer.keys(ContinuationRecord)
        if isinstance(outcome, EvalFailure) or (self.reference.id, plan.id) in recorded:
            return
        variant = Variant(plan, self.milestones[-1].weights_id if self.milestones else "")
        try:
            written = self.session.pool.continuations(variant, self.reference.id, telling_prompts(outcome.fdt))
        except RuntimeError as error:  # they explain the plan; without them it is no worse
            first_line = reason_of(error)
            self.session.note(f"the plan's own texts could not be recorded: {first_line}")
        else:
            self.session.writer.add([ContinuationRecord(self.reference.id, plan.id, each) for each in written])


def stays_the_plan(file: SearchFile, milestones: Sequence[Milestone]) -> bool:
    """Whether nothing can take the place of a search's plan."""
    return bool(milestones) or file.search.stop.min_fdt is not None


def is_anything_chosen(file: SearchFile, space: SearchSpace, plan: Plan, milestones: Sequence[Milestone]) -> bool:
    """Whether a uniform plan can take the place of the plan, or one of several is held against it: these must be chosen
    then."""
    num_rivals = len(validation_plans(space, plan, only_rivals=True)) - 1
    return num_rivals > (1 if stays_the_plan(file, milestones) else 0)


def validation_plans(space: SearchSpace, plan: Plan, only_rivals: bool = False) -> dict[str, Plan]:
    """What a final plan is held against: label -> plan, itself among them.

    The base model (`base`, whose unmasked FDT and SDT are its noise), and uniform plans
    (`uniform:SCHEME`): of each scheme of the search, and those of its families that may be the best known of at most
    the plan's size (`uniform_rivals`); of llama.cpp's types its own mixture of the plan's size (`preset_rivals`); where
    nothing but shapes is searched, the last layers and one width for all (`shape_rivals`). A plan of several widths is
    measured beside the same rounded to one of each kind (`evened`), which is none of its rivals.
    `only_rivals`: no others than what `rivals_of` names and these.
    """
    rivals = uniform_rivals(space, plan)
    presets = preset_rivals(space, float(space.budget.counted(space.size(plan))))
    plans = {f"uniform:{scheme}": space.uniform(scheme) for scheme in dict.fromkeys((*space.schemes, *rivals))}
    presets |= shape_rivals(space, plan)
    plans = {label: other for label, other in (plans | presets).items() if other.id != plan.id}
    if only_rivals:
        named = {*rivals_of(space, plans | {_PLAN: plan}), *(f"uniform:{scheme}" for scheme in rivals), *presets}
        return {label: other for label, other in plans.items() if label in named} | {_PLAN: plan}
    rounded = evened(space, plan)
    if rounded is not None and rounded.id not in {other.id for other in plans.values()}:
        plans[EVENED] = rounded
    return plans | {"base": Plan(), _PLAN: plan}


def telling_prompts(fdt: IntArray) -> list[int]:
    """Prompts to read, from the least to the most robust: the ends of the order by `fdt` [num_prompts], and its
    middle."""
    order = np.argsort(fdt, kind="stable").tolist()
    middle = len(order) // 2
    chosen = [*order[:_READ_AT_ENDS], *order[middle - 1 : middle + 1], *order[-_READ_AT_ENDS:]]
    return list(dict.fromkeys(chosen))
