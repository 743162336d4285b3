"""What other runs of the store have measured, found by evaluation id without reading what is not asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from dtmsearch.plans.evaluation import Outcome
from dtmsearch.results.files import StoreError
from dtmsearch.results.segments import ROWS_PER_GROUP, Segment, Segments
from dtmsearch.results.tables import OUTCOME_COLUMNS, outcomes

# How often the store is looked through for what other running searches have added.
_REFRESH_SECONDS = 20.0


class Elsewhere:
    """An index over the successful evaluations under every key but `own_key`: evaluation id -> segment and row."""

    def __init__(self, segments: Segments, own_key: str) -> None:
        self._segments = segments
        self._own_key = own_key
        self._indexed: list[Segment] = []
        self._place: dict[str, tuple[int, int]] = {}
        self._fresh_until = 0.0

    def find(self, ids: Sequence[str]) -> Mapping[str, tuple[str, Outcome]]:
        """Evaluation id -> (run, outcome) for those of `ids` that another run has measured."""
        if time.monotonic() > self._fresh_until:
            self._refresh()
        while True:
            places = {i: self._place[i] for i in ids if i in self._place}
            try:
                return self._fetch(places)
            except (pa.ArrowException, OSError) as error:
                # A segment was compacted away, or is damaged.
                if not self._segments.check(self._indexed[number] for number, _ in set(places.values())):
                    raise StoreError(f"cannot read what other runs have measured: {error}") from error
                self._indexed, self._place = [], {}
                self._refresh()

    def _refresh(self) -> None:
        """Index segments that are new. One that a compaction has since replaced is found missing when it is read."""

        def scan(segments: Sequence[Segment]) -> None:
            known = set(self._indexed)
            for segment in segments:
                if segment not in known and segment.key != self._own_key:
                    self._index(segment)

        self._segments.scanning("evaluations", None, scan)
        self._fresh_until = time.monotonic() + _REFRESH_SECONDS

    def _index(self, segment: Segment) -> None:
        rows = self._segments.dataset("evaluations", [segment]).to_table(columns=["evaluation_id", "status"])
        ok = pc.equal(rows["status"], "ok").to_pylist()
        number = len(self._indexed)
        self._indexed.append(segment)
        for row, (evaluation_id, measured) in enumerate(zip(rows["evaluation_id"].to_pylist(), ok, strict=True)):
            if measured:
                self._place.setdefault(evaluation_id, (number, row))

    def _fetch(self, places: Mapping[str, tuple[int, int]]) -> dict[str, tuple[str, Outcome]]:
        groups: dict[tuple[int, int], list[int]] = {}
        for number, row in places.values():
            groups.setdefault((number, row // ROWS_PER_GROUP), []).append(row % ROWS_PER_GROUP)
        found: dict[str, tuple[str, Outcome]] = {}
        for (number, group), rows in groups.items():
            found |= self._fetch_rows(self._indexed[number], group, rows)
        return {i: found[i] for i in places}

    def _fetch_rows(self, segment: Segment, group: int, rows: Sequence[int]) -> dict[str, tuple[str, Outcome]]:
        (fragment,) = self._segments.dataset("evaluations", [segment]).get_fragments()
        table = fragment.subset(row_group_ids=[group]).to_table(columns=["run", *OUTCOME_COLUMNS]).take(rows)
        return {
            outcome.request_id: (run, outcome)
            for batch in table.combine_chunks().to_batches()
            for run, outcome in zip(batch["run"].to_pylist(), outcomes(batch), strict=True)
        }
