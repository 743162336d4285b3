"""Stores for tests: a local one and one in a bucket, a session with them, and what they hold afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from contracts import ids
from fakes import toy_components, toy_manifest
from pyarrow import fs

from dtmsearch.core.records import RunRecord
from dtmsearch.store.store import ResultStore, RunWriter


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


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From now on the operating system answers whoever writes with this error."""

    def refused(*arguments: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace")):
        monkeypatch.setattr(owner, name, refused)
