"""What every driver of replicas does, whatever it is after: open their pool, and make the reference or find it in
the store. Knows no strategy and no verb.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from dtmsearch.cluster.pool_settings import PoolSettings as Where
from dtmsearch.config import SearchFile, texts
from dtmsearch.core.evaluation import (
    EXTRA_METRICS,
    EvalRequest,
    GenerationRules,
    Reference,
    ReplicaSettings,
    check_agreement,
    reference_id,
)
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.errors import UserError
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.loop import Observer
from dtmsearch.store.store import ResultStore, RunWriter
from dtmsearch.workflows.text_windows import Cut

# What opens the side that has the model, for a search file and where it runs.
OpenEvaluator = Callable[[SearchFile, Where], ModelEvaluator]


def pool_for(
    file: SearchFile, where: Where, observer: Observer, evaluator: OpenEvaluator | None = None
) -> ModelEvaluator:
    """What has a search file's model, to be closed by `with`: replicas on a cluster or in this process, or what
    `evaluator` opens in the place of both. Raises `UserError` for a folder that holds no model."""
    if evaluator is not None:
        return evaluator(file, where)
    if file.model.trust_remote_code:
        observer.on_note(
            f"WARNING: TRUST_REMOTE_CODE IS ON. PYTHON CODE THAT COMES WITH {file.model.path} RUNS WITH ALL YOUR RIGHTS"
        )
    if where.address is None:
        texts.check_model(file)
        texts.check_vocabulary(file)
    if where.in_process:
        from dtmsearch.model.replica.local_replicas import LocalReplicas

        settings = ReplicaSettings(where.batch_tokens, weights_folder=where.weights_folder)
        return cast(ModelEvaluator, LocalReplicas(file.model_spec, settings))  # it answers as a pool does
    from dtmsearch.cluster.pool import ReplicaPool

    return ReplicaPool(file.model_spec, where, observer.on_note, run=file.run)


def reference_of(
    pool: ModelEvaluator, results: ResultStore, writer: RunWriter, cut: Cut, on_note: Callable[[str], None]
) -> Reference:
    """The reference of prompts, from the store if any run has made it before. `on_note` hears how the prompts differ
    from the text that they are cut from."""
    prompts, wanted_id = cut
    for note in prompts.notes:
        on_note(note)
    reference = results.reference(wanted_id) or writer.put_reference(pool.make_reference(prompts))
    check_agreement(reference)  # of one that an earlier version recorded
    return reference


def recorded(pool: ModelEvaluator, results: ResultStore, run: str, known_id: str | None) -> Cut | None:
    """The prompts that a run began with, which it keeps to whatever its texts hold now. Raises `UserError` where the
    model would continue them otherwise than it did then."""
    reference = None if known_id is None else results.reference(known_id)
    if reference is None:
        return None
    _check_conditions(run, reference, *pool.conditions())
    return reference.prompts, reference.id


def _check_conditions(run: str, stored: Reference, mode: NumericMode, rules: GenerationRules) -> None:
    if reference_id(stored.manifest_id, mode, stored.prompts, rules) == stored.id:
        return
    changed = stored.mode.differences(mode)
    changed += stored.rules.differences(rules) if stored.tokenizer else []
    what = "; ".join(changed) or "by an older dtmsearch, whose measurements are not comparable with this one's"
    raise UserError(
        f"run {run!r} was begun with other continuations of its prompts than the model gives now: {what}. Undo the "
        f"change, or search anew under a name of its own (--set run={run}-2)"
    )


def whole_request(
    plan: Plan,
    reference: Reference,
    calibration_id: str,
    weights_id: str = "",
    metrics: tuple[str, ...] = EXTRA_METRICS,
) -> EvalRequest:
    """A plan on every prompt of a reference, in all of this package's metrics, or those `metrics`."""
    prompts = 0, reference.num_prompts
    return EvalRequest(plan, reference.id, prompts, metrics, calibration_id=calibration_id, weights_id=weights_id)
