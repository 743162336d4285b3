"""Logs for machines: one JSON object a line, with the run and the request that it is about.

Knows Python's logging, nothing of what is logged. Loggers name a request with `extra={"request": id}`.
"""

from __future__ import annotations

import contextvars
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO

_RUN: contextvars.ContextVar[str | None] = contextvars.ContextVar("run", default=None)
# What every record has; anything else came with `extra`.
_COMMON = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextmanager
def naming(run: str) -> Iterator[None]:
    """Within this block, every line of this thread is about `run`."""
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


class JsonLines(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `event`, `run`, `request`, and whatever else the record was given."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            "run": _RUN.get(),
            "request": None,
        }
        line |= {key: value for key, value in vars(record).items() if key not in _COMMON}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # in ASCII, of which nothing acts on a terminal


@contextmanager
def json_lines(stream: TextIO, package: str = "dtmsearch") -> Iterator[None]:
    """Send the package's log, from INFO up, to a stream as JSON lines until the block ends."""
    logger = logging.getLogger(package)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
