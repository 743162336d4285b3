"""Every exception that carries an exit code of the command line.

A user's mistake is a `UserError`, raised at the edge: search file, plan against manifest, model folder, options. A bare
`ValueError` is a fault of ours. Whatever is not in this module ends a command with exit code 1 and a traceback in a
file.
"""

from __future__ import annotations

from typing import ClassVar

_LONGEST_REASON = 300
FAILED, USAGE, STOPPED, STORE_UNREADABLE, CLUSTER_UNREACHABLE = 1, 2, 3, 4, 5


class DtmError(Exception):
    """An error whose message says all that a user needs; `exit_code` is what a command ends with."""

    exit_code: ClassVar[int] = FAILED


def reason_of(error: BaseException) -> str:
    """What an error says, in one line of 300 letters at most; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:_LONGEST_REASON]


class UserError(DtmError, ValueError):
    """A mistake of the user's; the message says what is wrong, what was got, what is wanted and what to do.

    A `ValueError` too, as callers in Python expect of a bad argument.
    """

    exit_code = USAGE


class LibraryMissing(UserError):
    """This machine lacks a library that a scheme is computed by: nothing is wrong with what was asked, and another
    machine, or this one tomorrow, may answer it."""


class SearchStopped(DtmError):
    """The user asked the search to stop; it can be resumed."""

    exit_code = STOPPED


class SearchFailed(DtmError, RuntimeError):
    """The strategy cannot go on: every candidate of a round failed."""


class RecoveryDiverged(DtmError, RuntimeError):
    """A training's loss is no number any more; its last good checkpoint is kept."""

    exit_code = STOPPED


class ExportFailed(DtmError, RuntimeError):
    """What was written is not what was measured."""


class StoreError(DtmError):
    """The store cannot be used as asked. Nothing that was recorded is lost."""

    exit_code = STORE_UNREADABLE


class StoreFull(StoreError):
    """No room to write; the run can be resumed when there is."""

    exit_code = STOPPED


class StoreReadOnly(StoreError):
    """The store can be read but not written."""


class RunLocked(StoreError):
    """Another driver works on this run."""

    exit_code = FAILED


class ClusterUnreachable(DtmError, RuntimeError):
    """There is no Ray cluster at the address, or it does not let us in."""

    exit_code = CLUSTER_UNREACHABLE


class ServerUnreachable(DtmError, RuntimeError):
    """A server of models does not answer, or not in time."""

    exit_code = CLUSTER_UNREACHABLE


class ClusterLost(DtmError, RuntimeError):
    """The Ray that was started for this search has died; the search can be resumed."""

    exit_code = STOPPED


class ReplicasFailed(DtmError, RuntimeError):
    """No replica can be brought up; the message says why."""


class JobEnded(DtmError, RuntimeError):
    """A followed job ended without an exit code: killed, or lost with its node."""

    exit_code = STOPPED


class JobNotBegun(DtmError, RuntimeError):
    """A job's environment could not be made on the cluster; the message says why."""
