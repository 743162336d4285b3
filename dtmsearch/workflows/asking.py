"""Multiple-choice questions put to a model under plans, in this process: by the likelihood of each choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dtmsearch.config import SearchFile
from dtmsearch.config.texts import read
from dtmsearch.core.cloze import KINDS, SPAN, QuestionKind, Questions, answers_of, questions_of
from dtmsearch.core.decoding import GREEDY
from dtmsearch.core.evaluation import EvalRequest, EvalResult, Reference, ReplicaSettings
from dtmsearch.core.identity import identity
from dtmsearch.core.plan import Plan
from dtmsearch.errors import UserError
from dtmsearch.model.replica.replica import Replica

_CONTEXT = 48
Answers = Mapping[QuestionKind, NDArray[np.int64]]


def asked_of(file: SearchFile, plans: Sequence[Plan]) -> list[Answers]:
    """The choices of a search file's model under each plan, [questions] of each kind; 0 is right. There are as many as
    the file has held-out prompts, made of their text, or as many as prompts of theirs, but for those that ask nothing.
    Raises `UserError` for too little text, text that repeats itself, and a plan that cannot be measured."""
    section = file.validation_prompts or file.prompts
    replica = Replica(replace(file.model_spec, decoding=GREEDY), ReplicaSettings())
    windows, _ = replica.cut_prompts(read(file, section), section.count, _CONTEXT, 4 * SPAN, section.seed)
    made = [questions_of(kind, windows.tokens, _CONTEXT, section.seed) for kind in KINDS]
    empty = [each.kind for each in made if not each.num_questions]
    if empty:
        raise UserError(
            f"no question of the kind {empty[0]} can be made of {section.count} held-out windows: in each a wrong "
            "choice is the right one again. Give text that repeats itself less"
        )
    return [{each.kind: answers_of(nats_of(replica, each, plan)) for each in made} for plan in plans]


def nats_of(replica: Replica, questions: Questions, plan: Plan) -> NDArray[np.float64]:
    """The mean nats of each choice's tokens after its context [questions x choices] under a plan."""
    mode, rules = replica.conditions()
    rows, manifest_id = questions.rows, replica.manifest().id
    name = identity([manifest_id, questions.kind, questions.context, rows.tolist()])
    choices = rows[:, questions.context :]
    agrees = np.ones(choices.shape, np.bool_)
    replica.use(Reference(name, manifest_id, mode, rows, choices, agrees, rules.suppressed))
    (outcome,) = replica.evaluate([EvalRequest(plan, name, (0, len(rows)))])
    if not isinstance(outcome, EvalResult):
        raise UserError(f"questions cannot be put to the model under plan {plan.id}: {outcome.message}")
    found: NDArray[np.float64] = np.log(outcome.dppl.astype(np.float64))
    return found
