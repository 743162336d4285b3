"""The process that answers SQL: queries come through a connection, batches of answers go back.

It begins for every command that asks, so what it does not need it does not load. `dtmsearch.analysis.database` is what
answers in it.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import threading
import time
from contextlib import suppress
from importlib.abc import MetaPathFinder
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from dtmsearch.errors import StoreError, UserError

if TYPE_CHECKING:
    import pyarrow as pa

# A process that was asked nothing for so long ends.
_IDLE_SECONDS = 60.0
_WATCH_SECONDS = 0.5
# What a message from the process is: the next one holds its content, but for the last four.
BATCH, NOTE, MISTAKE, STORE_ERROR, FAULT, NO_MEMORY, ANEW, BEGUN, DONE = (bytes([n]) for n in range(9))


def serve(descriptor: int, address_space_bytes: int) -> None:
    """Answer queries that come through a socket until nobody asks any more."""
    sys.meta_path.insert(0, _WithoutPandas())
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


class _WithoutPandas(MetaPathFinder):
    """Has pyarrow find no pandas, which it imports with its first array where there is one: half of the time that this
    process takes to begin, for data frames that it never makes."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


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
    from dtmsearch.store.store import ResultStore

    def note(text: str) -> None:
        connection.send_bytes(NOTE)
        connection.send_bytes(text.encode())

    def fail(kind: bytes, error: Exception | str) -> None:
        connection.send_bytes(kind)
        connection.send_bytes(str(error).encode(errors="replace"))

    try:
        store = ResultStore(root, filesystem, on_note=note)
        store.folder.url = store.url = url
        connection.send_bytes(BEGUN)
        for batch in database.answer(store, sql):
            connection.send_bytes(ANEW if batch is None else BATCH)
            if batch is not None:
                connection.send_bytes(_serialized(batch))
        connection.send_bytes(DONE)
    except MemoryError:
        connection.send_bytes(NO_MEMORY)
        return False
    except UserError as error:
        fail(MISTAKE, error)
    except StoreError as error:
        fail(STORE_ERROR, error)
    except Exception as error:
        fail(FAULT, repr(error))
        return False
    return True


def _serialized(batch: pa.RecordBatch) -> pa.Buffer:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()
