"""Which replica is sent what: without Ray, on a clock of the test's own."""

from __future__ import annotations

import random
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import evaluate, request_for, toy_components, toy_manifest

from dtmsearch.cluster.canaries import Canaries
from dtmsearch.cluster.dispatcher import Dispatcher
from dtmsearch.cluster.health import Health
from dtmsearch.cluster.outstanding import MAX_ATTEMPTS
from dtmsearch.cluster.replica_handle import Call, ReplicaHandle
from dtmsearch.cluster.verifier import Verifier
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, Outcome, first_changed_layer
from dtmsearch.core.plan import Perturbation, Plan

NOTHING: Any = SimpleNamespace()
CALLS = count()


def requests(number: int) -> list[EvalRequest]:
    plans = [Plan().with_(Perturbation(c.name, s)) for c in toy_components(8) for s in ("int8-channel", "int4-g32")]
    return [request_for(plan, Plan()) for plan in plans[:number]]


class World:
    """A dispatcher, a verifier, and replicas that are there at once; time stands still unless it is moved."""

    def __init__(self, num_replicas: int, guess_from: int = 1, health: Health = Health()) -> None:
        self.now = 0.0
        canaries = Canaries(health, {})
        self.verifier = Verifier(canaries)
        self.dispatcher = Dispatcher(toy_manifest(8), health, canaries, guess_from, lambda: self.now)
        self.replicas = [self.replica() for _ in range(num_replicas)]

    def replica(self) -> ReplicaHandle:
        return ReplicaHandle(f"replica-{next(CALLS)}", NOTHING, NOTHING, NOTHING, ready=True)

    def send(self) -> list[tuple[ReplicaHandle, Call]]:
        sent = []
        for replica, call in self.dispatcher.orders(self.replicas):
            replica.calls[next(CALLS)] = call
            sent.append((replica, call))
        return sent

    def answer(self, replica: ReplicaHandle) -> list[Outcome]:
        """What is handed over as a replica's oldest call ends."""
        call = replica.calls.pop(next(iter(replica.calls)))
        outcomes = [evaluate(request) for request in call.requests]
        self.dispatcher.learn(call, self.dispatcher.ended(replica, call), outcomes)
        return self.dispatcher.finished(self.verifier.answered(replica, call, outcomes))

    def lose(self, replica: ReplicaHandle, is_blameless: bool = False) -> list[Outcome]:
        """Another comes in its place; what is given up."""
        self.replicas[self.replicas.index(replica)] = self.replica()
        return self.dispatcher.take_back(replica, "it died", is_blameless)


def test_everyone_has_a_first_call_before_anyone_has_a_second() -> None:
    world = World(3)
    world.dispatcher.add(requests(16))
    assert [len(set(names)) for names in [[replica.name for replica, _ in world.send()][:3]]] == [3]


def test_a_replica_that_reads_all_weights_in_a_call_gets_its_part_of_a_round_in_one() -> None:
    world = World(2)
    for replica in world.replicas:
        replica.together = True
    world.dispatcher.add(requests(16))
    sizes = [len(call.requests) for _, call in world.send()]
    assert sizes == [8, 8]


def test_a_replica_over_several_devices_gets_candidates_of_all_layers_in_a_call() -> None:
    world = World(2)
    for replica in world.replicas:
        replica.over_devices = True
    asked, manifest = requests(16), toy_manifest(8)
    world.dispatcher.add(asked)
    calls = [[first_changed_layer(request, manifest) for request in call.requests] for _, call in world.send()]
    assert [len(layers) for layers in calls[:2]] == [4, 4]  # something is left to even out what takes longer
    everywhere = [first_changed_layer(request, manifest) for request in asked]
    assert all(max(layers) - min(layers) > (max(everywhere) - min(everywhere)) / 2 for layers in calls[:2])
    alone = World(1)
    alone.replicas[0].over_devices = True
    alone.dispatcher.add(asked)
    assert [len(call.requests) for _, call in alone.send()] == [16]


def test_nobody_is_sent_a_guess_while_something_real_waits() -> None:
    world = World(1)
    world.dispatcher.add(requests(4)[:3])
    world.dispatcher.add_guesses(requests(4)[3:])
    first = [request.id for _, call in world.send() for request in call.requests]
    assert requests(4)[3].id not in first


def test_idle_replicas_are_offered_where_there_are_many() -> None:
    assert [World(2, guess_from).dispatcher.num_idle(World(2).replicas) for guess_from in (8, 2)] == [0, 4]


def test_a_request_over_which_replicas_are_lost_is_given_up_after_so_many() -> None:
    world, [request] = World(1), requests(1)
    world.dispatcher.add([request])
    given_up: list[Outcome] = []
    for _ in range(MAX_ATTEMPTS):
        world.send()
        given_up += world.lose(world.replicas[0])
    [failure] = given_up
    assert isinstance(failure, EvalFailure)
    assert (failure.request_id, failure.kind, failure.provenance.attempts) == (request.id, "replica_lost", MAX_ATTEMPTS)


def test_a_loss_that_is_nobodys_fault_is_charged_to_no_request() -> None:
    world = World(1)
    world.dispatcher.add(requests(1))
    for _ in range(MAX_ATTEMPTS + 1):
        world.send()
        assert world.lose(world.replicas[0], is_blameless=True) == []
    world.send()
    assert len(world.answer(world.replicas[0])) == 1


def test_a_call_is_overdue_once_it_takes_longer_than_any_could() -> None:
    world = World(1, health=Health(first_seconds=10.0))
    world.dispatcher.add(requests(1))
    world.send()
    said = []
    for world.now in (9.0, 11.0):
        said.append(world.dispatcher.overdue(world.replicas[0]))
    assert said == [None, "no answer for 11 s, where 10 s are the most"]


@pytest.mark.parametrize("seed", range(20))
def test_every_request_is_answered_once_whichever_replicas_are_lost(seed: int) -> None:
    world, chance = World(3), random.Random(seed)
    world.dispatcher.add(requests(16))
    arrived: list[Outcome] = []
    while len(arrived) < 16:
        world.send()
        world.now += chance.random()
        replica = chance.choice([replica for replica in world.replicas if replica.calls])
        arrived += world.lose(replica) if chance.random() < 0.2 else world.answer(replica)
    assert sorted(outcome.request_id for outcome in arrived) == sorted(request.id for request in requests(16))
