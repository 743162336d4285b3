"""The store: many runs in one folder or bucket, each written by one driver at a time, read by anybody.

Knows runs and records; a run's writer, files, locks and segments have modules of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from dtmsearch.core.calibration import InputStatistics, PackedMatrix
from dtmsearch.core.evaluation import Reference
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import RunRecord, StatisticsRecord, check_run_name, is_run_name
from dtmsearch.errors import RunLocked, StoreError, StoreFull, StoreReadOnly
from dtmsearch.store import schemas
from dtmsearch.store.codecs import tables
from dtmsearch.store.codecs.codec_registry import CODECS, Key, Record, keys_of
from dtmsearch.store.codecs.evaluations import with_metric
from dtmsearch.store.codecs.plans import plan_of
from dtmsearch.store.files import Folder, LocalFolder, open_folder
from dtmsearch.store.locks import lock_of
from dtmsearch.store.run_writer import COUNTED, RunWriter, stop_marker
from dtmsearch.store.segments import Segments

__all__ = ["ResultStore", "RunLocked", "RunWriter", "StoreError", "StoreFull", "StoreReadOnly"]

_MARKER = "store.json"
# Between a run's name, which cannot hold it, and what is written beside the run's own driver.
_PART = "~"
_EVALUATE = "evaluate"


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
        own = [table for table in COUNTED if self._lacks(record, table, thorough)]
        references = {record.reference_id, record.validation_reference_id} - {None}
        lost = [i for i in references if i and self.reference(i) is None and self.segments.is_damaged("prompts", i)]
        return (*own, *(["prompts"] if lost else []))

    def _lacks(self, record: RunRecord, table: str, thorough: bool) -> bool:
        if thorough:
            self.segments.check(self.segments.live(table, record.run))
        recorded = getattr(record, COUNTED[table])
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
        self.folder.write(stop_marker(run), reason.encode())

    def stop_reason(self, run: str) -> str:
        """What was said with the request to stop; empty without one."""
        try:
            return str(self.folder.read(stop_marker(run)).to_pybytes(), "utf-8")
        except FileNotFoundError:
            return ""

    def stop_requested(self, run: str) -> bool:
        return self.folder.exists(stop_marker(run))

    def writer(self, run: str, retry_out_of_memory: bool = False) -> RunWriter:
        """The run's own writer, to be used in a `with` statement. Entering raises `RunLocked` while another is open.
        `retry_out_of_memory`: see `RunWriter.replay`."""
        return RunWriter(self, run, run, retry_out_of_memory)

    def evaluate_writer(self, run: str) -> RunWriter:
        """A writer for evaluations under the run's name but beside its driver, which may be at work."""
        return RunWriter(self, run, f"{run}{_PART}{_EVALUATE}")
