"""The cache of unquantized models on this machine: which are there, how large, when they were last used, and their end.

A model is held while a process uses it, by a shared lock on the file beside its folder; those that are held stay. Knows
nothing of how models are unquantized.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dtmsearch.errors import UserError

# Names a folder of one's own for the cache; how many GB it may hold, and for how many days models that nobody uses.
CACHE, MOST_GB, MOST_DAYS = "DTMSEARCH_CACHE", "DTMSEARCH_CACHE_GB", "DTMSEARCH_CACHE_DAYS"
_USUAL_DAYS = 30.0
# Beside the files of an unquantized folder: what it was made of. Its name has no ending that an export copies.
RECORD = "source.dtmsearch"
_DAY_SECONDS, _GB = 86_400.0, 1e9
# Of models that this process uses, the open files of their locks: until it ends.
_held: dict[Path, int] = {}


@dataclass(frozen=True)
class UnquantizedModel:
    """A folder of the cache: the quantized model at `source` unquantized, `num_bytes` on the disk, not used for
    `unused_days`, or in use."""

    path: str
    source: str
    num_bytes: int
    unused_days: float
    in_use: bool


def cache_folder() -> Path:
    """Where unquantized models lie."""
    own = os.environ.get(CACHE)
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dtmsearch" / "unquantized"


def hold(folder: Path) -> None:
    """Keep a folder of the cache as long as this process runs, and have it used now."""
    with suppress(OSError):  # of a cache that may only be read
        os.utime(folder / RECORD)
        if folder not in _held:
            _held[folder] = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(_held[folder], fcntl.LOCK_SH)


def unquantized_models() -> list[UnquantizedModel]:
    """All that the cache holds, the largest first."""
    folders = [path.parent for path in cache_folder().glob(f"*/{RECORD}") if not path.parent.name.endswith(".partial")]
    found = (_described(folder) for folder in folders)
    return sorted((model for model in found if model), key=lambda model: model.num_bytes, reverse=True)


def remove(models: list[UnquantizedModel]) -> list[UnquantizedModel]:
    """Remove models that are not in use; those that were removed. Raises `UserError` where that is not allowed."""
    return [model for model in models if _removed(Path(model.path))]


def keep_within_limits() -> list[UnquantizedModel]:
    """Remove what nobody has used for too long and, where the cache may hold so much only, what was not used for
    longest; those that were removed. What is in use stays, and what may not be removed. Raises `UserError` for limits
    that are no numbers."""
    most_days, most_gb = _number(MOST_DAYS, _USUAL_DAYS), _number(MOST_GB, float("inf"))
    models = sorted((m for m in unquantized_models()), key=lambda model: model.unused_days, reverse=True)
    total = sum(model.num_bytes for model in models)
    removed: list[UnquantizedModel] = []
    for model in models:
        if model.unused_days > most_days or total > most_gb * _GB:
            with suppress(UserError):  # another's: a search does not end for it
                removed += (gone := remove([model]))
                total -= sum(each.num_bytes for each in gone)
    return removed


def _number(variable: str, usual: float) -> float:
    try:
        return float(os.environ.get(variable) or usual)
    except ValueError:
        raise UserError(f"{variable} is {os.environ[variable]!r}, and a number is wanted") from None


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _described(folder: Path) -> UnquantizedModel | None:
    """None of one that another process removes meanwhile."""
    try:
        files = [path.stat() for path in folder.rglob("*") if path.is_file()]
        used_at = (folder / RECORD).stat().st_mtime
        text = (folder / RECORD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    source = str(record.get("path", "")) if isinstance(record, dict) else "not known: its record is damaged"
    return UnquantizedModel(
        str(folder), source, sum(512 * file.st_blocks for file in files),
        max(0.0, time.time() - used_at) / _DAY_SECONDS, not _is_free(folder),
    )  # fmt: skip


def _is_free(folder: Path) -> bool:
    """Whether no process uses a folder."""
    lock = _lock_of(folder)
    if not lock.exists():
        return True
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _removed(folder: Path) -> bool:
    try:
        descriptor = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be removed: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / RECORD).unlink(missing_ok=True)  # first: what is left of a removal that is cut off is made anew
        shutil.rmtree(folder)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{folder} cannot be removed: {error}") from error
    finally:
        os.close(descriptor)
    return True
