"""One search of `chaos.py`, what happens to it, and the tally of what came of it."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from chaos_machines import PATIENCE_SECONDS, Machines, until

from dtmsearch.store.store import ResultStore

# How often each fault comes, among all.
WEIGHTS = {
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
FULL, REFUSED = 3, 4


def write_search(folder: Path, run: str, layers: int, width: int, seed: int) -> Path:
    (folder / "text.txt").write_text("nothing that anybody reads " * 1000)
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
                [sys.executable, str(Path(__file__).parent / "chaos_driver.py"), *arguments],
                stdout=stream,
                stderr=stream,
                env=os.environ | variables,
            )

    @property
    def ended(self) -> int | None:
        return self.process.poll()

    def _over(self) -> None:
        """Note what is recorded now that a driver has gone; what was recorded before must still be there."""
        self.process.wait(PATIENCE_SECONDS)
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
            kind = chance.choices(list(faults), [WEIGHTS[name] for name in faults])[0]
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
        assert self.ended in (0, FULL), f"a full disk ends the driver with {self.ended}"
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
        code = second.wait(PATIENCE_SECONDS)
        self._tally.refused += code == REFUSED
        assert code in (0, REFUSED), f"a second driver ended with {code}"
        return True

    def _count_notes(self) -> None:
        text = self._log.read_text(errors="replace")
        self._tally.dismissed += text.count("its canary")
        self._tally.hung += text.count("no answer for")
        self._tally.evaluations += len(self._seen)
