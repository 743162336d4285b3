"""What the store remembers of runs, plans and references, and the places that it refuses."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from contracts import ResultLogContract, ids, make_record, make_records, make_request, make_step
from fakes import MODE, REFERENCE_ID, MemoryLog, toy_components, toy_manifest
from stores import as_format_1, bucket, opened, refuse, replayed, run_record

from dtmsearch.core.evaluation import EvalFailure, Reference
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.records import EvaluationRecord, StepRecord
from dtmsearch.errors import StoreError, StoreFull, StoreReadOnly
from dtmsearch.search.protocols import ResultLog
from dtmsearch.store import locks
from dtmsearch.store.files import Folder
from dtmsearch.store.schemas import FORMAT_VERSION, MODE_COLUMNS, SCHEMAS, fits
from dtmsearch.store.store import ResultStore


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


def test_last_record_of_a_run_holds(tmp_path: Path) -> None:
    with opened(ResultStore(tmp_path)) as writer:
        writer.put_run(run_record())
    with opened(ResultStore(tmp_path)) as writer:
        writer.put_run(run_record(status="finished", finished_at=1.6e9))
    counts = {"num_evaluations": 0, "num_plan_rows": 0, "num_steps": 0}
    assert ResultStore(tmp_path).run("run") == run_record(status="finished", finished_at=1.6e9, **counts)


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
    reference = Reference("ref", "manifest", MODE, grid, grid[:, :3], np.ones((2, 3), np.bool_), (0,))
    for run in ("a", "b"):
        with opened(ResultStore(tmp_path), run) as writer:
            writer.share(reference)
    assert ResultStore(tmp_path).table("prompts")["prompt"].to_pylist() == [0, 1]


def test_of_two_runs_that_share_a_reference_at_once_one_has_written_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = np.arange(12, dtype=np.int32).reshape(2, 6)
    reference = Reference("ref", "manifest", MODE, grid, grid[:, :3], np.ones((2, 3), np.bool_), (0,))
    look, place = ResultStore.shared, tmp_path / "prompts" / "ref"
    with opened(ResultStore(tmp_path), "a") as first, opened(ResultStore(tmp_path), "b") as second:

        def look_too_early(*asked: Any) -> Any:
            """The other run writes after the look, of which the beginning was there before it."""
            found = look(*asked)
            monkeypatch.setattr(ResultStore, "shared", look)
            (place / ".tmp-00000001-00000001.parquet.1").unlink()
            first.share(reference)
            return found

        place.mkdir(parents=True)
        (place / ".tmp-00000001-00000001.parquet.1").touch()
        monkeypatch.setattr(ResultStore, "shared", look_too_early)
        second.share(reference)
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


def test_newer_store_is_refused_with_both_versions(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"format": 7}')
    with pytest.raises(StoreError, match=r"version 7.*version 2\b"):
        ResultStore(tmp_path)


def test_rows_say_the_numeric_mode_of_their_reference(tmp_path: Path) -> None:
    grid = np.arange(12, dtype=np.int32).reshape(2, 6)
    mode = NumericMode("bfloat16", "cuda", "eager", compiled=True, scale_dtype="float16")
    with opened(ResultStore(tmp_path)) as writer:
        writer.share(Reference(REFERENCE_ID, "m", mode, grid, grid[:, :3], np.ones((2, 3), np.bool_), ()))
        writer.append(make_records(1))
    (row,) = ResultStore(tmp_path).table("evaluations").to_pylist()
    assert NumericMode(**{name: row[name] for name in MODE_COLUMNS}) == mode


def test_a_store_of_format_1_is_read_and_goes_on(tmp_path: Path) -> None:
    with opened(ResultStore(tmp_path)) as writer:
        writer.append(make_records(0, 1))
    as_format_1(tmp_path)
    with opened(ResultStore(tmp_path)) as writer:
        again = ids(list(writer.replay()))
        writer.append(make_records(2))
    results = ResultStore(tmp_path)
    columns = results.table("evaluations", ["evaluation_id", "extra_metrics"]).to_pydict()
    assert again == columns["evaluation_id"][:2]
    assert columns["extra_metrics"] == [None, None, ["kl", "ppl"]]
    assert results.notes == []


# Columns of every table as the first format had them.
FORMAT_1_COLUMNS = {
    "runs": """
        run status config config_folder manifest_id reference_id validation_reference_id final_plan_id
        created_at finished_at version message continue_command
    """,
    "components": """
        manifest_id model component layer kind rows cols num_weights dense_bits
    """,
    "prompts": """
        reference_id manifest_id mode prompt tokens continuation human_continuation base_agreement
        disagreements suppressed
    """,
    "evaluations": """
        run step evaluation_id plan_id parent_plan_id weights_id perturbation component scheme purpose label
        reused_from reference_id status message num_compressed share bits_per_weight num_prompts fdt_mean
        fdt_p25 fdt_p50 fdt_p75 sdt_mean dppl ppl kl fdt sdt dppl_list ppl_list kl_list tokens wall_seconds
        replica node attempts finished_at version
    """,
    "plans": """
        plan_id component scheme stored_bits num_weights
    """,
    "steps": """
        run step plan_id perturbation score num_compressed share bits_per_weight sparsity evaluations
        wall_seconds
    """,
    "statistics": """
        calibration_id manifest_id component mean_squares
    """,
    "matrices": """
        calibration_id component scheme rows cols bits block scale_dtype codes scales zeros mask
    """,
    "weight_errors": """
        run component scheme plain weighted_by_inputs weighted_by_hessian
    """,
    "continuations": """
        run reference_id plan_id prompt prompt_text base_tokens base_pieces base_margins own_tokens
        own_pieces own_margins
    """,
    "trainings": """
        run round training_id plan_id from_weights_id weights_id steps tokens wall_seconds losses
    """,
}


@pytest.mark.parametrize("table", FORMAT_1_COLUMNS)
def test_every_table_of_format_1_is_one_of_todays(table: str) -> None:
    names = FORMAT_1_COLUMNS[table].split()
    assert fits(table, pa.schema([SCHEMAS[table].field(name) for name in names]))


def test_an_older_dtmsearch_is_kept_from_a_store_that_this_one_has_written_to(tmp_path: Path) -> None:
    """It would take the columns that it does not know for damage, and set the segments aside."""
    (tmp_path / "store.json").write_text('{"format": 1}')
    with opened(ResultStore(tmp_path)):
        pass
    assert json.loads((tmp_path / "store.json").read_text()) == {"format": FORMAT_VERSION}


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"holds thesis\.tex but no store\.json"):
        ResultStore(tmp_path)


def test_a_store_that_is_made_while_one_looks_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Folder.names

    def made_before(folder: Folder) -> list[str]:
        folder.write("store.json", b'{"format": 1}')
        return look(folder)

    monkeypatch.setattr(Folder, "names", made_before)
    assert ResultStore(tmp_path).runs() == []


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


def out_of_memory(number: int) -> EvaluationRecord:
    return make_record(number, EvalFailure(make_request(number).id, "out_of_memory", "too large"))


def test_what_ran_out_of_memory_is_asked_again_only_when_the_user_says_so(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    with opened(store) as writer:
        writer.append([make_record(0), out_of_memory(1)])
    with store.writer("run") as writer:
        assert ids(list(writer.replay())) == ids([make_record(0), make_record(1)])
    with store.writer("run", retry_out_of_memory=True) as writer:
        assert ids(list(writer.replay())) == ids([make_record(0)])


def test_what_was_measured_after_it_ran_out_of_memory_counts(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for record in (out_of_memory(1), make_record(1)):
        with store.writer("run", retry_out_of_memory=True) as writer:
            writer.put_components(toy_manifest(), toy_components())
            writer.append([record])
    with store.writer("run") as writer:
        assert [isinstance(outcome, EvalFailure) for outcome in writer.replay()] == [False]


def test_what_a_recorded_decision_rests_on_is_not_asked_again(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    with opened(store) as writer:
        writer.append([out_of_memory(1)])
        writer.decide([make_step(0)])
    with store.writer("run", retry_out_of_memory=True) as writer:
        assert ids(list(writer.replay())) == ids([make_record(1)])
