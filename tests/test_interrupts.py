"""The first signal interrupts, the next waits, the third ends at once; whatever was ignored stays so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from processes import process_ends

from dtmsearch.workflows import interrupts
from dtmsearch.workflows.interrupts import interruptible

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What would be done at this process's end."""
    calls: list[object] = []
    monkeypatch.setattr(interrupts.atexit, "register", lambda *call: calls.append(call))
    yield calls


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@SIGNALS
def test_the_first_signal_interrupts(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        send(number)


@SIGNALS
def test_the_next_breaks_nothing_off(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    closed = False
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(number)
        closed = True
    assert closed
    assert "once more ends at once" in capfd.readouterr().err


def test_the_third_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(interrupts, "_end_at_once", lambda: ended.append(True))
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert ended == [True]


def test_at_once_takes_along_whatever_runs_below() -> None:
    code = """
import subprocess, sys
from dtmsearch.workflows.interrupts import _end_at_once
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
_end_at_once()
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=180, check=False)
    assert done.returncode == 3
    assert process_ends(int(done.stdout))


@SIGNALS
def test_signals_are_as_before_afterwards(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruptible():
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before


def test_after_a_signal_nothing_breaks_off_the_end_of_the_process(registered: list[object]) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        send(signal.SIGTERM)
    assert registered == [(interrupts._ignore, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))]


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_block_within_another_changes_nothing() -> None:
    with interruptible():
        outer = signal.getsignal(signal.SIGINT)
        with interruptible():
            assert signal.getsignal(signal.SIGINT) == outer
        assert signal.getsignal(signal.SIGINT) == outer


def test_a_thread_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
