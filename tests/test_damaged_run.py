"""A finished search whose rows were damaged says so, measures them again when it is run, and is then as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from processes import CIRCUMSTANCES, rows
from test_api import IN_PROCESS, search_of
from test_store_damage import flip_bytes

import dtmsearch as dtm
from dtmsearch.analysis.summary import summarize_run
from dtmsearch.store import segments
from dtmsearch.store.store import ResultStore


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[dtm.SearchFile, Path]:
    """A search and the store in which it has finished, with few rows in a row group."""
    folder = tmp_path_factory.mktemp("search")
    file = dtm.search_file(search_of(folder, strategy="beam", width=1, stop={"components": 2}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "_ROWS_PER_GROUP", {"evaluations": 4, "plans": 4, "steps": 2})
        dtm.run(file, folder / "store", IN_PROCESS)
    return file, folder / "store"


@pytest.mark.parametrize("table", ["evaluations", "plans", "prompts"])
def test_what_was_damaged_is_measured_again(search: tuple[dtm.SearchFile, Path], table: str, tmp_path: Path) -> None:
    file, whole = search
    shutil.copytree(whole, tmp_path / "store")
    path = max((tmp_path / "store" / table).rglob("*.parquet"), key=lambda path: path.stat().st_size)
    path.write_bytes(flip_bytes(path.read_bytes()))
    damaged = summarize_run(ResultStore(tmp_path / "store"), file.run)
    assert (damaged.status, damaged.missing) == ("incomplete", (table,))
    summary = dtm.run(file, tmp_path / "store", IN_PROCESS).summary
    assert (summary.status, summary.already_complete) == ("finished", False)
    assert summary.final_plan is not None
    assert dtm.run(file, tmp_path / "store", IN_PROCESS).summary.already_complete
    assert evaluations(tmp_path / "store") == evaluations(whole)
    assert summary.final_plan == summarize_run(ResultStore(whole), file.run).final_plan


def evaluations(store: Path) -> list[tuple[str, str]]:
    found = rows(store, "evaluations", without=CIRCUMSTANCES)
    return sorted((row["evaluation_id"], str(row)) for row in found)
