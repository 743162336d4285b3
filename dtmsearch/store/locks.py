"""One driver a run: a kernel lock where the store is a local folder, a lease with a heartbeat in a bucket.

Knows a name to lock and who holds it, nothing of what is protected.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from dtmsearch.errors import RunLocked, StoreError
from dtmsearch.store.files import Folder, LocalFolder

FOLDER = "locks"
# A reader that asks whether a run is locked holds its lock for an instant: no reason to refuse a driver.
_RETRY_SECONDS = 0.5
_BEAT_SECONDS = 15.0
_STALE_SECONDS = 60.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `epoch` is that of its segments, `beat` counts the heartbeats of a lease."""

    host: str
    pid: int
    started_at: float
    token: str
    epoch: int = 0
    beat: int = 0

    @staticmethod
    def here() -> Holder:
        return Holder(socket.gethostname(), os.getpid(), time.time(), secrets.token_hex(8))

    @staticmethod
    def from_json(text: bytes) -> Holder | None:
        try:
            return Holder(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Lock(Protocol):
    """What a driver holds while it writes a run."""

    def acquire(self) -> int:
        """Take the lock and return the epoch of its last holder, 0 if unknown. Raises `RunLocked`."""

    def note_epoch(self, epoch: int) -> None:
        """Write down the holder's epoch, for whoever comes after it."""

    def check(self) -> None:
        """Raise `StoreError` if the lock was lost."""

    def release(self) -> None: ...

    def is_held(self) -> bool:
        """Whether anybody holds the lock."""


def lock_of(folder: Folder, name: str) -> Lock:
    """The lock of a name in a folder: of the file system where it is local, else a lease that is renewed."""
    if isinstance(folder, LocalFolder):
        return FileLock(folder, name)
    return Lease(folder, name, _BEAT_SECONDS, _STALE_SECONDS)


def _locked(name: str, holder: Holder | None) -> RunLocked:
    by = "another driver"
    if holder is not None:
        since = datetime.fromtimestamp(holder.started_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        by = f"process {holder.pid} on {holder.host}, started {since}"
    return RunLocked(f"run {name} is being worked on by {by}. Stop that one first, or use another run name")


class FileLock:
    """`flock` on a file that stays; the kernel releases it with its holder, however that one ends."""

    def __init__(self, folder: LocalFolder, name: str) -> None:
        self._folder, self._name = folder, name
        self._path = Path(folder.full(f"{FOLDER}/{name}.lock"))
        self._descriptor: int | None = None
        self._holder = Holder.here()

    def acquire(self) -> int:
        self._folder.make(FOLDER)
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._folder.error("write", f"{FOLDER}/{self._path.name}", error) from error
        previous = Holder.from_json(os.pread(descriptor, 4096, 0))
        if not self._try(descriptor):
            os.close(descriptor)
            raise _locked(self._name, previous)
        self._descriptor = descriptor
        _HELD.add(self)
        self._write()
        return 0 if previous is None else previous.epoch

    def _try(self, descriptor: int) -> bool:
        deadline = time.monotonic() + _RETRY_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.02)
            except OSError as error:
                os.close(descriptor)
                raise StoreError(
                    f"cannot lock {self._path}: {error.strerror}. The filesystem must support file locks; give --store "
                    "another place"
                ) from error

    def _write(self) -> None:
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self._holder.to_json(), 0)
        except OSError as error:
            self.release()
            raise self._folder.error("write", f"{FOLDER}/{self._path.name}", error) from error

    def note_epoch(self, epoch: int) -> None:
        self._holder = replace(self._holder, epoch=epoch)
        self._write()

    def check(self) -> None:
        assert self._descriptor is not None

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _HELD.discard(self)

    def is_held(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def forget(self) -> None:
        """In a forked child: let go of the parent's lock without releasing it."""
        self.release()


# A forked child shares its parent's lock and would hold it beyond the parent's death.
_HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


class Lease:
    """An object in a bucket that its holder rewrites every `beat_seconds`.

    A lease that was not rewritten for `stale_seconds` while we watched is taken over, so no clocks are compared. Where
    two start in the same instant, the one whose object stays wins: buckets offer no test-and-set to every client.
    """

    def __init__(self, folder: Folder, name: str, beat_seconds: float, stale_seconds: float) -> None:
        self._folder, self._name = folder, name
        self._path = f"{FOLDER}/{name}.lease"
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._holder = Holder.here()
        self._writing = threading.Lock()
        self._refreshed_at = 0.0
        self._lost = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> int:
        previous = self._read()
        if previous is not None and not self._watch_die(previous):
            raise _locked(self._name, self._read() or previous)
        self._write()
        time.sleep(min(1.0, self._beat_seconds / 4))  # for a rival's object to appear
        winner = self._read()
        if winner is None or winner.token != self._holder.token:
            raise _locked(self._name, winner)
        self._thread = threading.Thread(target=self._beat, name=f"lease of {self._name}", daemon=True)
        self._thread.start()
        return 0 if previous is None else previous.epoch

    def _read(self) -> Holder | None:
        try:
            return Holder.from_json(self._folder.read(self._path).to_pybytes())
        except FileNotFoundError:
            return None

    def _write(self, epoch: int | None = None) -> None:
        with self._writing:
            epoch = self._holder.epoch if epoch is None else epoch
            self._holder = replace(self._holder, beat=self._holder.beat + 1, epoch=epoch)
            self._folder.write(self._path, self._holder.to_json())
            self._refreshed_at = time.monotonic()

    def _watch_die(self, seen: Holder) -> bool:
        """Whether a lease stays as it is for `stale_seconds`, or disappears; False as soon as it beats."""
        deadline = time.monotonic() + self._stale_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_seconds / 4))
            now = self._read()
            if now != seen:
                return now is None
        return True

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            with suppress(StoreError):  # a bucket out of reach may come back before the lease is stale
                holder = self._read()
                if holder is None or holder.token != self._holder.token:
                    self._lost = True
                    return
                self._write()

    def note_epoch(self, epoch: int) -> None:
        self._write(epoch)

    def check(self) -> None:
        if self._lost or time.monotonic() - self._refreshed_at > self._stale_seconds:
            raise StoreError(
                f"the lease of run {self._name} in {self._folder.url} could not be kept for {self._stale_seconds:.0f} "
                "seconds, so another driver may have taken over. Nothing that was recorded is lost: run again to resume"
            )

    def release(self) -> None:
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        with suppress(StoreError):
            holder = self._read()
            if holder is not None and holder.token == self._holder.token:
                self._folder.remove(self._path)

    def is_held(self) -> bool:
        """Whether the lease was rewritten lately, by this machine's clock."""
        written_at = self._folder.written_at(self._path)
        return written_at is not None and time.time() - written_at <= self._stale_seconds
