"""SQL over a store in a process of its own, which is killed when it takes too long, too much memory, or is no longer
wanted.

DuckDB looks at its limits between steps only: a single function can take all memory, or never look up. Knows how to
ask and to end such a process; `dtmsearch.analysis.database` is what answers in it.
"""

from __future__ import annotations

import atexit
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa

from dtmsearch.errors import StoreError, UserError
from dtmsearch.store.files import LocalFolder
from dtmsearch.store.store import ResultStore

_ANSWER_BYTES = 4 << 30
# Beyond what the process takes when it begins: DuckDB's own limit of 4 GB and 2 GiB for what it does not count (one
# function's values, a batch of the answer).
_ADDRESS_SPACE_BYTES = 6 << 30
# A process that was asked nothing for so long ends.
_IDLE_SECONDS = 60.0
_WATCH_SECONDS = 0.5
_MAIN = "from dtmsearch.analysis.sql import serve; serve({descriptor}, {limit})"
# What a message from the process is: the next one holds its content, but for the last four.
_BATCH, _NOTE, _MISTAKE, _STORE_ERROR, _FAULT, _NO_MEMORY, _ANEW, _BEGUN, _DONE = (bytes([n]) for n in range(9))


def query(store: ResultStore, sql: str, time_limit_seconds: float = 60.0) -> pa.Table:
    """Answer one SELECT (WITH before it is fine) over the store's tables (`dtmsearch.store.schemas.SCHEMAS`).

    `runs` has one row a run, its last record; `plans` and `components` hold no row twice. Times are in UTC. Raises
    `UserError` for anything but one SELECT, for what DuckDB makes nothing of, and when the answer takes longer than
    `time_limit_seconds`, more than 4 GiB, or more memory than 6 GiB on its way.
    """
    while _idle:
        with suppress(_HasEnded):
            return _idle.pop().ask(store, sql, time_limit_seconds)
    return _Child().ask(store, sql, time_limit_seconds)


class _HasEnded(RuntimeError):
    """The process ended before it began with what it was asked."""


class _Child:
    """A process that answers one query after the other, and is no more after one that it did not answer to the end."""

    def __init__(self) -> None:
        self._connection, there = Pipe()
        code = _MAIN.format(descriptor=there.fileno(), limit=_ADDRESS_SPACE_BYTES)
        paths = os.pathsep.join(path for path in sys.path if path)
        # Reserves of memory that is never used would count as used: few arenas, no pool.
        frugal = {"MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        self._process = subprocess.Popen(  # noqa: S603 (our own code, in our own interpreter)
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what it has to say comes through the connection
            pass_fds=[there.fileno()],
            env=os.environ | frugal | {"PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is ours to hear
        )
        there.close()

    def ask(self, store: ResultStore, sql: str, time_limit_seconds: float) -> pa.Table:
        is_whole = False
        try:
            kind, found = self._asked(store, sql, time_limit_seconds)
            is_whole = True
        finally:  # also when Ctrl-C comes
            if is_whole:
                _idle.append(self)
            else:
                self.end()
        if isinstance(found, pa.Table):
            return found
        if kind == _MISTAKE:
            raise UserError(found)
        if kind == _STORE_ERROR:
            raise StoreError(found)
        raise RuntimeError(f"the process that answers SQL failed: {found}")

    def _asked(self, store: ResultStore, sql: str, time_limit_seconds: float) -> tuple[bytes, pa.Table | str]:
        """What the process makes of a query: a table, or what is wrong. Raises `UserError` where it has to be ended."""
        folder = store.folder
        filesystem = None if isinstance(folder, LocalFolder) else folder.filesystem
        batches: list[pa.Table] = []
        size, deadline = 0, None
        try:
            self._connection.send((folder.url, filesystem, folder.root, sql))
            while True:
                if deadline is not None and not self._connection.poll(max(0.0, deadline - time.monotonic())):
                    raise UserError(
                        f"the query took longer than {time_limit_seconds:g} seconds; narrow it with WHERE or LIMIT"
                    )
                kind = self._connection.recv_bytes()
                if kind == _BEGUN:
                    deadline = time.monotonic() + time_limit_seconds
                elif kind == _ANEW:
                    batches, size = [], 0
                elif kind == _BATCH:
                    content = self._connection.recv_bytes()
                    size += len(content)
                    if size > _ANSWER_BYTES:
                        raise UserError(
                            f"the answer is larger than {_ANSWER_BYTES >> 30} GiB; choose columns, or narrow it with "
                            "WHERE or LIMIT"
                        )
                    batches.append(pa.ipc.open_stream(pa.py_buffer(content)).read_all())
                elif kind == _NOTE:
                    store.segments.tell(self._connection.recv_bytes().decode())
                elif kind == _DONE:
                    return kind, pa.concat_tables(batches)
                elif kind == _NO_MEMORY:
                    raise EOFError
                else:
                    return kind, self._connection.recv_bytes().decode()
        except (EOFError, OSError):
            if deadline is None:
                raise _HasEnded("the process that answers SQL ended before it began") from None
            raise UserError(
                f"the query took more than {_ADDRESS_SPACE_BYTES >> 30} GiB of memory; narrow it with WHERE or LIMIT, "
                "or choose fewer columns"
            ) from None

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """In a forked process: it is the parent's."""
        self._connection.close()
        self._process.returncode = 0


# Processes that have answered. One that ends for want of queries is replaced when the next is asked.
_idle: list[_Child] = []


def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _forget_all() -> None:
    while _idle:
        _idle.pop().forget()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget_all)


# In the process itself.


def serve(descriptor: int, address_space_bytes: int) -> None:
    """Answer queries that come through a socket until nobody asks any more."""
    from dtmsearch.analysis import database  # noqa: F401 - loaded before memory is counted

    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than another
    _limit_memory(address_space_bytes)
    threading.Thread(target=_watch, args=(descriptor,), daemon=True).start()
    connection = Connection(descriptor)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while connection.poll(_IDLE_SECONDS):
            url, filesystem, root, sql = connection.recv()
            if not _answer(connection, url, filesystem, root, sql):
                return


def _limit_memory(address_space_bytes: int) -> None:
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + address_space_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _watch(descriptor: int) -> None:
    """End this process, whatever it is doing, when the one that asks is gone."""
    with socket.socket(fileno=os.dup(descriptor)) as ours:
        while True:
            time.sleep(_WATCH_SECONDS)
            try:
                if not ours.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    os._exit(1)
            except BlockingIOError:
                continue
            except OSError:
                os._exit(1)


def _answer(connection: Connection, url: str, filesystem: pa.fs.FileSystem | None, root: str, sql: str) -> bool:
    """Send the answer to one query. False when this process can answer no other."""
    from dtmsearch.analysis import database

    def note(text: str) -> None:
        connection.send_bytes(_NOTE)
        connection.send_bytes(text.encode())

    def fail(kind: bytes, error: Exception | str) -> None:
        connection.send_bytes(kind)
        connection.send_bytes(str(error).encode(errors="replace"))

    try:
        store = ResultStore(root, filesystem, on_note=note)
        store.folder.url = store.url = url
        connection.send_bytes(_BEGUN)
        for batch in database.answer(store, sql):
            connection.send_bytes(_ANEW if batch is None else _BATCH)
            if batch is not None:
                connection.send_bytes(_serialized(batch))
        connection.send_bytes(_DONE)
    except MemoryError:
        connection.send_bytes(_NO_MEMORY)
        return False
    except UserError as error:
        fail(_MISTAKE, error)
    except StoreError as error:
        fail(_STORE_ERROR, error)
    except Exception as error:
        fail(_FAULT, repr(error))
        return False
    return True


def _serialized(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()
