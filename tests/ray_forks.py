"""Commands and functions that tests have processes for, and the Python processes of a test's Ray, as forks of one that
has imported what they import.

Ray starts its workers and its own agents as `PYTHON SCRIPT ARGUMENT...`: interpreters that import Ray, and most of
them torch and transformers, for one to six seconds of CPU time each. Here PYTHON is a small program, the stub, that
has `serve` fork a process to run the script in (or the module of `-m`), with the stub's environment, folder, streams
and signal mask. The two end together, whatever ends one of them. A `Fork` is such a process without a stub.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import json
import marshal
import os
import random
import re
import runpy
import select
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
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
said = marshal.dumps((os.getpid(), sys.argv[1:], dict(os.environ), os.getcwd(), masked, []))
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

        _read_environment()
        if isinstance(services.sys, _Elsewhere):  # type: ignore[attr-defined]
            return
        services.sys = _Elsewhere(folder)  # type: ignore[attr-defined]
        services.get_node = _once_it_is_there(services.get_node)
        _leave_out_what_watches(Node)


def _once_it_is_there(get_node: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    """What `get_node` gives, which looks for a node that has just been started a second time only after a second."""
    from ray._private import services
    from ray._private.state import GlobalState

    def get_started_node(gcs_address: str, node_id: str) -> Any:
        state, deadline = GlobalState(), time.monotonic() + 20.0
        state._initialize_global_state(services._get_gcs_client_options(gcs_address))
        while time.monotonic() < deadline and node_id not in {node["NodeID"] for node in state.node_table()}:
            time.sleep(0.01)
        return get_node(gcs_address, node_id)

    return get_started_node


def _read_environment() -> None:
    """Have Ray know this environment, where it was imported in another one."""
    from ray._raylet import Config

    Config.initialize("")


def _leave_out_what_watches(node: Any) -> None:
    """No local Ray here grows by itself or sends its workers' output to the driver, and without a dashboard there is
    only what counts usage in its process, and nobody whom a node's agent would tell how it fares: without these it
    starts in half the CPU time."""
    from ray._private import utils

    start, start_raylet, lacking = node.start_api_server, node.start_raylet, utils.get_dashboard_dependency_error

    def start_dashboard(self: Any, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        if include_dashboard is not False:
            start(self, include_dashboard=include_dashboard, raise_on_failure=raise_on_failure)

    def start_with_little(self: Any, *arguments: Any, **named: Any) -> None:
        utils.get_dashboard_dependency_error = lambda: ImportError("a dashboard")
        try:
            start_raylet(self, *arguments, **named)
        finally:
            utils.get_dashboard_dependency_error = lacking

    def start_node(self: Any, *arguments: Any, **named: Any) -> None:
        little = self._ray_params.include_dashboard is False
        (start_with_little if little else start_raylet)(self, *arguments, **named)

    node.start_monitor = node.start_log_monitor = lambda self: None
    node.start_api_server, node.start_raylet = start_dashboard, start_node


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


# A connection, a stub's process id or 0, arguments, environment, folder, masked signals, and a path for imports.
_Asked = tuple[int, list[str], dict[str, str], str, list[int], list[str]]


def serve(place: Path, parent: int, import_ray: Callable[[bool], None]) -> NoReturn:
    """Have a process forked for everyone who asks at the socket in `place`, for as long as the parent lives, which
    leaves nothing of that folder.

    Ray reads its environment when it is imported, Python's side of it by names that are noted and C++'s side in a way
    that cannot be repeated for what a job's workers are told. So there are several processes that fork: one that has
    Ray by this environment, for all but workers, and one for each other environment that it would have read.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place / "asked.new"))
    listener.listen(64)
    usual = _forking(place, None, import_ray)
    length, _ = _asked(usual)
    read_by_ray: dict[str, list[str]] = marshal.loads(_all_of(usual, length))
    forking: dict[tuple[tuple[str, str], ...], socket.socket] = {}
    (place / "asked.new").rename(place / "asked")
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(os.pidfd_open(parent), selectors.EVENT_READ)
    while True:
        if any(key.fileobj is not listener for key, _ in waiting.select()):
            shutil.rmtree(place, ignore_errors=True)
            os._exit(0)
        link, _ = listener.accept()
        streams: list[int] = []
        with contextlib.closing(link), contextlib.suppress(OSError, EOFError, struct.error):  # it was killed at once
            length, streams = _asked(link)
            stub, argv, env, *rest = marshal.loads(_all_of(link, length))
            argv, env = _set_up(argv, env)
            said = marshal.dumps((stub, argv, env, *rest))
            own = {name: value for name, value in env.items() if name.startswith("RAY_")}
            if not _is_worker(argv) and all(env.get(name, "") in alike for name, alike in read_by_ray.items()):
                _send(usual, said, [link.fileno(), *streams])
            else:
                by = tuple(sorted(own.items()))
                for _ in range(2):  # those of a job end with it
                    if by not in forking:
                        forking[by] = _forking(place, own, import_ray)
                    try:
                        _send(forking[by], said, [link.fileno(), *streams])
                        break
                    except BrokenPipeError:
                        forking.pop(by).close()
        for stream in streams:
            os.close(stream)


def _forking(place: Path, env: dict[str, str] | None, import_ray: Callable[[bool], None]) -> socket.socket:
    """The end by which a new process is asked to fork: one that has Ray by these variables of the environment for it.
    Without them it has this process's, and first sends those that Ray has read, with their values."""
    ours, its = socket.socketpair()
    if os.fork() > 0:
        its.close()
        return ours
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.closerange(3, its.fileno())  # what others ask for, with their streams, ends where they close it
    os.closerange(its.fileno() + 1, 4096)
    if env is not None:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(env)
    before = dict(os.environ)
    with _noting_reads() as read:
        import_ray(env is None)
    if env is None:  # some it has set itself
        alike = {name: [before.get(name, ""), os.environ.get(name, "")] for name in read if name.startswith("RAY_")}
        _send(its, marshal.dumps(alike), [])
    return _fork_on(its, place)


@contextlib.contextmanager
def _noting_reads() -> Iterator[set[str]]:
    """The names of the environment that this process asks for in the block."""
    names: set[str] = set()

    class Noting(type(os.environ)):  # type: ignore[misc]
        def __getitem__(self, name: str) -> str:
            names.add(name)
            return str(super().__getitem__(name))

    plain = type(os.environ)
    os.environ.__class__ = Noting
    try:
        yield names
    finally:
        os.environ.__class__ = plain


def _fork_on(asked: socket.socket, place: Path) -> NoReturn:
    """Fork a process for everyone who is handed over, until the other end is closed or the raylet of this environment
    ends. A stub that is gone takes its fork along; a fork that is gone leaves its stub the code to exit with."""
    waiting, forks = selectors.DefaultSelector(), set[int]()
    waiting.register(asked, selectors.EVENT_READ)
    raylet = os.environ.get("RAY_RAYLET_PID", "")
    if raylet:
        with contextlib.suppress(ProcessLookupError):
            waiting.register(os.pidfd_open(int(raylet)), selectors.EVENT_READ, None)
    python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    packages = [path for path in sys.path if path and path not in python_path]
    is_over = False
    while not (is_over and not forks):
        for key, _ in waiting.select():
            if key.fileobj is asked:
                try:
                    length, (link, *streams) = _asked(asked)
                    content = _all_of(asked, length)
                except (OSError, EOFError, ValueError, struct.error):
                    for fork in forks:
                        os.kill(fork, signal.SIGKILL)
                    os._exit(0)
                forks.add(_fork(socket.socket(fileno=link), streams, marshal.loads(content), waiting, place, packages))
            elif key.data is None:
                is_over = True
                waiting.unregister(key.fileobj)
            elif isinstance(key.fileobj, socket.socket):  # the stub is gone
                with contextlib.suppress(ProcessLookupError, KeyError, ValueError):  # the fork went at the same moment
                    os.kill(key.data[0], signal.SIGKILL)
                    waiting.unregister(key.fileobj)
            else:  # the fork is gone
                pid, link, listed = key.data
                waiting.unregister(key.fileobj)
                listed.unlink(missing_ok=True)
                os.close(int(key.fd))
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                forks.discard(pid)
                with contextlib.suppress(KeyError):
                    waiting.unregister(link)
                with contextlib.suppress(OSError):
                    link.sendall(struct.pack("i", code))
                link.close()
    os._exit(0)


def _fork(
    link: socket.socket,
    streams: list[int],
    asked: _Asked,
    waiting: selectors.BaseSelector,
    place: Path,
    packages: list[str],
) -> int:
    pid = os.fork()
    if pid == 0:
        _run(str(place / "python"), streams, packages, *asked[1:])
    for stream in streams:
        os.close(stream)
    listed = place / str(asked[0] or f"of-{pid}")
    listed.with_suffix(".new").write_text(str(pid))
    listed.with_suffix(".new").rename(listed)
    waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, link, listed))
    waiting.register(link, selectors.EVENT_READ, (pid, link, listed))
    with contextlib.suppress(OSError):
        link.sendall(struct.pack("i", pid))
    return pid


def _send(link: socket.socket, said: bytes, fds: Sequence[int]) -> None:
    link.sendmsg([struct.pack("Q", len(said))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    link.sendall(said)


class Fork:
    """A process in which a function of a module, named with a colon between them, is called with arguments: in a
    process group of its own, with what this process imports from. Its exit code is what that returns."""

    def __init__(
        self, place: Path, work: str, arguments: Sequence[str], env: Mapping[str, str], cwd: str, streams: Sequence[int]
    ) -> None:
        self.exitcode: int | None = None
        self._link = socket.socket(socket.AF_UNIX)
        self._link.connect(str(place / "asked"))
        _send(self._link, marshal.dumps((0, ["-f", work, *arguments], dict(env), cwd, [], sys.path)), streams)
        (self.pid,) = struct.unpack("i", _all_of(self._link, 4))

    def join(self, seconds: float) -> int | None:
        """The exit code, negative for the signal that ended it; None if it has not ended in that time."""
        if self.exitcode is None and select.select([self._link], [], [], seconds)[0]:
            (self.exitcode,) = struct.unpack("i", _all_of(self._link, 4))
        return self.exitcode

    def __del__(self) -> None:
        self._link.close()


def _asked(link: socket.socket) -> tuple[int, list[int]]:
    said, ancillary, _, _ = link.recvmsg(8, socket.CMSG_SPACE(4 * 4), socket.MSG_WAITALL)
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
    imports: list[str],
) -> NoReturn:
    """The script or module in this process, as in an interpreter of its own, what it starts being forks as well; or a
    function, which starts interpreters."""
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
        _read_environment()
        module = argv[1] if argv[0] == "-m" else None
        sys.argv = argv = argv[1:] if module else argv
        if imports:
            sys.path[:] = imports
        else:
            python_path = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
            sys.path[:] = [cwd if module else str(Path(argv[0]).parent), *python_path, *packages]
            sys.executable = stub
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        random.seed()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        code = 0
        if imports:
            use()
            place, _, function = argv[1].partition(":")
            sys.argv = ["dtmsearch", *argv[2:]]
            code = int(getattr(importlib.import_module(place), function)(*argv[2:]) or 0)
        elif module is None:
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):  # as the interpreter does
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _set_up(argv: list[str], env: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """What Ray's script that sets up a worker would execute: the worker's own command, if no more is to be set up than
    variables of its environment, which then are in it; otherwise the same command."""
    while argv[0] in ("-u", "-s", "-S"):
        argv = argv[1:]
    if Path(argv[0]).name != "setup_worker.py":
        return argv, env
    named = dict(word.split("=", 1) for word in argv[1:] if word.startswith(("--serialized-runtime", "--language=")))
    context = json.loads(named.get("--serialized-runtime-env-context", "{}"))
    wanted = {name for name, value in context.items() if value} - {"env_vars", "py_executable"}
    if wanted or named.get("--language") != "PYTHON":
        return argv, env
    more = {name: _expanded(value, env) for name, value in context.get("env_vars", {}).items()}
    return [word for word in argv[1:] if word.split("=", 1)[0] not in named], env | more


def _expanded(value: str, env: dict[str, str]) -> str:
    """As `os.path.expandvars`, by another environment."""
    return re.sub(r"\$(?:(\w+)|\{([^}]*)\})", lambda found: env.get(found[1] or found[2], found[0]), value)


def _is_worker(argv: list[str]) -> bool:
    return Path(argv[0]).name in ("setup_worker.py", "default_worker.py")
