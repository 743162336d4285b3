"""The Python processes of a test's Ray as forks of one that has imported what they import.

Ray starts its workers and its own agents as `PYTHON SCRIPT ARGUMENT...`: interpreters that import Ray, and most of
them torch and transformers, for one to six seconds of CPU time each. Here PYTHON is a small program, the stub, that
has `serve` fork a process to run the script in (or the module of `-m`), with the stub's environment, folder, streams
and signal mask. The two end together, whatever ends one of them.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import marshal
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# The folder of the stub, of the socket that it asks, and of a file for each stub, named by its process id, that holds
# the id of its fork: what runs below a stub is no child of it.
VARIABLE = "DTMSEARCH_TEST_RAY_FORKS"

_STUB = """#!{python} -IS
import _signal, _socket, marshal, os, struct, sys
if sys.argv[1][0] == "-" and sys.argv[1] not in ("-u", "-m"):
    os.execv({own!r}, [{own!r}, *sys.argv[1:]])
link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
link.connect({address!r})
masked = [int(number) for number in _signal.pthread_sigmask(_signal.SIG_BLOCK, [])]
said = marshal.dumps((os.getpid(), sys.argv[1:], dict(os.environ), os.getcwd(), masked))
link.sendmsg([struct.pack("Q", len(said))], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("3i", 0, 1, 2))])
link.sendall(said)
(fork,) = struct.unpack("i", link.recv(4, _socket.MSG_WAITALL))
for number in (1, 2, 3, 10, 12, 15):
    _signal.signal(number, lambda number, _: os.kill(fork, number))
ended = link.recv(4, _socket.MSG_WAITALL)
(code,) = struct.unpack("i", ended) if ended else (1,)
if code < 0:
    _signal.signal(-code, _signal.SIG_DFL) if -code != 9 else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def write_stub(folder: Path) -> None:
    """Make `folder` what `serve` and `use` want."""
    stub = folder / "python"
    stub.write_text(
        _STUB.format(python=Path(sys.executable).resolve(), own=sys.executable, address=str(folder / "asked"))
    )
    stub.chmod(0o755)


def environment(folder: Path) -> dict[str, str]:
    """What processes that start a Ray, or are to be one's, have in theirs."""
    return {VARIABLE: str(folder)}


def use() -> None:
    """Have a Ray that this process starts fork its Python processes, where its environment says from what."""
    folder = os.environ.get(VARIABLE)
    if folder is not None:
        from ray._private import services
        from ray._private.node import Node
        from ray._raylet import Config

        Config.initialize("")  # of this environment, not of the one in which Ray was imported
        services.sys = _Elsewhere(folder)  # type: ignore[attr-defined]
        _leave_out_what_watches(Node)


def _leave_out_what_watches(node: Any) -> None:
    """No local Ray here grows by itself or sends its workers' output to the driver, and without a dashboard there is
    only what counts usage in its process: without these three it starts in two thirds of the CPU time."""
    start = node.start_api_server

    def start_dashboard(self: Any, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        if include_dashboard is not False:
            start(self, include_dashboard=include_dashboard, raise_on_failure=raise_on_failure)

    node.start_monitor = node.start_log_monitor = lambda self: None
    node.start_api_server = start_dashboard


class _Elsewhere(ModuleType):
    """`sys` with another interpreter."""

    def __init__(self, folder: str) -> None:
        super().__init__("sys")
        self.executable = str(Path(folder) / "python")

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


def forks(pids: set[int], folder: Path) -> dict[int, int]:
    """Those of the processes that are stubs, each with its fork."""
    found = {}
    for stub in pids & {int(path.name) for path in folder.iterdir() if path.name.isdigit()}:
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            found[stub] = int((folder / str(stub)).read_text())
    return found


def serve() -> NoReturn:
    """Fork a process for each stub that asks, for as long as the parent of this one lives. A stub that is gone takes
    its fork along; a fork that is gone leaves its stub the code to exit with."""
    place, waiting = Path(os.environ[VARIABLE]), selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place / "asked.new"))
    listener.listen(64)
    (place / "asked.new").rename(place / "asked")
    waiting.register(listener, selectors.EVENT_READ)
    parent = os.pidfd_open(os.getppid())
    waiting.register(parent, selectors.EVENT_READ)
    python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    packages = [path for path in sys.path if path and path not in python_path]
    while True:
        for key, _ in waiting.select():
            if key.fileobj == parent:
                os._exit(0)
            if key.fileobj is listener:
                link, _ = listener.accept()
                _fork(link, waiting, place, packages)
            elif isinstance(key.fileobj, socket.socket):  # the stub is gone
                os.kill(key.data[0], signal.SIGKILL)
                waiting.unregister(key.fileobj)
            else:  # the fork is gone
                pid, link, listed = key.data
                waiting.unregister(key.fileobj)
                listed.unlink(missing_ok=True)
                os.close(int(key.fd))
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(KeyError):
                    waiting.unregister(link)
                with contextlib.suppress(OSError):
                    link.sendall(struct.pack("i", code))
                link.close()


def _fork(link: socket.socket, waiting: selectors.BaseSelector, place: Path, packages: list[str]) -> None:
    streams: list[int] = []
    try:
        length, streams = _asked(link)
        asked = marshal.loads(_all_of(link, length))
    except (OSError, EOFError, struct.error):  # the stub was killed at once
        link.close()
        for stream in streams:
            os.close(stream)
        return
    pid = os.fork()
    if pid == 0:
        _run(str(place / "python"), streams, packages, *asked[1:])
    for stream in streams:
        os.close(stream)
    stub = asked[0]
    listed = place / str(stub)
    listed.with_suffix(".new").write_text(str(pid))
    listed.with_suffix(".new").rename(listed)
    waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, link, listed))
    waiting.register(link, selectors.EVENT_READ, (pid, link, listed))
    with contextlib.suppress(OSError):
        link.sendall(struct.pack("i", pid))


def _asked(link: socket.socket) -> tuple[int, list[int]]:
    said, ancillary, _, _ = link.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i")
    for _, _, held in ancillary:
        streams.frombytes(held)
    return struct.unpack("Q", said)[0], list(streams)


def _all_of(link: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = link.recv(min(length, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _run(
    stub: str,
    streams: list[int],
    packages: list[str],
    argv: list[str],
    env: dict[str, str],
    cwd: str,
    masked: list[int],
) -> NoReturn:
    """The script or module in this process, as in an interpreter of its own; what it starts are forks as well."""
    code = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 4096)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        os.environ.clear()
        os.environ.update(env | environment(Path(stub).parent))
        os.chdir(cwd)
        while argv[0] in ("-u", "-s", "-S"):
            del argv[0]
        argv = _set_up(argv)
        module = argv[1] if argv[0] == "-m" else None
        sys.argv = argv = argv[1:] if module else argv
        python_path = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:] = [cwd if module else str(Path(argv[0]).parent), *python_path, *packages]
        sys.executable = stub
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        random.seed()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        if module is None:
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _set_up(argv: list[str]) -> list[str]:
    """What Ray's script that sets up a worker would execute: the worker's own command, if no more is to be set up than
    variables of its environment, which then are set; otherwise the same command."""
    if Path(argv[0]).name != "setup_worker.py":
        return argv
    named = dict(word.split("=", 1) for word in argv[1:] if word.startswith(("--serialized-runtime", "--language=")))
    context = json.loads(named.get("--serialized-runtime-env-context", "{}"))
    wanted = {name for name, value in context.items() if value} - {"env_vars", "py_executable"}
    if wanted or named.get("--language") != "PYTHON":
        return argv
    os.environ.update({name: os.path.expandvars(value) for name, value in context.get("env_vars", {}).items()})
    return [word for word in argv[1:] if word.split("=", 1)[0] not in named]
