"""In which order a model over several devices is given its work."""

from __future__ import annotations

from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Counted:
    """Products of the matrices of a layer, and what of them is not run again for q, k, v, o, gate, up and down, where
    outputs are kept; the head in layers, and where two GPUs are cut. Of 32 layers."""

    layer: float
    spared: tuple[float, ...]
    head: float
    cut: int

    def share_of_two_replicas(self, under_way: int, head: float, calls: int = 1) -> float:
        """What two GPUs do of what two replicas do, in a probe of all components, in calls that each have every n-th
        and end before the next begins, with no more requests on their way, in the order for a head of so many layers;
        the parent's pass included."""
        requests = [(layer, spared / self.layer) for layer in range(32) for spared in self.spared]
        lower, upper = float(self.cut), 32.0
        for own in (requests[first::calls] for first in range(calls)):
            done = [upper if calls > 1 else 0.0] * (under_way + 1)
            for at in busy_order([layer for layer, _ in own], [self.cut, 32], head):
                (layer, spared), launched = own[at], done[-under_way - 1]
                if layer < self.cut:
                    lower = max(lower, launched) + self.cut - layer - spared
                upper = max(upper, launched, lower if layer < self.cut else 0.0)
                upper += 32 - max(layer, self.cut) - (spared if layer >= self.cut else 0.0) + self.head
                done.append(upper)
        return (sum(32 - layer - spared + self.head for layer, spared in requests) + 64) / 2 / upper


LLAMA_2_7B = Counted(202.4, (33.6, 33.6, 33.6, 50.3, 112.2, 112.2, 157.3), 0.75, 23)
LLAMA_3_8B = Counted(218.1, (8.4, 20.9, 20.9, 25.1, 100.7, 100.7, 159.4), 2.5, 24)


SMALL_HEAD = replace(LLAMA_2_7B, head=1 / 6)


@pytest.mark.parametrize(("model", "head"), [(LLAMA_2_7B, 0.75), (LLAMA_3_8B, 2.5), (SMALL_HEAD, 0.25)])
def test_so_many_are_on_their_way_that_both_gpus_have_something_to_do(model: Counted, head: float) -> None:
    assert model.share_of_two_replicas(2 * _AHEAD_OF_EACH, head) > 0.974


def test_with_fewer_on_their_way_or_in_a_call_gpus_wait() -> None:
    assert SMALL_HEAD.share_of_two_replicas(4, 0.25) < 0.965
    of_75, of_32 = (SMALL_HEAD.share_of_two_replicas(2 * _AHEAD_OF_EACH, 0.25, calls) for calls in (3, 7))
    assert of_75 > 0.96 and of_32 < 0.945


def test_a_head_counts_in_the_order_and_in_the_cut() -> None:
    assert LLAMA_3_8B.share_of_two_replicas(2 * _AHEAD_OF_EACH, 0.0) < 0.87
    assert replace(LLAMA_3_8B, cut=23).share_of_two_replicas(2 * _AHEAD_OF_EACH, 2.5) < 0.92
    assert replace(LLAMA_3_8B, cut=23).share_of_two_replicas(2 * _AHEAD_OF_EACH, 0.0) < 0.91


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
        lambda layers, *further: launched.extend(layers) or busy_order(layers, *further),
    )
    assert found(Replica(spec, settings)) == expected
    assert bool(launched) == (states == "device")  # where not all states are kept, layer by layer
