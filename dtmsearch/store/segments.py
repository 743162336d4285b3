"""Segments: immutable Parquet files that together are the tables. Written, listed, read, checked, compacted.

The listing is the truth. A segment's name says which commits of its writers it holds, so that after a compaction,
finished or not, every row is read once. Knows the tables' schemas, nothing of what rows mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from dtmsearch.errors import StoreError, StoreReadOnly
from dtmsearch.store.files import Folder
from dtmsearch.store.schemas import SCHEMAS, fits

DAMAGED = ".damaged"
# Large enough that the description of all groups of all columns is small beside the columns that a query reads, small
# enough that a single row can be fetched.
_ROWS_PER_GROUP = 8192
_SMALL_BYTES = 8 << 20
_COMPACTED_BYTES = 32 << 20
# Readers list again when a compaction or a damaged segment comes between listing and reading.
_READ_ATTEMPTS = 8
_COMMIT = r"(\d{8})-(\d{8})"
_NAME = re.compile(rf"{_COMMIT}(?:_{_COMMIT})?\.parquet")
_T = TypeVar("_T")

Commit = tuple[int, int]  # epoch of the writer, number within it


@dataclass(frozen=True)
class Segment:
    """The rows of `table` that were committed under `key` from commit `first` to commit `last`."""

    table: str
    key: str
    first: Commit
    last: Commit
    size: int = 0

    @property
    def path(self) -> str:
        name = "_".join(f"{epoch:08}-{number:08}" for epoch, number in dict.fromkeys((self.first, self.last)))
        return f"{self.table}/{self.key}/{name}.parquet"

    @staticmethod
    def of(path: str, size: int) -> Segment | None:
        """The segment of a path; None for temporary and damaged files, and for anything else."""
        table, _, rest = path.partition("/")
        key, _, name = rest.rpartition("/")
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        numbers = [int(n) for n in match.groups() if n is not None]
        return Segment(table, key, (numbers[0], numbers[1]), (numbers[-2], numbers[-1]), size)


def uncovered(segments: Iterable[Segment]) -> tuple[list[Segment], list[Segment]]:
    """Segments in order of commits without those that a compacted one stands for, and those."""
    kept: list[Segment] = []
    covered: list[Segment] = []
    for segment in sorted(segments, key=lambda s: (s.table, s.key, s.first, (-s.last[0], -s.last[1]))):
        inside = (
            kept and (kept[-1].table, kept[-1].key) == (segment.table, segment.key) and segment.last <= kept[-1].last
        )
        (covered if inside else kept).append(segment)
    return kept, covered


class Segments:
    """The segments of a store. `notes` collects, and `on_note` hears, a line for each one that is set aside."""

    def __init__(self, folder: Folder, on_note: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._on_note = on_note
        self.num_damaged = 0
        self._skipped: set[str] = set()  # damaged, but in a store that we cannot rename in
        self._format = ds.ParquetFileFormat(
            default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        )

    def live(self, table: str, key: str | None = None) -> list[Segment]:
        """Segments to read, in order of commits, of one key or of all."""
        return uncovered(self._all(table, key))[0]

    def _all(self, table: str, key: str | None) -> list[Segment]:
        files = self.folder.walk(table if key is None else f"{table}/{key}")
        found = [Segment.of(file.path, file.size) for file in files if file.path not in self._skipped]
        return [segment for segment in found if segment is not None]

    def last_epoch(self, key: str) -> int:
        """The highest epoch under a key in any table, of damaged and temporary files too; 0 without any."""
        paths = (file.path for table in SCHEMAS for file in self.folder.walk(f"{table}/{key}"))
        epochs = (int(epoch) for path in paths for epoch, _ in re.findall(_COMMIT, path.rpartition("/")[2]))
        return max(epochs, default=0)

    def write(self, segment: Segment, rows: pa.Table, keep_existing: bool = False) -> None:
        """Commit rows: durable when this returns. With `keep_existing` a segment of that name stays as it is."""
        repeating = [f.name for f in rows.schema if pa.types.is_dictionary(f.type) or pa.types.is_integer(f.type)]
        sink = pa.BufferOutputStream()
        pq.write_table(
            rows.combine_chunks(),
            sink,
            row_group_size=_ROWS_PER_GROUP if segment.table == "evaluations" else None,
            compression="zstd",
            use_dictionary=repeating,
            write_page_checksum=True,
        )
        self.folder.write(segment.path, sink.getvalue(), keep_existing)

    def dataset(self, table: str, segments: Sequence[Segment]) -> ds.Dataset:
        """The rows of these segments, to be scanned with every page that is read verified.

        Raises `ArrowInvalid` when a segment has other columns: a scan would fill those that it lacks with nulls, as it
        should only for columns that came later (`schemas.ADDED`).
        """
        schema, filesystem = SCHEMAS[table], self.folder.filesystem
        fragments = [self._format.make_fragment(self.folder.full(s.path), filesystem) for s in segments]
        for segment, fragment in zip(segments, fragments, strict=True):
            if not fits(table, fragment.physical_schema):
                raise pa.ArrowInvalid(f"{segment.path} has other columns than the table {table}")
        return ds.FileSystemDataset(fragments, schema, self._format, filesystem)

    def read(
        self,
        table: str,
        keys: Collection[str] | None = None,
        columns: Sequence[str] | None = None,
        where: pc.Expression | None = None,
    ) -> pa.Table:
        """Rows of a table in order of commits, of some keys or all, of some columns or all."""

        def scan(segments: Sequence[Segment]) -> pa.Table:
            return self.dataset(table, segments).to_table(columns=columns, filter=where)

        return self.scanning(table, keys, scan)

    def scanning(self, table: str, keys: Collection[str] | None, scan: Callable[[Sequence[Segment]], _T]) -> _T:
        """What `scan` makes of a table's segments. When it fails, damaged segments are set aside, and it is called
        again with those that there are then."""
        for _ in range(_READ_ATTEMPTS):
            segments = self._of_keys(table, keys)
            try:
                return scan(segments)
            except (pa.ArrowException, OSError) as error:
                failure = error
                if isinstance(error, MemoryError):
                    raise
                if not self.check(segments):
                    break
        raise StoreError(f"cannot read {table} in the store {self.folder.url}: {failure}") from failure

    def whole(self, segment: Segment) -> pa.Table | None:
        """All columns of a segment; None when it is gone, or is damaged and now set aside."""
        try:
            return self.dataset(segment.table, [segment]).to_table()
        except MemoryError:
            raise
        except (pa.ArrowException, OSError) as error:
            if not self.check([segment]):
                raise StoreError(f"cannot read {segment.path} in the store {self.folder.url}: {error}") from error
            return None

    def _of_keys(self, table: str, keys: Collection[str] | None) -> list[Segment]:
        if keys is None:
            return self.live(table)
        return [segment for key in sorted(keys) for segment in self.live(table, key)]

    def check(self, segments: Iterable[Segment]) -> bool:
        """Read segments in full and set the damaged ones aside. True when any was damaged, or is gone."""
        changed = False
        for segment in segments:
            try:
                damage = self._damage(segment, self.folder.read(segment.path))
            except FileNotFoundError:
                changed = True
                continue
            if damage is not None:
                changed = True
                self._set_aside(segment, damage)
        return changed

    def _damage(self, segment: Segment, content: pa.Buffer) -> str | None:
        """What is wrong with a segment's content; None if nothing is."""
        try:
            rows = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
            rows.validate(full=True)
        except MemoryError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            return " ".join(str(error).split())
        return None if fits(segment.table, rows.schema) else "its columns are not those of the table"

    def _set_aside(self, segment: Segment, damage: str) -> None:
        self.num_damaged += 1
        done = "set aside"
        try:
            with suppress(FileNotFoundError):
                self.folder.move(segment.path, segment.path + DAMAGED)
        except StoreReadOnly:
            self._skipped.add(segment.path)
            done = "skipped, for the store is read-only"
        note = f"damaged segment {segment.path} {done} ({damage}); what it held is measured again when its run goes on"
        self.notes.append(note)
        if self._on_note is not None:
            self._on_note(note)

    def compact(self, table: str, key: str) -> None:
        """Merge neighbouring small segments of a key; only for the holder of its lock.

        The merged segment is written and read back before those that it covers are removed, so that a crash at any
        point loses nothing and doubles nothing.
        """
        live, covered = uncovered(self._all(table, key))
        for segment in covered:
            self.folder.remove(segment.path)
        for group in _groups(live):
            self._merge(group)

    def _merge(self, group: Sequence[Segment]) -> None:
        merged = Segment(group[0].table, group[0].key, group[0].first, group[-1].last)
        try:
            rows = self.dataset(merged.table, group).to_table()
        except (pa.ArrowException, OSError) as error:
            if not self.check(group):
                raise StoreError(f"cannot compact {merged.table} in the store {self.folder.url}: {error}") from error
            return
        self.write(merged, rows)
        if self.check([merged]):
            return
        for segment in group:
            self.folder.remove(segment.path)

    def num_small(self, table: str, key: str) -> int:
        return sum(segment.size < _SMALL_BYTES for segment in self.live(table, key))


def _groups(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Runs of at least two neighbouring small segments, each run within the size of a compacted segment."""
    groups: list[list[Segment]] = [[]]
    room = _COMPACTED_BYTES
    for segment in segments:
        if segment.size >= _SMALL_BYTES or segment.size > room:
            groups.append([])
            room = _COMPACTED_BYTES
        if segment.size < _SMALL_BYTES:
            groups[-1].append(segment)
            room -= segment.size
    return [group for group in groups if len(group) > 1]
