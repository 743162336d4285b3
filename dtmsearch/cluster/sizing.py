"""How much work goes into one call: enough that calls cost little, little enough to share it fairly. Pure."""

from __future__ import annotations

from math import sqrt

# Long enough that a call's own cost vanishes for the replica, short enough that a lost one is a small loss.
CALL_SECONDS = 1.0
# What a call costs the driver to send and to fetch, whatever is in it, and the share of its time that calls may take.
_DRIVER_SECONDS = 0.7e-3
_DRIVER_SHARE = 1 / 4


def usual_seconds(num_replicas: int) -> float:
    """How long a call should last: longer where so many replicas come back that the driver would be busy with calls."""
    return max(CALL_SECONDS, num_replicas * _DRIVER_SECONDS / _DRIVER_SHARE)


def call_seconds(waiting_seconds: float, num_replicas: int) -> float:
    """How long the next call should last when replicas together have work of `waiting_seconds` before them.

    Half of a replica's fair part leaves something to even out what takes longer than expected. Many short calls keep
    everybody waiting for the driver: the last of `waiting_seconds / length` calls is sent after so many times its cost,
    and answered after `length` more, which is soonest for the root below.
    """
    fair = waiting_seconds / num_replicas
    return min(usual_seconds(num_replicas), max(fair / 2, sqrt(waiting_seconds * _DRIVER_SECONDS)))


def guess_seconds(waiting_seconds: float, num_free: int) -> float:
    """The same for guesses, of which each free place gets its part: what is left over at their end does not matter."""
    return min(CALL_SECONDS, waiting_seconds / num_free)
