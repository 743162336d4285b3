"""What a verb says, and where: data on stdout, everything else on stderr, commands to paste in either."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import click

from dtmsearch.console.printing import print_shown
from dtmsearch.errors import FAILED

DEFAULT_STORE = "dtm-store"
LOG_FORMAT: ContextVar[str] = ContextVar("log_format", default="text")


def say(text: str) -> None:
    """A line for the person, never for a program that reads our output."""
    if LOG_FORMAT.get() == "json":
        import logging

        from dtmsearch.logs import json_lines

        with json_lines(sys.stderr):
            logging.getLogger("dtmsearch").warning(text)
    else:
        print_shown(text, sys.stderr)


def show(value: Any, form: str, as_text: Callable[[Any], str], as_values: Callable[[Any], Any] | None = None) -> None:
    """Print a verb's result as JSON, of `as_values` where that is given, or as text by `as_text`."""
    from dtmsearch.analysis.format import json_text

    if form == "json":
        print_text(json_text(value if as_values is None else as_values(value)))
    else:
        print_text(as_text(value))


def print_text(text: str, end: str = "\n") -> None:
    """Print to stdout, with nothing in it that acts on a terminal."""
    try:
        print_shown(text, sys.stdout, end)
    except BrokenPipeError:
        # The reader (`head`, a pager) has seen enough. Python would complain once more while it closes stdout.
        sys.stdout = None
        raise click.exceptions.Exit(FAILED) from None


def resume_command(run: str, store: str) -> str:
    """The command that goes on with a run."""
    from dtmsearch.core.records import CONTINUE_VARIABLE

    submitted = os.environ.get(CONTINUE_VARIABLE)  # set by `dtmsearch submit` for the driver that it sends
    return submitted or f"dtmsearch resume {run}{store_argument(store)}"


def query_command(sql: str, store: str) -> str:
    """The command that asks a store something."""
    return f'dtmsearch query "{sql}"{store_argument(store)}'


def store_argument(store: str) -> str:
    """`--store URL`, with a blank before it; empty for the store that is the default."""
    return "" if store == DEFAULT_STORE else f" --store {shlex.quote(store)}"
