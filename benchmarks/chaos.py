"""Searches that are disturbed in every way, for real, held against the same searches undisturbed.

    python benchmarks/chaos.py --kills 200 [--seed 0] [--replicas 2] [--seconds 0.02]

A Ray cluster of two nodes, each with a raylet process of its own, on this machine; a driver process that runs the real
`run` over the real pool and store; replicas without a model (`faulty.py`). A seed draws what happens next and when:

    driver    SIGKILL of the driver                     replica   SIGKILL of a replica
    hang      SIGSTOP of a replica                      lie       a replica returns wrong numbers from now on
    worker    SIGKILL of the second node's raylet       head      SIGKILL of the head's control process (gcs_server)
    disk      the store's disk is full (a real one,     writes    every k-th write to the store fails
              where file systems can be mounted)        second    a second driver starts

After each fault the harness starts again what a supervisor would (the driver, the node, the cluster). What the store
had recorded when a driver went must be there at the end, unchanged. When a search ends before all kills are done, the
next begins. Exit code 1 when anything was lost or a plan differs.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from chaos_machines import PATIENCE_SECONDS, Machines, environment
from chaos_search import WEIGHTS, Disturbed, Tally, write_search

from dtmsearch.store.store import ResultStore

# What differs between two runs of one search: where and when; and who guessed that an evaluation would be asked for.
_CIRCUMSTANCES = (
    "replica",
    "node",
    "attempts",
    "wall_seconds",
    "finished_at",
    "step",
    "parent_plan_id",
    "perturbation",
)


def table(store: Path, name: str, run: str, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    rows = ResultStore(store).table(name, run=run).to_pylist()
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


def compare(calm: Path, disturbed: Path, run: str, tally: Tally) -> None:
    """Hold a disturbed search against the same one undisturbed: plan, steps, and every evaluation's values."""
    same = final_plan(calm, run) == final_plan(disturbed, run) != b""
    same &= table(calm, "steps", run, ("wall_seconds",)) == table(disturbed, "steps", run, ("wall_seconds",))
    tally.plans_alike += same
    tally.plans_different += not same
    values = {row["evaluation_id"]: row for row in table(calm, "evaluations", run, _CIRCUMSTANCES)}
    found = {row["evaluation_id"]: row for row in table(disturbed, "evaluations", run, _CIRCUMSTANCES)}
    tally.values_different += sum(found.get(i) != row for i, row in values.items())


def final_plan(store: Path, run: str) -> bytes:
    """The plan's rows in their order, as text."""
    results = ResultStore(store)
    record = results.run(run)
    assert record is not None and record.status == "finished", f"{run} is {record}"
    rows = [row for row in table(store, "plans", run) if row["plan_id"] == record.final_plan_id]
    return repr(rows).encode() if rows else b""


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A place for the store: a small file system of its own, where that can be had."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def undisturbed(machines: Machines, file: Path, store: Path, folder: Path, replicas: int) -> None:
    (folder / "seconds").write_text("0")
    calm = Disturbed(machines, file, store, folder, replicas, Tally(), lambda _: None)
    assert calm.process.wait(PATIENCE_SECONDS) == 0, f"the undisturbed search failed; see {folder}"


def disturb(
    kills: int,
    seed: int,
    replicas: int,
    seconds: float,
    layers: int,
    width: int,
    between: tuple[int, float],
    faults: Sequence[str] = tuple(WEIGHTS),
    say: Callable[[str], None] = lambda _: None,
) -> Tally:
    """Searches with at least `kills` kills, drawn from `seed`; what became of them."""
    tally, chance = Tally(), random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    os.environ.update(environment(folder))
    machines = Machines()
    try:
        with disk(folder / "disk") as place:
            number = 0
            while tally.kills < kills:
                file = write_search(folder, f"search-{number}", layers, width, seed + number)
                undisturbed(machines, file, folder / "calm", folder, replicas)
                (folder / "seconds").write_text(str(seconds))
                search = Disturbed(machines, file, place / "store", folder, replicas, tally, say)
                search.run(chance, lambda: tally.kills < kills, between, faults)
                compare(folder / "calm", place / "store", file.stem, tally)
                say(f"search {number} done: {tally}")
                number += 1
    finally:
        machines.stop()
    if tally.sound:
        shutil.rmtree(folder, ignore_errors=True)
    return tally


@click.command(help=__doc__)
@click.option("--kills", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--replicas", default=2, show_default=True)
@click.option("--seconds", default=0.02, show_default=True, help="Of an evaluation.")
@click.option("--layers", default=8, show_default=True, help="Of four components each.")
@click.option("--width", default=4, show_default=True)
@click.option("--evaluations", default=60, show_default=True, help="Most evaluations between two faults.")
@click.option("--faults", default=",".join(WEIGHTS), show_default=True, help="Those to draw from.")
@click.option("--pause", default=2.0, show_default=True, help="Most seconds more between two faults.")
def main(
    kills: int,
    seed: int,
    replicas: int,
    seconds: float,
    layers: int,
    width: int,
    evaluations: int,
    faults: str,
    pause: float,
) -> None:
    started_at = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - started_at:7.1f} s  {text}", err=True)

    tally = disturb(kills, seed, replicas, seconds, layers, width, (evaluations, pause), faults.split(","), say)
    click.echo(f"{tally.kills} kills in {time.monotonic() - started_at:.0f} s, {tally.sessions} drivers")
    for kind in WEIGHTS:
        click.echo(f"  {kind:<10}{tally.faults[kind]:>6}")
    click.echo(f"searches that ended with the undisturbed plan, byte for byte: {tally.plans_alike}")
    click.echo(f"searches that did not: {tally.plans_different}")
    click.echo(f"evaluations recorded: {tally.evaluations}; lost: {tally.lost}; changed: {tally.changed}")
    click.echo(f"evaluations with other values than undisturbed: {tally.values_different}")
    click.echo(f"replicas dismissed by a canary: {tally.dismissed}; given up as hung: {tally.hung}")
    click.echo(f"second drivers refused: {tally.refused}")
    sys.exit(0 if tally.sound else 1)


if __name__ == "__main__":
    main()
