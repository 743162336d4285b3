"""The command line in processes of its own, and what happens to such processes: for tests from end to end.

Processes are forked from a server that has imported what the command imports, torch and Ray among it: an interpreter
of its own would be at that for seconds each time. `ended([COMMAND, ...])` is the command as a shell starts it.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import ray_forks
import yaml
from gate import Gate
from tiny import TEXT, TRAINING, llama_config, write_model

from dtmsearch.store.store import ResultStore

COMMAND = str(Path(sys.executable).with_name("dtmsearch"))
# The longest that anything waited for here may take, on a machine that is busy with other things.
PATIENCE_SECONDS = 180.0
# What differs between evaluations of two runs of one search: where and when.
CIRCUMSTANCES = ("replica", "node", "attempts", "wall_seconds", "finished_at")

_STARTING = threading.Lock()

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    offline = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    # Several processes share few CPUs here: a thread that waits by spinning would take them from the others.
    return os.environ | offline | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def dtmsearch(*arguments: str | Path, cwd: Path | None = None) -> Ended:
    """The command, from start to end."""
    return forked(_command, *map(str, arguments), cwd=cwd)


def without_ray(*arguments: str | Path, cwd: Path | None = None) -> Ended:
    """The command with a Ray that refuses to start."""
    return forked(_command_without_ray, *map(str, arguments), cwd=cwd)


def forked(work: Callable[..., int], *arguments: str, cwd: Path | None = None) -> Ended:
    """What a function of a module ends with in a process of its own, and what it says there."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = _start(work, arguments, out, err, environment(), cwd)
        process.join(PATIENCE_SECONDS)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join(PATIENCE_SECONDS)
        return Ended(process.exitcode, out.read_text(), err.read_text())


def ended(command: list[str], cwd: Path | None = None) -> Ended:
    """A command in an interpreter of its own, from start to end."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=PATIENCE_SECONDS, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def _start(
    work: Callable[..., int],
    arguments: tuple[str, ...],
    out: Path,
    err: Path,
    variables: Mapping[str, str],
    cwd: Path | None = None,
) -> ray_forks.Fork:
    """A process of the fork server's that does `work`, a function of a module, in a process group of its own. Its exit
    code is what `work` returns."""
    place = serving_ray()
    with_forks = dict(variables) | ray_forks.environment(place)
    named = f"{work.__module__}:{work.__name__}"
    with Path(os.devnull).open() as nothing, out.open("ab") as said, err.open("ab") as wrong:
        streams = [stream.fileno() for stream in (nothing, said, wrong)]
        return ray_forks.Fork(place, named, arguments, with_forks, str(cwd or Path.cwd()), streams)


def serving_ray() -> Path:
    """The folder in which processes are asked for, Ray's Python processes too (see ray_forks.py): of one fork server
    for all workers of a pytest, which the first that asks starts."""
    with _STARTING:  # once, also where threads ask for it together
        return _serving_ray()


@functools.cache
def _serving_ray() -> Path:
    shared = os.environ.get("PYTEST_XDIST_TESTRUNUID", "")[:8]
    parent = os.getppid() if shared else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"dtm-{shared or parent}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "asked").exists():
            return folder
        ray_forks.write_stub(folder)
        own = environment() | ray_forks.environment(folder)
        own["PYTHONPATH"] = _with_tests(os.environ.get("PYTHONPATH", ""))
        command = [sys.executable, str(Path(__file__).with_name("imported.py")), str(folder), str(parent)]
        os.posix_spawn(sys.executable, command, own, setsid=True)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (folder / "asked").exists():
            assert time.monotonic() < deadline, "the fork server does not start"
            time.sleep(0.01)
    return folder


def forking_python() -> str:
    """An interpreter whose scripts and modules, and what they start, are forks too."""
    return str(serving_ray() / "python")


def fork_for_ray() -> None:
    """Have a Ray that this process starts from now on fork its Python processes."""
    os.environ.update(ray_forks.environment(serving_ray()))
    ray_forks.use()


def _with_tests(python_path: str) -> str:
    return os.pathsep.join(filter(None, (str(Path(__file__).parent), python_path)))


def _command(*arguments: str) -> int:
    from dtmsearch.cli import main

    return main(list(arguments))


def _command_without_ray(*arguments: str) -> int:
    import ray

    def refuse(**_: object) -> None:
        sys.exit("Ray was started")

    ray.init = refuse
    return _command(*arguments)


def _gated(*arguments: str) -> int:
    import gated

    return gated.command(list(arguments))


def _gated_toy(*arguments: str) -> int:
    import gated

    return gated.toy_command(list(arguments))


class Driver:
    """The command at work, in a process group of its own, as a shell would start it, with a gate over a model or over
    the `toy` one. Use in a `with` statement."""

    def __init__(self, log: Path, *arguments: str | Path, gate: Gate | None = None, toy: bool = False) -> None:
        self._log = log
        variables = environment() | ({} if gate is None else gate.environment)
        work = _command if gate is None else _gated_toy if toy else _gated
        log.unlink(missing_ok=True)
        self._process = _start(work, tuple(map(str, arguments)), log, log, variables)

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def is_running(self) -> bool:
        return self._process.join(0.0) is None

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait until something happened; that this process has ended first is an error."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            assert self.is_running, f"ended too early, with {self._process.exitcode}:\n{self.output}"
            assert time.monotonic() < deadline, f"waited too long:\n{self.output}"
            time.sleep(0.1)  # what is asked may read a store, and takes the process's CPU

    def says(self, text: str) -> bool:
        return text in self.output

    def starts(self, name: str) -> bool:
        """Whether a process with `name` in its command line runs below this one."""
        return bool(self.below(name))

    def below(self, name: str) -> list[int]:
        """Ids of the processes below this one with `name` in their command line."""
        return below(self._process.pid, name)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        """As a terminal does with Ctrl-C."""
        os.killpg(self._process.pid, number)

    def kill(self, name: str) -> None:
        """SIGKILL to one process below this one, such as the raylet."""
        os.kill(self.below(name)[0], signal.SIGKILL)

    def wait(self) -> int:
        """The exit code. That it does not end is an error."""
        self._process.join(PATIENCE_SECONDS)
        assert not self.is_running, f"does not end:\n{self.output}"
        return int(self._process.exitcode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """It does not outlive the `with` statement."""
        if self.is_running:
            self.signal(signal.SIGTERM)
            self._process.join(20.0)
        if self.is_running:
            self.signal_group(signal.SIGKILL)
            self._process.join(PATIENCE_SECONDS)


def process_ends(pid: int) -> bool:
    """Whether a process ends before our patience does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while _command_line(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def below(pid: int, name: str) -> list[int]:
    """Process ids of descendants with `name` in their command line."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    folder = os.environ.get(ray_forks.VARIABLE) or serving_ray()
    parents |= {fork: stub for stub, fork in ray_forks.forks(set(parents), Path(folder)).items()}
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return sorted(child for child in below - {pid} if name in _command_line(child))


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def tiny_search(folder: Path, **changes: Any) -> Path:
    """A search file over a tiny model of random weights, both in `folder`; `changes` replace its keys, such as
    `search__width`."""
    if not (folder / "model").is_dir():
        write_model(folder / "model", llama_config(num_hidden_layers=2))
        (folder / "text.txt").write_text(TEXT)
        (folder / "train.txt").write_text(TRAINING)
    content: dict[str, Any] = {
        "run": "tiny",
        "model": {"path": "model", "dtype": "float32"},
        "prompts": {"files": ["text.txt"], "count": 8, "prompt_tokens": 10, "continuation_tokens": 12},
        "validation": {"files": ["text.txt"], "count": 6, "seed": 1},
        "search": {"strategy": "beam", "width": 2, "schemes": ["int4-channel", "int8-channel"], "stop": {"share": 0.4}},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = content
        for name in sections:
            section = section[name]
        section[last] = value
    path = folder / f"{content['run']}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def rows(store: Path, table: str, run: str | None = None, without: tuple[str, ...] = ()) -> Rows:
    """A table's rows in recorded order; no rows where nothing is recorded yet."""
    found: Rows = ResultStore(store).table(table, run=run).to_pylist()
    return [{key: value for key, value in row.items() if key not in without} for row in found]


def num_recorded(store: Path, run: str = "tiny") -> int:
    """Evaluations that are recorded for a run."""
    return ResultStore(store).table("evaluations", ["evaluation_id"], run).num_rows


def last_status(store: Path, run: str = "tiny") -> str:
    record = ResultStore(store).run(run)
    assert record is not None
    return record.status


def no_traceback(done: Ended) -> bool:
    return "Traceback" not in done.err + done.out


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at `folder`, which can fill up or turn read-only. Skips where mounting is forbidden."""
    folder.mkdir()
    mounted = ended(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)])
    if mounted.code != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.err.strip()}")
    try:
        yield folder
    finally:
        ended(["umount", "--lazy", str(folder)])


def remount(folder: Path, options: str) -> None:
    assert ended(["mount", "-o", f"remount,{options}", str(folder)]).code == 0
