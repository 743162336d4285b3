"""The command line: one verb of `dtmsearch` to one function, a module to each group of verbs.

Knows words, options and exit codes, and nothing of how a search works. What a verb needs is imported inside it, so
that `--help` answers at once. Here is what all verbs have in common: how their errors become exit codes.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Sequence

import click

from dtmsearch.cli import looking, preparing, searching, using  # noqa: F401 - each adds its verbs
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import CLUSTER_UNREACHABLE, FAILED, LOG_FORMAT, STOPPED, STORE_UNREADABLE, USAGE, say

__all__ = ["cli", "main"]

# Exceptions of ours (and Python's own) that say all a user needs, by name, because naming them must not import their
# modules; the nearest class counts. Any other exception is a fault of ours, whose traceback is kept.
_EXIT_CODES = {
    "ValueError": USAGE,
    "ClusterLost": STOPPED,
    "ClusterUnreachable": CLUSTER_UNREACHABLE,
    "ExportFailed": FAILED,
    "JobEnded": STOPPED,
    "JobNotBegun": FAILED,
    "RecoveryDiverged": STOPPED,
    "ReplicasFailed": FAILED,
    "RunLocked": FAILED,
    "SearchFailed": FAILED,
    "SearchStopped": STOPPED,
    "StoreError": STORE_UNREADABLE,
    "StoreFull": STOPPED,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done or already complete, 1 failed, 2 usage, 3 stopped and
    resumable, 4 store unreadable, 5 cluster unreachable."""
    LOG_FORMAT.set("text")
    try:
        return cli.main(arguments, prog_name="dtmsearch", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        return FAILED
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    code = next((_EXIT_CODES[cls.__name__] for cls in type(error).__mro__ if _is_ours(cls)), None)
    if code is not None:
        say(f"error: {error}")
        return code
    with tempfile.NamedTemporaryFile("w", prefix="dtmsearch-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    first_line = next(iter(str(error).splitlines()), "")
    say(f"error: {type(error).__name__}: {first_line}\nthe traceback is in {log.name}")
    return FAILED


def _is_ours(cls: type) -> bool:
    return cls.__name__ in _EXIT_CODES and cls.__module__.partition(".")[0] in ("builtins", "dtmsearch")
