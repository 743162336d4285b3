"""How a person ends what is under way: by Ctrl-C, `kill`, or a terminal that is closed, once or impatiently.

Knows signals, nothing of what they end.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from dtmsearch.errors import STOPPED

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPING = b"already stopping: what was begun is brought to its end; once more ends at once\n"


class _Listener:
    """Hears signals in the place of what was there before."""

    def __init__(self) -> None:
        self.num_heard = 0
        # What is ignored stays ignored: that is how `nohup` and background jobs ask to be left alone.
        self._before = {n: h for n in _SIGNALS if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def start(self) -> None:
        for number in self._before:
            signal.signal(number, self._hear)

    def stop(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.num_heard:  # the process is probably on its way out: nothing may break off what remains to be done
            atexit.register(_ignore, tuple(self._before))

    def _hear(self, _signal: int, _frame: FrameType | None) -> None:
        self.num_heard += 1
        if self.num_heard == 1:
            raise KeyboardInterrupt
        if self.num_heard == 2:
            with suppress(OSError):
                os.write(2, _STOPPING)
        else:
            _end_at_once()


def _ignore(numbers: tuple[int, ...]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _end_at_once() -> None:
    """End this process and all below it, a local Ray's too. What is recorded is recorded, and a lock on this machine
    goes with its holder."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()
    os._exit(STOPPED)


_listener: _Listener | None = None


@contextmanager
def interruptible() -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP raises `KeyboardInterrupt`. The next lets what ends go on to its end, and the
    one after that ends this process at once, and all below it. Within another such block, and in a thread, it changes
    nothing."""
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = _Listener()
    _listener.start()
    try:
        yield
    finally:
        _listener.stop()
        _listener = None
