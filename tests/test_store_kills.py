"""Neither kills nor compactions nor a disk that fails lose or double what the store said it has."""

from __future__ import annotations

import errno
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from contracts import ids, make_records
from fakes import toy_components, toy_manifest
from hypothesis import given
from hypothesis import strategies as st
from stores import opened, replayed, segment_files

from dtmsearch.errors import StoreError
from dtmsearch.store import run_writer
from dtmsearch.store.files import LocalFolder
from dtmsearch.store.segment_names import Segment, uncovered
from dtmsearch.store.store import ResultStore

_CHILD = """
import sys
sys.path.insert(0, {tests!r})
from contracts import ids, make_records
from test_store import opened
from dtmsearch.store import run_writer
from dtmsearch.store.store import ResultStore
run_writer._COMMITS_BETWEEN_COMPACTIONS = 3
with opened(ResultStore({place!r})) as writer:
    done = len(list(writer.replay()))
    for number in range(done, 168, 2):
        records = make_records(number, number + 1)
        writer.append(records)
        print(*ids(records), flush=True)
"""


def test_killed_writers_lose_and_double_nothing_that_append_returned_for(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    generator = random.Random(0)
    for _ in range(4):
        code = _CHILD.format(tests=str(Path(__file__).parent), place=str(tmp_path))
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            acknowledged += child.stdout.readline().split()
            time.sleep(generator.uniform(0.0, 0.15))
            child.kill()
            acknowledged += child.stdout.read().split()
    found = replayed(tmp_path)
    # Rows may be durable before the writer could say so: at most one append of each killed writer.
    assert found == ids(make_records(*range(len(found))))
    assert set(acknowledged) <= set(found)


class Killed(BaseException):
    """The process ended here."""


def killed_at(monkeypatch: pytest.MonkeyPatch, operation: int) -> None:
    """From the given operation on a folder on, counted over writes, renames and removals, none happens any more."""
    counter = itertools.count()
    for name in ("_put", "move", "remove"):
        original: Callable[..., None] = getattr(LocalFolder, name)

        def dying(self: LocalFolder, *arguments: Any, original: Callable[..., None] = original) -> None:
            if next(counter) >= operation:
                raise Killed
            original(self, *arguments)

        monkeypatch.setattr(LocalFolder, name, dying)


def test_death_before_any_operation_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_writer, "_COMMITS_BETWEEN_COMPACTIONS", 3)
    for operation in itertools.count():
        place = tmp_path / str(operation)
        returned: list[str] = []
        with monkeypatch.context() as patch:
            killed_at(patch, operation)
            try:
                with opened(ResultStore(place)) as writer:
                    for number in range(5):
                        writer.append(make_records(number))
                        returned += ids(make_records(number))
                finished = True
            except Killed:
                finished = False
        found = replayed(place)
        assert found[: len(returned)] == returned
        assert found == ids(make_records(*range(len(found))))
        if finished:
            break
    assert operation > 20


def test_unfinished_compaction_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFolder, "remove", lambda self, path: None)
    with opened(ResultStore(tmp_path)) as writer:
        for number in range(5):
            writer.append(make_records(number))
    assert len(segment_files(tmp_path, "evaluations")) == 6
    assert ResultStore(tmp_path).table("evaluations")["evaluation_id"].to_pylist() == ids(make_records(*range(5)))


def test_closing_leaves_one_small_segment_a_table(tmp_path: Path) -> None:
    for numbers in (range(5), range(5, 9)):
        with opened(ResultStore(tmp_path)) as writer:
            for number in numbers:
                writer.append(make_records(number))
    assert len(segment_files(tmp_path, "evaluations")) == 1


def test_temporary_files_are_no_rows_and_go_when_a_driver_starts(tmp_path: Path) -> None:
    with opened(ResultStore(tmp_path)) as writer:
        writer.append(make_records(1))
    left = tmp_path / "evaluations" / "run" / ".tmp-00000001-00000009.parquet.1"
    left.write_bytes(b"half a segm")
    assert replayed(tmp_path) == ids(make_records(1))
    assert not left.exists()


def test_reader_that_listed_before_a_compaction_finds_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultStore(tmp_path)
    with opened(ResultStore(tmp_path)) as writer:
        writer.append(make_records(1))
        writer.append(make_records(2))
        listings = iter([results.segments.live("evaluations")])
    live = results.segments.live
    monkeypatch.setattr(results.segments, "live", lambda *arguments: next(listings, None) or live(*arguments))
    assert results.table("evaluations")["evaluation_id"].to_pylist() == ids(make_records(1, 2))


def test_result_of_a_run_that_compacts_meanwhile_is_found(tmp_path: Path) -> None:
    with opened(ResultStore(tmp_path), "mine") as mine:
        with opened(ResultStore(tmp_path), "other") as other:
            other.append(make_records(1))
            other.append(make_records(2))
            mine.recorded_elsewhere(ids(make_records(1)))
        assert set(mine.recorded_elsewhere(ids(make_records(1, 2)))) == set(ids(make_records(1, 2)))


COMMITS = st.tuples(st.integers(1, 3), st.integers(1, 9))


@given(st.lists(st.tuples(COMMITS, COMMITS).map(sorted), max_size=6))
def test_segments_to_read_are_those_inside_no_other(ranges: list[list[tuple[int, int]]]) -> None:
    # As names are made: any two ranges are apart, or one lies inside the other.
    found: list[Segment] = []
    for first, last in ranges:
        if all(last < s.first or s.last < first or _inside(first, last, s) or _holds(first, last, s) for s in found):
            found.append(Segment("steps", "run", first, last))
    found = list(dict.fromkeys(found))
    kept, covered = uncovered(found)
    assert set(covered) == {s for s in found if any(_inside(s.first, s.last, o) for o in found if o != s)}
    assert kept == sorted(set(found) - set(covered), key=lambda s: s.first)


def _inside(first: tuple[int, int], last: tuple[int, int], segment: Segment) -> bool:
    return segment.first <= first and last <= segment.last


def _holds(first: tuple[int, int], last: tuple[int, int], segment: Segment) -> bool:
    return first <= segment.first and segment.last <= last


@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_store_that_fails_every_so_often_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    write, calls = LocalFolder._write_synced, itertools.count(1)

    def sometimes(self: LocalFolder, path: Path, content: bytes) -> None:
        if next(calls) % every == 0:
            raise OSError(errno.EIO, "every so often this disk fails")
        write(self, path, content)

    with ResultStore(tmp_path).writer("run") as writer:
        writer.put_components(toy_manifest(), toy_components())
        monkeypatch.setattr(LocalFolder, "_write_synced", sometimes)
        for number in range(12):
            for _ in range(4):  # as a driver that is started again does
                with suppress(StoreError):
                    writer.append(make_records(number))
        monkeypatch.undo()
        assert ids(list(writer.replay())) == ids(make_records(*range(12)))
