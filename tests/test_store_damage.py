"""A damaged segment is set aside by name, and costs only what it held."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contracts import ids, make_records, make_step
from stores import opened, refuse, replayed, segment_files

from dtmsearch.core.records import RunRecord
from dtmsearch.store import segments
from dtmsearch.store.store import ResultStore


def flip_bytes(content: bytes) -> bytes:
    """Within the pages of an id that every reader reads."""
    columns = pq.read_metadata(pa.BufferReader(content)).row_group(0).to_dict()["columns"]
    pages = next(c for c in columns if c["path_in_schema"] in ("evaluation_id", "plan_id"))
    start = pages["dictionary_page_offset"] or pages["data_page_offset"]
    at = start + pages["total_compressed_size"] - 8
    return content[:at] + bytes(255 - b for b in content[at : at + 8]) + content[at + 8 :]


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    return b""


def other_columns(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"evaluation_id": ["x"], "plan_id": ["y"]}), sink)
    return bytes(sink.getvalue().to_pybytes())


DAMAGES = pytest.mark.parametrize("damage", [flip_bytes, truncate, empty, other_columns])


def damaged_store(place: Path, table: str, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> str:
    """A store whose run recorded evaluations 1, 2 and 3 in segments of their own, that of 2 in `table` damaged.

    Returns the path of the damaged segment within the store.
    """
    with monkeypatch.context() as patch:
        patch.setattr(segments.Segments, "compact", lambda *arguments: None)
        with opened(ResultStore(place)) as writer:
            for number in (1, 2, 3):
                writer.append(make_records(number))
    path = segment_files(place, table)[1]
    path.write_bytes(damage(path.read_bytes()))
    return path.relative_to(place).as_posix()


@DAMAGES
@pytest.mark.parametrize("table", ["evaluations", "plans"])
def test_evaluations_of_a_damaged_segment_run_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_store(tmp_path, table, damage, monkeypatch)
    assert replayed(tmp_path) == ids(make_records(1, 3))


@DAMAGES
@pytest.mark.parametrize("table", ["evaluations", "plans"])
def test_what_was_measured_again_is_recorded(
    tmp_path: Path, damage: Callable[[bytes], bytes], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_store(tmp_path, table, damage, monkeypatch)
    with opened(ResultStore(tmp_path)) as writer:
        list(writer.replay())
        writer.append(make_records(2))
    assert sorted(replayed(tmp_path)) == sorted(ids(make_records(1, 2, 3)))


@DAMAGES
def test_damaged_segment_is_set_aside_by_name(
    tmp_path: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damaged_store(tmp_path, "evaluations", damage, monkeypatch)
    heard: list[str] = []
    results = ResultStore(tmp_path, on_note=heard.append)
    replayed(results)
    assert (tmp_path / f"{path}.damaged").exists()
    assert heard == results.notes
    assert path in heard[0]


def test_while_a_run_is_under_way_its_plan_is_the_one_that_leads(tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with opened(results) as writer:
        writer.decide([make_step(0), make_step(1)])
    run = RunRecord("run", "running", "", "", None, None, None, None, 0.0, None, "1")
    final = replace(run, status="finished", final_plan_id="plan-0")
    assert (results.plan_id_so_far(run), results.plan_id_so_far(final)) == ("plan-1", "plan-0")


def test_decisions_after_a_damaged_one_are_made_again_and_stand_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(segments.Segments, "compact", lambda *arguments: None)
        with opened(ResultStore(tmp_path)) as writer:
            for step in range(3):
                writer.decide([make_step(step)])
    path = segment_files(tmp_path, "steps")[1]
    path.write_bytes(truncate(path.read_bytes()))
    with opened(ResultStore(tmp_path)) as writer:
        before = list(writer.decisions())
        writer.decide([make_step(1), make_step(2)])
    steps = ResultStore(tmp_path).table("steps")["step"].to_pylist()
    assert (before, sorted(steps)) == ([make_step(0)], [0, 1, 2])


def test_readers_go_on_without_a_damaged_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged_store(tmp_path, "evaluations", flip_bytes, monkeypatch)
    assert ResultStore(tmp_path).table("evaluations")["evaluation_id"].to_pylist() == ids(make_records(1, 3))


def test_damaged_segment_in_a_read_only_store_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged_store(tmp_path, "evaluations", truncate, monkeypatch)
    refuse(monkeypatch, errno.EROFS)
    results = ResultStore(tmp_path)
    assert results.table("evaluations").num_rows == 2
    assert (tmp_path / path).exists()
    assert "read-only" in results.notes[0]


def test_damaged_result_of_another_run_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged_store(tmp_path, "evaluations", flip_bytes, monkeypatch)
    with opened(ResultStore(tmp_path), "another") as writer:
        assert set(writer.recorded_elsewhere(ids(make_records(1, 2, 3)))) == set(ids(make_records(1, 3)))


def test_damage_that_comes_while_a_run_goes_on_costs_only_what_it_hit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultStore(tmp_path)
    with opened(results) as writer:
        writer.append(make_records(1))
        writer.append(make_records(2))
        path = segment_files(tmp_path, "evaluations")[0]
        path.write_bytes(flip_bytes(path.read_bytes()))
        results.table("evaluations")
        writer.append(make_records(1, 3))
    assert sorted(replayed(tmp_path)) == sorted(ids(make_records(1, 2, 3)))
