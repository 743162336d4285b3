"""Composition: the one place where the packages meet. A search from its file to its validated plan.

`run` and `resume` are one function: what the store holds is replayed, the rest is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import dtmsearch
from dtmsearch import config
from dtmsearch.analysis.summary import RunSummary, record_of, summarize_run
from dtmsearch.cluster.pool_settings import PoolSettings as Where
from dtmsearch.config import SearchFile, texts
from dtmsearch.core.calibration import ExpertTokens
from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import Reference, evaluation_cost
from dtmsearch.core.holders import source_note
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import CONTINUE_VARIABLE, RunRecord
from dtmsearch.errors import ClusterLost, RecoveryDiverged, SearchStopped, StoreError, StoreFull, UserError
from dtmsearch.logs import naming
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.loop import search
from dtmsearch.search.min_fdt import ladder_of
from dtmsearch.search.protocols import Decision, Observer, Silent, Strategy, remarks_of
from dtmsearch.search.strategies.generator import Milestone, Procedure
from dtmsearch.search.strategies.strategy_registry import STRATEGIES
from dtmsearch.store.store import ResultStore, RunWriter
from dtmsearch.workflows.build import sparsity_search_of, strategy_of
from dtmsearch.workflows.calibrate import Calibrating
from dtmsearch.workflows.evaluate import PlanMeasurement, evaluate, recover
from dtmsearch.workflows.interrupts import interruptible
from dtmsearch.workflows.keep_fdt import KeptPlan, keep_fdt
from dtmsearch.workflows.lookup import StoreLike, begun, check_continuable, open_store, stored_file
from dtmsearch.workflows.recover import Recovering
from dtmsearch.workflows.session import OpenEvaluator, Session, opened
from dtmsearch.workflows.take_prices import TakingPrices, missing_prices
from dtmsearch.workflows.text_windows import (
    Cut,
    cut_held_out,
    cut_min_fdt,
    cut_search,
    described,
    halves,
    training_text,
)
from dtmsearch.workflows.validate import Validation, is_anything_chosen

__all__ = [
    "PlanMeasurement",
    "Where",
    "demo",
    "evaluate",
    "open_store",
    "recover",
    "resume",
    "run",
    "stop",
]

# How the reason begins for which a sweep stops a run.
DOMINATED = "dominated by "
# An expert is rarely routed to when it gets less than this part of an expert's mean share of tokens; so many are named.
_RARELY, _RARE_NAMED = 0.1, 5


class _Counting:
    """An observer behind which those who watch the machines hear of decisions too."""

    def __init__(self, observer: Observer, pool: ModelEvaluator) -> None:
        self._pool = pool
        self.on_progress, self.on_note = observer.on_progress, observer.on_note
        self._on_decision = observer.on_decision

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        self._pool.decided(decision.summary.fdt_mean, decision.size.bits_per_weight)
        self._on_decision(decision, replayed)


def run(
    file: SearchFile,
    store: StoreLike,
    where: Where = Where(),
    observer: Observer | None = None,
    evaluator: OpenEvaluator | None = None,
) -> RunSummary:
    """Start a search, or continue it where it was; a finished one returns at once. `evaluator` opens what has the
    model, in the place of replicas as `where` says.

    Raises `UserError` for a user's mistake, `SearchStopped` when it was stopped or interrupted (it can be resumed),
    `StoreError` when the store cannot be used, `ClusterUnreachable`, `SearchFailed`.
    """
    observer = observer or Silent()
    results = open_store(store, observer.on_note)
    previous = begun(results, file)
    if previous is not None and previous.status == "finished" and not where.retry_out_of_memory:
        missing = results.missing(previous, thorough=True)
        if not missing:
            return replace(summarize_run(results, file.run), already_complete=True)
        observer.on_note(f"rows of {' and '.join(missing)} of run {file.run} are lost, and are measured again")
    if previous is None:  # a mistake leaves nothing in the store
        texts.check_readable(file)
    with interruptible(), naming(file.run), results.writer(file.run, where.retry_out_of_memory) as writer:
        _Run(file, results, writer, observer, begun(results, file)).run(where, evaluator)
    return summarize_run(results, file.run)


def resume(
    run_name: str,
    store: StoreLike,
    where: Where = Where(),
    observer: Observer | None = None,
    evaluator: OpenEvaluator | None = None,
) -> RunSummary:
    """Continue a search by its name, from the search file that the store remembers.

    Raises also `UserError` where the search cannot be continued from here, because its texts are elsewhere.
    """
    results = open_store(store)
    file = stored_file(results, run_name)
    check_continuable(results, file)
    return run(file, store, where, observer, evaluator)


def demo(store: StoreLike, where: Where = Where(), observer: Observer | None = None) -> RunSummary:
    """A whole search of the model inside the package, over texts that lie beside it."""
    package = Path(dtmsearch.__file__).parent
    text = (package / "demo" / "demo.yaml").read_text(encoding="utf-8")
    return run(config.parse(text, "demo.yaml", package), store, where, observer)


def stop(run_name: str, store: StoreLike, reason: str = "") -> str | None:
    """Ask a running search to stop; it ends within a second or so of its replicas' present calls.

    A reason is kept as the run's message. For a search that was submitted, the command that continues it.
    """
    results = open_store(store)
    record = record_of(results, run_name)
    if not results.is_running(run_name):
        raise UserError(f"run {run_name!r} is not running")
    results.request_stop(run_name, reason)
    return record.continue_command


def is_left_out(results: ResultStore, run_name: str) -> bool:
    """Whether a sweep has nothing more to do for a run: it is finished, or was stopped because another dominates it."""
    record = results.run(run_name)
    if record is None:
        return False
    if record.status == "finished":
        return not results.missing(record, thorough=True)
    return record.status == "stopped" and (record.message or "").startswith(DOMINATED)


class _Run:
    """A search from beginning to end: prepare, search, validate, and say in the store how it ended."""

    def __init__(
        self, file: SearchFile, results: ResultStore, writer: RunWriter, observer: Observer, previous: RunRecord | None
    ) -> None:
        self._file, self._results, self._writer, self._observer = file, results, writer, observer
        self._milestones: Sequence[Milestone] = ()
        folder, command = str(file.folder.absolute()), os.environ.get(CONTINUE_VARIABLE)
        if previous is not None:
            previous = replace(previous, config_folder=folder, continue_command=command)
        self._record = previous or RunRecord(
            run=file.run,
            status="running",
            config=file.to_yaml(),
            config_folder=folder,
            continue_command=command,
            manifest_id=None,
            reference_id=None,
            validation_reference_id=None,
            final_plan_id=None,
            created_at=time.time(),
            finished_at=None,
            version=dtmsearch.__version__,
        )

    def run(self, where: Where, evaluator: OpenEvaluator | None) -> None:
        file, results = self._file, self._results
        try:
            self._save(status="running", finished_at=None, message=None)
            texts.check_readable(file)
            stop_requested = partial(results.stop_requested, file.run)
            with opened(file, results, self._writer, where, self._observer, evaluator, stop_requested) as session:
                self._run(session)
        except (KeyboardInterrupt, SearchStopped):
            reason = results.stop_reason(file.run)
            self._save(status="stopped", finished_at=time.time(), message=reason or None)
            raise SearchStopped from None
        except BaseException as error:
            status = "stopped" if isinstance(error, StoreFull | ClusterLost | RecoveryDiverged) else "failed"
            with suppress(StoreError):  # the first error is the one to report, also when the store cannot take it
                self._save(status=status, finished_at=time.time(), message=str(error))
            raise

    def _save(self, **changes: object) -> None:
        self._record = replace(self._record, **changes)  # type: ignore[arg-type]
        self._writer.put_run(self._record)

    def _run(self, session: Session) -> None:
        manifest, space, pool = session.manifest, session.space, session.pool
        if self._record.manifest_id not in (None, manifest.id):
            raise UserError(
                f"run {session.file.run!r} began with another model: manifest {self._record.manifest_id}, now "
                f"{manifest.id} at {manifest.model}. Give the search another run name"
            )
        if note := source_note(manifest.source, space.parsed):
            session.note(note)
        session.writer.put_components(manifest, space.components)
        self._save(manifest_id=manifest.id)
        calibrating = Calibrating(session)
        search, held_out, own = self._cut(session, calibrating)
        reference = session.reference(search)
        self._save(reference_id=reference.id)
        pool.use(reference)
        of_mixture = any(component.stacked and component.mixture for component in space.components)
        if of_mixture and not _has_rows(session, "expert_tokens"):
            routed = pool.routed_tokens(reference.id)
            session.writer.add(tokens_of_experts(space.components, routed, reference.id))
            session.note(rare_experts(routed))
        plan, remarks, ladder = self._search(session, reference, calibrating)
        if own is not None and ladder:
            kept = self._keep_fdt(session, ladder, own, calibrating)
            plan, remarks = kept.plan, [*remarks, kept.said]
        if plan is not None:
            session.writer.put_plan(plan)
        self._save(final_plan_id=None if plan is None else plan.id, message="; ".join(remarks) or None)
        if plan is not None and held_out is not None:
            self._validate(session, plan, held_out, calibrating)
        self._save(status="finished", finished_at=time.time())

    def _cut(self, session: Session, calibrating: Calibrating) -> tuple[Cut, Cut | None, Cut | None]:
        """The search's prompts, the held-out ones, if the file has any, and those by which `min_fdt` is kept, if it is;
        as the run began with, where it has. All are cut before anything is measured: where a text does not hold
        enough, that is said now."""
        file, record, cut_prompts = session.file, self._record, session.pool.cut_prompts
        began_with = session.recorded(record.reference_id)
        search = began_with or cut_search(file, cut_prompts)
        note = file.model_spec.decoding.note
        said = {"search_text": record.search_text if began_with else described(file.prompts, search[0]) + note}
        held_out = session.recorded(record.validation_reference_id)
        own = session.recorded(record.min_fdt_reference_id)
        others = [search[0].tokens, *calibrating.rows_of_its_own]
        if file.validation_prompts is not None and held_out is None:
            read = others if own is None else [*others, own[0].tokens]
            trained_on = training_text(file, file.search.recovery, session.pool.tokenized)
            held_out = cut_held_out(file, cut_prompts, read, trained_on)
            said["held_out_text"] = described(file.validation_prompts, held_out[0], bool(trained_on)) + note
        if file.min_fdt_prompts is not None and own is None:
            own = cut_min_fdt(file, cut_prompts, others if held_out is None else [*others, held_out[0].tokens])
        self._save(**said)
        for whose, text in (("the search's", self._record.search_text), ("held-out", self._record.held_out_text)):
            if text is not None:
                session.note(f"{whose} prompts: {text}")
        return search, held_out, own

    def _keep_fdt(self, session: Session, ladder: Sequence[Plan], own: Cut, calibrating: Calibrating) -> KeptPlan:
        """The smallest plan of the search that is shown to keep `min_fdt`."""
        reference = session.reference(own)
        self._save(min_fdt_reference_id=reference.id)
        session.pool.use(reference)
        kept = keep_fdt(session, calibrating, ladder, reference)
        session.note(kept.said)
        return kept

    def _search(
        self, session: Session, reference: Reference, calibrating: Calibrating
    ) -> tuple[Plan | None, Sequence[str], Sequence[Plan]]:
        """The plan that the search comes to, what its strategy has to say of it, and the less compressed plans on the
        way there."""
        calibration_id = calibrating.for_space(session.space)
        recovery = session.file.search.recovery
        trainer = None if recovery is None else Recovering(session, recovery, calibration_id)
        strategy = searching(session, reference, calibrating, calibration_id)
        plan = search(
            strategy,
            session.pool,
            session.writer,
            _Counting(session.observer, session.pool),
            session.stop_requested,
            session.file.search.stop.seconds,
            cost_of=partial(evaluation_cost, manifest=session.manifest),
            trainer=trainer,
        )
        if isinstance(strategy, Procedure):
            self._milestones = strategy.milestones
        return plan, remarks_of(strategy), ladder_of(strategy)

    def _validate(self, session: Session, plan: Plan, held_out: Cut, calibrating: Calibrating) -> None:
        is_chosen = is_anything_chosen(session.file, session.space, plan, self._milestones)
        choice, reference = self._held_out_references(session, held_out, is_chosen)
        validation = Validation(session, session.space, choice, reference, self._milestones)
        judged = validation.judge(plan, calibrating)
        if judged.said is not None:
            message = "; ".join(part for part in (self._record.message, judged.said) if part)
            self._save(final_plan_id=judged.plan.id, message=message)
        validation.record_continuations(judged)

    def _held_out_references(
        self, session: Session, held_out: Cut, is_chosen: bool
    ) -> tuple[Reference | None, Reference]:
        """What the plan and its rival are chosen by, if anything `is_chosen`, and what they are reported on: parts of
        the held-out prompts, in use by the replicas; those that the run began with, where it has."""
        record, choice, report = self._record, None, held_out
        if record.validation_reference_id is not None:
            choice = session.recorded(record.choice_reference_id)
        elif is_chosen and (parts := halves(held_out[0])) is not None:
            choice, report = ((part, session.pool.reference_id(part)) for part in parts)
        by, on = (None if cut is None else session.reference(cut) for cut in (choice, report))
        assert on is not None
        self._save(validation_reference_id=on.id, choice_reference_id=None if by is None else by.id)
        for reference in (by, on):
            if reference is not None:
                session.pool.use(reference)
        return by, on


def searching(session: Session, reference: Reference, calibrating: Calibrating, calibration_id: str) -> Strategy:
    """The strategy of a session's search, with what it knows of weights and takes as prices. Raises `UserError`."""
    search, space = session.file.search, session.space
    if search.strategy == "sparsity":
        errors, outliers = calibrating.pruning_errors(space.components), calibrating.outliers()
        return sparsity_search_of(session.file, space, reference.id, errors, outliers, calibration_id)
    kind = STRATEGIES[search.strategy]
    take = _taking_prices(session, reference, calibration_id) if kind.takes_prices else None
    known_errors = calibrating.errors(space.components, space.schemes) if kind.needs_errors and take is None else None
    uses = calibrating.expert_uses(space.components, space.schemes) if kind.needs_uses else ()
    return strategy_of(session.file, space, reference.id, known_errors, calibration_id, take, uses)


def _taking_prices(session: Session, reference: Reference, calibration_id: str) -> TakingPrices | None:
    """What takes prices; None where they cannot be had and the strategy does without, as it began. Raises `UserError`
    for a run that began with prices and cannot go on with them: by probes it would decide otherwise."""
    name, run = session.file.search.strategy, session.file.run
    problem = missing_prices(name, session.space, session.pool)
    priced = _has_rows(session, "prices")
    if problem and priced:
        raise UserError(
            f"run {run!r} was begun with prices, which cannot be had now: {problem}. Continue it with each replica in "
            f"one process (without --nodes-per-replica), or search anew under another name (--set run={run}-2)"
        )
    if problem:
        session.note(f"{name} probes components one by one, for prices cannot be had: {problem}")
        return None
    # Weights' errors are what it knows without prices: a run that has lost its prices takes them again.
    if not priced and _has_rows(session, "weight_errors") and _has_rows(session, "evaluations"):
        session.note(f"{name} goes on by probes, as run {run!r} was begun, though prices can be had now")
        return None
    return TakingPrices(session, session.space, reference, calibration_id)


def _has_rows(session: Session, table: str) -> bool:
    """Whether the run has rows in a table."""
    return bool(session.store.table(table, ["run"], session.file.run).num_rows)


def tokens_of_experts(
    components: Sequence[Component], routed: Mapping[str, int], reference_id: str
) -> list[ExpertTokens]:
    """How many of the reference's tokens reach each expert, as the store keeps it."""
    experts = {(c.mixture, c.expert): routed[c.name] for c in components if c.mixture and c.name in routed}
    return [ExpertTokens(reference_id, *expert, tokens) for expert, tokens in experts.items()]


def rare_experts(routed: Mapping[str, int]) -> str:
    """Which experts' matrices few of the reference's tokens reach (component -> tokens), for a person."""
    if not routed:
        return "how many tokens reach each expert is not known: the model's code does not say where it routes"
    usual = sum(routed.values()) / len(routed)
    rare = sorted((count, name) for name, count in routed.items() if count < _RARELY * usual)
    if not rare:
        return f"every expert is reached by at least a tenth of the usual {usual:.0f} reference tokens"
    named = ", ".join(f"{name} ({count})" for count, name in rare[:_RARE_NAMED])
    more = f" and {len(rare) - _RARE_NAMED} more" if len(rare) > _RARE_NAMED else ""
    return (
        f"{len(rare)} of {len(routed)} experts' matrices are reached by less than a tenth of the usual {usual:.0f} "
        f"reference tokens, so that little is known of what compressing them does: {named}{more}"
    )
