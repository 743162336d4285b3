"""Composition: the one place where the rooms meet. A search from its file to its validated plan.

`run` and `resume` are one function: what the store holds is replayed, the rest is measured.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np

import dtmsearch
from dtmsearch import config, texts
from dtmsearch.calibrating import Calibrating
from dtmsearch.cluster.joining import ClusterLost
from dtmsearch.cluster.metrics import Metrics
from dtmsearch.cluster.pool import PoolSettings as Where
from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.compose import space_of, sparsity_search_of, strategy_of
from dtmsearch.config import PromptsSection, SearchFile
from dtmsearch.logs import naming
from dtmsearch.plans.components import ModelManifest
from dtmsearch.plans.evaluation import (
    EXTRA_METRICS,
    EvalFailure,
    EvalRequest,
    IntArray,
    Outcome,
    Reference,
    evaluation_cost,
)
from dtmsearch.plans.metrics import Summary, summarize
from dtmsearch.plans.plan import Plan, PlanSize, plan_from_json
from dtmsearch.plans.records import RunRecord
from dtmsearch.plans.schemes import parse_scheme, siblings
from dtmsearch.recovering import Recovering, RecoveryDiverged, weights_folder
from dtmsearch.results.store import ResultStore, RunWriter, StoreError, StoreFull
from dtmsearch.results.summary import RunSummary, summarize_run
from dtmsearch.search.scheduler import (
    Decision,
    Observer,
    Progress,
    SearchStopped,
    Strategy,
    measure,
    remarks_of,
    search,
)
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.sparsity import Milestone, Sparsity
from dtmsearch.search.strategies import NEED_ERRORS
from dtmsearch.search.uniform import better_uniform, law_remarks

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

# A uniform plan counts as one of the same size up to this relative difference in stored bits.
_SAME_SIZE = 0.05
# What the final plan is called among the plans that are validated.
_PLAN = "plan"
# Of the held-out prompts, so many at either end are recorded as text.
_READ_AT_ENDS = 3
# How the reason begins for which a sweep stops a run.
DOMINATED = "dominated by "
# How `evaluate` is asked for the uniform plan of a scheme.
_UNIFORM = "uniform:"
# An expert is rarely routed to when it gets less than this part of an expert's mean share of tokens; so many are named.
_RARELY, _RARE_NAMED = 0.1, 5


class _Silent:
    """An observer that looks away."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_decision(self, decision: Decision, replayed: bool) -> None: ...

    def on_note(self, text: str) -> None: ...


class _Counting:
    """An observer behind which Ray's metrics hear of decisions too."""

    def __init__(self, observer: Observer, metrics: Metrics) -> None:
        self._metrics = metrics
        self.on_progress, self.on_note = observer.on_progress, observer.on_note
        self._on_decision = observer.on_decision

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        self._metrics.decided(decision.summary.fdt_mean, decision.size.bits_per_weight)
        self._on_decision(decision, replayed)


@dataclass(frozen=True)
class PlanMeasurement:
    """One plan on the prompts of a search file: its size, and its values or the reason why there are none."""

    label: str
    plan: Plan
    size: PlanSize
    num_prompts: int
    summary: Summary | None
    failure: str | None


def open_store(url: str) -> ResultStore:
    """The store at a local path or a bucket's URL; created on first writing."""
    return ResultStore(url)


def run(file: SearchFile, store: str, where: Where = Where(), observer: Observer | None = None) -> RunSummary:
    """Start a search, or continue it where it was; a finished one returns at once.

    Raises `ValueError` for a user's mistake, `SearchStopped` when it was stopped or interrupted (it can be resumed),
    `StoreError` when the store cannot be used, `ClusterUnreachable`, `SearchFailed`.
    """
    observer = observer or _Silent()
    results = ResultStore(store, on_note=observer.on_note)
    previous = _begun(results, file)
    if previous is not None and previous.status == "finished":
        return replace(summarize_run(results, file.run), already_complete=True)
    with naming(file.run), results.writer(file.run) as writer:
        _Session(file, results, writer, where, observer, _begun(results, file)).run()
    return summarize_run(results, file.run)


def resume(run_name: str, store: str, where: Where = Where(), observer: Observer | None = None) -> RunSummary:
    """Continue a search by its name, from the search file that the store remembers."""
    return run(_stored_file(open_store(store), run_name), store, where, observer)


def demo(store: str, where: Where = Where(), observer: Observer | None = None) -> RunSummary:
    """A whole search of the model inside the package, over the package's own source text."""
    package = Path(dtmsearch.__file__).parent
    text = (package / "demo" / "demo.yaml").read_text(encoding="utf-8")
    return run(config.parse(text, "demo.yaml", package), store, where, observer)


def stop(run_name: str, store: str, reason: str = "") -> None:
    """Ask a running search to stop; it ends within a second or so of its replicas' present calls.

    A reason is kept as the run's message.
    """
    results = open_store(store)
    _record_of(results, run_name)
    if not results.is_running(run_name):
        raise ValueError(f"run {run_name!r} is not running")
    results.request_stop(run_name, reason)


def is_left_out(results: ResultStore, run_name: str) -> bool:
    """Whether a sweep has nothing more to do for a run: it is finished, or was stopped because another dominates it."""
    record = results.run(run_name)
    if record is None:
        return False
    return record.status == "finished" or (record.status == "stopped" and (record.message or "").startswith(DOMINATED))


def evaluate(
    file: SearchFile, plan: str, store: str, where: Where = Where(), observer: Observer | None = None
) -> PlanMeasurement:
    """Measure one plan on the prompts of a search file, in all metrics.

    `plan` is a plan file, a run of the store that has a plan (while it is under way: the one that leads), or
    `uniform:SCHEME` over the file's components.
    """
    observer = observer or _Silent()
    results = ResultStore(store, on_note=observer.on_note)
    _check_plan_argument(plan, results)
    texts.text_files(file, file.prompts)  # missing ones are said before anything is started
    named = not plan.startswith(_UNIFORM) and not Path(plan).is_file()
    weights_id = results.weights_id(plan) if named else ""
    where = replace(where, weights_folder=weights_folder(results))
    with results.evaluate_writer(file.run) as writer, _pool(file, where, observer) as pool, _interruptible():
        manifest = pool.manifest()
        space = space_of(file, manifest)
        chosen = _find_plan(plan, space, manifest, results)
        writer.put_components(manifest, space.components)
        reference = _reference(pool, results, writer, file, file.prompts, None)
        pool.use(reference)
        calibration_id = Calibrating(file, pool, results, writer, manifest).for_plans([chosen])
        request = EvalRequest(
            chosen,
            reference.id,
            (0, reference.num_prompts),
            EXTRA_METRICS,
            calibration_id=calibration_id,
            weights_id=weights_id,
        )
        outcome = measure({plan: request}, pool, writer, "evaluate")[plan]
    failed = isinstance(outcome, EvalFailure)
    return PlanMeasurement(
        label=plan,
        plan=chosen,
        size=space.size(chosen),
        num_prompts=reference.num_prompts,
        summary=None if isinstance(outcome, EvalFailure) else summarize(outcome),
        failure=f"{outcome.kind}: {outcome.message}" if failed and isinstance(outcome, EvalFailure) else None,
    )


@dataclass(frozen=True)
class RecoveredModel:
    """A plan's model before and after training, on held-out prompts; None where it could not be measured."""

    run: str
    weights_id: str
    weights_file: str
    before: Summary | None
    after: Summary | None


def recover(
    run_name: str,
    store: str,
    settings: Sequence[str] = (),
    where: Where = Where(),
    observer: Observer | None = None,
) -> RecoveredModel:
    """Train the model of a run's final plan under its masks, and measure it before and after.

    `settings` (`masked_steps=200`, `files=[train.txt]`) go over the run's own `search.recovery`. Raises `ValueError`
    for a plan that does more than prune, `RecoveryDiverged`, and `SearchStopped`, after which the same goes on.
    """
    observer = observer or _Silent()
    results = ResultStore(store, on_note=observer.on_note)
    _check_plan_argument(run_name, results)
    file = _stored_file(results, run_name)
    recovery = config.recovery_of(file, settings)
    prompts = file.validation_prompts or file.prompts
    texts.paths(file, recovery.files)  # missing ones are said before anything is started
    where = replace(where, weights_folder=weights_folder(results))
    with results.evaluate_writer(run_name) as writer, _pool(file, where, observer) as pool, _interruptible():
        manifest = pool.manifest()
        space = space_of(file, manifest)
        plan, weights_id = _find_plan(run_name, space, manifest, results), results.weights_id(run_name)
        writer.put_components(manifest, space.components)
        calibration_id = Calibrating(file, pool, results, writer, manifest).for_plans([plan])
        recovering = Recovering(
            file,
            recovery,
            results,
            writer,
            pool,
            manifest,
            observer,
            lambda: False,
            calibration_id,
            on_cluster=where.address is not None,
        )
        trained = recovering(len(file.search.pruning_rounds), plan, weights_id)
        reference = _reference(pool, results, writer, file, prompts, None)
        pool.use(reference)
        before = EvalRequest(
            plan,
            reference.id,
            (0, reference.num_prompts),
            EXTRA_METRICS,
            calibration_id=calibration_id,
            weights_id=weights_id,
        )
        requests = {"before": before, "after": replace(before, weights_id=trained)}
        found = measure(requests, pool, writer, "evaluate")
    summaries = {label: None if isinstance(o, EvalFailure) else summarize(o) for label, o in found.items()}
    weights_file = f"{weights_folder(results)}/{trained}.safetensors"
    return RecoveredModel(run_name, trained, weights_file, summaries["before"], summaries["after"])


class _Session:
    """One driver's time with a search: prepare, search, validate, and say in the store how it ended."""

    def __init__(
        self,
        file: SearchFile,
        results: ResultStore,
        writer: RunWriter,
        where: Where,
        observer: Observer,
        previous: RunRecord | None,
    ) -> None:
        self._file, self._results, self._writer = file, results, writer
        self._where, self._observer, self._previous = where, observer, previous
        self._milestones: Sequence[Milestone] = ()
        self._record = previous or RunRecord(
            run=file.run,
            status="running",
            config=file.to_yaml(),
            config_folder=str(file.folder.absolute()),
            manifest_id=None,
            reference_id=None,
            validation_reference_id=None,
            final_plan_id=None,
            created_at=time.time(),
            finished_at=None,
            version=dtmsearch.__version__,
        )

    def run(self) -> None:
        try:
            self._save(status="running", finished_at=None, message=None)
            texts.check_readable(self._file)
            where = replace(self._where, weights_folder=weights_folder(self._results))
            with _interruptible(), _pool(self._file, where, self._observer) as pool:
                self._run(pool)
        except (KeyboardInterrupt, SearchStopped):
            reason = self._results.stop_reason(self._file.run)
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

    def _run(self, pool: ReplicaPool) -> None:
        manifest = pool.manifest()
        space = space_of(self._file, manifest)
        if self._record.manifest_id not in (None, manifest.id):
            raise ValueError(
                f"run {self._file.run!r} began with another model: manifest {self._record.manifest_id}, now "
                f"{manifest.id} at {manifest.model}. Give the search another run name"
            )
        self._writer.put_components(manifest, space.components)
        self._save(manifest_id=manifest.id)
        reference = _reference(
            pool, self._results, self._writer, self._file, self._file.prompts, self._record.reference_id
        )
        self._save(reference_id=reference.id)
        pool.use(reference)
        if any(".experts." in component.name for component in space.components):
            self._observer.on_note(rare_experts(pool.routed_tokens(reference.id)))
        calibrating = Calibrating(self._file, pool, self._results, self._writer, manifest)
        plan, remarks = self._search(pool, space, reference, calibrating)
        if plan is not None:
            self._writer.put_plan(plan)
        self._save(final_plan_id=None if plan is None else plan.id, message="; ".join(remarks) or None)
        held_out = self._file.validation_prompts
        if plan is not None and held_out is not None:
            self._validate(pool, space, plan, held_out, calibrating)
        self._save(status="finished", finished_at=time.time())

    def _search(
        self, pool: ReplicaPool, space: SearchSpace, reference: Reference, calibrating: Calibrating
    ) -> tuple[Plan | None, Sequence[str]]:
        """The plan that the search comes to, and what its strategy has to say of it."""
        strategy = self._strategy(pool, space, reference, calibrating)
        limit_seconds = self._file.search.stop.seconds
        cost_of = partial(evaluation_cost, manifest=pool.manifest())
        observer = _Counting(self._observer, pool.metrics)
        plan = search(strategy, pool, self._writer, observer, self._stop_requested, limit_seconds, cost_of=cost_of)
        if isinstance(strategy, Sparsity):
            self._milestones = strategy.milestones
        return plan, remarks_of(strategy)

    def _strategy(
        self, pool: ReplicaPool, space: SearchSpace, reference: Reference, calibrating: Calibrating
    ) -> Strategy:
        calibration_id = calibrating.for_schemes(space.components, space.schemes)
        if self._file.search.strategy == "sparsity":
            recover = self._recovering(pool, calibration_id)
            errors, outliers = calibrating.pruning_errors(space.components), calibrating.outliers()
            return sparsity_search_of(self._file, space, reference.id, recover, errors, outliers, calibration_id)
        known = self._file.search.strategy in NEED_ERRORS
        known_errors = calibrating.errors(space.components, space.schemes) if known else None
        return strategy_of(self._file, space, reference.id, known_errors, calibration_id)

    def _recovering(self, pool: ReplicaPool, calibration_id: str) -> Recovering | None:
        """What trains after every round, if the file wants that."""
        section = self._file.search.recovery
        if section is None:
            return None
        results, writer, where = self._results, self._writer, self._where
        return Recovering(
            self._file,
            section,
            results,
            writer,
            pool,
            pool.manifest(),
            self._observer,
            self._stop_requested,
            calibration_id,
            on_cluster=where.address is not None,
        )

    def _validate(
        self,
        pool: ReplicaPool,
        space: SearchSpace,
        plan: Plan,
        held_out: PromptsSection,
        calibrating: Calibrating,
    ) -> None:
        self._observer.on_note("measuring the plan and uniform plans on held-out prompts")
        known = self._record.validation_reference_id
        reference = _reference(pool, self._results, self._writer, self._file, held_out, known)
        self._save(validation_reference_id=reference.id)
        pool.use(reference)
        plans = validation_plans(space, plan)
        calibration_id = calibrating.for_plans(plans.values())
        requests = {
            label: EvalRequest(
                candidate, reference.id, (0, reference.num_prompts), EXTRA_METRICS, calibration_id=calibration_id
            )
            for label, candidate in plans.items()
        }
        for model in self._milestones:  # the last of them is the plan itself, over the weights that it ended with
            label = _PLAN if model is self._milestones[-1] else model.label
            requests[label] = replace(requests[_PLAN], plan=model.plan, weights_id=model.weights_id)
        outcomes = measure(requests, pool, self._writer, "validation", self._stop_requested)
        label = self._chosen(space, plans, outcomes)
        self._record_continuations(pool, reference, plans[label], outcomes[label])

    def _chosen(self, space: SearchSpace, plans: Mapping[str, Plan], outcomes: Mapping[str, Outcome]) -> str:
        """The label of what the search ends with: its plan, or the uniform plan of its size that it does not beat."""
        metric = self._file.search.rank_by
        better = None if self._milestones else better_uniform(space, plans[_PLAN], plans, outcomes, metric)
        for remark in law_remarks(space, plans, outcomes, self._file.prompts.continuation_tokens):
            self._observer.on_note(remark)
        if better is None:
            return _PLAN
        said = f"the plan found does not beat {better} in {metric} on held-out prompts, so that is the plan"
        self._observer.on_note(said)
        message = "; ".join(part for part in (self._record.message, said) if part)
        self._save(final_plan_id=plans[better].id, message=message)
        return better

    def _record_continuations(self, pool: ReplicaPool, reference: Reference, plan: Plan, outcome: Outcome) -> None:
        """Have the plan's own texts for a few held-out prompts, the least and the most robust, for people to read."""
        if isinstance(outcome, EvalFailure) or self._writer.has_continuations(reference.id, plan.id):
            return
        prompts = telling_prompts(outcome.fdt)
        try:
            weights_id = self._milestones[-1].weights_id if self._milestones else ""
            written = pool.continuations(plan, reference.id, prompts, weights_id)
        except RuntimeError as error:  # they explain the plan; without them it is no worse
            first_line = str(error).splitlines()[0]
            self._observer.on_note(f"the plan's own texts could not be recorded: {first_line}")
        else:
            self._writer.put_continuations(reference.id, plan.id, written)

    def _stop_requested(self) -> bool:
        return self._results.stop_requested(self._file.run)


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


def rare_experts(routed: Mapping[str, int]) -> str:
    """Which experts' matrices few of the reference's tokens reach (component -> tokens), for a person."""
    usual = sum(routed.values()) / max(1, len(routed))
    rare = sorted((count, name) for name, count in routed.items() if count < _RARELY * usual)
    if not rare:
        return f"every expert is reached by at least a tenth of the usual {usual:.0f} reference tokens"
    named = ", ".join(f"{name} ({count})" for count, name in rare[:_RARE_NAMED])
    more = f" and {len(rare) - _RARE_NAMED} more" if len(rare) > _RARE_NAMED else ""
    return (
        f"{len(rare)} of {len(routed)} experts' matrices are reached by less than a tenth of the usual {usual:.0f} "
        f"reference tokens, so that little is known of what compressing them does: {named}{more}"
    )


def _pool(file: SearchFile, where: Where, observer: Observer) -> ReplicaPool:
    if file.model.trust_remote_code:
        observer.on_note(
            f"WARNING: TRUST_REMOTE_CODE IS ON. PYTHON CODE THAT COMES WITH {file.model.path} RUNS WITH ALL YOUR RIGHTS"
        )
    if where.address is None:
        texts.check_model(file)
    return ReplicaPool(file.model_spec, where, observer.on_note, run=file.run)


def _reference(
    pool: ReplicaPool,
    results: ResultStore,
    writer: RunWriter,
    file: SearchFile,
    prompts: PromptsSection,
    known_id: str | None,
) -> Reference:
    """The reference that a run began with; else that of its prompts, from the store if any run has made it before."""
    stored = None if known_id is None else results.reference(known_id)
    if stored is not None:
        return stored
    tokens, wanted_id = pool.cut_prompts(
        texts.read(file, prompts), prompts.count, prompts.prompt_tokens, prompts.continuation_tokens, prompts.seed
    )
    reference = results.reference(wanted_id)
    if reference is None:
        reference = writer.put_reference(pool.make_reference(tokens))
    return reference


def _check_plan_argument(plan: str, results: ResultStore) -> None:
    """Raises `ValueError` for what can be told to be no plan before the model is known."""
    if plan.startswith(_UNIFORM):
        parse_scheme(plan.removeprefix(_UNIFORM))
    elif not Path(plan).is_file():
        record = results.run(plan)
        if record is None:
            raise ValueError(f"--plan {plan!r} is no file, no run of this store, and not {_UNIFORM}SCHEME")
        if results.plan_id_so_far(record) is None:
            raise ValueError(f"run {plan!r} has no plan (it is {record.status})")


def _find_plan(plan: str, space: SearchSpace, manifest: ModelManifest, results: ResultStore) -> Plan:
    if plan.startswith(_UNIFORM):
        return space.uniform(plan.removeprefix(_UNIFORM))
    path = Path(plan)
    if path.is_file():
        return plan_from_json(path.read_text(encoding="utf-8"), manifest, plan)
    record = _record_of(results, plan)
    if record.manifest_id != manifest.id:
        raise ValueError(f"the plan of run {plan!r} was made for another model, with manifest {record.manifest_id}")
    plan_id = results.plan_id_so_far(record)
    found = None if plan_id is None else results.plan(plan_id, plan)
    if found is None:
        raise ValueError(f"the plan of run {plan!r} is not in the store")
    return found


def _record_of(results: ResultStore, run_name: str) -> RunRecord:
    record = results.run(run_name)
    if record is None:
        names = ", ".join(r.run for r in results.runs()) or "none"
        raise ValueError(f"no run {run_name!r} in this store; it holds: {names}")
    return record


def _stored_file(results: ResultStore, run_name: str) -> SearchFile:
    record = _record_of(results, run_name)
    return config.parse(record.config, f"the search file of run {run_name}", Path(record.config_folder))


def _begun(results: ResultStore, file: SearchFile) -> RunRecord | None:
    """What is recorded of the run; None if it came to nothing yet, so that a mistake in its file can be mended.

    Raises `ValueError` when it was begun from another search file.
    """
    previous = results.run(file.run)
    if previous is None or previous.reference_id is None:
        return None
    # As this version writes it: a key that came later stands there with its default.
    before = config.parse(previous.config, f"the search file of run {file.run}", Path(previous.config_folder))
    changes = config.difference(before.to_yaml(), file.to_yaml())
    if changes:
        lines = "\n  ".join(changes)
        raise ValueError(
            f"run {file.run!r} in {results.url} was started from another search file:\n  {lines}\n"
            f"Give this search a name of its own (run: {file.run}-2, or --set run={file.run}-2), or undo the change"
        )
    return previous


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the search as Ctrl-C does: recorded as stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
