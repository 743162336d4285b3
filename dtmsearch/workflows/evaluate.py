"""One plan measured apart from any search: `evaluate` as it is, `recover` before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dtmsearch import config
from dtmsearch.analysis.summary import record_of
from dtmsearch.cluster.pool_settings import PoolSettings as Where
from dtmsearch.config import SearchFile, texts
from dtmsearch.core.evaluation import EvalFailure
from dtmsearch.core.metrics import Summary, summarize
from dtmsearch.core.plan import Plan, PlanSize
from dtmsearch.core.variant import Variant
from dtmsearch.errors import UserError
from dtmsearch.search.protocols import Observer, Silent, TrainRequest
from dtmsearch.workflows.build import held_out_metrics_of
from dtmsearch.workflows.calibrate import Calibrating
from dtmsearch.workflows.interrupts import interruptible
from dtmsearch.workflows.lookup import (
    StoreLike,
    check_plan_argument,
    drops_blocks,
    find_plan,
    find_weights_id,
    open_store,
    stored_file,
)
from dtmsearch.workflows.recover import Recovering
from dtmsearch.workflows.session import OpenEvaluator, check_holds_whole, opened, whole_request
from dtmsearch.workflows.text_windows import check_not_trained_on, cut_held_out, cut_search, training_text


@dataclass(frozen=True)
class PlanMeasurement:
    """One plan on the prompts of a search file: its size, and its values or the reason why there are none."""

    label: str
    plan: Plan
    size: PlanSize
    num_prompts: int
    summary: Summary | None
    failure: str | None


@dataclass(frozen=True)
class RecoveredModel:
    """A plan's model before and after it was repaired and trained, on held-out prompts; None where that failed."""

    run: str
    weights_id: str
    weights_file: str
    before: Summary | None
    after: Summary | None


def evaluate(
    file: SearchFile,
    plan: str,
    store: StoreLike,
    where: Where = Where(),
    observer: Observer | None = None,
    evaluator: OpenEvaluator | None = None,
) -> PlanMeasurement:
    """Measure one plan on the prompts of a search file, in all metrics.

    `plan` is a plan file, a run of the store that has a plan (while it is under way: the one that leads), or
    `uniform:SCHEME` over the file's components.
    """
    observer = observer or Silent()
    results = open_store(store, observer.on_note)
    check_plan_argument(plan, results)
    if drops_blocks(plan, results):
        check_holds_whole(where)
        file = _uncompiled(file)
    texts.text_files(file, file.prompts)  # missing ones are said before anything is started
    weights_id = find_weights_id(plan, results)
    with (
        interruptible(),
        results.evaluate_writer(file.run) as writer,
        opened(file, results, writer, where, observer, evaluator) as session,
    ):
        space = session.space
        chosen = find_plan(plan, space, session.manifest, results)
        writer.put_components(session.manifest, space.components)
        reference = session.reference(cut_search(file, session.pool.cut_prompts))
        session.pool.use(reference)
        calibration_id = Calibrating(session).for_plans([chosen])
        request = whole_request(Variant(chosen, weights_id, calibration_id), reference, held_out_metrics_of(file))
        outcome = session.measure({plan: request}, "evaluate")[plan]
    return PlanMeasurement(
        label=plan,
        plan=chosen,
        size=space.size(chosen),
        num_prompts=reference.num_prompts,
        summary=None if isinstance(outcome, EvalFailure) else summarize(outcome),
        failure=f"{outcome.kind}: {outcome.message}" if isinstance(outcome, EvalFailure) else None,
    )


def _uncompiled(file: SearchFile) -> SearchFile:
    """The file for a plan that drops blocks, which compiled layers do not, unless it asks for these itself."""
    if file.model.compile != "auto":
        return file
    return file.model_copy(update={"model": file.model.model_copy(update={"compile": "never"})})


def recover(
    run_name: str,
    store: StoreLike,
    settings: Sequence[str] = (),
    where: Where = Where(),
    observer: Observer | None = None,
    evaluator: OpenEvaluator | None = None,
) -> RecoveredModel:
    """Repair and train the model of a run's final plan under its masks, and measure it before and after.

    `settings` (`masked_steps=200`, `files=[train.txt]`) go over the run's own `search.recovery`. Raises `UserError`
    for a plan that does more than prune, `RecoveryDiverged`, and `SearchStopped`, after which the same goes on.
    """
    observer = observer or Silent()
    results = open_store(store, observer.on_note)
    check_plan_argument(run_name, results)
    file = stored_file(results, run_name)
    recovery = config.recovery_of(file, settings)
    texts.paths(file, recovery.files)  # missing ones are said before anything is started
    with (
        interruptible(),
        results.evaluate_writer(run_name) as writer,
        opened(file, results, writer, where, observer, evaluator) as session,
    ):
        pool = session.pool
        plan, weights_id = find_plan(run_name, session.space, session.manifest, results), results.weights_id(run_name)
        if mixtures := [name for name, s in plan.widths.items() if s.width is not None and s.width.takes_experts]:
            raise UserError(
                f"{mixtures[0]} has fewer experts in the plan: training holds at zero what a plan takes out, and a "
                "router would go on giving tokens to experts of zeros. Recover a plan without experts-... widths"
            )
        blocks = [name for name in plan.dropped if session.manifest.by_name[name].is_block] + sorted(plan.widths)
        if recovery.repair_tokens and not blocks:
            raise UserError(
                "repair_tokens fits what stands before dropped blocks, or in cut ones, and the plan has neither: give "
                "repair_tokens=0"
            )
        if blocks and recovery.unmasked_steps:
            raise UserError(
                f"unmasked_steps: {recovery.unmasked_steps} would let {min(blocks)} grow again, which the plan drops "
                "or cuts: give unmasked_steps=0"
            )
        writer.put_components(session.manifest, session.space.components)
        calibrating = Calibrating(session)
        calibration_id = calibrating.for_plans([plan])
        recovering = Recovering(session, recovery, calibration_id)
        record = record_of(results, run_name)
        prompts = session.recorded(record.reference_id) or cut_search(file, pool.cut_prompts)
        if file.validation is not None:
            others = [prompts[0].tokens, *calibrating.rows_of_its_own]
            held_out = session.recorded(record.validation_reference_id)
            trained_on = training_text(file, recovery, pool.tokenized)
            if held_out is not None:
                check_not_trained_on(run_name, held_out[0], trained_on)
            prompts = held_out or cut_held_out(file, pool.cut_prompts, others, trained_on)
        trained = recovering(TrainRequest(len(file.search.pruning_rounds), plan, weights_id))
        reference = session.reference(prompts)
        pool.use(reference)
        before = whole_request(Variant(plan, weights_id, calibration_id), reference, held_out_metrics_of(file))
        requests = {"before": before, "after": replace(before, weights_id=trained)}
        found = session.measure(requests, "evaluate")
    summaries = {label: None if isinstance(o, EvalFailure) else summarize(o) for label, o in found.items()}
    weights_file = f"{results.weights_folder}/{trained}.safetensors"
    return RecoveredModel(run_name, trained, weights_file, summaries["before"], summaries["after"])
