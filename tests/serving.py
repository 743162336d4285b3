"""A store's pages behind a server in a thread."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dtmsearch.store.store import ResultStore
from dtmsearch.ui import server


@contextmanager
def served(store: ResultStore) -> Iterator[str]:
    """The address at which it answers, token included, until the end of the block."""
    loop, addresses = asyncio.new_event_loop(), queue.Queue[str]()
    task = loop.create_task(server._serve(store, 0, addresses.put))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield addresses.get(timeout=60)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
