"""Of two drivers of one run the second is refused; a lease in a bucket is taken over from the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stores import bucket_filesystem, opened

from dtmsearch.errors import RunLocked, StoreError
from dtmsearch.store.files import open_folder
from dtmsearch.store.locks import Lease
from dtmsearch.store.store import ResultStore


def test_second_driver_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    with (
        opened(ResultStore(tmp_path)),
        pytest.raises(RunLocked, match=rf"process {os.getpid()} on .* started \d{{4}}-"),
        ResultStore(tmp_path).writer("run"),
    ):
        pass


def test_run_is_running_while_its_driver_holds_it(tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with opened(ResultStore(tmp_path)):
        during = results.is_running("run")
    assert (during, results.is_running("run")) == (True, False)


_FORKING_CHILD = """
import os, sys, time, warnings
from dtmsearch.store.store import ResultStore
with ResultStore({place!r}).writer("run"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_forked_child_does_not_keep_a_killed_drivers_run(tmp_path: Path) -> None:
    code = _FORKING_CHILD.format(place=str(tmp_path))
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        grandchild = int(driver.stdout.readline())
        try:
            before = ResultStore(tmp_path).is_running("run")
            driver.kill()
            driver.wait()
            assert (before, ResultStore(tmp_path).is_running("run")) == (True, False)
        finally:
            os.kill(grandchild, signal.SIGKILL)


def make_lease(place: Path) -> Lease:
    return Lease(open_folder("a-bucket", bucket_filesystem(place)), "run", beat_seconds=0.02, stale_seconds=0.4)


def die(lease: Lease) -> None:
    """As its process would: the lease stays and beats no more."""
    lease._ended.set()


def test_lease_that_beats_refuses_a_second_driver(tmp_path: Path) -> None:
    first = make_lease(tmp_path)
    first.acquire()
    with pytest.raises(RunLocked):
        make_lease(tmp_path).acquire()
    first.release()


def test_lease_of_a_dead_driver_is_taken_over(tmp_path: Path) -> None:
    dead, next_one = make_lease(tmp_path), make_lease(tmp_path)
    dead.acquire()
    dead.note_epoch(7)
    die(dead)
    assert next_one.acquire() == 7
    next_one.release()


def test_driver_that_lost_its_lease_writes_no_more(tmp_path: Path) -> None:
    sleeper, next_one = make_lease(tmp_path), make_lease(tmp_path)
    sleeper.acquire()
    die(sleeper)
    next_one.acquire()
    with pytest.raises(StoreError, match="another driver may have taken over"):
        sleeper.check()
    next_one.release()


def test_released_lease_is_free_at_once(tmp_path: Path) -> None:
    first, second = make_lease(tmp_path), make_lease(tmp_path)
    first.acquire()
    during = second.is_held()
    first.release()
    assert (during, second.is_held()) == (True, False)
