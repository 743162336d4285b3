"""Segments: immutable Parquet files that together are the tables. Written, listed, read, checked, compacted.

The listing is the truth. A segment's name says which commits of its writers it holds, so that after a compaction,
finished or not, every row is read once; its footer repeats the name, so that a copy under another one is no rows.
(Older versions wrote no such footer: there, copies are told by their content.)
Readers leave out what is damaged and change nothing; the holder of a key's lock sets it aside. Knows the tables'
schemas, nothing of what rows mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from dtmsearch.errors import StoreError
from dtmsearch.store.files import TEMPORARY, Folder
from dtmsearch.store.schemas import SCHEMAS, fits
from dtmsearch.store.segment_names import COMMIT, SMALL_BYTES, Segment, covered_by, covers, small_neighbours, uncovered

DAMAGED = ".damaged"
# Damage costs the group that it is in. Large enough that the description of all groups of all columns is small beside
# the columns that a query reads, small enough that a single row can be fetched. Tables that are not named have few
# rows, or rows that are worth nothing without each other, as a reference's.
_ROWS_PER_GROUP = {"evaluations": 8192, "plans": 65536, "steps": 8192}
# Rows with one value of this column stay in one group.
_TOGETHER = {"plans": "plan_id"}
# In a segment's footer: the path under which it was written.
_WRITTEN_AS = b"dtmsearch.segment"
# Readers list again when a compaction or a damaged segment comes between listing and reading.
_READ_ATTEMPTS = 8
# Smaller tables are written as they are: they get hardly smaller, and a compressor for each column takes as long as
# all else together.
_COMPRESSED_BYTES = 4 << 10
_T = TypeVar("_T")


@dataclass(frozen=True)
class Damage:
    """What is wrong with a segment, the row groups that can be read nevertheless, and how many rows the others held:
    None where that cannot be told, 0 for a copy of another segment."""

    reason: str
    whole_groups: tuple[int, ...] = ()
    num_rows_lost: int | None = None


class Segments:
    """The segments of a store. `notes` collects, and `on_note` hears, a line for each one that is damaged.

    `num_damaged` counts the findings of damage, so that whoever keeps what was read can tell that it may be less now.
    """

    def __init__(self, folder: Folder, on_note: Callable[[str], None] | None = None) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._on_note = on_note
        self.num_damaged = 0
        self._damage: dict[Segment, Damage] = {}
        self._told: set[str] = set()
        self._digests: dict[Segment, bytes] = {}
        self._own: dict[Segment, bool] = {}  # whether it stands for the commits of its name
        self._renamed: dict[str, Segment] = {}  # of what stands no longer where it was written: by what it is read now
        self._format = ds.ParquetFileFormat(
            default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        )

    def live(self, table: str, key: str | None = None) -> list[Segment]:
        """Segments to read, in order of commits, of one key or of all."""
        return self._sorted(table, key)[0]

    def _sorted(self, table: str, key: str | None) -> tuple[list[Segment], list[Segment]]:
        """Segments that can be read, and those for which one of these stands by its name and its footer."""
        files = self.folder.walk(table if key is None else f"{table}/{key}")
        found = (Segment.of(file.path, file.size) for file in files)
        segments = [s for s in found if s is not None and (s not in self._damage or self._damage[s].whole_groups)]
        while True:
            kept, covered = uncovered(segments)
            strangers = {s for s in kept if (inside := covered_by(s, covered)) and not self._is_own(s, inside)}
            if not strangers:
                return kept, covered
            segments = [s for s in segments if s not in strangers]
            for stranger in strangers:
                self._damage[stranger] = Damage("it does not hold the commits that its name says", (), 0)
                self._note(stranger, self._damage[stranger])

    def _is_own(self, segment: Segment, inside: Sequence[Segment]) -> bool:
        """Whether a segment's footer names it, and so the commits that it stands for. Those of older versions name
        nothing, and are trusted unless their content is that of one of those `inside` by its name."""
        if segment not in self._own:
            try:
                with self.folder.filesystem.open_input_file(self.folder.full(segment.path)) as file:
                    written_as = _written_as(pq.read_schema(file))
                alike = [other for other in inside if other.size == segment.size] if written_as is None else []
                is_copy = any(self._digest(other) == self._digest(segment) for other in alike)
                self._own[segment] = written_as in (None, segment.path) and not is_copy
            except (pa.ArrowException, OSError):
                return False
        return self._own[segment]

    def _digest(self, segment: Segment) -> bytes:
        """Of the content of a segment, by which copies are known where the footer names none."""
        if segment not in self._digests:
            self._digests[segment] = sha256(self.folder.read(segment.path)).digest()
        return self._digests[segment]

    def last_epoch(self, key: str, unfinished: bool = True) -> int:
        """The highest epoch under a key in any table, of damaged files too and, with `unfinished`, of temporary ones;
        0 without any."""
        paths = (file.path for table in SCHEMAS for file in self.folder.walk(f"{table}/{key}"))
        names = [path.rpartition("/")[2] for path in paths]
        counted = [name for name in names if unfinished or not name.startswith(TEMPORARY)]
        epochs = (int(epoch) for name in counted for epoch, _ in re.findall(COMMIT, name))
        return max(epochs, default=0)

    def write(self, segment: Segment, rows: pa.Table, keep_existing: bool = False) -> None:
        """Commit rows: durable when this returns. With `keep_existing` a segment of that name stays as it is."""
        rows = rows.combine_chunks().replace_schema_metadata(
            {**(rows.schema.metadata or {}), _WRITTEN_AS: segment.path}
        )
        repeating = [f.name for f in rows.schema if pa.types.is_dictionary(f.type) or pa.types.is_integer(f.type)]
        compression = "zstd" if rows.nbytes > _COMPRESSED_BYTES else "none"
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(
            sink, rows.schema, compression=compression, use_dictionary=repeating, write_page_checksum=True
        ) as writer:
            for group in _row_groups(segment.table, rows):
                writer.write_table(group, row_group_size=max(1, group.num_rows))
        self.folder.write(segment.path, sink.getvalue(), keep_existing)

    def dataset(self, table: str, segments: Sequence[Segment]) -> ds.Dataset:
        """The rows of these segments but those that are known to be damaged, to be scanned with every page that is read
        verified.

        Raises `ArrowInvalid` when a segment has other columns: a scan would fill those that it lacks with nulls, as it
        should only for columns that came later (`schemas.ADDED`); and for a copy of another segment.
        """
        schema, filesystem = SCHEMAS[table], self.folder.filesystem
        fragments = []
        unnamed: dict[int, list[Segment]] = {}  # by size
        for segment in segments:
            fragment = self._format.make_fragment(self.folder.full(segment.path), filesystem)
            if not fits(table, fragment.physical_schema):
                raise pa.ArrowInvalid(f"{segment.path} has other columns than the table {table}")
            written_as = _written_as(fragment.physical_schema)
            if written_as not in (None, segment.path) and not self._own.get(segment):
                raise pa.ArrowInvalid(f"{segment.path} was written as {written_as}")
            if written_as is None:
                alike = unnamed.setdefault(segment.size, [])
                if any(self._digest(other) == self._digest(segment) for other in alike):
                    self.tell(f"{segment.path}: its content is that of another segment; its rows are read once")
                    continue
                alike.append(segment)
            damage = self._damage.get(segment)
            fragments.append(fragment if damage is None else fragment.subset(row_group_ids=list(damage.whole_groups)))
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
            if not segments:
                nothing = SCHEMAS[table].empty_table()
                if columns is None and where is None:
                    return nothing
                return ds.dataset(nothing).to_table(columns=columns, filter=where)  # which knows of wrong names
            return self.dataset(table, segments).to_table(columns=columns, filter=where)

        return self.scanning(table, keys, scan)

    def scanning(self, table: str, keys: Collection[str] | None, scan: Callable[[Sequence[Segment]], _T]) -> _T:
        """What `scan` makes of a table's segments. When it fails, what is damaged is found, and it is called again
        with those that there are then."""
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
        """All columns of a segment's rows that can be read; None when it is gone, or nothing of it can."""
        for _ in range(_READ_ATTEMPTS):
            if segment in self._damage and not self._damage[segment].whole_groups:
                return None
            try:
                return self.dataset(segment.table, [segment]).to_table()
            except MemoryError:
                raise
            except FileNotFoundError:
                return None
            except (pa.ArrowException, OSError) as error:
                failure = error
                if not self.check([segment]):
                    break
        raise StoreError(f"cannot read {segment.path} in the store {self.folder.url}: {failure}") from failure

    def _of_keys(self, table: str, keys: Collection[str] | None) -> list[Segment]:
        if keys is None:
            return self.live(table)
        return [segment for key in sorted(keys) for segment in self.live(table, key)]

    def check(self, segments: Iterable[Segment]) -> bool:
        """Read segments in full, and leave out what is damaged from now on. True when anything was found that was not
        known: damage, a segment that is gone, or one that was mended meanwhile."""
        changed = False
        for segment in segments:
            num_renamed = len(self._renamed)
            try:
                damage = self._examined(segment, self.folder.read(segment.path))
            except FileNotFoundError:
                self._damage.pop(segment, None)
                changed = True
                continue
            changed = changed or len(self._renamed) > num_renamed
            if damage == self._damage.get(segment):
                continue
            changed = True
            if damage is None:
                del self._damage[segment]
            else:
                self._damage[segment] = damage
                self.num_damaged += 1
                self._note(segment, damage)
        return changed

    def _examined(self, segment: Segment, content: pa.Buffer) -> Damage | None:
        """What is wrong with a segment's content; None if nothing is."""
        try:
            file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        except MemoryError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            return Damage(" ".join(str(error).split()))
        if not fits(segment.table, schema):
            return Damage("its columns are not those of the table", (), num_rows)
        written_as = _written_as(schema)
        if written_as not in (None, segment.path):
            if self._stands_elsewhere(segment, str(written_as)):
                return Damage(f"it is a copy of {written_as}", (), 0)
            self._own[segment], self._renamed[str(written_as)] = True, segment
        return _damaged_groups(file, apart=segment.table in _ROWS_PER_GROUP)

    def _stands_elsewhere(self, segment: Segment, written_as: str) -> bool:
        """Whether what was written under a path stands there still, or in what it was merged into."""
        original = Segment.of(written_as, 0)
        if original is None or original.table not in SCHEMAS:
            return False
        others = self.live(original.table, original.key)
        return self._renamed.get(written_as, segment) != segment or any(
            covers(other, original) for other in others if other != segment
        )

    def _note(self, segment: Segment, damage: Damage) -> None:
        """Say once what is wrong with a segment."""
        what = f"{segment.path}: {damage.reason}"
        if damage.num_rows_lost == 0:
            note = f"{what}; its rows are read once"
        elif damage.whole_groups:
            note = (
                f"damaged segment {what}; {damage.num_rows_lost} rows are left out, the others are read. What is "
                "missing is measured again when its run goes on"
            )
        else:
            note = f"damaged segment {what}; its rows are left out, and measured again when its run goes on"
        self.tell(note)

    def tell(self, note: str) -> None:
        """Say a line, once."""
        if note not in self._told:
            self._told.add(note)
            self.notes.append(note)
            if self._on_note is not None:
                self._on_note(note)

    def num_rows(self, table: str, key: str) -> int:
        """How many rows under a key can be read, as far as damage is known."""

        def count(segments: Sequence[Segment]) -> int:
            # `count_rows` would count those of the groups that are left out.
            fragments = self.dataset(table, segments).get_fragments()
            return sum(group.num_rows for fragment in fragments for group in fragment.row_groups)

        return self.scanning(table, [key], count)

    def is_damaged(self, table: str, key: str) -> bool:
        """Whether damage is known of what was written under a key, found just now or set aside before."""
        known = any((s.table, s.key) == (table, key) and d.num_rows_lost != 0 for s, d in self._damage.items())
        return known or any(file.path.endswith(DAMAGED) for file in self.folder.walk(f"{table}/{key}"))

    def set_aside(self, table: str, key: str) -> None:
        """Keep what is known to be damaged under another name, and of its segment the rows that can be read; only for
        the holder of the key's lock, or where nothing of a segment can be read."""
        for segment, damage in list(self._damage.items()):
            if (segment.table, segment.key) != (table, key):
                continue
            if damage.whole_groups:
                # In this order, so that a crash between the two leaves all there is.
                rows = self.dataset(table, [segment]).to_table()
                self.folder.write(segment.path + DAMAGED, self.folder.read(segment.path))
                self.write(segment, rows)
            else:
                with suppress(FileNotFoundError):
                    self.folder.move(segment.path, segment.path + DAMAGED)
            del self._damage[segment]

    def compact(self, table: str, key: str) -> None:
        """Merge neighbouring small segments of a key; only for the holder of its lock.

        The merged segment is written and read back before those that it covers are removed, so that a crash at any
        point loses nothing and doubles nothing.
        """
        self.set_aside(table, key)
        live, covered = self._sorted(table, key)
        for segment in covered:
            self.folder.remove(segment.path)
        for group in small_neighbours(live):
            self._merge(group)

    def _merge(self, group: Sequence[Segment]) -> None:
        merged = Segment(group[0].table, group[0].key, group[0].first, group[-1].last)
        try:
            rows = self.dataset(merged.table, group).to_table()
        except (pa.ArrowException, OSError) as error:
            if not self.check(group):
                raise StoreError(f"cannot compact {merged.table} in the store {self.folder.url}: {error}") from error
            self.set_aside(merged.table, merged.key)
            return
        self.write(merged, rows)
        if self.check([merged]):
            return
        for segment in group:
            self.folder.remove(segment.path)

    def num_small(self, table: str, key: str) -> int:
        return sum(segment.size < SMALL_BYTES for segment in self.live(table, key))


def _written_as(schema: pa.Schema) -> str | None:
    """The path that a segment's footer names."""
    path = (schema.metadata or {}).get(_WRITTEN_AS)
    return None if path is None else path.decode(errors="replace")


def _damaged_groups(file: pq.ParquetFile, apart: bool) -> Damage | None:
    """The damage of a file, by its row groups if these mean anything `apart`; None where all can be read."""
    whole: list[int] = []
    lost, reason = 0, ""
    for group in range(file.num_row_groups):
        try:
            file.read_row_group(group).validate(full=True)
            whole.append(group)
        except MemoryError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = reason or " ".join(str(error).split())
            lost += file.metadata.row_group(group).num_rows
    if not reason:
        return None
    return Damage(reason, tuple(whole), lost) if apart else Damage(reason, (), file.metadata.num_rows)


def _row_groups(table: str, rows: pa.Table) -> Iterator[pa.Table]:
    """The rows in the pieces that become row groups."""
    size = _ROWS_PER_GROUP.get(table)
    if size is None or rows.num_rows <= size:
        yield rows
        return
    starts = np.arange(rows.num_rows)
    if table in _TOGETHER:
        values = rows[_TOGETHER[table]].combine_chunks()
        codes = values.indices if pa.types.is_dictionary(values.type) else values.dictionary_encode().indices
        starts = np.flatnonzero(np.diff(codes.to_numpy(zero_copy_only=False), prepend=-1))
    cuts = np.unique(starts[np.searchsorted(starts, np.arange(0, rows.num_rows, size)).clip(max=len(starts) - 1)])
    for first, after in zip(cuts.tolist(), [*cuts[1:].tolist(), rows.num_rows], strict=True):
        yield rows.slice(first, after - first)
