"""Stores for tests: a local one and one in a bucket, a session with them, and what they hold afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
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


# The columns of `evaluations` in stores of format 1.
_FORMAT_1 = (
    *("run", "step", "evaluation_id", "plan_id", "parent_plan_id", "weights_id", "perturbation", "component", "scheme"),
    *("purpose", "label", "reused_from", "reference_id", "status", "message", "num_compressed", "share"),
    *("bits_per_weight", "num_prompts", "fdt_mean", "fdt_p25", "fdt_p50", "fdt_p75", "sdt_mean", "dppl", "ppl", "kl"),
    *("fdt", "sdt", "dppl_list", "ppl_list", "kl_list", "tokens", "wall_seconds", "replica", "node", "attempts"),
    *("finished_at", "version"),
)


def as_format_1(place: Path) -> None:
    """Make a store what it would be had it been written in format 1."""
    for path in place.glob("evaluations/*/*.parquet"):
        pq.write_table(pq.read_table(path, columns=list(_FORMAT_1)), path, write_page_checksum=True)
    (place / "store.json").write_text(json.dumps({"format": 1}))


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
