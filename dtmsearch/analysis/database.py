"""One SQL SELECT over a store's tables, in an in-memory DuckDB that can reach nothing else.

Runs in a process of its own (`dtmsearch.analysis.sql_process`), which can be ended at any moment. Knows the tables and
how to lock a database down, nothing of what the questions are about.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtmsearch.config.recorded_text import other_metrics_of
from dtmsearch.core.metric_registry import BUILT_IN, METRICS
from dtmsearch.errors import UserError
from dtmsearch.store import schemas
from dtmsearch.store.codecs import tables
from dtmsearch.store.segment_names import Segment
from dtmsearch.store.store import ResultStore

# DuckDB keeps to this between its operators, not within a function.
MEMORY_LIMIT = "4GB"
_SPILL_LIMIT = "16GB"
_MAX_THREADS = 8
# Large enough to be scanned where they lie, column by column; the others are read whole.
_SCANNED = ("evaluations", "plans", "matrices")
_ATTEMPTS = 4
_USER_ERRORS = (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException, duckdb.PermissionException)


def answer(store: ResultStore, sql: str) -> Iterator[pa.RecordBatch | None]:
    """The batches of one SELECT's answer, at least one. None says that what came so far is void, and that the answer
    begins anew: a segment was found to be damaged, or was compacted away. Raises `UserError`, `MemoryError`."""
    _check_select(sql)
    mentioned = _mentioned(sql)
    whole = {name: _read(store, name) for name in mentioned if name not in _SCANNED}
    for _ in range(_ATTEMPTS):
        scanned = {name: store.segments.live(name) for name in mentioned if name in _SCANNED}
        try:
            yield from _batches(store, sql, whole, scanned)
            return
        except _USER_ERRORS as error:
            raise UserError(_explain(str(error))) from None
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if isinstance(error, MemoryError | duckdb.OutOfMemoryException) or "bad_alloc" in str(error):
                raise MemoryError from error
            failure = error
            # What the scan of a damaged or vanished segment raises reaches us as any failing query does.
            is_gone = isinstance(error, FileNotFoundError)
            if not is_gone and not store.segments.check(s for segments in scanned.values() for s in segments):
                break
            yield None
    raise UserError(_explain(str(failure))) from failure


def _check_select(sql: str) -> None:
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise UserError(_explain(str(error))) from None
    if len(statements) != 1:
        raise UserError(f"query takes exactly one SELECT, got {len(statements)} statements")
    if statements[0].type != duckdb.StatementType.SELECT:
        kind = str(statements[0].type).rpartition(".")[2]
        raise UserError(f"query takes a SELECT and changes nothing, got {kind}")


def _mentioned(sql: str) -> list[str]:
    """Tables whose name is a word of the query: at least those that it reads, if it does not spell them with care."""
    if re.search(r"\bquery(_table)?\s*\(", sql, re.IGNORECASE):
        return list(schemas.SCHEMAS)
    return [name for name in schemas.SCHEMAS if re.search(rf"\b{name}\b", sql, re.IGNORECASE)]


def _read(store: ResultStore, name: str) -> pa.Table:
    if name == "runs":
        return tables.runs_table(store.runs())
    rows = store.table(name)
    return _first_of_each(rows, ("manifest_id", "component")) if name == "components" else rows


def _first_of_each(rows: pa.Table, key: Sequence[str]) -> pa.Table:
    """The first row for each value of the key columns, in order."""
    parts = [rows[name].cast(pa.string()) for name in key]
    codes = pc.binary_join_element_wise(*parts, "\n").combine_chunks().dictionary_encode().indices
    _, first = np.unique(codes.to_numpy(), return_index=True)
    return rows.take(np.sort(first))


def _batches(
    store: ResultStore, sql: str, whole: dict[str, pa.Table], scanned: dict[str, list[Segment]]
) -> Iterator[pa.RecordBatch]:
    with tempfile.TemporaryDirectory(prefix="dtmsearch-query-") as spill, duckdb.connect(":memory:") as connection:
        for name in schemas.SCHEMAS:
            segments = scanned.get(name, [])
            if name == "plans" and segments:
                _register_plans(connection, store, segments)
            elif segments:
                source = store.segments.dataset(name, segments)
                _register_evaluations(connection, store, source) if name == "evaluations" else connection.register(
                    name, source
                )
            else:
                connection.register(name, whole.get(name, schemas.empty(name)))
        _lock_down(connection, spill)
        reader = pa.RecordBatchReader.from_stream(connection.sql(sql))
        yield pa.RecordBatch.from_pylist([], reader.schema)
        yield from reader


def _register_evaluations(connection: duckdb.DuckDBPyConnection, store: ResultStore, rows: object) -> None:
    """Evaluations, with two columns for each metric of another package that a run has named, or that is installed."""
    own = set(schemas.EVALUATIONS.names)
    parts = ["*"]
    named = {name for record in store.runs() for name in other_metrics_of(record.config)}
    for metric in sorted(named | set(METRICS) - set(BUILT_IN)):
        if {metric, f"{metric}_list"} & own:
            continue
        at = f"list_position(other_metrics, '{metric}')"
        parts.append(f'CASE WHEN {at} > 0 THEN other_means[{at}] END AS "{metric}"')
        values = f"other_values[({at} - 1) * num_prompts + 1 : {at} * num_prompts]"
        parts.append(f'CASE WHEN {at} > 0 THEN {values} END AS "{metric}_list"')
    if len(parts) == 1:
        connection.register("evaluations", rows)
        return
    connection.register("recorded_evaluations", rows)
    connection.execute(f"CREATE VIEW evaluations AS SELECT {', '.join(parts)} FROM recorded_evaluations")  # noqa: S608 (names of metrics: letters, digits, _)


def _register_plans(connection: duckdb.DuckDBPyConnection, store: ResultStore, segments: Sequence[Segment]) -> None:
    """Each plan once, though every run that evaluates it writes its rows: of a run's plans, those of earlier ones are
    left out. (DISTINCT over all rows takes seconds where this takes tenths.)"""
    by_run = {key: list(group) for key, group in groupby(segments, lambda segment: segment.key)}
    unrepeated: list[Segment] = []
    parts = ["SELECT * FROM unrepeated_plans"]
    seen = pa.array([], pa.string())
    for number, group in enumerate(by_run.values()):
        rows = store.segments.dataset("plans", group)
        ids = pc.unique(rows.to_table(["plan_id"])["plan_id"]).cast(pa.string()) if len(by_run) > 1 else seen
        again = ids.filter(pc.is_in(ids, seen))
        if len(again) == 0:
            unrepeated += group
        else:
            connection.register(f"plans_{number}", rows)
            connection.register(f"again_{number}", pa.table({"plan_id": again}))
            parts.append(f"SELECT * FROM plans_{number} ANTI JOIN again_{number} USING (plan_id)")  # noqa: S608 (our own names)
        seen = pa.concat_arrays([seen, ids])
    if len(parts) == 1:
        connection.register("plans", store.segments.dataset("plans", unrepeated))
    else:
        connection.register("unrepeated_plans", store.segments.dataset("plans", unrepeated))
        connection.execute(f"CREATE VIEW plans AS {' UNION ALL '.join(parts)}")


def _lock_down(connection: duckdb.DuckDBPyConnection, spill: str) -> None:
    """Nothing but the registered tables can be reached. The order matters: the last setting forbids any other."""
    for setting, value in {
        "temp_directory": f"'{spill}'",
        "max_temp_directory_size": f"'{_SPILL_LIMIT}'",
        "memory_limit": f"'{MEMORY_LIMIT}'",
        "threads": str(min(_MAX_THREADS, os.cpu_count() or 1)),
        "python_enable_replacements": "false",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "enable_external_access": "false",
        "lock_configuration": "true",
    }.items():
        connection.execute(f"SET {setting}={value}")


def _explain(text: str) -> str:
    """DuckDB's message in one line, without its copy of the query; a wrong table's name with the nearest of ours."""
    message = " ".join(re.split(r"\n+\s*LINE \d+:", text)[0].split())
    missing = re.search(r"Table with name (\S+) does not exist", message)
    if missing is None:
        return message
    name, names = missing[1], ", ".join(schemas.SCHEMAS)
    return f"there is no table {name!r}{_nearest(name, schemas.SCHEMAS)}. Tables are {names}"


def _nearest(name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; the nearest is {nearest[0]!r}" if nearest else ""
