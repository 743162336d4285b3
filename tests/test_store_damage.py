"""A damaged segment is set aside by name, and costs only what it held."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contracts import ids, make_records, make_step
from stores import opened, refuse, replayed, run_record, segment_files
from test_store_kills import Killed, killed_at

from dtmsearch.analysis.sql import query
from dtmsearch.analysis.summary import runs_overview, summarize_run
from dtmsearch.console.run_text import run_text
from dtmsearch.console.watch import glance
from dtmsearch.core.records import RunRecord
from dtmsearch.errors import UserError
from dtmsearch.store import segments
from dtmsearch.store.store import ResultStore


def flip_bytes(content: bytes, group: int = 0) -> bytes:
    """Within the pages of an id that every reader reads: what stands before a page, its header too, has no checksum."""
    columns = pq.read_metadata(pa.BufferReader(content)).row_group(group).to_dict()["columns"]
    pages = next((c for c in columns if c["path_in_schema"] in ("evaluation_id", "plan_id")), columns[0])
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
    assert path in results.notes[0]


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


# A finished run whose rows stand in one compacted segment a table, several row groups each.


_GROUPS = {"evaluations": 2, "plans": 2, "steps": 2}


@pytest.fixture(scope="module")
def as_finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segments, "_ROWS_PER_GROUP", _GROUPS)
        with opened(ResultStore(place)) as writer:
            writer.append(make_records(*range(8)))
            writer.decide([make_step(step) for step in range(4)])
            writer.put_run(run_record(status="finished"))
    return place


@pytest.fixture
def finished(as_finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(segments, "_ROWS_PER_GROUP", _GROUPS)
    shutil.copytree(as_finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def damage_group(place: Path, table: str, group: int) -> Path:
    (path,) = segment_files(place, table)
    path.write_bytes(flip_bytes(path.read_bytes(), group))
    return path


def snapshot(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_a_damaged_page_costs_its_row_group_alone(finished: Path) -> None:
    damage_group(finished, "evaluations", 1)
    rows = ResultStore(finished).table("evaluations")
    assert rows["evaluation_id"].to_pylist() == ids(make_records(0, 1, 4, 5, 6, 7))


def test_damage_in_a_column_that_is_not_read_hides_no_rows(finished: Path) -> None:
    damage_group(finished, "evaluations", 1)
    assert ResultStore(finished).table("evaluations", ["plan_id"]).num_rows == 8


@pytest.mark.parametrize(
    "read",
    [
        lambda store: summarize_run(store, "run"),
        runs_overview,
        lambda store: store.table("evaluations"),
        lambda store: store.missing(run_record(status="finished"), thorough=True),
        lambda store: glance(store, "run"),
        lambda store: query(store, "SELECT * FROM evaluations JOIN plans USING (plan_id)"),
        lambda store: store.plan("0" * 32),
        lambda store: store.matrices("0" * 32, ["q"]),
    ],
)
@pytest.mark.parametrize("table", ["evaluations", "plans", "steps", "runs", "components"])
def test_reading_changes_no_file(finished: Path, table: str, read: Callable[[ResultStore], object]) -> None:
    damage_group(finished, table, 0)
    before = snapshot(finished)
    with suppress(UserError):  # the run's own record may be what is damaged
        read(ResultStore(finished))
    assert snapshot(finished) == before


@pytest.mark.parametrize("table", ["evaluations", "plans", "steps"])
def test_a_finished_run_that_lacks_rows_is_incomplete(finished: Path, table: str) -> None:
    damage_group(finished, table, 1)
    summary = summarize_run(ResultStore(finished), "run")
    assert (summary.status, summary.missing) == ("incomplete", (table,))
    assert f"incomplete: rows of {table} are lost" in run_text(summary)


def test_a_finished_run_that_lacks_a_segment_is_incomplete(finished: Path) -> None:
    segment_files(finished, "evaluations")[0].unlink()
    assert [run.status for run in runs_overview(ResultStore(finished))] == ["incomplete"]


def test_a_finished_run_of_an_older_version_with_a_segment_set_aside_is_incomplete(finished: Path) -> None:
    (path,) = segment_files(finished, "evaluations")
    path.rename(path.with_name(path.name + ".damaged"))
    record = replace(run_record(status="finished"), num_evaluations=None)
    assert ResultStore(finished).missing(record) == ("evaluations",)


def test_a_whole_finished_run_is_complete(finished: Path) -> None:
    store = ResultStore(finished)
    record = store.run("run")
    assert record is not None
    assert (store.missing(record, thorough=True), record.num_evaluations, record.num_steps) == ((), 8, 4)


@pytest.mark.parametrize("group", range(4))
def test_the_driver_keeps_what_is_whole_and_measures_the_rest_again(finished: Path, group: int) -> None:
    path = damage_group(finished, "evaluations", group)
    damaged = path.read_bytes()
    with opened(ResultStore(finished)) as writer:
        found = ids(list(writer.replay()))
        writer.append(make_records(*range(8)))
        writer.put_run(run_record(status="finished"))
    lost = ids(make_records(2 * group, 2 * group + 1))
    assert found == [i for i in ids(make_records(*range(8))) if i not in lost]
    assert path.with_name(path.name + ".damaged").read_bytes() == damaged
    assert sorted(replayed(finished)) == sorted(ids(make_records(*range(8))))
    assert summarize_run(ResultStore(finished), "run").status == "finished"


def test_no_plan_is_cut_in_two_by_a_row_group(finished: Path) -> None:
    (path,) = segment_files(finished, "plans")
    file = pq.ParquetFile(path)
    groups = [set(file.read_row_group(n)["plan_id"].to_pylist()) for n in range(file.num_row_groups)]
    assert len(groups) > 1
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_dying_while_damage_is_set_aside_loses_nothing_more(finished: Path) -> None:
    damage_group(finished, "evaluations", 1)
    whole = ids(make_records(0, 1, 4, 5, 6, 7))
    for operation in range(12):
        place = finished.parent / f"{finished.name}-{operation}"
        shutil.copytree(finished, place)
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            killed_at(patch, operation)
            replayed(place)
        assert replayed(place) == whole


def test_what_was_found_elsewhere_is_found_beside_a_damaged_group(finished: Path) -> None:
    damage_group(finished, "evaluations", 1)
    results = ResultStore(finished)
    with opened(results, "another") as writer:
        wanted = ids(make_records(*range(8)))
        first = set(writer.recorded_elsewhere(wanted))  # what is damaged is read only when it is fetched
        results.table("evaluations")
        assert first == set(writer.recorded_elsewhere(wanted)) == set(ids(make_records(0, 1, 4, 5, 6, 7)))


def test_what_another_driver_mended_meanwhile_is_found(finished: Path) -> None:
    damage_group(finished, "evaluations", 1)
    with opened(ResultStore(finished), "another") as writer:
        wanted = ids(make_records(*range(8)))
        writer.recorded_elsewhere(wanted)
        replayed(finished)
        assert set(writer.recorded_elsewhere(wanted)) == set(ids(make_records(0, 1, 4, 5, 6, 7)))


# Copies of segments.


# Where a copy of a segment may come to lie.
COPIES = pytest.mark.parametrize(
    "name",
    [
        "run/00000009-00000001.parquet",
        "run/00000000-00000001.parquet",
        "run/00000000-00000001_00000009-00000001.parquet",
        "another/00000001-00000001.parquet",
    ],
)


def copy_segments(place: Path, name: str) -> None:
    """The first segment of every table of a run once more, under another name."""
    for table in ("evaluations", "plans", "steps", "runs", "components"):
        copy = place / table / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(segment_files(place, table)[0], copy)


@COPIES
def test_a_copied_segment_doubles_no_rows(finished: Path, name: str) -> None:
    before = _counts(finished)
    copy_segments(finished, name)
    assert _counts(finished) == before
    store = ResultStore(finished)
    assert [r.run for r in store.runs()] == ["run"]
    assert summarize_run(store, "run").status == "finished"


@pytest.fixture
def finished_by_an_older_version(finished: Path) -> Path:
    """The same, in segments whose footers do not name them."""
    for path in finished.glob("*/*/*.parquet"):
        rows = pq.read_table(path)
        metadata = {key: value for key, value in rows.schema.metadata.items() if key != b"dtmsearch.segment"}
        pq.write_table(rows.replace_schema_metadata(metadata), path, write_page_checksum=True)
    return finished


@COPIES
def test_a_copied_segment_of_an_older_version_doubles_no_rows(finished_by_an_older_version: Path, name: str) -> None:
    before = _counts(finished_by_an_older_version)
    copy_segments(finished_by_an_older_version, name)
    assert _counts(finished_by_an_older_version) == before
    assert summarize_run(ResultStore(finished_by_an_older_version), "run").status == "finished"


def test_a_copy_of_an_older_version_loses_nothing_and_goes_with_the_next_driver(
    finished_by_an_older_version: Path,
) -> None:
    place = finished_by_an_older_version
    (original,) = segment_files(place, "evaluations")
    shutil.copyfile(original, original.with_name("00000000-00000001_00000009-00000001.parquet"))
    assert replayed(place) == ids(make_records(*range(8)))
    assert ResultStore(place).table("evaluations").num_rows == 8


def _counts(place: Path) -> list[tuple[int, int]]:
    """Rows of every table, by reading it and by SQL."""
    store, counts = ResultStore(place), []
    for table in ("runs", "components", "evaluations", "plans", "steps"):
        (row,) = query(store, f"SELECT count(*) AS n FROM {table}").to_pylist()
        counts.append((store.table(table).num_rows, row["n"]))
    return counts


def test_a_copy_is_set_aside_by_the_driver_and_nothing_is_lost(finished: Path) -> None:
    (original,) = segment_files(finished, "evaluations")
    copy = original.with_name("00000000-00000001_00000009-00000001.parquet")
    shutil.copyfile(original, copy)
    assert replayed(finished) == ids(make_records(*range(8)))
    assert ResultStore(finished).table("evaluations").num_rows == 8


def test_a_segment_that_was_renamed_is_read(finished: Path) -> None:
    (path,) = segment_files(finished, "evaluations")
    path.rename(path.with_name("00000007-00000001.parquet"))
    assert ResultStore(finished).table("evaluations").num_rows == 8
    assert replayed(finished) == ids(make_records(*range(8)))


def test_of_two_renamed_copies_one_is_read(finished: Path) -> None:
    (path,) = segment_files(finished, "evaluations")
    shutil.copyfile(path, path.with_name("00000008-00000001.parquet"))
    path.rename(path.with_name("00000007-00000001.parquet"))
    assert ResultStore(finished).table("evaluations").num_rows == 8
