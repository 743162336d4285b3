"""Logs for machines: one JSON object a line, with the run and the request that it is about.

Knows Python's logging, nothing of what is logged. Loggers name a request with `extra={"request": id}`.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_RUN: contextvars.ContextVar[str | None] = contextvars.ContextVar("run", default=None)


@contextmanager
def naming(run: str) -> Iterator[None]:
    """Within this block, every line of this thread is about `run`."""
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


def _named(record: logging.LogRecord) -> bool:
    """Gives every record what a line holds beside Python's own: the run, and its level as it is written."""
    record.run, record.level = _RUN.get(), record.levelname.lower()
    return True


def _formatter() -> logging.Formatter:
    """`time` (UTC), `level`, `logger`, `event`, `run`, `request`, `exception`, and whatever else a record was given; in
    ASCII, of which nothing acts on a terminal."""
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        ["level", "name", "message", "run", "request"],
        style=",",
        rename_fields={"name": "logger", "message": "event", "exc_info": "exception"},
        timestamp="time",
        defaults={"request": None},
        json_default=str,
    )


@contextmanager
def json_lines(stream: TextIO, package: str = "dtmsearch") -> Iterator[None]:
    """Send the package's log, from INFO up, to a stream as JSON lines until the block ends."""
    logger = logging.getLogger(package)
    handler = logging.StreamHandler(stream)
    handler.addFilter(_named)
    handler.setFormatter(_formatter())
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
