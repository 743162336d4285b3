"""Identities: hashes of canonical JSON, and of the bytes of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_ID_HEX_DIGITS = 32
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def identity(value: object) -> str:
    """The identity of a JSON-like value: 128 bits of SHA-256 over its canonical JSON, in hexadecimal."""
    return identity_of_text(canonical(value))


def canonical(value: object) -> str:
    """The one JSON text of a JSON-like value."""
    return _CANONICAL.encode(value)


def identity_of_text(text: str) -> str:
    """The identity of a text: 128 bits of its SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_HEX_DIGITS]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
