"""What a segment is by its name: the commits that it holds, so which of several stands for which, which are merged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SMALL_BYTES = 8 << 20
_COMPACTED_BYTES = 32 << 20
COMMIT = r"(\d{8})-(\d{8})"
_NAME = re.compile(rf"{COMMIT}(?:_{COMMIT})?\.parquet")

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


def covered_by(segment: Segment, others: Iterable[Segment]) -> list[Segment]:
    """Those of others whose commits a segment's name says that it holds."""
    return [other for other in others if covers(segment, other)]


def covers(segment: Segment, other: Segment) -> bool:
    """Whether a segment's name says that it holds another's commits, or is the other."""
    same = (segment.table, segment.key) == (other.table, other.key)
    return same and segment.first <= other.first and other.last <= segment.last


def small_neighbours(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Runs of at least two neighbouring small segments, each run within the size of a compacted segment."""
    groups: list[list[Segment]] = [[]]
    room = _COMPACTED_BYTES
    for segment in segments:
        if segment.size >= SMALL_BYTES or segment.size > room:
            groups.append([])
            room = _COMPACTED_BYTES
        if segment.size < SMALL_BYTES:
            groups[-1].append(segment)
            room -= segment.size
    return [group for group in groups if len(group) > 1]
