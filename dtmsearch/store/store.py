"""The store: many runs in one folder or bucket, each written by one driver at a time, read by anybody.

What a writer's method was given is durable when it returns. Knows runs and records; files, locks and segments have
modules of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

import dtmsearch
from dtmsearch.core.calibration import InputStatistics, PackedMatrix
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import EvalFailure, Outcome, Reference
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import FloatArray, PriceBlock, PriceRequest
from dtmsearch.core.records import (
    ComponentRecord,
    EvaluationRecord,
    RunRecord,
    StatisticsRecord,
    StepRecord,
    check_run_name,
    is_run_name,
)
from dtmsearch.errors import RunLocked, StoreError, StoreFull, StoreReadOnly
from dtmsearch.store import schemas
from dtmsearch.store.codecs import price_blocks as price_tables
from dtmsearch.store.codecs import tables
from dtmsearch.store.codecs.codec_registry import CODECS, Codec, Key, Record, keys_of
from dtmsearch.store.codecs.evaluations import evaluations_table, outcomes, with_metric
from dtmsearch.store.codecs.plans import PlanRows, plan_of
from dtmsearch.store.files import TEMPORARY, Folder, LocalFolder, open_folder
from dtmsearch.store.locks import lock_of
from dtmsearch.store.reuse_index import Elsewhere
from dtmsearch.store.segments import Segment, Segments

__all__ = ["ResultStore", "RunLocked", "RunWriter", "StoreError", "StoreFull", "StoreReadOnly"]

_MARKER = "store.json"
# Between a run's name, which cannot hold it, and what is written beside the run's own driver.
_PART = "~"
_EVALUATE = "evaluate"
# Above this many, reading small segments one by one takes longer than it should.
_MANY_SEGMENTS = 64
_COMMITS_BETWEEN_COMPACTIONS = 256
# Tables whose rows a finished run counts: where it says how many.
_COUNTED = {"evaluations": "num_evaluations", "plans": "num_plan_rows", "steps": "num_steps"}
# Of what several runs may write at once under one key.
_PUT_ATTEMPTS = 8


class ResultStore:
    """The store at a local path or a URI that pyarrow knows (`s3://`, `gs://`); an empty one is created on writing.

    Whatever takes a run's name raises `UserError` for what cannot be one.

    `notes` are lines about damaged segments; `on_note` hears each of them as it comes. Raises
    `StoreError` when there is something else at the place, a newer version's store, or nothing can be read.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Folder,
        filesystem: fs.FileSystem | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self.on_note = on_note
        self.folder = open_folder(url, filesystem)
        self.url = self.folder.url
        self.segments = Segments(self.folder, on_note)
        self._check_marker()

    @property
    def notes(self) -> list[str]:
        return self.segments.notes

    @property
    def weights_folder(self) -> str:
        """Where trained weights are kept, a file for each; nothing where the store lies in a bucket."""
        return self.folder.full("weights") if isinstance(self.folder, LocalFolder) else ""

    def _check_marker(self) -> int | None:
        """The format version of the store at the place; None where there is none yet. Raises `StoreError` when it is
        something else."""
        content = self._marker()
        if content is None:
            names = self.folder.names()
            # Somebody may have made the store between the look for its marker and the look at the folder.
            content = self._marker() if _MARKER in names else None
        if content is None:
            strangers = [name for name in names if not name.startswith(".") and name != "lost+found"]
            if strangers:
                raise StoreError(
                    f"{self.url} is no store: it holds {strangers[0]} but no {_MARKER}. Give --store a new or empty "
                    "folder"
                )
            return None
        try:
            version = int(json.loads(content)["format"])
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{self.url} is no store that can be read: its {_MARKER} is damaged") from None
        if version > schemas.FORMAT_VERSION:
            raise StoreError(
                f"the store {self.url} has format version {version}, this dtmsearch reads up to version "
                f"{schemas.FORMAT_VERSION}. Use the version of dtmsearch that wrote it, or a newer one"
            )
        return version

    def _marker(self) -> bytes | None:
        try:
            content: bytes = self.folder.read(_MARKER).to_pybytes()
        except FileNotFoundError:
            return None
        return content

    def create(self) -> None:
        """Make the place a store if it is none yet, and one of this version if it is older: an older dtmsearch would
        take the columns of what is written now for damage."""
        if (self._check_marker() or 0) < schemas.FORMAT_VERSION:
            self.folder.write(_MARKER, json.dumps({"format": schemas.FORMAT_VERSION}).encode())

    def table(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        run: str | None = None,
        where: pc.Expression | None = None,
    ) -> pa.Table:
        """Rows of a table, every row once, in order of runs and commits: of some columns, of one run (for the tables
        that runs write), where an expression over columns holds. Of evaluations, metrics of other packages are columns,
        too, if `columns` names them (see `with_metric`)."""
        keys = None if run is None else self._keys(name, run)
        known = schemas.SCHEMAS[name].names
        others = [column for column in columns or () if name == "evaluations" and column not in known]
        if columns is None or not others:
            return self.segments.read(name, keys, columns, where)
        read = [column for column in columns if column in known and column not in schemas.OTHER_COLUMNS]
        rows = self.segments.read(name, keys, [*read, *schemas.OTHER_COLUMNS], where)
        for metric in dict.fromkeys(column.removesuffix("_list") for column in others):
            rows = with_metric(rows, metric)
        return rows.select(list(columns))

    def _keys(self, table: str, run: str) -> list[str]:
        """The keys under which a run's rows stand: its driver's, and those written beside it."""
        check_run_name(run)
        keys = {segment.key for segment in self.segments.live(table)}
        return sorted(key for key in keys if key.partition(_PART)[0] == run)

    def runs(self) -> list[RunRecord]:
        """The last record of every run, in order of creation."""
        return tables.run_records(self.table("runs"))

    def run(self, name: str) -> RunRecord | None:
        """The last record of a run; None where the store has none of that name, whatever it is."""
        if not is_run_name(name):
            return None
        records = tables.run_records(self.segments.read("runs", [name]))
        return records[0] if records else None

    def missing(self, record: RunRecord, thorough: bool = False) -> tuple[str, ...]:
        """The tables in which rows of a finished run cannot be read any more; none where it is complete. `thorough`
        reads every page of them, else what was read so far and the number of rows tell."""
        if record.status != "finished":
            return ()
        own = [table for table in _COUNTED if self._lacks(record, table, thorough)]
        references = {record.reference_id, record.validation_reference_id} - {None}
        lost = [i for i in references if i and self.reference(i) is None and self.segments.is_damaged("prompts", i)]
        return (*own, *(["prompts"] if lost else []))

    def _lacks(self, record: RunRecord, table: str, thorough: bool) -> bool:
        if thorough:
            self.segments.check(self.segments.live(table, record.run))
        recorded = getattr(record, _COUNTED[table])
        if recorded is None:  # an older version wrote it
            return self.segments.is_damaged(table, record.run)
        return bool(self.segments.num_rows(table, record.run) < recorded)

    def plan(self, plan_id: str, run: str | None = None) -> Plan | None:
        """The plan of an id, if it was evaluated: in `run`, or in any."""
        if plan_id == Plan().id:
            return Plan()
        rows = self.table("plans", ["component", "scheme"], run, pc.field("plan_id") == plan_id)
        if rows.num_rows == 0:
            return None
        plan = plan_of(rows)
        assert plan.id == plan_id, f"the rows of plan {plan_id} make plan {plan.id}"
        return plan

    def weights_id(self, run: str) -> str:
        """The weights that a search's last round came to; empty for the base model's. What was trained later, beside
        its driver, is not counted."""
        rows = self.segments.read("trainings", [check_run_name(run)], ["round", "weights_id"]).to_pylist()
        return str(max(rows, key=lambda row: row["round"])["weights_id"]) if rows else ""

    def plan_id_so_far(self, run: RunRecord) -> str | None:
        """The run's final plan or, while it is under way or stopped, the one that leads; None before the first."""
        if run.final_plan_id is not None or run.status == "finished":
            return run.final_plan_id
        steps = tables.step_records(self.table("steps", run=run.run))
        return steps[-1].plan_id if steps else None

    def shared(self, kind: type[Record], shared_id: str) -> Record | None:
        """What any run has recorded under an id, of a type that has a codec of its own and is written whole."""
        codec = CODECS[kind]
        records = codec.read(self.segments.read(codec.table, [shared_id]))
        return records[0] if records else None

    def shared_keys(self, kind: type, shared_id: str) -> set[Key]:
        """What tells the parts apart that are recorded under an id."""
        codec = CODECS[kind]
        return keys_of(self.segments.read(codec.table, [shared_id], list(codec.identity)))

    def reference(self, reference_id: str) -> Reference | None:
        return self.shared(Reference, reference_id)

    def mode_of(self, reference_id: str) -> NumericMode | None:
        """The numeric mode in which a reference was made; None for one that is not recorded."""
        modes = self.segments.read("prompts", [reference_id], ["mode"])["mode"]
        return NumericMode.parse(modes[0].as_py()) if len(modes) else None

    def statistics(self, calibration_id: str) -> InputStatistics | None:
        """What was gathered over a calibration, by any run."""
        record = self.shared(StatisticsRecord, calibration_id)
        return None if record is None else record.statistics

    def matrices(self, calibration_id: str, components: Collection[str]) -> dict[tuple[str, str], PackedMatrix]:
        """(component, scheme) -> solved matrix, of some components; of those solved twice the first counts."""
        wanted = pc.field("component").isin(list(components))
        rows = self.segments.read("matrices", [calibration_id], where=wanted)
        return {(m.component, m.scheme): m for m in reversed(CODECS[PackedMatrix].read(rows))}

    def is_running(self, run: str) -> bool:
        """Whether a driver works on the run."""
        return lock_of(self.folder, check_run_name(run)).is_held()

    def request_stop(self, run: str, reason: str = "") -> None:
        """Ask the run's driver to stop; the request is gone when a driver next starts."""
        self.folder.write(_stop_marker(run), reason.encode())

    def stop_reason(self, run: str) -> str:
        """What was said with the request to stop; empty without one."""
        try:
            return str(self.folder.read(_stop_marker(run)).to_pybytes(), "utf-8")
        except FileNotFoundError:
            return ""

    def stop_requested(self, run: str) -> bool:
        return self.folder.exists(_stop_marker(run))

    def writer(self, run: str, retry_out_of_memory: bool = False) -> RunWriter:
        """The run's own writer, to be used in a `with` statement. Entering raises `RunLocked` while another is open.
        `retry_out_of_memory`: see `RunWriter.replay`."""
        return RunWriter(self, run, run, retry_out_of_memory)

    def evaluate_writer(self, run: str) -> RunWriter:
        """A writer for evaluations under the run's name but beside its driver, which may be at work."""
        return RunWriter(self, run, f"{run}{_PART}{_EVALUATE}")


def _stop_marker(run: str) -> str:
    return f"stops/{check_run_name(run)}"


class RunWriter:
    """One driver's hold on a run: its lock, its epoch, and what it records. The `ResultLog` of a search.

    Everything is written under `key`: the run's name, or that and a part.
    """

    def __init__(self, store: ResultStore, run: str, key: str, retry_out_of_memory: bool = False) -> None:
        self._store, self._run, self._key = store, check_run_name(run), key
        self._retry_out_of_memory = retry_out_of_memory
        self._segments = store.segments
        self._lock = lock_of(store.folder, key)
        self._epoch = 0
        self._commits = 0
        self._since_compaction: dict[str, int] = {}
        self._plan_rows: PlanRows | None = None
        self._recorded: _Recorded | None = None
        self._recorded_steps: set[int] | None = None
        self._elsewhere = Elsewhere(store.segments, key)
        self._mode_of: dict[str, NumericMode] = {}

    def __enter__(self) -> Self:
        self._store.create()
        last_epoch = self._lock.acquire()
        try:
            self._epoch = 1 + max(last_epoch, self._segments.last_epoch(self._key))
            self._lock.note_epoch(self._epoch)
            self._tidy()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _tidy(self) -> None:
        """Clear away what earlier drivers of the run left: stop requests, temporary files, too many segments."""
        folder = self._store.folder
        if self._key == self._run:
            folder.remove(_stop_marker(self._run))
        for table in schemas.SCHEMAS:
            self._segments.set_aside(table, self._key)
            for file in folder.walk(f"{table}/{self._key}"):
                if file.path.rpartition("/")[2].startswith(TEMPORARY):
                    folder.remove(file.path)
            if self._segments.num_small(table, self._key) > _MANY_SEGMENTS:
                self._segments.compact(table, self._key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # Compaction only makes reading faster: a full disk must not turn a finished search into a failed one.
            with suppress(StoreError):
                self._lock.check()
                for table in schemas.SCHEMAS:
                    self._segments.compact(table, self._key)
        finally:
            self._lock.release()

    def put_run(self, record: RunRecord) -> None:
        """Record how a run stands; with a finished one, how many rows it has come to."""
        assert record.run == self._run and self._key == self._run, "only a run's driver writes its record"
        is_over = record.status == "finished"
        rows: dict[str, Any] = {
            column: self._segments.num_rows(table, self._key) if is_over else None for table, column in _COUNTED.items()
        }
        self.add([replace(record, **rows)])

    def put_components(self, manifest: ModelManifest, components: Sequence[Component]) -> None:
        """Record the model's components and those searched, over which a plan's size is counted from now on."""
        self._plan_rows = PlanRows(manifest, components)
        self.add([ComponentRecord(manifest, each) for each in dict.fromkeys((*manifest.components, *components))])

    def add(self, records: Sequence[Any]) -> None:
        """Record what the run comes to, records of one type that has a codec of its own; one that is recorded already
        stays as it is."""
        if not records:
            return
        codec = CODECS[type(records[0])]
        assert not codec.is_shared, f"{codec.table} are shared"
        known = self.keys(type(records[0])) if codec.identity else set()
        new = codec.new(records, known)
        if new:
            self._commit(codec.table, codec.rows(self._run, new))

    def read(self, kind: type[Record]) -> list[Record]:
        """The records of a type that this run has written."""
        codec = CODECS[kind]
        return codec.read(self._segments.read(codec.table, [self._key]))

    def keys(self, kind: type) -> set[Key]:
        """What tells the records of a type apart that this run has written."""
        codec = CODECS[kind]
        return keys_of(self._segments.read(codec.table, [self._key], list(codec.identity)))

    def share(self, record: Record) -> Record:
        """Record something for all runs, under the id of what it is of; the one that counts is returned: of two runs
        that write it at once the first wins, for two may come to slightly different ones."""
        codec = CODECS[type(record)]
        shared_id = codec.id_of(record)
        if self._store.shared(type(record), shared_id) is None:
            self._write_shared(codec, shared_id, [record])
        recorded = self._store.shared(type(record), shared_id)
        assert recorded is not None
        return recorded

    def share_parts(self, shared_id: str, records: Sequence[Any]) -> None:
        """Record parts of something for all runs; one that is recorded already stays as it is."""
        if not records:
            return
        codec = CODECS[type(records[0])]
        for _ in range(_PUT_ATTEMPTS):
            new = codec.new(records, self._store.shared_keys(type(records[0]), shared_id))
            if not new:
                return
            # Another run that writes at this moment may take the number; then ours come under the next.
            self._write_shared(codec, shared_id, new)
        raise StoreError(f"cannot record {codec.table} in {self._store.url}: others keep writing under {shared_id}")

    def _write_shared(self, codec: Codec[Any], shared_id: str, records: Sequence[Any]) -> None:
        self._segments.set_aside(codec.table, shared_id)
        number = 1 + self._segments.last_epoch(shared_id)
        segment = Segment(codec.table, shared_id, (number, 1), (number, 1))
        self._write(segment, codec.rows(shared_id, records), keep_existing=True)

    def replay(self) -> Iterator[Outcome]:
        """Every outcome that this run has recorded, in recorded order, as views into the memory of a segment's rows;
        one segment is held at a time.

        All columns are read, so that what is damaged anywhere is measured again; so is an evaluation whose plan was
        lost in that way. One that ran out of memory counts no longer where it was measured later and, with
        `retry_out_of_memory`, where no recorded decision rests on it.
        """
        self._recorded = None
        stale = self._stale()
        plans = {*self._known().plans, Plan().id}
        seen: set[str] = set()
        for segment in self._segments.live("evaluations", self._key):
            rows = self._segments.whole(segment)
            for batch in () if rows is None else rows.to_batches():
                batch_plans = batch["plan_id"].to_pylist()
                for plan_id, outcome in zip(batch_plans, outcomes(batch), strict=True):
                    if outcome.request_id not in seen and plan_id in plans:
                        if outcome.request_id in stale and isinstance(outcome, EvalFailure):
                            continue
                        seen.add(outcome.request_id)
                        yield outcome

    def _stale(self) -> set[str]:
        """Evaluations whose `out_of_memory` is not replayed: it was measured later, or is to be asked again."""
        measured, asked_again = self._out_of_memory()
        return measured | asked_again

    def _out_of_memory(self) -> tuple[set[str], set[str]]:
        """Of the evaluations that ran out of memory those that were measured later, and those to be asked again."""
        columns = ["evaluation_id", "step"]
        failed = self._segments.read("evaluations", [self._key], columns, pc.field("status") == "out_of_memory")
        if not failed.num_rows:
            return set(), set()
        ids = pc.field("evaluation_id").isin(pc.unique(failed["evaluation_id"]))
        of_late = self._segments.read("evaluations", [self._key], columns[:1], ids & (pc.field("status") == "ok"))
        measured = set(of_late["evaluation_id"].to_pylist())
        if not self._retry_out_of_memory:
            return measured, set()
        decided = len(self.decisions())
        again = {r["evaluation_id"] for r in failed.to_pylist() if r["step"] is None or r["step"] >= decided}
        return measured, again - measured

    def recorded_elsewhere(self, request_ids: Sequence[str]) -> Mapping[str, tuple[str, Outcome]]:
        return self._elsewhere.find(request_ids)

    def price_block(self, request: PriceRequest) -> FloatArray | None:
        """The products of a request, if they are recorded for just its samples. Those of another run of the store are
        recorded as this run's, too, for no tokens."""
        where = (pc.field("price_id") == request.id) & (pc.field("first_sample") == request.samples[0])
        for keys in ([self._key], None):
            blocks = price_tables.blocks_of(self._segments.read("prices", keys, where=where))
            found = price_tables.recorded(blocks.get(request.samples[0], {}), request)
            if found is not None:
                if keys is None:
                    self.add([PriceBlock(request, found, 0, 0.0)])
                return found
        return None

    def put_plan(self, plan: Plan) -> None:
        """Record a plan that may not have been evaluated."""
        assert self._plan_rows is not None, "put_components comes before put_plan"
        recorded = self._known()
        if plan.entries and plan.id not in recorded.plans:
            self._commit("plans", self._plan_rows.table([plan]))
            recorded.plans.add(plan.id)

    def append(self, records: Sequence[EvaluationRecord]) -> None:
        """Record evaluations and their plans; one that is recorded already keeps its first outcome, unless it ran out
        of memory and is asked again."""
        assert self._plan_rows is not None, "put_components comes before append"
        recorded = self._known()
        plans = {r.request.plan.id: r.request.plan for r in records if r.request.plan.id not in recorded.plans}
        plans.pop(Plan().id, None)
        if plans:
            self._commit("plans", self._plan_rows.table(list(plans.values())))
            recorded.plans |= plans.keys()
        new = {r.request.id: r for r in reversed(records) if r.request.id not in recorded.evaluations}
        if new:
            rows = list(reversed(new.values()))
            figures = self._plan_rows.figures([r.request.plan for r in rows])
            modes = self._modes({r.request.reference_id for r in rows})
            self._commit("evaluations", evaluations_table(self._run, rows, figures, dtmsearch.__version__, modes))
            recorded.evaluations |= new.keys()

    def _modes(self, reference_ids: set[str]) -> dict[str, NumericMode]:
        """The numeric modes of those of these references that are recorded."""
        for reference_id in reference_ids - self._mode_of.keys():
            mode = self._store.mode_of(reference_id)
            if mode is not None:
                self._mode_of[reference_id] = mode
        return self._mode_of

    def _known(self) -> _Recorded:
        """The ids recorded so far, read anew when damage was found meanwhile."""
        if self._recorded is None or self._recorded.num_damaged != self._segments.num_damaged:
            evaluations = self._segments.read("evaluations", [self._key], ["evaluation_id"])["evaluation_id"]
            self._recorded = _Recorded(
                evaluations=set(evaluations.to_pylist()) - self._out_of_memory()[1],
                plans=self._segments.scanning("plans", [self._key], self._plan_ids),
                num_damaged=self._segments.num_damaged,
            )
        return self._recorded

    def _plan_ids(self, segments: Sequence[Segment]) -> set[str]:
        """Ids of the plans in segments, which are read in full, to see that they are whole, but one at a time."""
        ids: set[str] = set()
        for segment in segments:
            rows = self._segments.dataset("plans", [segment]).to_table()
            ids.update(pc.unique(rows["plan_id"]).to_pylist())
        return ids

    def decisions(self) -> Sequence[StepRecord]:
        """The recorded decisions up to the first that is missing; those after it are decided again."""
        records = self.read(StepRecord)
        self._recorded_steps = {record.step for record in records}
        return [record for expected, record in enumerate(records) if record.step == expected]

    def decide(self, steps: Sequence[StepRecord]) -> None:
        """Record decisions; one that is recorded already stays as it is."""
        if self._recorded_steps is None:
            self.decisions()
        assert self._recorded_steps is not None
        new = [step for step in steps if step.step not in self._recorded_steps]
        if new:
            self._commit("steps", CODECS[StepRecord].rows(self._run, new))
            self._recorded_steps |= {step.step for step in new}

    def _commit(self, table: str, rows: pa.Table) -> None:
        self._commits += 1
        at = (self._epoch, self._commits)
        self._write(Segment(table, self._key, at, at), rows)
        self._since_compaction[table] = self._since_compaction.get(table, 0) + 1
        if self._since_compaction[table] >= _COMMITS_BETWEEN_COMPACTIONS:
            self._since_compaction[table] = 0
            with suppress(StoreError):  # the rows are recorded; what is wrong, the next commit says
                self._segments.compact(table, self._key)

    def _write(self, segment: Segment, rows: pa.Table, keep_existing: bool = False) -> None:
        assert self._epoch, "the writer is used in a with statement"
        self._lock.check()
        self._segments.write(segment, rows, keep_existing)


class _Recorded:
    """Ids of what a writer's key holds, as of `num_damaged` findings of damage."""

    def __init__(self, evaluations: Collection[str], plans: Collection[str], num_damaged: int) -> None:
        self.evaluations = set(evaluations)
        self.plans = set(plans)
        self.num_damaged = num_damaged
