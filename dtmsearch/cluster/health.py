"""When a replica is given up: it takes too long, or its canary says that its numbers are wrong. Pure.

A canary is the plan that a replica holds, or the unquantized model, measured anew on a few prompts. What comes out
must be what is known of that plan: from evaluations that were verified, and from the replica's own earlier canaries.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from dtmsearch.core.evaluation import EvalRequest, EvalResult, FloatArray, IntArray, Reference
from dtmsearch.core.plan import Plan

# Verified plans that are remembered: more than the candidates of a round, whose best are the next round's parents.
_MOST_KNOWN = 1 << 14


@dataclass(frozen=True)
class Health:
    """How replicas are watched.

    Time: a call is given up after `factor` times what its cost leads to expect, never before `floor_seconds` nor
    before three times the longest call so far, and after `first_seconds` while nothing has been measured.

    Numbers: a canary of `canary_part` of the prompts, at most `canary_prompts`, comes every `canary_seconds`, or more
    rarely where canaries would take more than `canary_share` of the time; and whenever results that a round waits for
    would have to wait for one. On other batches near ties fall differently: what other replicas found may differ by
    what the base model's own disagreement leads to expect (`tolerated_share`). What the same replica found on the same
    batch it must find again, up to `own_nats`.
    """

    first_seconds: float = 3600.0
    floor_seconds: float = 60.0
    factor: float = 20.0
    canary_prompts: int = 8
    canary_part: float = 1 / 64
    canary_seconds: float = 10.0
    canary_share: float = 0.02
    own_nats: float = 5e-3

    def num_canary_prompts(self, num_prompts: int) -> int:
        return max(1, min(self.canary_prompts, int(num_prompts * self.canary_part)))

    def canary_interval(self, canary_seconds: float) -> float:
        """Seconds between canaries that take `canary_seconds` each."""
        return max(self.canary_seconds, canary_seconds / self.canary_share)


def tolerated_share(reference: Reference, num_tokens: int) -> float:
    """The share of `num_tokens` tokens on which two sound replicas of one mode may differ.

    The base model's cached generation and its single pass differ in a share of the reference's tokens, which is what
    rounding does to it. Two replicas differ from each other by no more than twice that, as each may from a third;
    beyond it three standard deviations of such a number of tokens are allowed, and one token.
    """
    differing = (~reference.agrees).sum() + 0.5  # none of few is no proof that there are none
    expected = 2.0 * num_tokens * differing / (reference.agrees.size + 1)
    return float(min(1.0, (expected + 3.0 * np.sqrt(expected) + 1.0) / num_tokens))


@dataclass
class Pace:
    """How fast replicas are, learned from their calls; costs are in the queue's units (layers times prompts).

    `seconds_per_cost` is by the replicas' own clocks, for how much to send; limits go by what the driver sees of them.
    """

    health: Health
    seconds_per_cost: float | None = None
    seen_seconds_per_cost: float | None = None
    seconds_per_request: float = float("inf")
    longest_seconds: float = 0.0

    def learn(self, cost: float, seconds: float, num_requests: int = 1, own_seconds: float = 0.0) -> None:
        """`seconds` as the driver saw the call. `own_seconds` is what the replica says that it worked, 0 where it does
        not say: what comes on top is waiting for a busy driver, who would only be busier with smaller calls."""
        worked = own_seconds or seconds
        self.seconds_per_request = max(worked, 1e-6) / num_requests
        self.seconds_per_cost = _nearer(self.seconds_per_cost, worked / cost)
        self.seen_seconds_per_cost = _nearer(self.seen_seconds_per_cost, seconds / cost)
        self.longest_seconds = max(self.longest_seconds, seconds)

    def limit_seconds(self, cost: float) -> float:
        """How long a replica may work on a call before it counts as hung."""
        if self.seen_seconds_per_cost is None:
            return self.health.first_seconds
        expected = cost * self.seen_seconds_per_cost
        return max(self.health.floor_seconds, self.health.factor * expected, 3 * self.longest_seconds)


def _nearer(known: float | None, measured: float) -> float:
    return measured if known is None else 0.7 * known + 0.3 * measured


@dataclass(frozen=True, eq=False)
class Sample:
    """A plan on the first prompts of a reference: divergent tokens and perplexity, each [num_prompts]."""

    sdt: IntArray
    dppl: FloatArray

    @staticmethod
    def of(result: EvalResult, num_prompts: int) -> Sample:
        # Copies, so that the whole arrays need not be held.
        return Sample(result.sdt[:num_prompts].copy(), result.dppl[:num_prompts].copy())

    def nats_from(self, other: Sample) -> float:
        """Mean distance of the perplexities' logarithms; infinite where one is no number."""
        distance = float(np.abs(np.log(self.dppl.astype(np.float64)) - np.log(other.dppl.astype(np.float64))).mean())
        return distance if np.isfinite(distance) else float("inf")

    def tokens_from(self, other: Sample) -> float:
        """Mean distance of the numbers of divergent tokens."""
        return float(np.abs(self.sdt - other.sdt).mean())


@dataclass(frozen=True)
class Check:
    """A canary: `plan` on the first prompts of a reference. `tolerated` is the share of its tokens that may differ from
    what another replica found, and the nats of DPPL, which rounding moves by a third as much."""

    plan: Plan
    reference_id: str
    num_prompts: int
    continuation_tokens: int
    tolerated: float

    @property
    def key(self) -> tuple[str, str]:
        return self.plan.id, self.reference_id


class Known:
    """What verified evaluations say of plans on the first prompts of their references; the latest are remembered."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._samples: OrderedDict[tuple[str, str], Sample] = OrderedDict()  # by plan and reference

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._samples

    def learn(self, request: EvalRequest, result: EvalResult, num_prompts: int) -> None:
        """Of prompts from the first on; a plan so damaged that its perplexity overflows says nothing, and canaries are
        of the base model's own weights."""
        if request.weights_id:
            return
        if request.prompts[0] == 0 and len(result.sdt) >= num_prompts and np.isfinite(result.dppl[:num_prompts]).all():
            self._samples[request.plan.id, request.reference_id] = Sample.of(result, num_prompts)
            if len(self._samples) > _MOST_KNOWN:
                self._samples.popitem(last=False)

    def fault(self, check: Check, found: Sample, own: Sample | None) -> str | None:
        """Why what a canary `found` is wrong; None if it is not. `own` is the replica's earlier canary of that plan.

        What others found of a plan is held against one replica only: the second could not be the one to blame.
        """
        if not np.isfinite(found.dppl).all():
            return "its canary's perplexity is no number"
        if own is not None and (found.nats_from(own) > self._health.own_nats or found.tokens_from(own) > 0.5):
            return f"its canary moved by {found.nats_from(own):.3g} nats and {found.tokens_from(own):.3g} tokens"
        expected = self._samples.get(check.key)
        if expected is None and len(check.plan) == 0:
            expected = Sample(np.zeros_like(found.sdt), found.dppl)
        if expected is None:
            return None
        if not self.alike(check, found, expected):
            self._samples.pop(check.key, None)
            share = found.tokens_from(expected) / check.continuation_tokens
            return (
                f"its canary is off by {share:.1%} of the tokens and {found.nats_from(expected):.3g} nats, where "
                f"{check.tolerated:.1%} may be rounding"
            )
        return None

    def alike(self, check: Check, found: Sample, other: Sample) -> bool:
        """Whether two replicas found the same, up to rounding; two that found no number did."""
        infinite, others = ~np.isfinite(found.dppl), ~np.isfinite(other.dppl)
        if infinite.any() or others.any():
            return bool((infinite == others).all())
        share = found.tokens_from(other) / check.continuation_tokens
        return share <= check.tolerated and found.nats_from(other) <= max(check.tolerated, self._health.own_nats)


@dataclass
class Record:
    """A replica's own canaries: what they found, when the last good one was, and how long one takes."""

    verified_at: float = 0.0
    seconds: float = 0.0
    samples: dict[tuple[str, str], Sample] = field(default_factory=dict)

    def keep(self, check: Check, found: Sample, now: float, seconds: float) -> None:
        if len(check.plan):
            # Replicas come back to the unquantized model, but not to parents of the past.
            self.samples = {key: sample for key, sample in self.samples.items() if key[0] == Plan().id}
        self.samples[check.key] = found
        self.verified_at, self.seconds = now, seconds
