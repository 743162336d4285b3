"""What other runs of the store have measured, found by evaluation id without reading what is not asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtmsearch.core.evaluation import Outcome
from dtmsearch.errors import StoreError
from dtmsearch.store.codecs.evaluations import OUTCOME_COLUMNS, outcomes
from dtmsearch.store.segment_names import Segment
from dtmsearch.store.segments import Segments

# How often the store is looked through for what other running searches have added.
_REFRESH_SECONDS = 20.0
# An id is known by its first 64 bits: what is fetched has the whole of it.
_KEY_DIGITS = 16
# Segments come and go while they are read.
_ATTEMPTS = 8
# Segments of fewer rows are those that running searches add all the time.
_MANY = 4096

_Keys = NDArray[np.uint64]
_Places = NDArray[np.int64]  # [rows, 2]: segment, row


class _Index:
    """Id -> place, in 24 bytes each: sorted keys, and recent ones that are sorted in when they have become many."""

    def __init__(self) -> None:
        self._keys: _Keys = np.empty(0, np.uint64)
        self._places: _Places = np.empty((0, 2), np.int64)
        self._recent: dict[int, tuple[int, int]] = {}
        self._unsorted: list[tuple[_Keys, _Places]] = []

    def add(self, keys: _Keys, segment: int, rows: NDArray[np.int64]) -> None:
        """Of equal ids the first stays."""
        if len(keys) > _MANY:
            self._unsorted.append((keys, np.stack([np.full(len(rows), segment), rows], axis=1)))
            return
        for key, row in zip(keys.tolist(), rows.tolist(), strict=True):
            self._recent.setdefault(key, (segment, row))

    def find(self, ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        self._sort()
        wanted = np.array([int(i[:_KEY_DIGITS], 16) for i in ids], np.uint64)
        at = np.searchsorted(self._keys, wanted)
        found: dict[str, tuple[int, int]] = {}
        for request_id, key, place in zip(ids, wanted.tolist(), at.tolist(), strict=True):
            if place < len(self._keys) and int(self._keys[place]) == key:
                found[request_id] = int(self._places[place, 0]), int(self._places[place, 1])
            elif key in self._recent:
                found[request_id] = self._recent[key]
        return found

    def _sort(self) -> None:
        if not self._unsorted:
            return
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._unsorted)])
        places = np.concatenate([self._places, *(places for _, places in self._unsorted)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._places, self._unsorted = keys[order], places[order], []


class Elsewhere:
    """An index over the successful evaluations under every key but `own_key`: evaluation id -> segment and row."""

    def __init__(self, segments: Segments, own_key: str) -> None:
        self._segments = segments
        self._own_key = own_key
        self._indexed: list[Segment] = []
        self._index = _Index()
        self._num_damaged = segments.num_damaged
        self._fresh_until = 0.0

    def find(self, ids: Sequence[str]) -> Mapping[str, tuple[str, Outcome]]:
        """Evaluation id -> (run, outcome) for those of `ids` that another run has measured."""
        if time.monotonic() > self._fresh_until:
            self._refresh()
        for _ in range(_ATTEMPTS):
            if self._num_damaged != self._segments.num_damaged:  # rows stand elsewhere in what is left of a segment
                self._begin_anew()
            places = self._index.find(ids)
            try:
                return self._fetch(places)
            except (pa.ArrowException, OSError) as error:
                # A segment was compacted away or mended, or is damaged.
                failure = error
                self._segments.check({self._indexed[number] for number, _ in places.values()})
                self._begin_anew()
        raise StoreError(f"cannot read what other runs have measured: {failure}") from failure

    def _begin_anew(self) -> None:
        self._indexed, self._index, self._num_damaged = [], _Index(), self._segments.num_damaged
        self._refresh()

    def _refresh(self) -> None:
        """Index segments that are new. One that a compaction has since replaced is found missing when it is read."""

        def scan(segments: Sequence[Segment]) -> None:
            known = set(self._indexed)
            for segment in segments:
                if segment not in known and segment.key != self._own_key:
                    self._add(segment)

        self._segments.scanning("evaluations", None, scan)
        self._fresh_until = time.monotonic() + _REFRESH_SECONDS

    def _add(self, segment: Segment) -> None:
        rows = self._segments.dataset("evaluations", [segment]).to_table(columns=["evaluation_id", "status"])
        measured = np.flatnonzero(pc.equal(rows["status"], "ok").to_numpy(zero_copy_only=False))
        number = len(self._indexed)
        self._indexed.append(segment)
        self._index.add(_keys_of(rows["evaluation_id"].take(measured)), number, measured)

    def _fetch(self, places: Mapping[str, tuple[int, int]]) -> dict[str, tuple[str, Outcome]]:
        of_segment: dict[int, list[int]] = {}
        for number, row in places.values():
            of_segment.setdefault(number, []).append(row)
        found: dict[str, tuple[str, Outcome]] = {}
        for number, rows in of_segment.items():
            found |= self._fetch_rows(self._indexed[number], np.array(sorted(rows)))
        return {i: found[i] for i in places if i in found}

    def _fetch_rows(self, segment: Segment, rows: NDArray[np.int64]) -> dict[str, tuple[str, Outcome]]:
        """Rows of a segment, from those of its groups in which they lie."""
        (fragment,) = self._segments.dataset("evaluations", [segment]).get_fragments()
        ends = np.cumsum([group.num_rows for group in fragment.row_groups])
        if rows[-1] >= ends[-1]:
            raise pa.ArrowInvalid(f"{segment.path} has fewer rows than before")
        group_of = np.searchsorted(ends, rows, side="right")
        found: dict[str, tuple[str, Outcome]] = {}
        for group in np.unique(group_of).tolist():
            first = int(ends[group - 1]) if group else 0
            part = fragment.subset(row_group_ids=[fragment.row_groups[group].id]).to_table(
                columns=["run", *OUTCOME_COLUMNS]
            )
            for batch in part.take(rows[group_of == group] - first).combine_chunks().to_batches():
                runs = batch["run"].to_pylist()
                found |= {o.request_id: (run, o) for run, o in zip(runs, outcomes(batch), strict=True)}
        return found


def _keys_of(ids: pa.ChunkedArray) -> _Keys:
    """The first 64 bits of hexadecimal ids."""
    digits = pc.utf8_slice_codeunits(ids, 0, _KEY_DIGITS).cast(pa.binary(_KEY_DIGITS)).combine_chunks()
    joined = digits.buffers()[1].slice(digits.offset * _KEY_DIGITS, len(digits) * _KEY_DIGITS)
    keys: _Keys = np.frombuffer(bytes.fromhex(str(joined, "ascii")), ">u8").astype(np.uint64)
    return keys
