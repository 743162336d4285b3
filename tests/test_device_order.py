"""In which order a model over several devices is given its work."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tiny import DEMO_MODEL, TEXT

from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, ReplicaSettings, StatesKept
from dtmsearch.core.plan import Plan
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.replica.device_order import busy_order
from dtmsearch.model.replica.plan_evaluator import _AHEAD_OF_EACH
from dtmsearch.model.replica.replica import Replica


def layers_until_done(first_layers: list[int], ends: list[int]) -> int:
    """When the last device is done with requests launched in this order, in the time of a layer."""
    free = [0] * len(ends)
    for layer in first_layers:
        done = 0
        for device, (start, end) in enumerate(pairwise((0, *ends))):
            if layer < end:
                done = free[device] = max(done, free[device]) + end - max(layer, start)
    return max(free)


def times_one(num_layers: int, ends: list[int], first_layers: list[int], ordered: bool) -> float:
    """How many times as fast as one device that many devices are."""
    order = busy_order(first_layers, ends) if ordered else range(len(first_layers))
    done = layers_until_done([first_layers[at] for at in order], ends)
    return sum(num_layers - layer for layer in first_layers) / done


@pytest.mark.parametrize(
    ("num_layers", "ends", "each", "least"),
    [(48, [34, 48], 7, 1.95), (48, [34, 48], 1, 1.9), (32, [23, 32], 7, 1.88), (80, [40, 57, 69, 80], 2, 3.7)],
)
def test_all_devices_work_at_once(num_layers: int, ends: list[int], each: int, least: float) -> None:
    layers = [layer for layer in range(num_layers) for _ in range(each)]
    assert times_one(num_layers, ends, layers, ordered=True) >= least
    assert times_one(num_layers, ends, layers, ordered=False) < 0.8 * least  # one layer after the other


# What of a layer of Llama-2-7B is not run again for q, k, v, o, gate, up and down, where outputs are kept: products of
# matrices, in millions.
SPARED = [33.6, 33.6, 33.6, 50.3, 112.2, 112.2, 157.3]
LAYER = 202.4


def share_of_two_replicas(under_way: int) -> float:
    """What two GPUs with 23 and 9 layers do of what two replicas do, in a probe of all components, with no more
    requests on their way; the parent's pass and the head, a sixth of a layer, included."""
    requests = [(layer, spared / LAYER) for layer in range(32) for spared in SPARED]
    order = busy_order([layer for layer, _ in requests], [23, 32])
    lower, upper, done = 23.0, 32.0, list[float]()
    for layer, spared in (requests[at] for at in order):
        launched = done[-under_way - 1] if len(done) > under_way else 0.0
        if layer < 23:
            lower = max(lower, launched) + 23 - layer - spared
        upper = max(upper, launched, lower if layer < 23 else 0.0)
        upper += 32 - max(layer, 23) - (spared if layer >= 23 else 0.0) + 1 / 6
        done.append(upper)
    return (sum(32 - layer - spared + 1 / 6 for layer, spared in requests) + 64) / 2 / upper


def test_so_many_are_on_their_way_that_both_gpus_have_something_to_do() -> None:
    assert share_of_two_replicas(2 * _AHEAD_OF_EACH) >= 0.97
    assert share_of_two_replicas(_AHEAD_OF_EACH) < 0.955, "half as many would do"


def test_every_request_is_launched_once() -> None:
    layers = [3, 0, 0, 7, 5, 7]
    assert sorted(busy_order(layers, [5, 8])) == list(range(6))


def test_one_that_changes_no_layer_runs_on_the_last_device_alone() -> None:
    assert busy_order([8, 8], [5, 8]) == [0, 1]


def test_on_one_device_all_orders_are_as_good_and_that_of_layers_is_taken() -> None:
    assert busy_order([2, 0, 1], [3]) == [1, 2, 0]


@pytest.mark.parametrize("states", ["device", "host", "sweep"])
def test_requests_in_any_order_find_the_same(states: StatesKept, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(replica: Replica) -> list[tuple[bytes, ...]]:
        reference = replica.make_reference(replica.cut_prompts([TEXT], 4, 16, 16, 0)[0])
        replica.use(reference)
        components = replica.manifest().components
        plans = [Plan(), *(Plan.of({component.name: "int4-g32"}) for component in components[::3])]
        asked = [EvalRequest(plan, reference.id, (0, 4), ("kl", "ppl")) for plan in plans]
        outcomes = [outcome for outcome in replica.evaluate(asked) if isinstance(outcome, EvalResult)]
        assert [outcome.request_id for outcome in outcomes] == [request.id for request in asked]
        return [(outcome.fdt.tobytes(), outcome.dppl.tobytes(), outcome.kl.tobytes()) for outcome in outcomes]

    spec, settings = ModelSpec(str(DEMO_MODEL), dtype="float32"), ReplicaSettings(states=states)
    expected = found(Replica(spec, settings))
    launched: list[int] = []
    monkeypatch.setattr(Body, "device_ends", property(lambda body: [4, body.num_layers]))
    monkeypatch.setattr(
        "dtmsearch.model.replica.plan_evaluator.busy_order",
        lambda layers, ends: launched.extend(layers) or busy_order(layers, ends),
    )
    assert found(Replica(spec, settings)) == expected
    assert bool(launched) == (states == "device")  # where not all states are kept, layer by layer
