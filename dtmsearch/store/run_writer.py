"""One driver's hold on a run: what it records, under its own lock, is durable when a method returns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

import pyarrow as pa
import pyarrow.compute as pc

import dtmsearch
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import EvalFailure, Outcome
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import FloatArray, PriceBlock, PriceRequest
from dtmsearch.core.records import (
    ComponentRecord,
    EvaluationRecord,
    RunRecord,
    StepRecord,
    check_run_name,
)
from dtmsearch.errors import StoreError
from dtmsearch.store import schemas
from dtmsearch.store.codecs import price_blocks as price_tables
from dtmsearch.store.codecs.codec_registry import CODECS, Codec, Key, Record, keys_of
from dtmsearch.store.codecs.evaluations import evaluations_table, outcomes
from dtmsearch.store.codecs.plans import PlanRows
from dtmsearch.store.files import TEMPORARY, Folder
from dtmsearch.store.locks import lock_of
from dtmsearch.store.reuse_index import Elsewhere
from dtmsearch.store.segment_names import Segment
from dtmsearch.store.segments import Segments

# Above this many, reading small segments one by one takes longer than it should.
_MANY_SEGMENTS = 64
_COMMITS_BETWEEN_COMPACTIONS = 256
# Tables whose rows a finished run counts: where it says how many.
COUNTED = {"evaluations": "num_evaluations", "plans": "num_plan_rows", "steps": "num_steps"}
# Of what several runs may write at once under one key.
_PUT_ATTEMPTS = 8


class SharedStore(Protocol):
    """The store as a writer sees it: the place, and what all runs of it share."""

    @property
    def url(self) -> str: ...

    @property
    def folder(self) -> Folder: ...

    @property
    def segments(self) -> Segments: ...

    def create(self) -> None: ...

    def shared(self, kind: type[Record], shared_id: str) -> Record | None: ...

    def shared_keys(self, kind: type, shared_id: str) -> set[Key]: ...

    def mode_of(self, reference_id: str) -> NumericMode | None: ...


def stop_marker(run: str) -> str:
    """Where a request to stop a run lies. Raises `UserError` for what is no run's name."""
    return f"stops/{check_run_name(run)}"


class RunWriter:
    """One driver's hold on a run: its lock, its epoch, and what it records. The `ResultLog` of a search.

    Everything is written under `key`: the run's name, or that and a part.
    """

    def __init__(self, store: SharedStore, run: str, key: str, retry_out_of_memory: bool = False) -> None:
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
            folder.remove(stop_marker(self._run))
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
            column: self._segments.num_rows(table, self._key) if is_over else None for table, column in COUNTED.items()
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
        number = self._next_number(shared_id)
        if self._store.shared(type(record), shared_id) is None:
            self._write_shared(codec, shared_id, number, [record])
        recorded = self._store.shared(type(record), shared_id)
        assert recorded is not None
        return recorded

    def share_parts(self, shared_id: str, records: Sequence[Any]) -> None:
        """Record parts of something for all runs; one that is recorded already stays as it is."""
        if not records:
            return
        codec = CODECS[type(records[0])]
        for _ in range(_PUT_ATTEMPTS):
            number = self._next_number(shared_id)
            new = codec.new(records, self._store.shared_keys(type(records[0]), shared_id))
            if not new:
                return
            # Another run that writes at this moment may take the number; then ours come under the next.
            self._write_shared(codec, shared_id, number, new)
        raise StoreError(f"cannot record {codec.table} in {self._store.url}: others keep writing under {shared_id}")

    def _next_number(self, shared_id: str) -> int:
        """Of a segment of what is shared: taken before looking whether that is there already, and whatever others are
        about to write, so that two runs that both find nothing take the same number, and one alone is written."""
        return 1 + self._segments.last_epoch(shared_id, unfinished=False)

    def _write_shared(self, codec: Codec[Any], shared_id: str, number: int, records: Sequence[Any]) -> None:
        self._segments.set_aside(codec.table, shared_id)
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

    def holds_any(self, request_ids: Collection[str]) -> bool:
        """Whether `replay` may give an outcome of any of these requests. Reads ids alone, and those once."""
        return not self._known().evaluations.isdisjoint(request_ids)

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
