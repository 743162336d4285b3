"""What replicas answer is held until a canary says that they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

from dtmsearch.cluster.canaries import Canaries
from dtmsearch.cluster.health import Check, Sample
from dtmsearch.cluster.replica_handle import Call, Held, ReplicaHandle
from dtmsearch.core.evaluation import Outcome


class Verifier:
    """Holds answers with the replica that gave them. Both methods return what may be handed over now."""

    def __init__(self, canaries: Canaries) -> None:
        self._canaries = canaries

    def answered(self, replica: ReplicaHandle, call: Call, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """A replica has answered a call; what there is no reference to hold it against by is not held."""
        replica.held.append(Held(call, outcomes))
        return [] if call.requests[0].reference_id in replica.references else self._release(replica)

    def checked(self, replica: ReplicaHandle, check: Check, found: Sample, seconds: float) -> list[Outcome]:
        """A replica has answered a canary in so many seconds. Raises `WrongNumbers` if it is wrong, `ReplicasFailed`
        where no replica is to blame."""
        self._canaries.verify(replica, check, found, seconds)
        return self._release(replica)

    def _release(self, replica: ReplicaHandle) -> list[Outcome]:
        verified = replica.take_held()
        self._canaries.learn(verified)
        return [outcome for held in verified for outcome in held.outcomes]
