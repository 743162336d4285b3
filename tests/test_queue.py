"""The order in which waiting requests are handed to replicas."""

from __future__ import annotations

from fakes import toy_components, toy_manifest

from dtmsearch.cluster.queue import RequestQueue
from dtmsearch.core.evaluation import EvalRequest
from dtmsearch.core.plan import Perturbation, Plan

MANIFEST = toy_manifest(num_layers=8)
COMPONENTS = toy_components(num_layers=8)
PARENTS = [Plan.of({COMPONENTS[0].name: scheme}) for scheme in ("int8-tensor", "int4-tensor")]


def requests_of(parent: Plan) -> list[EvalRequest]:
    plans = [parent.with_(Perturbation(c.name, "int4-g32")) for c in COMPONENTS[3:]]
    return [EvalRequest(plan, "reference", (0, 8), (), parent) for plan in plans]


def changed_layers(requests: list[EvalRequest]) -> list[int]:
    names = [next(iter(r.plan.diff(r.parent))) for r in requests]
    return [MANIFEST.by_name[name].layer for name in names]


def test_requests_of_a_parent_come_from_the_bottom_layer_up() -> None:
    queue = RequestQueue(MANIFEST)
    queue.add(list(reversed(requests_of(PARENTS[0]))))
    taken, _, _ = queue.take(1e9, None)
    assert changed_layers(taken) == sorted(changed_layers(taken))


def test_one_call_holds_requests_of_one_parent() -> None:
    queue = RequestQueue(MANIFEST)
    for parent in PARENTS:
        queue.add(requests_of(parent))
    taken, parent_id, _ = queue.take(1e9, None)
    assert {request.parent.id for request in taken} == {parent_id}


def test_a_replica_stays_with_its_parent() -> None:
    queue = RequestQueue(MANIFEST)
    for parent in PARENTS:
        queue.add(requests_of(parent))
    assert [queue.take(0.0, PARENTS[1].id)[1] for _ in range(5)] == [PARENTS[1].id] * 5


def test_a_second_replica_takes_a_parent_that_nobody_has() -> None:
    queue = RequestQueue(MANIFEST)
    for parent in PARENTS:
        queue.add(requests_of(parent))
    _, first, _ = queue.take(0.0, None)
    _, second, _ = queue.take(0.0, None)
    assert {first, second} == {parent.id for parent in PARENTS}


def test_a_call_costs_about_its_budget_and_is_never_empty() -> None:
    queue = RequestQueue(MANIFEST)
    queue.add(requests_of(PARENTS[0]))
    one, _, cost = queue.take(0.0, None)
    some, _, _ = queue.take(2.5 * cost, None)
    assert (len(one), len(some)) == (1, 3)


def test_a_suspect_goes_alone_and_first() -> None:
    queue = RequestQueue(MANIFEST)
    *others, suspect = requests_of(PARENTS[0])
    queue.add(others)
    queue.add([suspect], alone=True)
    assert queue.take(1e9, None)[0] == [suspect]


def test_everything_put_in_comes_out_once() -> None:
    queue = RequestQueue(MANIFEST)
    wanted = [request for parent in PARENTS for request in requests_of(parent)]
    queue.add(wanted)
    got: list[EvalRequest] = []
    while len(queue):
        got += queue.take(50.0, None)[0]
    assert sorted(r.id for r in got) == sorted(r.id for r in wanted)


def test_an_emptied_queue_costs_nothing() -> None:
    queue = RequestQueue(MANIFEST)
    queue.add(requests_of(PARENTS[0]))
    while len(queue):
        queue.take(20.0, None)
    assert abs(queue.cost) < 1e-9
