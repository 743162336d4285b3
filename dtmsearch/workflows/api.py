"""The package's verbs as a notebook types them: search files as paths, mappings or objects, stores as folders, URLs or
objects, results that show themselves as tables. `dtmsearch/__init__.py` exports them.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtmsearch import config
from dtmsearch.analysis import named_queries, pareto_runs, sql, summary
from dtmsearch.cluster.pool_settings import PoolSettings as Where
from dtmsearch.config import SearchFile
from dtmsearch.core.plan import Plan
from dtmsearch.search.protocols import Observer
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows import estimate as estimating
from dtmsearch.workflows import evaluate as measuring
from dtmsearch.workflows import run as running
from dtmsearch.workflows.check_search import check_search
from dtmsearch.workflows.lookup import StoreLike
from dtmsearch.workflows.session import OpenEvaluator

# A search file as its path, as the mapping that it would hold (relative paths start at the current folder), or loaded.
FileLike = SearchFile | Mapping[str, Any] | str | os.PathLike[str]

DEFAULT_STORE = "dtm-store"
_ROWS_SHOWN = 20


class Rows:
    """Rows of a table: an Arrow table that shows itself in a notebook. pandas, polars and DuckDB take it as it is."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self.table

    def to_pandas(self) -> Any:
        """A pandas DataFrame; needs pandas."""
        return self.table.to_pandas()

    def to_pylist(self) -> list[dict[str, Any]]:
        """The rows as dictionaries of Python values."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(requested_schema)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __repr__(self) -> str:
        return f"Rows({self.table.num_rows} x {self.table.column_names})"

    def _repr_html_(self) -> str:
        names = self.table.column_names
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        rows = (
            "<tr>" + "".join(f"<td>{html.escape(_shown(row[name]))}</td>" for name in names) + "</tr>"
            for row in self.table.slice(0, _ROWS_SHOWN).to_pylist()
        )
        more = self.table.num_rows - _ROWS_SHOWN
        note = f"<p>and {more} more rows</p>" if more > 0 else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}"


class Store(ResultStore):
    """A store with what one asks of it; created when something is first written."""

    def query(self, select: str, time_limit_seconds: float = 60.0) -> pa.Table:
        """Answer one SELECT over the store's tables. Raises `UserError` for anything else."""
        return sql.query(self, select, time_limit_seconds)

    def ask(self, name: str, run: str) -> pa.Table:
        """Answer a named query (`dtmsearch query --ask`) about a run."""
        return named_queries.ask(self, name, run)

    def open_run(self, name: str) -> Run:
        """A run of this store. Raises `UserError` when there is none of that name."""
        summary.record_of(self, name)
        return Run(self, name)

    def __iter__(self) -> Iterator[Run]:
        return (Run(self, record.run) for record in self.runs())

    def _repr_html_(self) -> str:
        rows = [
            {"run": each.run, "status": each.status, "evaluations": each.num_evaluations, "bits": each.bits_per_weight}
            for each in summary.runs_overview(self)
        ]
        title = f"<p>store {html.escape(self.url)}</p>"
        return title + (Rows(pa.Table.from_pylist(rows))._repr_html_() if rows else "<p>no runs yet</p>")


class Run:
    """A search as its store holds it, read when it is first asked. What a summary says (`status`, `bits_per_weight`,
    `verdict`, ...) can be asked of the run itself too."""

    def __init__(self, store: Store, name: str, found: summary.RunSummary | None = None) -> None:
        self.store, self.name = store, name
        self._found = found

    @property
    def summary(self) -> summary.RunSummary:
        """What the run has come to: sizes, held-out values, the verdict."""
        if self._found is None:
            self._found = summary.summarize_run(self.store, self.name)
        return self._found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.summary, name)

    @property
    def plan(self) -> Plan | None:
        """The plan that the search came to; None while it has none."""
        return self.summary.final_plan

    @property
    def evaluations(self) -> Rows:
        """Every evaluation of the run, a row each, with its values by prompt."""
        return self._rows("evaluations")

    @property
    def steps(self) -> Rows:
        """Every decision of the search, a row each."""
        return self._rows("steps")

    def _rows(self, table: str) -> Rows:
        return Rows(self.store.table(table, run=self.name))

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.summary.status}, {self.summary.num_evaluations} evaluations)"

    def _repr_html_(self) -> str:
        found = self.summary
        facts = {
            "run": found.run,
            "status": found.status,
            "model": found.model,
            "evaluations": found.num_evaluations,
            "bits per weight": None if found.bits_per_weight is None else f"{found.bits_per_weight:.2f}",
            "verdict": found.verdict,
        }
        shown = {key: str(value) for key, value in facts.items() if value}
        cells = "".join(f"<tr><th>{key}</th><td>{html.escape(value)}</td></tr>" for key, value in shown.items())
        return f"<table>{cells}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def open_store(store: StoreLike = DEFAULT_STORE) -> Store:
    """The store at a local folder or a bucket's URL; created on first writing."""
    if isinstance(store, Store):
        return store
    if isinstance(store, ResultStore):
        return Store(store.folder, on_note=store.on_note)
    return Store(store)


def search_file(file: FileLike, overrides: Sequence[str] = ()) -> SearchFile:
    """A search file from its path, a mapping, or itself, with overrides such as `search.width=4`.

    Raises `UserError` for a file that is not there or does not hold a search.
    """
    if isinstance(file, SearchFile) and not overrides:
        return file
    if isinstance(file, SearchFile):
        return config.parse(file.to_yaml(), "the search", file.folder, tuple(overrides))
    if isinstance(file, Mapping):
        return config.from_mapping(file, "the search", Path.cwd(), tuple(overrides))
    return config.load(os.fspath(file), tuple(overrides))


def run(
    file: FileLike,
    store: StoreLike = DEFAULT_STORE,
    where: Where = Where(),
    observer: Observer | None = None,
    *,
    overrides: Sequence[str] = (),
    evaluator: OpenEvaluator | None = None,
) -> Run:
    """Start a search, or continue it where it was; a finished one returns at once. `evaluator(file, where)` opens what
    has the model, a `ModelEvaluator`, in the place of the replicas that `where` asks for.

    Raises `UserError` for a user's mistake, `SearchStopped` when it was stopped or interrupted (it can be resumed),
    `StoreError`, `ClusterUnreachable`, `SearchFailed`.
    """
    opened, loaded = open_store(store), search_file(file, overrides)
    return Run(opened, loaded.run, running.run(loaded, opened, where, observer, evaluator))


def resume(
    name: str,
    store: StoreLike = DEFAULT_STORE,
    where: Where = Where(),
    observer: Observer | None = None,
    *,
    evaluator: OpenEvaluator | None = None,
) -> Run:
    """Continue a search by its name, from the search file that the store remembers; `evaluator` as in `run`."""
    opened = open_store(store)
    return Run(opened, name, running.resume(name, opened, where, observer, evaluator))


def demo(
    store: StoreLike = DEFAULT_STORE, where: Where = Where(in_process=True), observer: Observer | None = None
) -> Run:
    """A whole search of the model inside the package, in this process unless `where` says otherwise."""
    opened = open_store(store)
    found = running.demo(opened, where, observer)
    return Run(opened, found.run, found)


def stop(name: str, store: StoreLike = DEFAULT_STORE, reason: str = "") -> str | None:
    """Ask a running search to stop; for one that was submitted, the command that continues it."""
    return running.stop(name, open_store(store), reason)


def evaluate(
    file: FileLike,
    plan: str,
    store: StoreLike = DEFAULT_STORE,
    where: Where = Where(),
    observer: Observer | None = None,
    *,
    evaluator: OpenEvaluator | None = None,
) -> measuring.PlanMeasurement:
    """Measure one plan (a plan file, a run's name, `uniform:SCHEME`) on the prompts of a search file; `evaluator` as in
    `run`."""
    return measuring.evaluate(search_file(file), plan, open_store(store), where, observer, evaluator)


def estimate(file: FileLike, where: Where = Where(), *, evaluator: OpenEvaluator | None = None) -> estimating.Estimate:
    """What a search will cost, before it runs: evaluations, tokens, memory, seconds, as timed on this machine;
    `evaluator` as in `run`."""
    return estimating.estimate(search_file(file), where, evaluator)


def validate(file: FileLike) -> SearchFile:
    """Check a search file, its texts and its model's folder; the file as it was understood. Raises `UserError`."""
    loaded = search_file(file)
    check_search(loaded)
    return loaded


def query(store: StoreLike, select: str, time_limit_seconds: float = 60.0) -> pa.Table:
    """Answer one SELECT over a store's tables. Raises `UserError` for anything else."""
    return open_store(store).query(select, time_limit_seconds)


def ask(store: StoreLike, name: str, run: str) -> pa.Table:
    """Answer a named query about a run."""
    return open_store(store).ask(name, run)


def ls(store: StoreLike = DEFAULT_STORE) -> list[summary.RunOverview]:
    """A line about every run of a store."""
    return summary.runs_overview(open_store(store))


def status(store: StoreLike, run: str) -> summary.RunSummary:
    """How far a run is, what it found, and how its plan does on held-out prompts."""
    return summary.summarize_run(open_store(store), run)


def pareto(store: StoreLike = DEFAULT_STORE, pattern: str = "*") -> list[pareto_runs.Candidate]:
    """The validated plans of runs that match a pattern, each with whether another beats it in size and quality."""
    return pareto_runs.candidates(open_store(store), pattern)
