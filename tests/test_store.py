"""What the store remembers, and that neither kills nor damage nor a second driver take it away."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contracts import ResultLogContract, ids, make_record, make_records, make_request, make_step
from fakes import MemoryLog, evaluate, toy_components, toy_manifest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs
from reported import make_run

from dtmsearch.plans.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome, Provenance, Reference
from dtmsearch.plans.metrics import summarize
from dtmsearch.plans.plan import Plan, plan_size
from dtmsearch.plans.records import EvaluationRecord, RunRecord, StepRecord
from dtmsearch.results import evaluation_table, locks, segments, store, tables
from dtmsearch.results.evaluation_table import evaluations_table, summary_of
from dtmsearch.results.files import LocalFolder, StoreReadOnly, open_folder
from dtmsearch.results.locks import Lease
from dtmsearch.results.plan_table import PlanFigures, PlanRows, plan_of
from dtmsearch.results.segments import Segment, uncovered
from dtmsearch.results.store import ResultStore, RunLocked, RunWriter, StoreError, StoreFull
from dtmsearch.search.scheduler import ResultLog


class TestMemoryLog(ResultLogContract):
    @contextmanager
    def opened(self, place: Path, run: str) -> Iterator[ResultLog]:
        records, steps = _MEMORY.setdefault(place, {}).setdefault(run, ([], []))
        log = MemoryLog({name: _memory_log(*parts) for name, parts in _MEMORY[place].items() if name != run})
        log.records, log.steps = records, steps
        yield log


_MEMORY: dict[Path, dict[str, tuple[list[EvaluationRecord], list[StepRecord]]]] = {}


def _memory_log(records: list[EvaluationRecord], steps: list[StepRecord]) -> MemoryLog:
    log = MemoryLog()
    log.records, log.steps = records, steps
    return log


class TestStoreLog(ResultLogContract):
    def opened(self, place: Path, run: str) -> AbstractContextManager[ResultLog]:
        return opened(ResultStore(place), run)


class TestBucketLog(ResultLogContract):
    @pytest.fixture(autouse=True)
    def quick_lease(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(locks, "_BEAT_SECONDS", 0.01)

    def opened(self, place: Path, run: str) -> AbstractContextManager[ResultLog]:
        return opened(bucket(place), run)


@contextmanager
def opened(results: ResultStore, run: str = "run") -> Iterator[RunWriter]:
    with results.writer(run) as writer:
        writer.put_components(toy_manifest(), toy_components())
        yield writer


def bucket(place: Path) -> ResultStore:
    """A store that is reached through pyarrow's filesystem interface alone, as one in a bucket is."""
    return ResultStore("a-bucket/store", filesystem=bucket_filesystem(place))


def bucket_filesystem(place: Path) -> fs.FileSystem:
    return fs.SubTreeFileSystem(str(place), fs.LocalFileSystem())


def replayed(place: Path | ResultStore, run: str = "run") -> list[str]:
    results = place if isinstance(place, ResultStore) else ResultStore(place)
    with opened(results, run) as writer:
        return ids(list(writer.replay()))


def segment_files(place: Path, table: str, run: str = "run") -> list[Path]:
    return sorted((place / table / run).glob("*.parquet"))


def run_record(run: str = "run", **changes: Any) -> RunRecord:
    values: dict[str, Any] = {"status": "running", "config": f"run: {run}\n", "config_folder": "/searches"}
    values |= dict.fromkeys(("manifest_id", "reference_id", "validation_reference_id", "final_plan_id", "finished_at"))
    return RunRecord(run=run, **values | {"created_at": 1.5e9, "version": "0.1.0"} | changes)


# Rows and records


TEXT = st.text(max_size=8)
MICROSECONDS = st.integers(0, 2**51).map(lambda us: us / 1_000_000)
FINITE = st.floats(allow_nan=False)


@given(
    st.lists(
        st.builds(
            RunRecord,
            run=TEXT,
            status=st.sampled_from(["running", "finished", "stopped", "failed"]),
            config=TEXT,
            config_folder=TEXT,
            manifest_id=st.none() | TEXT,
            reference_id=st.none() | TEXT,
            validation_reference_id=st.none() | TEXT,
            final_plan_id=st.none() | TEXT,
            created_at=MICROSECONDS,
            finished_at=st.none() | MICROSECONDS,
            version=TEXT,
            message=st.none() | TEXT,
        ),
        unique_by=lambda record: record.run,
    )
)
def test_run_records_come_back_from_their_rows(records: list[RunRecord]) -> None:
    in_order = sorted(records, key=lambda record: (record.created_at, record.run))
    assert tables.run_records(tables.runs_table(records)) == in_order


@given(
    st.lists(
        st.builds(
            StepRecord,
            step=st.integers(0, 2**31 - 1),
            plan_id=TEXT,
            perturbation=st.none() | TEXT,
            score=FINITE,
            num_compressed=st.integers(0, 2**31 - 1),
            share=FINITE,
            bits_per_weight=FINITE,
            sparsity=FINITE,
            evaluations=st.integers(0, 2**63 - 1),
            wall_seconds=FINITE,
        ),
        unique_by=lambda record: record.step,
    )
)
def test_step_records_come_back_from_their_rows(steps: list[StepRecord]) -> None:
    assert tables.step_records(tables.steps_table("run", steps)) == sorted(steps, key=lambda step: step.step)


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    provenance = Provenance(
        draw(TEXT), draw(TEXT), draw(st.integers(1, 9)), draw(FINITE), draw(st.integers(0, 2**62)), draw(MICROSECONDS)
    )
    request_id = draw(TEXT)
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["replica_lost", "out_of_memory", "nonfinite", "invalid"]))
        return EvalFailure(request_id, kind, draw(TEXT), provenance)
    counts = st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3).map(lambda v: np.array(v, np.int32))
    floats = st.lists(st.floats(1.0, width=32), min_size=3, max_size=3).map(lambda v: np.array(v, np.float32))
    metrics = [draw(counts), draw(counts), draw(floats), draw(st.none() | floats), draw(st.none() | floats)]
    return EvalResult(request_id, *metrics, provenance=provenance)


def canonical(outcome: Outcome) -> tuple[object, ...]:
    if isinstance(outcome, EvalFailure):
        return (outcome,)
    arrays = (outcome.fdt, outcome.sdt, outcome.dppl, outcome.kl, outcome.ppl)
    return (outcome.request_id, *(None if a is None else (a.dtype, a.tolist()) for a in arrays), outcome.provenance)


@given(st.lists(outcomes(), max_size=4))
def test_outcomes_come_back_from_their_rows(found: list[Outcome]) -> None:
    figures = PlanFigures(0, 0.0, 16.0)
    records = [EvaluationRecord(_RequestOf(o), o, "search") for o in found]  # type: ignore[arg-type]
    rows = evaluations_table("run", records, [figures] * len(found), "0.1.0")
    back = [outcome for batch in rows.to_batches() for outcome in evaluation_table.outcomes(batch)]
    assert [canonical(o) for o in back] == [canonical(o) for o in found]


class _RequestOf:
    """A request with the id of an outcome."""

    plan, parent, reference_id, prompts, weights_id = Plan(), Plan(), "reference", (0, 3), ""

    def __init__(self, outcome: Outcome) -> None:
        self.id = outcome.request_id


@given(st.data())
def test_reference_comes_back_from_its_rows(data: st.DataObject) -> None:
    prompts, tokens, length = (data.draw(st.integers(1, 4)) for _ in range(3))
    token = st.integers(0, 2**31 - 1)

    def matrix(columns: int, values: st.SearchStrategy[Any], dtype: type) -> np.ndarray[Any, Any]:
        row = st.lists(values, min_size=columns, max_size=columns)
        return np.array(data.draw(st.lists(row, min_size=prompts, max_size=prompts)), dtype)

    reference = Reference(
        "id",
        "manifest",
        "mode",
        matrix(tokens + length, token, np.int32),
        matrix(length, token, np.int32),
        matrix(length, st.booleans(), np.bool_),
        tuple(data.draw(st.lists(token, max_size=3))),
    )
    back = tables.reference_of(tables.prompts_table(reference))
    for name in ("text", "continuation", "agrees", "base_agreement"):
        np.testing.assert_array_equal(getattr(back, name), getattr(reference, name), strict=True)
    for name in ("id", "manifest_id", "mode", "suppressed", "prompt_tokens"):
        assert getattr(back, name) == getattr(reference, name)


def test_components_come_back_from_their_rows() -> None:
    assert tables.components_of(tables.components_table(toy_manifest(), toy_components())) == toy_components()


SCHEMES = st.sampled_from(["dense", "int8-channel", "int4-g32-asym", "nf4", "llm-int8"])
PLANS = st.fixed_dictionaries({c.name: SCHEMES for c in (*toy_components(), *toy_manifest().others)}).map(Plan.of)


@given(st.lists(PLANS, max_size=4))
def test_figures_are_those_of_the_plan_over_the_searched_components(plans: list[Plan]) -> None:
    searched = toy_components()[1:]
    expected = [plan_size(plan, searched, 16) for plan in plans]
    found = PlanRows(toy_manifest(), searched).figures(plans)
    assert [(f.num_compressed, f.share, f.bits_per_weight) for f in found] == [
        (size.num_compressed, size.share, size.bits_per_weight) for size in expected
    ]


@given(st.lists(PLANS, max_size=4, unique_by=lambda plan: plan.id))
def test_plans_come_back_from_their_rows(plans: list[Plan]) -> None:
    rows = PlanRows(toy_manifest(), toy_components()).table(plans)
    assert [plan_of(rows.filter(pa.compute.equal(rows["plan_id"], p.id))) for p in plans] == plans


def test_failure_has_no_values() -> None:
    failure = EvalFailure(make_request(0).id, "out_of_memory", "no room")
    rows = evaluations_table("run", [make_record(0, failure)], [PlanFigures(1, 0.5, 8.0)], "0.1.0")
    measured = ["fdt_mean", "fdt_p50", "sdt_mean", "dppl", "ppl", "kl", "fdt", "sdt", "dppl_list", "kl_list"]
    assert rows.select(measured).to_pylist() == [dict.fromkeys(measured)]


def test_aggregates_are_those_of_the_metrics() -> None:
    outcome = evaluate(make_request(3))
    rows = evaluations_table("run", [make_record(3)], [PlanFigures(1, 0.5, 8.0)], "0.1.0")
    assert summary_of(rows.to_pylist()[0]) == summarize(outcome)


def test_component_and_scheme_name_a_plan_of_one_component_only() -> None:
    one, two = Plan.of({"a": "nf4"}), Plan.of({"a": "nf4", "b": "nf4"})
    requests = [EvalRequest(plan, "reference", (0, 8)) for plan in (Plan(), one, two)]
    records = [EvaluationRecord(r, EvalFailure(r.id, "invalid", ""), "search") for r in requests]
    rows = evaluations_table("run", records, [PlanFigures(0, 0.0, 16.0)] * 3, "0.1.0")
    assert rows.select(["component", "scheme"]).to_pylist() == [
        {"component": None, "scheme": None},
        {"component": "a", "scheme": "nf4"},
        {"component": None, "scheme": None},
    ]


# Runs, plans, references


def test_last_record_of_a_run_holds(tmp_path: Path) -> None:
    with opened(ResultStore(tmp_path)) as writer:
        writer.put_run(run_record())
    with opened(ResultStore(tmp_path)) as writer:
        writer.put_run(run_record(status="finished", finished_at=1.6e9))
    assert ResultStore(tmp_path).run("run") == run_record(status="finished", finished_at=1.6e9)


def test_runs_are_listed_in_order_of_creation(tmp_path: Path) -> None:
    for run, created_at in (("b", 3.0), ("a", 5.0), ("c", 4.0)):
        with opened(ResultStore(tmp_path), run) as writer:
            writer.put_run(run_record(run, created_at=created_at))
    assert [record.run for record in ResultStore(tmp_path).runs()] == ["b", "c", "a"]


def test_evaluated_plan_is_found_by_its_id(tmp_path: Path) -> None:
    with opened(ResultStore(tmp_path)) as writer:
        writer.append(make_records(*range(20)))
    plan = make_request(13).plan
    assert ResultStore(tmp_path).plan(plan.id, "run") == plan


def test_unknown_plan_run_and_reference_are_none(tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    assert (results.plan("x"), results.run("x"), results.reference("x")) == (None, None, None)


def test_reference_is_shared_by_runs(tmp_path: Path) -> None:
    grid = np.arange(12, dtype=np.int32).reshape(2, 6)
    reference = Reference("ref", "manifest", "cpu", grid, grid[:, :3], np.ones((2, 3), np.bool_), (0,))
    for run in ("a", "b"):
        with opened(ResultStore(tmp_path), run) as writer:
            writer.put_reference(reference)
    assert ResultStore(tmp_path).table("prompts")["prompt"].to_pylist() == [0, 1]


def test_first_outcome_of_an_evaluation_is_kept(tmp_path: Path) -> None:
    failure = EvalFailure(make_request(1).id, "invalid", "later")
    with opened(ResultStore(tmp_path)) as writer:
        writer.append(make_records(1))
    with opened(ResultStore(tmp_path)) as writer:
        writer.append([make_record(1, failure), *make_records(2, 2)])
    assert ResultStore(tmp_path).table("evaluations")["status"].to_pylist() == ["ok", "ok"]


def test_plan_beside_a_run_is_measured_while_the_run_goes_on(tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with opened(results) as driver, results.evaluate_writer("run") as beside:
        beside.put_components(toy_manifest(), toy_components())
        beside.append(make_records(1))
        driver.append(make_records(2))
    assert results.table("evaluations", ["run"], run="run")["run"].to_pylist() == ["run", "run"]


def test_stop_request_reaches_the_driver_and_is_gone_for_the_next(tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with opened(results):
        before = results.stop_requested("run")
        ResultStore(tmp_path).request_stop("run")
        during = results.stop_requested("run")
    with opened(results):
        after = results.stop_requested("run")
    assert (before, during, after) == (False, True, False)


# Kills

_CHILD = """
import sys
sys.path.insert(0, {tests!r})
from contracts import ids, make_records
from test_store import opened
from dtmsearch.results import store
store._COMMITS_BETWEEN_COMPACTIONS = 3
with opened(store.ResultStore({place!r})) as writer:
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
    monkeypatch.setattr(store, "_COMMITS_BETWEEN_COMPACTIONS", 3)
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


# Damage


def flip_bytes(content: bytes) -> bytes:
    at = len(content) // 8  # the data stand first, the footer last
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


# Places that are no store, or cannot be written


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From now on the operating system answers whoever writes with this error."""

    def refused(*arguments: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace")):
        monkeypatch.setattr(owner, name, refused)


def test_newer_store_is_refused_with_both_versions(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"format": 7}')
    with pytest.raises(StoreError, match=r"version 7.*version 1\b"):
        ResultStore(tmp_path)


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"holds thesis\.tex but no store\.json"):
        ResultStore(tmp_path)


def test_damaged_marker_is_reported(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(StoreError, match=r"store\.json is damaged"):
        ResultStore(tmp_path)


def test_file_in_place_of_a_store_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        ResultStore(tmp_path / "file")


@pytest.mark.parametrize("url", ["s4://bucket/store", "gs://"])
def test_url_that_leads_nowhere_is_reported(url: str) -> None:
    with pytest.raises(StoreError, match="cannot open the store"):
        ResultStore(url)


def test_credentials_in_a_url_are_not_shown() -> None:
    with pytest.raises(StoreError) as caught:
        ResultStore("s4://user:secret@bucket/store")
    assert "secret" not in str(caught.value)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    ResultStore(tmp_path / "absent").runs()
    assert not (tmp_path / "absent").exists()


def test_full_disk_says_that_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(ResultStore(tmp_path)) as writer:
        writer.append(make_records(1))
        with monkeypatch.context() as patch:
            refuse(patch, errno.ENOSPC)
            with pytest.raises(StoreFull, match=r"Nothing that was recorded is lost.*resume"):
                writer.append(make_records(2))
    assert replayed(tmp_path) == ids(make_records(1))


def test_records_that_did_not_fit_can_be_appended_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(ResultStore(tmp_path)) as writer:
        with monkeypatch.context() as patch:
            refuse(patch, errno.ENOSPC)
            with pytest.raises(StoreFull):
                writer.append(make_records(2))
        writer.append(make_records(2))
    assert replayed(tmp_path) == ids(make_records(2))


def test_writing_to_a_read_only_store_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EROFS)
    with pytest.raises(StoreReadOnly, match="Read-only file system"), ResultStore(tmp_path / "store").writer("run"):
        pass


# Two drivers


def test_second_driver_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    with (
        opened(ResultStore(tmp_path)),
        pytest.raises(RunLocked, match=rf"process {os.getpid()} on .* started \d{{4}}-"),
        ResultStore(tmp_path).writer("run"),
    ):
        pass


def test_run_is_running_while_its_driver_holds_it(tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with opened(ResultStore(tmp_path)):
        during = results.is_running("run")
    assert (during, results.is_running("run")) == (True, False)


_FORKING_CHILD = """
import os, sys, time, warnings
from dtmsearch.results.store import ResultStore
with ResultStore({place!r}).writer("run"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_forked_child_does_not_keep_a_killed_drivers_run(tmp_path: Path) -> None:
    code = _FORKING_CHILD.format(place=str(tmp_path))
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        grandchild = int(driver.stdout.readline())
        try:
            before = ResultStore(tmp_path).is_running("run")
            driver.kill()
            driver.wait()
            assert (before, ResultStore(tmp_path).is_running("run")) == (True, False)
        finally:
            os.kill(grandchild, signal.SIGKILL)


def make_lease(place: Path) -> Lease:
    return Lease(open_folder("a-bucket", bucket_filesystem(place)), "run", beat_seconds=0.02, stale_seconds=0.4)


def die(lease: Lease) -> None:
    """As its process would: the lease stays and beats no more."""
    lease._ended.set()


def test_lease_that_beats_refuses_a_second_driver(tmp_path: Path) -> None:
    first = make_lease(tmp_path)
    first.acquire()
    with pytest.raises(RunLocked):
        make_lease(tmp_path).acquire()
    first.release()


def test_lease_of_a_dead_driver_is_taken_over(tmp_path: Path) -> None:
    dead, next_one = make_lease(tmp_path), make_lease(tmp_path)
    dead.acquire()
    dead.note_epoch(7)
    die(dead)
    assert next_one.acquire() == 7
    next_one.release()


def test_driver_that_lost_its_lease_writes_no_more(tmp_path: Path) -> None:
    sleeper, next_one = make_lease(tmp_path), make_lease(tmp_path)
    sleeper.acquire()
    die(sleeper)
    next_one.acquire()
    with pytest.raises(StoreError, match="another driver may have taken over"):
        sleeper.check()
    next_one.release()


def test_released_lease_is_free_at_once(tmp_path: Path) -> None:
    first, second = make_lease(tmp_path), make_lease(tmp_path)
    first.acquire()
    during = second.is_held()
    first.release()
    assert (during, second.is_held()) == (True, False)


def test_segments_from_before_a_column_was_added_are_read_with_nulls_in_it(tmp_path: Path) -> None:
    make_run(tmp_path)
    (path,) = (tmp_path / "evaluations" / "toy").glob("*.parquet")
    before = pq.read_table(path).drop_columns(["weights_id"])
    pq.write_table(before, path, write_page_checksum=True)
    opened_again = ResultStore(tmp_path)
    rows = opened_again.table("evaluations")
    assert rows["weights_id"].null_count == len(rows) and rows.drop_columns(["weights_id"]).equals(before)
    assert opened_again.notes == []


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
