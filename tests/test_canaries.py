"""Whom a canary's answer blames: the replica, or what two replicas find alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import MODE

from dtmsearch.cluster.canaries import Canaries, WrongNumbers
from dtmsearch.cluster.health import Check, Health, Sample
from dtmsearch.cluster.replica_handle import ReplicaHandle
from dtmsearch.core.evaluation import Reference
from dtmsearch.core.plan import Plan
from dtmsearch.errors import ReplicasFailed

TOKENS = np.zeros((8, 100), np.int32)
REFERENCE = Reference("reference", "toy", MODE, TOKENS, TOKENS, np.ones((8, 100), np.bool_), ())
DENSE = Check(Plan(), "reference", 2, continuation_tokens=100, tolerated=0.02)
NOTHING: Any = None


def member(name: str) -> ReplicaHandle:
    return ReplicaHandle(name, NOTHING, NOTHING, NOTHING)


def found(sdt: int = 0, dppl: float = 1.5) -> Sample:
    return Sample(np.full(2, sdt, np.int32), np.full(2, dppl, np.float32))


def watched() -> Canaries:
    """Canaries that have dismissed `replica-0` for what it found of the base model."""
    canaries = Canaries(Health(), {"reference": REFERENCE})
    with pytest.raises(WrongNumbers):
        canaries.verify(member("replica-0"), DENSE, found(sdt=9), 0.1)
    return canaries


def test_a_second_replica_that_finds_the_same_is_not_to_blame() -> None:
    with pytest.raises(ReplicasFailed, match=r"replica-0 and replica-1, .* not a replica"):
        watched().verify(member("replica-1"), DENSE, found(sdt=9), 0.1)


def test_a_second_replica_that_finds_something_else_is_dismissed_too() -> None:
    with pytest.raises(WrongNumbers):
        watched().verify(member("replica-1"), DENSE, found(sdt=40), 0.1)


def test_a_second_replica_that_finds_what_the_reference_says_is_sound() -> None:
    replica = member("replica-1")
    watched().verify(replica, DENSE, found(), 0.1)
    assert DENSE.key in replica.record.samples


def test_numbers_that_are_none_are_the_models_when_two_replicas_find_none() -> None:
    canaries = Canaries(Health(), {"reference": REFERENCE})
    with pytest.raises(WrongNumbers):
        canaries.verify(member("replica-0"), DENSE, found(dppl=float("nan")), 0.1)
    with pytest.raises(ReplicasFailed, match="perplexity is no number"):
        canaries.verify(member("replica-1"), DENSE, found(dppl=float("nan")), 0.1)
