"""How much work goes into one call: enough that calls cost little, little enough to share it fairly. Pure."""

from __future__ import annotations

from math import sqrt

# Long enough that a call's own cost vanishes for the replica, short enough that a lost one is a small loss.
CALL_SECONDS = 1.0
# So far apart calls may leave the driver: each takes 0.7 ms of its time to send and to fetch, whatever is in it, and a
# quarter of its time is for that; the rest is for results.
APART_SECONDS = 2.8e-3


def usual_seconds(num_replicas: int) -> float:
    """How long a call should last: longer where so many replicas come back that they would come faster than that."""
    return max(CALL_SECONDS, num_replicas * APART_SECONDS)


def call_seconds(waiting_seconds: float, num_replicas: int) -> float:
    """How long the next call should last when replicas together have work of `waiting_seconds` before them.

    Half of a replica's fair part leaves something to even out what takes longer than expected. But short calls would
    keep everybody waiting for the driver: the last of `waiting_seconds / length` calls leaves after so many times
    `APART_SECONDS`, and is answered after `length` more, which is soonest for the root below.
    """
    fair = waiting_seconds / num_replicas
    return min(usual_seconds(num_replicas), max(fair / 2, sqrt(waiting_seconds * APART_SECONDS)))


def guess_seconds(waiting_seconds: float, num_free: int) -> float:
    """The same for guesses, of which each free place gets its part: what is left over at their end does not matter."""
    return min(CALL_SECONDS, waiting_seconds / num_free)
