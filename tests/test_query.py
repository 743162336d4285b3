"""What SQL can ask of a store, and what it cannot do."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from contracts import ids, make_record, make_records, make_request
from fakes import evaluate, toy_components, toy_manifest
from processes import below, process_ends
from stores import bucket

from dtmsearch.analysis import sql
from dtmsearch.analysis.named_queries import ask
from dtmsearch.analysis.sql import query
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, Provenance
from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import EvaluationRecord, RunRecord
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore


def recorded(place: Path, run: str = "run", *numbers: int) -> ResultStore:
    """A store in which a finished run has recorded evaluations, 0 to 5 unless others are named."""
    store = ResultStore(place)
    with store.writer(run) as writer:
        writer.put_components(toy_manifest(), toy_components())
        for status in ("running", "finished"):
            writer.put_run(RunRecord(run, status, "", "/", "toy", None, None, None, 1e9, None, "0.1.0"))  # type: ignore[arg-type]
        writer.append(make_records(*numbers or range(6)))
    return store


def rows(store: ResultStore, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = query(store, sql).to_pylist()
    return found


def test_best_plan_by_fdt(tmp_path: Path) -> None:
    best = max(range(6), key=lambda number: summarize(evaluate(make_request(number))).fdt_mean)
    sql = "SELECT plan_id FROM evaluations ORDER BY fdt_mean DESC LIMIT 1"
    assert rows(recorded(tmp_path), sql) == [{"plan_id": make_request(best).plan.id}]


def test_with_clauses_joins_and_lists(tmp_path: Path) -> None:
    sql = """
        WITH singles AS (SELECT plan_id, component, fdt[1] AS first FROM evaluations WHERE component IS NOT NULL)
        SELECT count(*) AS n, sum(first) AS tokens FROM singles JOIN plans USING (plan_id, component)
    """
    tokens = sum(int(evaluate(make_request(number)).fdt[0]) for number in range(6))
    assert rows(recorded(tmp_path), sql) == [{"n": 6, "tokens": tokens}]


@pytest.mark.parametrize("table", ["runs", "components", "prompts", "evaluations", "plans", "steps"])
def test_every_table_of_an_empty_store_has_no_rows(tmp_path: Path, table: str) -> None:
    assert query(ResultStore(tmp_path), f"SELECT * FROM {table}").num_rows == 0


def test_whole_row_holds_every_column(tmp_path: Path) -> None:
    (row,) = rows(recorded(tmp_path), "SELECT e FROM evaluations e LIMIT 1")
    assert len(row["e"]) == query(ResultStore(tmp_path), "FROM evaluations").num_columns


def test_run_has_one_row_its_last_record(tmp_path: Path) -> None:
    assert rows(recorded(tmp_path), "SELECT run, status FROM runs") == [{"run": "run", "status": "finished"}]


def test_plan_that_two_runs_evaluated_stands_once(tmp_path: Path) -> None:
    recorded(tmp_path, "a", 1, 2)
    store = recorded(tmp_path, "b", 2, 3)
    (row,) = rows(store, "SELECT count(*) AS n, count(DISTINCT plan_id) AS plans FROM plans")
    assert row == {"n": 3, "plans": 3}


def test_component_that_two_runs_search_stands_once(tmp_path: Path) -> None:
    recorded(tmp_path, "a")
    store = recorded(tmp_path, "b")
    found = rows(store, "SELECT component FROM components")
    assert [row["component"] for row in found] == [c.name for c in toy_components()]


def test_evaluations_of_all_runs_are_there(tmp_path: Path) -> None:
    recorded(tmp_path, "a", 1, 2)
    store = recorded(tmp_path, "b", 2)
    found = rows(store, "SELECT run, evaluation_id FROM evaluations ORDER BY run, evaluation_id")
    assert [(row["run"], row["evaluation_id"]) for row in found] == [
        *(("a", i) for i in sorted(ids(make_records(1, 2)))),
        ("b", make_request(2).id),
    ]


def test_open_run_can_be_asked_about(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    with store.writer("run") as writer:
        writer.put_components(toy_manifest(), toy_components())
        writer.append(make_records(1))
        writer.append(make_records(2))
        assert rows(store, "SELECT count(*) AS n FROM evaluations") == [{"n": 2}]


def test_damaged_segment_is_left_out_and_named(tmp_path: Path) -> None:
    recorded(tmp_path, "a", 1, 2)
    recorded(tmp_path, "b", 3)
    (path,) = (tmp_path / "evaluations" / "a").glob("*.parquet")
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(content)
    store = ResultStore(tmp_path)
    assert rows(store, "SELECT evaluation_id FROM evaluations") == [{"evaluation_id": make_request(3).id}]
    assert path.name in store.notes[0]


@pytest.mark.parametrize(
    "sql",
    [
        "COPY evaluations TO '{place}/out.csv'",
        "COPY (SELECT 1) TO '{place}/out.parquet'",
        "ATTACH '{place}/other.db'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM parquet_scan('{place}/evaluations/run/*.parquet')",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "SET enable_external_access=true",
        "RESET lock_configuration",
        "EXPLAIN ANALYZE SELECT 1",
        "CREATE TABLE mine AS SELECT 1",
        "INSERT INTO runs SELECT * FROM runs",
        "DROP VIEW runs",
        "WITH all_runs AS (SELECT 1) DELETE FROM runs",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY runs TO '{place}/out.csv'",
        "EXPORT DATABASE '{place}/out'",
        "SELECT * FROM python_variable",
        "",
        ";",
    ],
)
def test_whatever_is_not_one_select_over_the_tables_is_refused(tmp_path: Path, sql: str) -> None:
    python_variable = query(recorded(tmp_path / "store"), "SELECT 1")
    with pytest.raises(ValueError, match=r"\w"):
        query(ResultStore(tmp_path / "store"), sql.format(place=tmp_path))
    assert python_variable.num_rows == 1
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT plan FROM evaluations", r'"plan" not found.*"plan_id"'),
        (
            "SELECT * FROM evaluation",
            "no table 'evaluation'; the nearest is 'evaluations'. Tables are runs",
        ),
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT run::INTEGER FROM evaluations", "Could not convert string 'run' to INT32"),
        ("SELECT 1; SELECT 2", "exactly one SELECT, got 2 statements"),
        ("DROP TABLE runs", "got DROP"),
    ],
)
def test_error_says_in_one_line_what_is_wrong(tmp_path: Path, sql: str, message: str) -> None:
    store = recorded(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        query(store, sql)
    assert "\n" not in str(caught.value)


def test_answer_that_is_too_large_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtmsearch.analysis.sql._ANSWER_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="the answer is larger than"):
        query(ResultStore(tmp_path), "SELECT range FROM range(10000000)")


def test_dense_plan_has_no_rows(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    with store.writer("run") as writer:
        writer.put_components(toy_manifest(), toy_components())
        writer.append([_dense_record()])
    assert (query(store, "FROM plans").num_rows, query(store, "FROM evaluations").num_rows) == (0, 1)


def _dense_record() -> EvaluationRecord:
    request = EvalRequest(Plan(), "toy-reference", (0, 8))
    return EvaluationRecord(request, evaluate(request), "search", 0)


# Limits, in a process of its own.

ENDLESS = "SELECT count(*) FROM range(1000000000) a, range(1000000) b WHERE (a.range + b.range) % 7 = 3"
# One function, which looks at nothing while it runs, over strings of a million letters.
ONE_LONG_FUNCTION = "SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))"


def test_a_function_that_never_looks_up_is_ended_in_time(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"took longer than 0\.2 seconds"):
        query(ResultStore(tmp_path), ONE_LONG_FUNCTION, time_limit_seconds=0.2)


@pytest.mark.covering(lambda sql: "length" in sql)  # the other ends in the same way
@pytest.mark.parametrize(
    "sql", ["SELECT length(repeat('x', 4000000000)) AS n", "SELECT repeat('x', 3000000000) AS x FROM range(4)"]
)
def test_a_function_that_takes_all_memory_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str) -> None:
    monkeypatch.setattr("dtmsearch.analysis.sql._idle", [])
    monkeypatch.setattr("dtmsearch.analysis.sql._ADDRESS_SPACE_BYTES", 1 << 30)
    with pytest.raises(UserError, match="took more than 1 GiB of memory"):
        query(ResultStore(tmp_path), sql)


def test_after_a_query_that_was_ended_the_next_is_answered(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    with pytest.raises(UserError, match=r"took longer than 0\.1 seconds"):
        query(store, ENDLESS, time_limit_seconds=0.1)
    assert rows(store, "SELECT count(*) AS n FROM evaluations") == [{"n": 6}]


def test_ctrl_c_ends_the_process_of_a_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_idle", [])
    ended: list[int] = []
    end = sql._Child.end

    def noted(child: sql._Child) -> None:
        end(child)
        ended.append(child._process.returncode)

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(sql._Child, "end", noted)
    monkeypatch.setattr(Connection, "poll", interrupted)
    with pytest.raises(KeyboardInterrupt):
        query(ResultStore(tmp_path), ONE_LONG_FUNCTION)
    assert ended == [-signal.SIGKILL]
    assert sql._idle == []


def test_a_process_that_went_while_it_was_asked_nothing_is_replaced(tmp_path: Path) -> None:
    store = recorded(tmp_path)
    query(store, "SELECT 1")
    sql._idle[-1]._process.kill()
    sql._idle[-1]._process.wait()
    assert rows(store, "SELECT count(*) AS n FROM evaluations") == [{"n": 6}]


def test_the_process_of_a_query_loads_neither_pandas_nor_the_schema_of_search_files(tmp_path: Path) -> None:
    """Half of the time that it takes to begin, where pandas is installed."""
    query(recorded(tmp_path), "SELECT * FROM evaluations")
    loaded = Path(f"/proc/{sql._idle[-1]._process.pid}/maps").read_text()
    assert [name for name in ("duckdb", "pandas", "pydantic_core") if name in loaded] == ["duckdb"]


def test_the_process_of_a_query_looks_for_modules_where_the_asking_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the current folder first, as `python -c` and a notebook do."""
    monkeypatch.setattr(sql, "_idle", [])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(tmp_path)
    query(ResultStore(tmp_path), "SELECT 1")
    asked = sql._idle.pop()
    environment = Path(f"/proc/{asked._process.pid}/environ").read_text().split("\0")
    asked.end()
    assert [line for line in environment if line.startswith(f"PYTHONPATH={tmp_path}:")] != []


def test_the_process_of_a_query_ends_with_the_one_that_asks(tmp_path: Path) -> None:
    code = f"import dtmsearch as dtm\ndtm.query(dtm.open_store({str(tmp_path)!r}), {ONE_LONG_FUNCTION!r}, 600.0)"
    with subprocess.Popen([sys.executable, "-c", code]) as asking:
        while not (answering := below(asking.pid, "dtmsearch.analysis.sql")):
            assert asking.poll() is None
            time.sleep(0.05)
        asking.kill()
    assert all(process_ends(pid) for pid in answering)


def test_a_store_in_a_bucket_is_asked_the_same(tmp_path: Path) -> None:
    recorded(tmp_path / "a-bucket" / "store")
    assert rows(bucket(tmp_path), "SELECT count(*) AS n FROM evaluations") == [{"n": 6}]


def test_the_message_of_failures_is_that_of_the_last(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    with store.writer("run") as writer:
        writer.put_components(toy_manifest(), toy_components())
        writer.put_run(RunRecord("run", "finished", "", "/", "toy", None, None, None, 1e9, None, "0.1.0"))
        for number, message in enumerate(("z: the first", "a: the last")):
            provenance = Provenance(finished_at=1e9 + number)
            failure = EvalFailure(make_request(number).id, "invalid", message, provenance)
            writer.append([make_record(number, failure)])
    assert ask(store, "failures", "run")["message"].to_pylist() == ["a: the last"]
