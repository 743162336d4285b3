"""Which replica is sent what, and when, how long it may take, and what becomes of the work of one that is lost. Pure:
sends nothing itself, and knows replicas by what is under way there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from dtmsearch.cluster.canaries import Canaries
from dtmsearch.cluster.health import Health, Pace
from dtmsearch.cluster.outstanding import Work
from dtmsearch.cluster.queue import RequestQueue
from dtmsearch.cluster.replica_handle import Call, ReplicaHandle
from dtmsearch.cluster.sizing import CALL_SECONDS, call_seconds, guess_seconds
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import MOST_TOGETHER, EvalFailure, EvalRequest, Outcome, Provenance

# Calls that a replica holds: the one it works on, and the next, so that it never waits for the driver.
_CALLS_AHEAD = 2
# Requests of a call to a replica over several devices, which stand idle one after the other at its end: counted in
# layers, two devices do 0.96 of two replicas' work with so many, 0.94 with half of them (test_device_order). Towards
# the end of a round fewer, for the sake of the others.
_OVER_DEVICES, _LEAST_OVER_DEVICES = 64, 4
# Guesses that a replica without work takes at once: its next real work waits until it has done them.
_MOST_GUESSES = 8


class Dispatcher:
    """What waits and what is under way, by requests and their costs. From `guess_from` replicas on, those that idle are
    offered to guesses."""

    def __init__(
        self,
        manifest: ModelManifest,
        health: Health,
        canaries: Canaries,
        guess_from: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work, self._pace, self._health = Work(manifest), Pace(health), health
        self._canaries, self._guess_from, self._clock = canaries, guess_from, clock

    def add(self, requests: Sequence[EvalRequest]) -> None:
        """Requests that somebody waits for; a guess among them is a guess no longer, wherever it is."""
        self._work.add(requests)

    def add_guesses(self, requests: Sequence[EvalRequest]) -> None:
        """Requests for replicas that have nothing else to do."""
        self._work.add_guesses(requests)

    def num_idle(self, ready: Sequence[ReplicaHandle]) -> int:
        """How many guesses more would fill up the calls that replicas may hold; none while something real waits."""
        if len(self._work.real) or len(ready) < self._guess_from:
            return 0
        each = min(max(int(CALL_SECONDS / self._pace.seconds_per_request), 1), _MOST_GUESSES)
        free = sum(max(_CALLS_AHEAD - len(replica.calls), 0) for replica in ready)
        return max(free * each - len(self._work.guesses), 0)

    def orders(self, ready: Sequence[ReplicaHandle]) -> Iterator[tuple[ReplicaHandle, Call]]:
        """What each replica is to be sent now. A call must be under way, in its replica's `calls`, before the next is
        asked for."""
        work, now = self._work, self._clock()
        num_free = sum(len(replica.calls) < _CALLS_AHEAD for replica in ready)
        for ahead in range(_CALLS_AHEAD):  # everyone's first call before anyone's second
            for replica in [each for each in ready if len(each.calls) <= ahead]:
                if self._canaries.is_due(replica, work, now):
                    yield replica, self._canary(replica)
                # Towards the end of a round nobody takes a second call while others have none.
                elif replica.calls and (work.real.has_suspects or self._holds_suspect(replica)):
                    continue
                elif len(work.real) > ahead * len(ready):
                    seconds = call_seconds(self._seconds_in(work.real), len(ready))
                    num_waiting = sum(not each.calls for each in ready)
                    yield self._order(replica, work.real, seconds, num_waiting, len(ready))
                elif not len(work.real) and len(work.guesses):
                    seconds = guess_seconds(self._seconds_in(work.guesses), num_free)
                    yield self._order(replica, work.guesses, seconds, num_free, len(ready))

    def _holds_suspect(self, replica: ReplicaHandle) -> bool:
        """Whether a request is under way there that may have killed replicas. Nothing goes before or behind it, so that
        no other is blamed for its next victim."""
        return any(self._work.has_suspect(call.requests) for call in replica.calls.values())

    def _canary(self, replica: ReplicaHandle) -> Call:
        check = self._canaries.next_check(replica)
        return Call([], self._work.real.full_cost(check.num_prompts), self._clock(), check)

    def _seconds_in(self, queue: RequestQueue) -> float:
        """How long what waits would take one replica; 0 while no pace is known."""
        return queue.cost * (self._pace.seconds_per_cost or 0.0)

    def _order(
        self, replica: ReplicaHandle, queue: RequestQueue, seconds: float, num_sharing: int, num_ready: int
    ) -> tuple[ReplicaHandle, Call]:
        """What the replica will be at for about so long, one request at least; of one that reads all weights in every
        call its part of all that is left for `num_sharing`, and of one whose model lies over several devices as many as
        keep these busy, if `num_ready` get as many."""
        rate = self._pace.seconds_per_cost
        budget, most = (seconds / rate if rate else 0.0), None
        if replica.together:
            budget, most = queue.cost / max(num_sharing, 1), MOST_TOGETHER
        elif replica.over_devices:
            fair = len(queue) / num_ready
            least = min(_OVER_DEVICES, fair if num_ready == 1 else max(fair / 2, _LEAST_OVER_DEVICES))
            budget = max(budget, least * queue.cost / len(queue))
        requests, replica.parent_id, cost = queue.take(budget, replica.parent_id, most, replica.over_devices)
        if not replica.calls:
            replica.idle_since = self._clock()
        return replica, Call(requests, cost, self._clock())

    def ended(self, replica: ReplicaHandle, call: Call) -> float:
        """A call has ended; the seconds that it took, as the driver saw it."""
        now = self._clock()
        seconds = now - max(call.started_at, replica.idle_since)
        replica.idle_since = now
        return seconds

    def learn(self, call: Call, seconds: float, outcomes: Sequence[Outcome]) -> None:
        """How fast replicas are, from what a call came to."""
        own_seconds = sum(outcome.provenance.wall_seconds for outcome in outcomes)
        self._pace.learn(call.cost, seconds, len(call.requests), own_seconds)

    def finished(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Outcomes to be handed over, with the attempts that they took."""
        return [self._work.finished(outcome) for outcome in outcomes]

    def overdue(self, replica: ReplicaHandle) -> str | None:
        """That a replica has been at one thing for longer than it can need; None if it has not."""
        head = next(iter(replica.calls.values()), None)
        if head is not None:
            since, limit = max(head.started_at, replica.idle_since), self._pace.limit_seconds(head.cost)
        elif replica.taking_since is not None:
            since, limit = replica.taking_since, self._health.first_seconds
        else:
            return None
        seconds = self._clock() - since
        return f"no answer for {seconds:.0f} s, where {limit:.0f} s are the most" if seconds > limit else None

    def take_back(self, replica: ReplicaHandle, reason: str, is_blameless: bool) -> list[Outcome]:
        """Have done again what a replica held that was lost; the requests that are given up, as failures.

        Only the oldest call may be to blame, so only its requests are charged an attempt, and none of one that
        `is_blameless`. What no canary has verified is measured again.
        """
        given_up: list[Outcome] = []
        for held in replica.take_held():
            given_up += self._again(held.call, replica, reason, charged=False)
        for position, call in enumerate(replica.calls.values()):
            given_up += self._again(call, replica, reason, charged=position == 0 and not is_blameless)
        replica.calls = {}
        return given_up

    def _again(self, call: Call, replica: ReplicaHandle, reason: str, charged: bool) -> Iterator[Outcome]:
        for given_up in self._work.again(call.requests, charged):
            attempts = given_up.attempts
            provenance = Provenance(replica.name, replica.node, attempts, finished_at=time.time())
            message = f"{attempts} replicas were lost while they measured it; the last: {reason}"
            yield EvalFailure(given_up.request.id, "replica_lost", message, provenance)
