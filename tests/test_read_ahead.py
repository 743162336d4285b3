"""Original weights that are read ahead are those that are read when they are asked for."""

from __future__ import annotations

import pytest
import torch
from tiny import DEMO_MODEL

from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import BASE, Variant
from dtmsearch.model.modules.weight_reading import Fetched
from dtmsearch.model.replica.replica import Replica
from dtmsearch.model.weights import read_ahead
from dtmsearch.model.weights.applied import Weights
from dtmsearch.model.weights.read_ahead import ReadAhead, Wanted


def under(replica: Replica, scheme: str) -> dict[str, torch.Tensor]:
    """All weights of a model whose components stand under a scheme, and then again unquantized."""
    found = {}
    plan = Plan.of({component.name: scheme for component in replica.manifest().components})
    with replica.under(Variant(plan)) as model:
        found |= {name: parameter.clone() for name, parameter in model.named_parameters()}
    with replica.under(BASE) as model:
        found |= {f"base {name}": parameter.clone() for name, parameter in model.named_parameters()}
    return found


def test_a_plan_after_a_plan_has_the_weights_that_it_has_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(str(DEMO_MODEL), dtype="bfloat16")
    expected = under(Replica(spec, ReplicaSettings()), "int4-g32")
    monkeypatch.setattr(Weights, "reads_ahead", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(read_ahead, "LEAST_BYTES", 0)
    taken: list[str] = []
    take = ReadAhead.take

    def taking(self: ReadAhead, component: str) -> torch.Tensor | None:
        found = take(self, component)
        taken.extend([component] if found is not None else [])
        return found

    monkeypatch.setattr(ReadAhead, "take", taking)
    replica = Replica(spec, ReplicaSettings())
    under(replica, "int8-channel")
    found = under(replica, "int4-g32")
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(taken) == {component.name for component in replica.manifest().components}


def test_no_more_is_on_its_way_than_there_is_room_for_and_at_least_two(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def wanted(name: str, size: int) -> Wanted:
        def mapped() -> torch.Tensor:
            read.append(name)
            return torch.full((size,), float(len(name)))

        return Wanted(name, mapped, torch.device("cpu"))

    monkeypatch.setattr(read_ahead, "_MOST_BYTES", 100)
    ahead = ReadAhead()
    with ahead.of([wanted("a", 30), wanted("bb", 30), wanted("ccc", 5), wanted("dddd", 5)]):
        assert {"a", "bb"} <= set(read) and "dddd" not in read
        for name in ("a", "bb", "ccc", "dddd"):
            values = ahead.take(name)
            assert values is not None and bool((values == len(name)).all())
        assert ahead.take("a") is None
    assert ahead.take("dddd") is None


def test_what_goes_wrong_in_reading_is_said_where_the_weights_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Fetched) -> None:
        raise OSError("gone")

    monkeypatch.setattr(Fetched, "wait", fail)
    ahead = ReadAhead()
    with (
        pytest.raises(OSError, match="gone"),
        ahead.of([Wanted("a", lambda: torch.zeros(4), torch.device("cpu"))]),
    ):
        ahead.take("a")


def test_an_interruption_leaves_nothing_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, waited = ReadAhead(), list[bool]()

    def wanted(*values: float) -> list[Wanted]:
        return [Wanted(f"{i}", lambda v=v: torch.full((4,), v), torch.device("cpu")) for i, v in enumerate(values)]  # type: ignore[misc]

    def interrupted(self: Fetched) -> None:
        waited.append(True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Fetched, "wait", interrupted)
        with ahead.of(wanted(1.0, 1.0)):
            pass
    with ahead.of(wanted(2.0)):
        assert waited and ahead.take("1") is None  # that of before
        found = ahead.take("0")
        assert found is not None and bool((found == 2.0).all())


def test_a_file_that_cannot_be_read_is_left_to_who_asks_for_it() -> None:
    def gone() -> torch.Tensor:
        raise OSError("gone")

    here = torch.device("cpu")
    ahead = ReadAhead()
    with ahead.of([Wanted("a", lambda: torch.ones(4), here), Wanted("b", gone, here)]):
        assert ahead.take("a") is not None and ahead.take("b") is None
