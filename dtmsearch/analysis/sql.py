"""SQL over a store in a process of its own, which is killed when it takes too long, too much memory, or is no longer
wanted.

DuckDB looks at its limits between steps only: a single function can take all memory, or never look up. Knows how to
ask and to end such a process; `dtmsearch.analysis.sql_process` is what runs in it.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path

import pyarrow as pa

from dtmsearch.analysis.sql_process import ANEW, BATCH, BEGUN, DONE, MISTAKE, NO_MEMORY, NOTE, STORE_ERROR
from dtmsearch.errors import StoreError, UserError
from dtmsearch.store.files import LocalFolder
from dtmsearch.store.store import ResultStore

_ANSWER_BYTES = 4 << 30
# Beyond what the process takes when it begins: DuckDB's own limit of 4 GB and 2 GiB for what it does not count (one
# function's values, a batch of the answer).
_ADDRESS_SPACE_BYTES = 6 << 30
_MAIN = "from dtmsearch.analysis.sql_process import serve; serve({descriptor}, {limit})"


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
        # An empty one is the current folder: left out, another copy of this package might be found first, or none.
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
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
        if kind == MISTAKE:
            raise UserError(found)
        if kind == STORE_ERROR:
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
                if kind == BEGUN:
                    deadline = time.monotonic() + time_limit_seconds
                elif kind == ANEW:
                    batches, size = [], 0
                elif kind == BATCH:
                    content = self._connection.recv_bytes()
                    size += len(content)
                    if size > _ANSWER_BYTES:
                        raise UserError(
                            f"the answer is larger than {_ANSWER_BYTES >> 30} GiB; choose columns, or narrow it with "
                            "WHERE or LIMIT"
                        )
                    batches.append(pa.ipc.open_stream(pa.py_buffer(content)).read_all())
                elif kind == NOTE:
                    store.segments.tell(self._connection.recv_bytes().decode())
                elif kind == DONE:
                    return kind, pa.concat_tables(batches)
                elif kind == NO_MEMORY:
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
