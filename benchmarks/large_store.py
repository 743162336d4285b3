"""A store of millions of evaluations: time and memory to resume one run, and to ask for the best plan.

    python benchmarks/large_store.py [--evaluations 10000000] [--runs 40] [--prompts 100] [--depth 30]

Segments are written as compaction leaves them, from random columns; a plan has 1 to twice `--depth` components. Each
question is asked in a process of its own, whose largest memory is reported. The store is removed afterwards unless
--store names a place to keep it.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa

from dtmsearch.analysis.sql import query
from dtmsearch.store import schemas
from dtmsearch.store.codecs.columns import coded_constant
from dtmsearch.store.segment_names import Segment
from dtmsearch.store.store import ResultStore

_PER_SEGMENT = 32_768
_COMPONENTS = 224
_BEST = "SELECT plan_id, fdt_mean FROM evaluations ORDER BY fdt_mean DESC LIMIT 1"
_BEST_OF_RUN = "SELECT plan_id, fdt_mean FROM evaluations WHERE run = 'run-3' ORDER BY fdt_mean DESC LIMIT 1"


def hexadecimal(rng: np.random.Generator, number: int) -> pa.Array:
    """Random ids of 32 hexadecimal digits."""
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[rng.integers(0, 16, (number, 32), np.uint8)]
    return pa.array(digits.view("S32")[:, 0].astype(str), pa.string())


def lists(values: Any, type_: pa.DataType) -> pa.Array:
    number, each = values.shape
    offsets = np.arange(0, number * each + 1, each, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel(), type_))


def evaluations(rng: np.random.Generator, run: str, ids: pa.Array, prompts: int, parents: pa.Array) -> pa.Table:
    number = len(ids)
    fdt = np.minimum(rng.integers(0, 101, (number, prompts), np.int32), rng.integers(50, 101, (number, 1), np.int32))
    sdt = 100 - fdt
    dppl = np.exp(0.01 * sdt).astype(np.float32)
    ordered = np.sort(fdt, axis=1)
    constant = {
        "run": run,
        "purpose": "search",
        "reference_id": "0" * 32,
        "status": "ok",
        "node": "node-0",
        "version": "0",
    }
    columns: dict[str, Any] = {
        "step": np.arange(number, dtype=np.int32) // 1000,
        "evaluation_id": ids,
        "plan_id": ids,
        "parent_plan_id": parents,
        "perturbation": pa.array([f"model.layers.{i % _COMPONENTS}=int8-channel" for i in range(number)]),
        "replica": pa.array([f"replica-{i % 64}" for i in range(number)]),
        "num_compressed": rng.integers(1, 200, number, np.int32),
        "share": rng.random(number),
        "bits_per_weight": 16 * rng.random(number),
        "num_prompts": np.full(number, prompts, np.int32),
        "fdt_mean": fdt.mean(axis=1),
        **{f"fdt_p{p}": ordered[:, prompts * p // 100].astype(float) for p in (25, 50, 75)},
        "sdt_mean": sdt.mean(axis=1),
        "dppl": dppl.mean(axis=1).astype(float),
        "fdt": lists(fdt, pa.int32()),
        "sdt": lists(sdt, pa.int32()),
        "dppl_list": lists(dppl, pa.float32()),
        "tokens": np.full(number, 200 * prompts, np.int64),
        "wall_seconds": rng.random(number),
        "attempts": np.ones(number, np.int32),
        "finished_at": np.arange(number) * 1_000_000,
    }
    arrays = []
    for field in schemas.EVALUATIONS:
        if field.name in constant:
            values = coded_constant(constant[field.name], number)
        elif field.name in columns:
            values = columns[field.name]
            values = values if isinstance(values, pa.Array) else pa.array(values)
            values = values.dictionary_encode() if pa.types.is_dictionary(field.type) else values.cast(field.type)
        else:
            values = pa.nulls(number, field.type)
        arrays.append(values)
    return pa.Table.from_arrays(arrays, schema=schemas.EVALUATIONS)


def plan_rows(rng: np.random.Generator, ids: pa.Array, depth: int) -> pa.Table:
    lengths = rng.integers(1, 2 * depth, len(ids))
    total = int(lengths.sum())
    owner = np.repeat(np.arange(len(ids), dtype=np.int32), lengths)
    names = pa.array([f"model.layers.{i // 7}.block.{i % 7}_proj" for i in range(_COMPONENTS)])
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    component = ((np.arange(total) - starts) * 3 % _COMPONENTS).astype(np.int32)
    constant = np.zeros(total, np.int32)
    arrays = [
        pa.DictionaryArray.from_arrays(pa.array(owner), ids),
        pa.DictionaryArray.from_arrays(pa.array(component), names),
        pa.DictionaryArray.from_arrays(pa.array(constant), pa.array(["int8-channel"])),
        pa.array(np.full(total, 134_000_000, np.int64)),
        pa.array(np.full(total, 16_777_216, np.int64)),
    ]
    return pa.Table.from_arrays(arrays, schema=schemas.PLANS)


def write_store(folder: Path, num_evaluations: int, runs: int, prompts: int, depth: int) -> None:
    """A process for each CPU, for it takes minutes; what a run holds follows from its number."""
    ResultStore(folder).create()
    arguments = [(folder, number, num_evaluations // runs, prompts, depth) for number in range(runs)]
    with Pool() as processes:
        processes.starmap(write_run, arguments, chunksize=1)


def write_run(folder: Path, number: int, left: int, prompts: int, depth: int) -> None:
    store, run, commit = ResultStore(folder), f"run-{number}", 1
    rng = np.random.default_rng([0, number])
    while left:
        ids = hexadecimal(rng, min(left, _PER_SEGMENT))
        parents = ids.take(pa.array(rng.integers(0, 10, len(ids))))
        left -= len(ids)
        for table, rows in (
            ("plans", plan_rows(rng, ids, depth)),
            ("evaluations", evaluations(rng, run, ids, prompts, parents)),
        ):
            store.segments.write(Segment(table, run, (1, commit), (1, commit + 1)), rows)
        commit += 2


def resume(store: ResultStore) -> Iterator[str]:
    """What a driver does before its first new evaluation."""
    with store.writer("run-3") as writer:
        number = sum(1 for _ in writer.replay())
        steps = writer.decisions()
        found = writer.recorded_elsewhere(["0" * 32])
        yield f"{number:,} outcomes, {len(steps)} steps, {len(found)} elsewhere"


def asked(sql: str) -> Callable[[ResultStore], Iterator[str]]:
    def ask(store: ResultStore) -> Iterator[str]:
        yield str(query(store, sql).to_pylist()[0]["fdt_mean"])

    return ask


_QUESTIONS: dict[str, Callable[[ResultStore], Iterator[str]]] = {
    "resume of one run": resume,
    "best of all, in SQL": asked(_BEST),
    "best of a run, in SQL": asked(_BEST_OF_RUN),
}


def answer(question: str, folder: str) -> None:
    """In a process of its own: seconds, those of CPU time, most memory in bytes, and what came out, as JSON."""
    started_at, cpu_started_at = time.perf_counter(), time.process_time()
    (found,) = _QUESTIONS[question](ResultStore(folder))
    seconds, cpu = time.perf_counter() - started_at, time.process_time() - cpu_started_at
    print(json.dumps([seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, found]))


@click.command(help=__doc__)
@click.option("--evaluations", "num_evaluations", default=10_000_000, show_default=True)
@click.option("--runs", default=40, show_default=True)
@click.option("--prompts", default=100, show_default=True)
@click.option("--depth", default=30, show_default=True, help="Components of a plan, on average.")
@click.option("--store", type=click.Path(path_type=Path), help="Where to keep the store, or where it was kept.")
def main(num_evaluations: int, runs: int, prompts: int, depth: int, store: Path | None) -> None:
    folder = store or Path(tempfile.mkdtemp(prefix="dtmsearch-benchmark-"))
    try:
        if not (folder / "store.json").is_file():
            started_at = time.perf_counter()
            write_store(folder, num_evaluations, runs, prompts, depth)
            click.echo(f"written in {time.perf_counter() - started_at:.0f} s", err=True)
        files = list(folder.rglob("*.parquet"))
        size = sum(file.stat().st_size for file in files) / 1e9
        click.echo(f"{num_evaluations:,} evaluations in {runs} runs, {size:.1f} GB in {len(files)} segments")
        for question in _QUESTIONS:
            command = [sys.executable, __file__, "--question", question, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                click.echo(f"  {question:<24} failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            seconds, cpu, memory, found = json.loads(done.stdout)
            click.echo(f"  {question:<24}{seconds:>8.2f} s, CPU {cpu:>6.2f} s{memory / 1e9:>8.2f} GB   {found}")
    finally:
        if store is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--question"]:
        answer(sys.argv[2], sys.argv[3])
    else:
        main()
