"""A folder of whole files, on this machine or in a bucket, and what can go wrong with one.

Files appear whole or not at all and are never changed. Knows nothing of tables or runs.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from dtmsearch.errors import StoreError, StoreFull, StoreReadOnly

TEMPORARY = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class File:
    """A file below the folder: `path` from there, with slashes, and its size in bytes."""

    path: str
    size: int


def _is_name(part: str) -> bool:
    """Whether a part of a path stands for a file or folder of its own."""
    return part not in ("", ".", "..") and not re.search(r"[\x00-\x1f]", part)


class Folder:
    """A folder in a pyarrow filesystem: a bucket, whose objects appear whole when they have been put."""

    def __init__(self, url: str, filesystem: fs.FileSystem, root: str) -> None:
        self.url = url
        self.filesystem = filesystem
        self.root = root.rstrip("/")

    def full(self, path: str) -> str:
        """The path as the filesystem knows it. Raises `StoreError` for one that could lead out of the folder."""
        if path and not all(_is_name(part) for part in path.split("/")):
            raise StoreError(f"{path[:200]!r} is no path inside the store {self.url}")
        return f"{self.root}/{path}" if path else self.root

    def walk(self, path: str = "") -> list[File]:
        """All files below `path`, at any depth, in no order; none where there is no such folder."""
        with self._explained("list", path):
            infos = self.filesystem.get_file_info(
                fs.FileSelector(self.full(path), allow_not_found=True, recursive=True)
            )
        return [File(info.path[len(self.root) + 1 :], info.size or 0) for info in infos if info.is_file]

    def names(self) -> list[str]:
        """What lies directly in the folder, files and folders."""
        with self._explained("list", ""):
            infos = self.filesystem.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def read(self, path: str) -> pa.Buffer:
        """The content of a file. Raises `FileNotFoundError` where there is none."""
        with self._explained("read", path), self.filesystem.open_input_file(self.full(path)) as file:
            return file.read_buffer()

    def exists(self, path: str) -> bool:
        with self._explained("look for", path):
            return bool(self.filesystem.get_file_info(self.full(path)).type != fs.FileType.NotFound)

    def written_at(self, path: str) -> float | None:
        """When a file was written, in seconds since the epoch; None where there is none."""
        with self._explained("look for", path):
            written = self.filesystem.get_file_info(self.full(path)).mtime
        return None if written is None else float(written.timestamp())

    def write(self, path: str, content: pa.Buffer | bytes, keep_existing: bool = False) -> None:
        """Put a whole file; when this returns, it is durable. With `keep_existing` a file that is there stays; in a
        bucket that holds but for writers at the same moment."""
        with self._explained("write", path):
            try:
                self._put(path, content, keep_existing)
            except FileNotFoundError:
                self.filesystem.create_dir(self.full(path).rpartition("/")[0], recursive=True)
                self._put(path, content, keep_existing)

    def remove(self, path: str) -> None:
        """Remove a file; no fault if it is gone already."""
        with self._explained("remove", path), suppress(FileNotFoundError):
            self.filesystem.delete_file(self.full(path))

    def move(self, path: str, to: str) -> None:
        """Rename a file. Raises `FileNotFoundError` where there is none."""
        with self._explained("rename", path):
            self.filesystem.move(self.full(path), self.full(to))

    def _put(self, path: str, content: pa.Buffer | bytes, keep_existing: bool) -> None:
        if keep_existing and self.exists(path):
            return
        with self.filesystem.open_output_stream(self.full(path)) as stream:
            stream.write(content)

    @contextmanager
    def _explained(self, verb: str, path: str) -> Iterator[None]:
        """Turn what a filesystem raises into a `StoreError`; a missing file stays what it is."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowInvalid) as error:
            raise self.error(verb, path, error) from error

    def error(self, verb: str, path: str, error: OSError | pa.ArrowInvalid) -> StoreError:
        """What an error of a filesystem means for the user."""
        number = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or str(error)
        if number in _FULL:
            return StoreFull(
                f"no room left in the store {self.url} ({reason}). Nothing that was recorded is lost: make room and "
                "run again to resume"
            )
        if verb not in ("read", "list", "look for") and (number in _FORBIDDEN or "ACCESS_DENIED" in str(error)):
            return StoreReadOnly(
                f"cannot {verb} {path or 'anything'} in the store {self.url}: {reason}. The store is read-only for "
                "this user; give --store a place that can be written"
            )
        return StoreError(f"cannot {verb} {path or 'the folder'} in the store {self.url}: {reason}")


class LocalFolder(Folder):
    """A folder on this machine. A file is written under a temporary name, synced, renamed, and the folder synced."""

    def __init__(self, url: str, path: Path) -> None:
        super().__init__(url, fs.LocalFileSystem(), str(path.absolute()))

    def remove(self, path: str) -> None:
        with self._explained("remove", path):
            Path(self.full(path)).unlink(missing_ok=True)

    def move(self, path: str, to: str) -> None:
        with self._explained("rename", path):
            Path(self.full(path)).rename(self.full(to))

    def _put(self, path: str, content: pa.Buffer | bytes, keep_existing: bool) -> None:
        target = Path(self.full(path))
        temporary = target.with_name(f"{TEMPORARY}{target.name}.{os.getpid()}")
        try:
            self._write_synced(temporary, content)
            if keep_existing:
                with suppress(FileExistsError):
                    target.hardlink_to(temporary)  # unlike a rename, it fails where another writer was first
                temporary.unlink()
            else:
                temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)

    def _write_synced(self, path: Path, content: pa.Buffer | bytes) -> None:
        try:
            file = path.open("wb", buffering=0)
        except FileNotFoundError:
            self._make(path.parent)
            file = path.open("wb", buffering=0)
        with file:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())

    def _make(self, folder: Path) -> None:
        """Create a folder and those above it, each durable in its parent."""
        if folder.is_dir():
            return
        self._make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)

    def make(self, path: str) -> Path:
        """A folder below this one, created if it is missing."""
        folder = Path(self.full(path))
        with self._explained("write", path):
            self._make(folder)
        return folder


def _sync_folder(folder: Path) -> None:
    """Make names in a folder durable: a rename is not, until its folder is synced."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_folder(url: str | os.PathLike[str] | Folder, filesystem: fs.FileSystem | None = None) -> Folder:
    """The folder of a path or a URI that pyarrow knows (`s3://`, `gs://`, ...), or of a path in `filesystem`; one that
    is open already stays so, with its credentials."""
    if isinstance(url, Folder):
        return url
    url = os.fspath(url)
    if filesystem is not None:
        return Folder(url, filesystem, url)
    if "://" not in url:
        return LocalFolder(url, Path(url).expanduser())
    try:
        filesystem, root = fs.FileSystem.from_uri(url)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"cannot open the store {_without_secrets(url)}: {_without_secrets(str(error))}") from None
    if isinstance(filesystem, fs.LocalFileSystem):
        return LocalFolder(url, Path(root))
    if not root.strip("/"):
        raise StoreError(f"cannot open the store {_without_secrets(url)}: it names no bucket")
    return Folder(_without_secrets(url), filesystem, root)


def _without_secrets(url: str) -> str:
    """A URI without the credentials that it may hold, for messages."""
    return re.sub(r"://[^/?#]*@", "://", url)
