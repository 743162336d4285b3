"""When a replica is asked for a canary, of which plan, and what its answer says of it.

Owns what is known of plans from verified evaluations. Knows nothing of how canaries are sent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from dtmsearch.cluster.health import Check, Health, Known, Sample, tolerated_share
from dtmsearch.cluster.outstanding import Work
from dtmsearch.cluster.replica_handle import Held, ReplicaHandle
from dtmsearch.core.evaluation import EvalResult, Reference
from dtmsearch.core.plan import Plan
from dtmsearch.errors import ReplicasFailed


class WrongNumbers(RuntimeError):
    """A replica's canary says that it cannot be trusted."""


def not_the_replicas(first: str, second: str, fault: str) -> str:
    """What is said when two replicas contradict a reference in the same way. `fault`: as of one of them."""
    return (
        f"{first} and {second}, which run in the same numeric mode, find the same of the base model, and it is not "
        f"what its reference says: {fault}. The model or its reference is to blame, not a replica: other hardware or "
        "other libraries may have made the reference (give the run another name, and it is made anew), or the model "
        "gives other numbers each time (model.dtype: float32, or model.attention: eager)"
    )


class Canaries:
    """`references` are those that replicas are given, by id; they may come to be more."""

    def __init__(self, health: Health, references: Mapping[str, Reference]) -> None:
        self._health, self._known, self._references = health, Known(health), references
        # By plan and reference: the last replica that was dismissed, and what it found.
        self._wrong: dict[tuple[str, str], tuple[str, Sample]] = {}

    def is_due(self, member: ReplicaHandle, work: Work, now: float) -> bool:
        """After its interval; and at once when nothing else waits and a round may wait for what is unverified."""
        last = member.last_request
        if last is None or last.reference_id not in member.references or member.checking:
            return False
        if now - member.record.verified_at > self._health.canary_interval(member.record.seconds):
            return True
        return not len(work.real) and any(work.is_waited_for(call.requests) for call in member.unverified)

    def next_check(self, member: ReplicaHandle) -> Check:
        """Of the plan that the replica holds, if it is known what comes out, and else of the unquantized model."""
        last = member.last_request
        assert last is not None, "a canary verifies something"
        reference = self._references[last.reference_id]
        plan = last.parent if (last.parent.id, reference.id) in self._known else Plan()
        num_prompts, length = self._num_prompts(reference), reference.continuation_tokens
        return Check(plan, reference.id, num_prompts, length, tolerated_share(reference, num_prompts * length))

    def verify(self, member: ReplicaHandle, check: Check, found: Sample, seconds: float) -> None:
        """Keep what a replica found. Raises `WrongNumbers` if it is wrong; `ReplicasFailed` if another replica found
        the same, for then no replica is to blame."""
        fault = self._known.fault(check, found, member.record.samples.get(check.key))
        if fault is None:
            member.record.keep(check, found, time.monotonic(), seconds)
            return
        before, self._wrong[check.key] = self._wrong.get(check.key), (member.name, found)
        if before is not None and before[0] != member.name and self._known.alike(check, found, before[1]):
            raise ReplicasFailed(not_the_replicas(before[0], member.name, fault))
        raise WrongNumbers(fault)

    def learn(self, verified: Sequence[Held]) -> None:
        """Remember what verified evaluations say of their plans."""
        for held in verified:
            for request, outcome in zip(held.call.requests, held.outcomes, strict=True):
                reference = self._references.get(request.reference_id)
                if isinstance(outcome, EvalResult) and reference is not None:
                    self._known.learn(request, outcome, self._num_prompts(reference))

    def _num_prompts(self, reference: Reference) -> int:
        return self._health.num_canary_prompts(reference.num_prompts)
