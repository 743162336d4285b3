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

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml

from dtmsearch.results.store import ResultStore

_HERE = Path(__file__).parent
# How often each fault comes, among all.
_WEIGHTS = {
    "driver": 24,
    "replica": 34,
    "hang": 8,
    "worker": 10,
    "head": 4,
    "lie": 8,
    "disk": 3,
    "writes": 4,
    "second": 3,
}
KILLS = ("driver", "replica", "hang", "worker", "head")
_PATIENCE_SECONDS = 240.0
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
_FULL, _REFUSED = 3, 4


class Stuck(RuntimeError):
    """Something that must happen did not."""


def until(happened: Callable[[], object], what: str, seconds: float = _PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise Stuck(f"waited {seconds:.0f} s: {what}")
        time.sleep(0.05)


def environment(folder: Path) -> dict[str, str]:
    """For the cluster and the driver: short timeouts, so that a death is noticed in seconds."""
    paths = os.pathsep.join((str(_HERE), str(_HERE.parent), os.environ.get("PYTHONPATH", "")))
    return {
        "PYTHONPATH": paths,
        "CHAOS_FOLDER": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_initial_delay_ms": "2000",
        "RAY_health_check_failure_threshold": "5",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "4",
        "RAY_gcs_server_request_timeout_seconds": "4",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


class Machines:
    """Two nodes of a Ray cluster: a head and a worker, one replica's processors each."""

    def __init__(self) -> None:
        self._cluster: Any = None
        self._worker: Any = None
        self.start()

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self._worker = self._cluster.add_node(num_cpus=1)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def kill_worker(self) -> None:
        self._kill(self._worker, "raylet")
        self._cluster.remove_node(self._worker, allow_graceful=False)
        self._worker = self._cluster.add_node(num_cpus=1)

    def kill_head(self) -> None:
        self._kill(self._cluster.head_node, "gcs_server")

    def restart(self) -> None:
        with suppress(Exception):  # half of it is dead
            self._cluster.remove_node(self._worker, allow_graceful=False)
        with suppress(Exception):
            self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)
        self._cluster.worker_nodes.clear()
        self.start()

    @staticmethod
    def _kill(node: Any, kind: str) -> None:
        process = node.all_processes[kind][0].process
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        with suppress(Exception):
            self._cluster.shutdown()

    def replicas(self) -> list[int]:
        """Process ids of the replicas, which run below our raylets."""
        return [pid for pid, command in below(os.getpid()) if command.startswith("ray::_Host")]


def below(pid: int) -> list[tuple[int, str]]:
    """(process id, command line) of all processes below one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    commands = []
    for child in sorted(found - {pid}):
        with suppress(OSError):
            commands.append((child, Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()))
    return commands


def write_search(folder: Path, run: str, layers: int, width: int, seed: int) -> Path:
    (folder / "text.txt").write_text("nothing that anybody reads")
    content = {
        "run": run,
        "model": {"path": f"faulty {layers}"},
        "prompts": {"files": ["text.txt"], "count": 16, "prompt_tokens": 4, "continuation_tokens": 1000, "seed": seed},
        "validation": {"files": ["text.txt"], "count": 8, "seed": seed + 1000},
        "search": {
            "strategy": "beam",
            "width": width,
            "schemes": ["int4-channel", "int8-channel"],
            "stop": {"share": 0.9},
        },
    }
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def recorded(store: Path, run: str) -> dict[str, str]:
    """Evaluation id -> a digest of all that is recorded of it."""
    if not (store / "store.json").is_file():
        return {}
    rows = ResultStore(store).table("evaluations", run=run).to_pylist()
    return {row["evaluation_id"]: hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest() for row in rows}


def num_recorded(store: Path, run: str) -> int:
    if not (store / "store.json").is_file():
        return 0
    return int(ResultStore(store).table("evaluations", ["evaluation_id"], run).num_rows)


@dataclass
class Tally:
    """What happened to all searches."""

    faults: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    evaluations: int = 0
    lost: int = 0
    changed: int = 0
    dismissed: int = 0
    hung: int = 0
    refused: int = 0
    plans_alike: int = 0
    plans_different: int = 0
    values_different: int = 0

    @property
    def kills(self) -> int:
        return sum(self.faults[kind] for kind in KILLS)

    @property
    def sound(self) -> bool:
        return not (self.lost or self.changed or self.plans_different or self.values_different)


class Disturbed:
    """One search, and what happens to it."""

    def __init__(
        self,
        machines: Machines,
        file: Path,
        store: Path,
        folder: Path,
        replicas: int,
        tally: Tally,
        say: Callable[..., None],
    ) -> None:
        self._machines, self._file, self._store, self._folder = machines, file, store, folder
        self._run, self._replicas, self._tally, self._say = file.stem, replicas, tally, say
        self._seen: dict[str, str] = {}
        self._log = folder / f"{self._run}.log"
        self.start()

    def start(self, **variables: str) -> None:
        self._tally.sessions += 1
        self.process = self._spawn(self._log, variables)

    def _spawn(self, log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        arguments = [str(self._file), str(self._store), self._machines.address, str(self._replicas)]
        with log.open("ab") as stream:
            return subprocess.Popen(
                [sys.executable, str(_HERE / "chaos_driver.py"), *arguments],
                stdout=stream,
                stderr=stream,
                env=os.environ | variables,
            )

    @property
    def ended(self) -> int | None:
        return self.process.poll()

    def _over(self) -> None:
        """Note what is recorded now that a driver has gone; what was recorded before must still be there."""
        self.process.wait(_PATIENCE_SECONDS)
        now = recorded(self._store, self._run)
        self._tally.lost += len(self._seen.keys() - now.keys())
        self._tally.changed += sum(now.get(i, digest) != digest for i, digest in self._seen.items())
        self._seen = now

    def run(
        self, chance: random.Random, wanted: Callable[[], bool], between: tuple[int, float], faults: Sequence[str]
    ) -> None:
        """Until the search has ended; disturbed as long as `wanted`, after up to so many evaluations and seconds."""
        while True:
            more = num_recorded(self._store, self._run) + (chance.randint(0, between[0]) if wanted() else 1 << 60)
            until(
                lambda more=more: self.ended is not None or num_recorded(self._store, self._run) >= more, "no progress"
            )
            if self.ended is None and wanted():
                time.sleep(chance.random() * between[1])
            if self.ended == 0:
                self._over()
                break
            if self.ended is not None:
                self._say(f"the driver ended by itself, with {self.ended}")
                self._over()
                self.start()
                continue
            kind = chance.choices(list(faults), [_WEIGHTS[name] for name in faults])[0]
            before = num_recorded(self._store, self._run)
            if getattr(self, f"fault_{kind}")(chance):
                self._tally.faults[kind] += 1
                self._say(f"{kind:<8} after {before:>6} evaluations; {self._tally.kills} kills")
        self._count_notes()

    def again(self) -> None:
        self._over()
        self.start()

    def fault_driver(self, chance: random.Random) -> bool:
        self.process.kill()
        self.again()
        return True

    def _signal_replica(self, chance: random.Random, number: signal.Signals) -> bool:
        replicas = self._machines.replicas()
        if not replicas:
            return False
        with suppress(ProcessLookupError):
            os.kill(chance.choice(replicas), number)
            return True
        return False

    def fault_replica(self, chance: random.Random) -> bool:
        return self._signal_replica(chance, signal.SIGKILL)

    def fault_hang(self, chance: random.Random) -> bool:
        return self._signal_replica(chance, signal.SIGSTOP)

    def fault_lie(self, chance: random.Random) -> bool:
        (self._folder / "lie").touch()
        return True

    def fault_worker(self, chance: random.Random) -> bool:
        self._machines.kill_worker()
        return True

    def fault_head(self, chance: random.Random) -> bool:
        """The driver must notice by itself."""
        self._machines.kill_head()
        until(lambda: self.ended is not None, "the driver goes on without a head")
        self._machines.restart()
        self.again()
        return True

    def fault_disk(self, chance: random.Random) -> bool:
        """Fill the store's own file system up until the driver gives up; then make room."""
        if not os.path.ismount(self._store.parent):
            return False
        filler = self._store.parent / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        until(lambda: self.ended is not None, "the driver goes on with a full disk")
        done = self.ended == 0
        assert self.ended in (0, _FULL), f"a full disk ends the driver with {self.ended}"
        filler.unlink()
        if done:
            return False
        self.again()
        return True

    def fault_writes(self, chance: random.Random) -> bool:
        """Kill the driver; the next one has a store that fails every k-th write, until one that fails ends it."""
        self.process.kill()
        self._over()
        self.start(CHAOS_FAIL_EVERY=str(chance.randint(3, 12)))
        until(lambda: self.ended is not None, "the driver goes on with a failing store")
        if self.ended == 0:
            return True
        self.again()
        return True

    def fault_second(self, chance: random.Random) -> bool:
        second = self._spawn(self._folder / "second.log", {})
        code = second.wait(_PATIENCE_SECONDS)
        self._tally.refused += code == _REFUSED
        assert code in (0, _REFUSED), f"a second driver ended with {code}"
        return True

    def _count_notes(self) -> None:
        text = self._log.read_text(errors="replace")
        self._tally.dismissed += text.count("its canary")
        self._tally.hung += text.count("no answer for")
        self._tally.evaluations += len(self._seen)


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
    assert calm.process.wait(_PATIENCE_SECONDS) == 0, f"the undisturbed search failed; see {folder}"


def disturb(
    kills: int,
    seed: int,
    replicas: int,
    seconds: float,
    layers: int,
    width: int,
    between: tuple[int, float],
    faults: Sequence[str] = tuple(_WEIGHTS),
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
@click.option("--faults", default=",".join(_WEIGHTS), show_default=True, help="Those to draw from.")
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
    for kind in _WEIGHTS:
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
