"""Text and JSON that a user gives: read whole or refused in words, whatever lies at the path.

A pipe without a writer would wait for ever and a device never ends: each is a `UserError` here, so that nobody behind
has to think of it.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from dtmsearch.errors import UserError

# More than any index of a checkpoint has, less than a machine's memory.
MOST_BYTES = 256 << 20
# Where a shell puts what it pipes into a command: `dtmsearch run <(...)`.
_PIPES = ("/dev/stdin", "/dev/fd/", "/proc/")
# A longer value is cut in an error's text.
_LONGEST_SHOWN = 200


def read_text(path: Path, what: str, most_bytes: int = MOST_BYTES) -> str:
    """The UTF-8 text of a file; `what` says in errors what it should have been.

    Raises `UserError` for a file that is missing, unreadable, no regular file or longer than `most_bytes`.
    """
    if "\0" in str(path):
        raise UserError(f"no {what} at {str(path)!r}: a path holds no null character")
    try:
        check_regular(path, what)
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no {what} at {path}") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from None
    if len(content) > most_bytes:
        raise UserError(f"cannot read the {what} {path}: it is longer than {most_bytes} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the {what} {path}: byte {error.start} is not UTF-8") from None


def check_regular(path: Path, what: str) -> None:
    """Raises `UserError` for a folder, a device, a socket, or a pipe that no shell has made; `OSError` for no file."""
    mode = path.stat().st_mode
    piped = stat.S_ISFIFO(mode) and str(path).startswith(_PIPES)
    if not (stat.S_ISREG(mode) or piped):
        raise UserError(f"cannot read the {what} {path}: it is {_kind(mode)}, not a file")


def is_file(path: Path) -> bool:
    """Whether a file lies at a path; not where no file can lie, as under a name of a thousand letters."""
    try:
        return path.is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder lies at a path; not where none can lie."""
    try:
        return path.is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds. Raises `UserError`, as `read_text` does and for what is no JSON."""
    return parse_json(read_text(path, what), f"the {what} {path}")


def parse_json(text: str, source: str) -> Any:
    """What a JSON text holds. Raises `UserError` that begins with `source`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{source} is no JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # also a number of more digits than Python reads
        raise UserError(f"{source} is no JSON: {error}") from None


def shown(value: Any) -> str:
    """A value in an error's text, cut where it is long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
