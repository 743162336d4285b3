"""What a search leaves behind: evaluations as they were asked and answered, decisions, and the run itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dtmsearch.core.calibration import InputStatistics
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import Continuation, EvalRequest, Outcome
from dtmsearch.errors import UserError

Purpose = Literal["search", "validation", "evaluate", "race", "choice"]
RunStatus = Literal["running", "finished", "stopped", "failed"]

# What a run may be called: never a path, an option or the key of something else in the store.
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def is_run_name(name: str) -> bool:
    """Whether a run could be called so."""
    return re.fullmatch(RUN_NAME, name) is not None


def check_run_name(name: str) -> str:
    """The name itself. Raises `UserError` for what no run can be called."""
    if not is_run_name(name):
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise UserError(
            f"{shown!r} cannot be the name of a run: it takes up to 100 letters, digits, dots, dashes and underscores, "
            "a letter or digit first"
        )
    return name


@dataclass(frozen=True)
class EvaluationRecord:
    """An answered request. `step` is the round that asked for it (None outside a search); `perturbation` the edge from
    the request's parent, None where there is no single one; `reused_from` names the run that measured it, if another;
    `label` says what a validated plan is (`plan`, `uniform:int4-g128`). The purpose `race` is a search's evaluation on
    some of its prompts only, `choice` one by which the plan is chosen among those that are validated: on prompts of its
    own, so that nothing is reported on what it was chosen by.
    """

    request: EvalRequest
    outcome: Outcome
    purpose: Purpose
    step: int | None = None
    perturbation: str | None = None
    reused_from: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class StepRecord:
    """A decision: the plan that leads after round `step`, how it came from its parent, and what it amounts to.

    `score` is the value of the metric that ranks; `evaluations` and `wall_seconds` count from the start of the search.
    `active_bits_per_weight` is what a token reads of a mixture of experts, None of other models.
    """

    step: int
    plan_id: str
    perturbation: str | None
    score: float
    num_compressed: int
    share: float
    bits_per_weight: float
    sparsity: float
    evaluations: int
    wall_seconds: float
    active_bits_per_weight: float | None = None


@dataclass(frozen=True)
class TrainingRecord:
    """A training after round `round` (from 0): of `plan_id` over `from_weights_id` (empty: the base model's), to
    `weights_id`. `losses` are those of its steps; `training_id` names its folder in the store."""

    round: int
    training_id: str
    plan_id: str
    from_weights_id: str
    weights_id: str
    steps: int
    tokens: int
    wall_seconds: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class ComponentRecord:
    """A component of a model, or a part of one that is searched by itself."""

    manifest: ModelManifest
    component: Component


@dataclass(frozen=True)
class ContinuationRecord:
    """How the base model and a plan each continue a prompt of a reference."""

    reference_id: str
    plan_id: str
    continuation: Continuation


@dataclass(frozen=True)
class StatisticsRecord:
    """What was gathered over a calibration, of the model of a manifest."""

    manifest_id: str
    statistics: InputStatistics


# Tells a driver on a cluster the command that continues its search.
CONTINUE_VARIABLE = "DTMSEARCH_RESUME_COMMAND"


@dataclass(frozen=True)
class RunRecord:
    """A search as a whole. `config` is the search file's YAML, and `config_folder` where its latest driver had it;
    `continue_command` is what continues a search that was submitted, where it was submitted. `search_text` and
    `held_out_text` say where its prompts come from, as they were cut. `choice_reference_id` names held-out prompts by
    which the final plan was chosen, `validation_reference_id` those that it is reported on, `min_fdt_reference_id`
    those by which it was shown to keep `stop.min_fdt`. Times in seconds since the epoch. `num_evaluations`,
    `num_plan_rows` and `num_steps` are the rows that it had recorded when it finished; None before, and where an older
    version wrote it."""

    run: str
    status: RunStatus
    config: str
    config_folder: str
    manifest_id: str | None
    reference_id: str | None
    validation_reference_id: str | None
    final_plan_id: str | None
    created_at: float
    finished_at: float | None
    version: str
    message: str | None = None
    continue_command: str | None = None
    num_evaluations: int | None = None
    num_plan_rows: int | None = None
    num_steps: int | None = None
    search_text: str | None = None
    held_out_text: str | None = None
    choice_reference_id: str | None = None
    min_fdt_reference_id: str | None = None
