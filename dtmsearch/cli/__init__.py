"""The command line: one verb of `dtmsearch` to one function, a module to each group of verbs.

Knows words, options and exit codes, and nothing of how a search works. What a verb needs is imported inside it, so
that `--help` answers at once. Here is what all verbs have in common: how their errors become exit codes.
"""

from __future__ import annotations

import io
import tempfile
import traceback
from collections.abc import Sequence

import click

from dtmsearch.cli import comparing, looking, preparing, searching, studying, using  # noqa: F401 - each adds its verbs
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import LOG_FORMAT, say
from dtmsearch.errors import FAILED, DtmError

__all__ = ["cli", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done or already complete, 1 failed, 2 usage, 3 stopped and
    resumable, 4 store unreadable, 5 cluster unreachable."""
    LOG_FORMAT.set("text")
    try:
        return cli.main(arguments, prog_name="dtmsearch", standalone_mode=False) or 0
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and not isinstance(error, click.exceptions.NoArgsIsHelpError):
            verb = "dtmsearch" if error.ctx is None else error.ctx.command_path
            message = " ".join(error.format_message().split()).rstrip(".")
            say(f"error: {message} (`{verb} --help` says what there is)")
            return error.exit_code
        shown = io.StringIO()
        error.show(file=shown)
        say(shown.getvalue().rstrip("\n"))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        return FAILED
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    if not isinstance(error, DtmError):
        first_line = next(iter(str(error).splitlines()), "")
        say(f"error: {type(error).__name__}: {first_line}\nthe traceback is in {_traceback_file(error)}")
        return FAILED
    say(f"error: {error}")
    if error.exit_code == FAILED and error.__cause__ is not None:  # what failed below us may be a fault of ours
        say(f"the traceback is in {_traceback_file(error)}")
    return error.exit_code


def _traceback_file(error: Exception) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="dtmsearch-", suffix=".log", delete=False, errors="replace") as log:
        traceback.print_exception(error, file=log)
    return log.name
