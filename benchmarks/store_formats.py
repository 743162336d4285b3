"""Would a table format of others carry the store? delta-rs and Lance beside our segments.

    pip install deltalake pylance
    python benchmarks/store_formats.py [--evaluations 20000] [--kills 30] [--flips 200]

Each format gets the same Arrow batches of the tables `evaluations` and `plans`, 100 evaluations a commit, and
compacts after every 64 commits, as the store does. Measured: seconds of a commit, reading all of it, bytes on disk;
then writers that are killed at random moments (rows that were acknowledged and are lost, rows that stand twice); then
single bits that are flipped in the files (told as an error, without an effect, or read as other values in silence).
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import click
import numpy as np
import pyarrow as pa
import pyarrow.feather
from store import record_all, timed

from dtmsearch.store.files import LocalFolder
from dtmsearch.store.segment_names import Segment
from dtmsearch.store.segments import Segments
from dtmsearch.store.store import ResultStore

TABLES = ("evaluations", "plans")
EVALUATIONS_PER_COMMIT = 100
COMMITS_BETWEEN_COMPACTIONS = 64


class Format(Protocol):
    """A table in a folder that takes batches of rows."""

    def append(self, rows: pa.Table) -> None: ...

    def compact(self) -> None: ...

    def read(self) -> pa.Table: ...


class OurSegments:
    """The store's own segments, without the locks and the codecs around them."""

    def __init__(self, folder: Path, table: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._segments = Segments(LocalFolder(str(folder), folder))
        self._table, self._commits = table, 0
        self._epoch = self._segments.last_epoch("run") + 1

    def append(self, rows: pa.Table) -> None:
        self._commits += 1
        at = (self._epoch, self._commits)
        self._segments.write(Segment(self._table, "run", at, at), rows)

    def compact(self) -> None:
        self._segments.compact(self._table, "run")

    def read(self) -> pa.Table:
        return self._segments.read(self._table)


class Delta:
    def __init__(self, folder: Path, table: str) -> None:
        self._folder = folder / table

    def append(self, rows: pa.Table) -> None:
        from deltalake import write_deltalake

        write_deltalake(self._folder, rows, mode="append")

    def compact(self) -> None:
        from deltalake import DeltaTable

        table = DeltaTable(self._folder)
        table.optimize.compact()
        table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)

    def read(self) -> pa.Table:
        from deltalake import DeltaTable

        return DeltaTable(self._folder).to_pyarrow_table()


class Lance:
    def __init__(self, folder: Path, table: str) -> None:
        self._folder = folder / f"{table}.lance"

    def append(self, rows: pa.Table) -> None:
        import lance

        lance.write_dataset(rows, str(self._folder), mode="append" if self._folder.exists() else "create")

    def compact(self) -> None:
        import datetime

        import lance

        dataset = lance.dataset(str(self._folder))
        dataset.optimize.compact_files()
        dataset.cleanup_old_versions(datetime.timedelta(0), delete_unverified=False)

    def read(self) -> pa.Table:
        import lance

        return lance.dataset(str(self._folder)).to_table()


FORMATS: dict[str, type[OurSegments] | type[Delta] | type[Lance]] = {
    "segments": OurSegments,
    "delta-rs": Delta,
    "lance": Lance,
}


def batches(tables: dict[str, pa.Table]) -> Iterator[dict[str, pa.Table]]:
    """What each commit writes: 100 evaluations and as large a part of the plans' rows."""
    commits = max(1, len(tables["evaluations"]) // EVALUATIONS_PER_COMMIT)
    for number in range(commits):
        yield {
            name: rows.slice(
                len(rows) * number // commits, len(rows) * (number + 1) // commits - len(rows) * number // commits
            )
            for name, rows in tables.items()
        }


def seconds_of_commits(name: str, folder: Path, tables: dict[str, pa.Table]) -> list[float]:
    open_tables = {table: FORMATS[name](folder, table) for table in TABLES}
    seconds = []
    for number, batch in enumerate(batches(tables), 1):

        def commit(batch: dict[str, pa.Table] = batch, number: int = number) -> None:
            for table, rows in batch.items():
                open_tables[table].append(rows)
                if number % COMMITS_BETWEEN_COMPACTIONS == 0:
                    open_tables[table].compact()

        seconds.append(timed(commit))
    return seconds


def append_until_killed(name: str, folder: Path, rows: Path) -> None:
    """The child of the kill test: one row a commit, said on stdout when `append` has returned."""
    table = pa.feather.read_table(rows)
    opened = FORMATS[name](folder, "evaluations")
    done = len(opened.read()) if any(folder.iterdir()) else 0
    for number in range(done, len(table)):
        opened.append(table.slice(number, 1))
        print(number, flush=True)
        if number % 8 == 7:
            opened.compact()


def kill(name: str, folder: Path, rows: Path, kills: int) -> str:
    """What was lost, doubled or unreadable after so many kills at random moments."""
    generator = np.random.default_rng(0)
    acknowledged = -1
    faults: Counter[str] = Counter()
    folder.mkdir()
    for _ in range(kills):
        command = [sys.executable, __file__, "--child", name, str(folder), str(rows)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:  # noqa: S603
            assert child.stdout is not None
            said = child.stdout.readline().split()
            time.sleep(generator.uniform(0.0, 0.25))
            child.send_signal(signal.SIGKILL)
            said += child.stdout.read().split()
        acknowledged = max([acknowledged, *map(int, said)])
        try:
            ids = FORMATS[name](folder, "evaluations").read()["evaluation_id"].to_pylist()
        except Exception as error:  # whatever a library raises: that is what is measured
            faults[f"unreadable: {type(error).__name__}"] += 1
            continue
        faults["lost"] += max(0, acknowledged + 1 - len(set(ids)))
        faults["doubled"] += len(ids) - len(set(ids))
    return f"{acknowledged + 1} rows: " + ", ".join(f"{n} {what}" for what, n in sorted(faults.items()))


def flip(name: str, folder: Path, flips: int) -> str:
    """How many flips of one bit are an error, have no effect, or change what is read in silence."""
    generator = np.random.default_rng(0)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".lance") and path.is_file())
    whole = FORMATS[name](folder, "evaluations").read()
    found: Counter[str] = Counter()
    for _ in range(flips):
        path = files[generator.integers(len(files))]
        content = bytearray(path.read_bytes())
        content[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
        before = path.read_bytes()
        path.write_bytes(bytes(content))
        try:
            read = FORMATS[name](folder, "evaluations")
            rows = read.read()
            told = isinstance(read, OurSegments) and len(rows) < len(whole)
            found["told" if told else "no effect" if _equal(rows, whole) else "silently other values"] += 1
        except BaseException as error:  # a panic of a Rust library is no `Exception`
            if isinstance(error, KeyboardInterrupt):
                raise
            found["told"] += 1
        path.write_bytes(before)
    return ", ".join(f"{number} {what}" for what, number in sorted(found.items()))


def _equal(one: pa.Table, other: pa.Table) -> bool:
    names = ("evaluation_id", "plan_id", "fdt_mean", "fdt", "sdt", "dppl_list")
    return len(one) == len(other) and all(repr(one[n].to_pylist()) == repr(other[n].to_pylist()) for n in names)


def _plain(rows: pa.Table) -> pa.Table:
    """Without dictionary columns, which delta-rs and Lance store as strings."""
    return rows.cast(
        pa.schema([f.with_type(pa.string()) if pa.types.is_dictionary(f.type) else f for f in rows.schema])
    )


def make_tables(evaluations: int) -> dict[str, pa.Table]:
    with tempfile.TemporaryDirectory() as folder:
        record_all(ResultStore(Path(folder)), evaluations, 100, 224)
        return {table: ResultStore(Path(folder)).table(table).combine_chunks() for table in TABLES}


@click.command(help=__doc__)
@click.option("--evaluations", default=20_000)
@click.option("--kills", default=30)
@click.option("--flips", default=200)
@click.option("--child", nargs=3, hidden=True)
def main(evaluations: int, kills: int, flips: int, child: Sequence[str] | None) -> None:
    if child:
        append_until_killed(child[0], Path(child[1]), Path(child[2]))
        return
    tables = make_tables(evaluations)
    scratch = Path(tempfile.mkdtemp(prefix="dtmsearch-formats-"))
    try:
        for name in FORMATS:
            own = tables if name == "segments" else {table: _plain(rows) for table, rows in tables.items()}
            commits = seconds_of_commits(name, scratch / name, own)
            reading = timed(lambda name=name: [FORMATS[name](scratch / name, table).read() for table in TABLES])  # type: ignore[misc]
            size = sum(path.stat().st_size for path in (scratch / name).rglob("*") if path.is_file())
            few = scratch / f"{name}.feather"
            pa.feather.write_feather(own["evaluations"].slice(0, 400), few)
            for row in (
                f"{name}: commit of {EVALUATIONS_PER_COMMIT}, median {np.median(commits) * 1e3:.1f} ms, mean with "
                f"compactions {np.mean(commits) * 1e3:.1f} ms; all read in {reading:.2f} s; {size / 1e6:.1f} MB",
                f"{name}: after {kills} kills {kill(name, scratch / f'{name}-killed', few, kills)}",
                f"{name}: of {flips} flipped bits {flip(name, scratch / f'{name}-killed', flips)}",
            ):
                click.echo(row)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
