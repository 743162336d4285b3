"""How much of a cluster a replica takes, and what is said while it waits."""

from __future__ import annotations

import pytest

from dtmsearch.cluster import placement, pool
from dtmsearch.cluster.placement import Node, Patience, Share, WantedReplicas, share_of, waiting_line
from dtmsearch.cluster.pool_settings import PoolSettings


def cpus(*nodes: float) -> list[Node]:
    return [{"CPU": each, "memory": 1e9} for each in nodes]


def gpus(*nodes: float) -> list[Node]:
    return [{"CPU": 16.0, "GPU": each} for each in nodes]


@pytest.mark.parametrize(
    ("nodes", "replicas", "each"),
    [
        (cpus(8), 1, 8),
        (cpus(8), 3, 2),
        (cpus(4, 4), 1, 4),  # never more than a node has
        (cpus(4, 1), 2, 2),
        (cpus(2, 2, 2), 4, 1),
        (cpus(2), 4, 0.5),
        (cpus(8), 0, 1),
    ],
)
def test_processors_are_shared_so_that_all_replicas_find_a_node(nodes: list[Node], replicas: int, each: float) -> None:
    assert share_of(nodes, replicas, None, None) == Share(0.0, each)


def test_processors_of_a_replica_on_two_nodes_leave_room_for_the_others() -> None:
    assert share_of(cpus(8, 8), 3, None, None, nodes_per_replica=2) == Share(0.0, 2.0, 2)


def test_a_replica_on_two_nodes_has_a_stage_and_a_processor_for_each_gpu() -> None:
    share = share_of(gpus(4, 4), 0, 4.0, None, nodes_per_replica=2)
    assert (share, share.num_stages) == (Share(4.0, 4.0, 2), 8)


def test_a_replica_takes_a_gpu_where_there_are_any() -> None:
    assert share_of(gpus(0, 2), 0, None, None) == Share(1.0, 1.0)


def test_wishes_are_taken_as_they_are() -> None:
    assert share_of(gpus(8), 2, 4.0, 6.0) == Share(4.0, 6.0)


@pytest.mark.parametrize(
    ("share", "nodes", "room"),
    [
        (Share(2.0, 1.0), gpus(1, 1, 1), 0),  # a replica lies on one node
        (Share(2.0, 1.0), gpus(3, 4), 3),
        (Share(0.5, 1.0), gpus(1), 2),
        (Share(0.1, 1.0), gpus(1), 10),
        (Share(1.0, 8.0), gpus(4), 2),
        (Share(0.0, 1.0), cpus(2, 0, 3), 5),
        (Share(2.0, 1.0, num_nodes=2), gpus(4), 0),  # the parts of one lie on different nodes
        (Share(2.0, 1.0, num_nodes=2), gpus(4, 2), 1),
        (Share(2.0, 1.0, num_nodes=2), gpus(4, 2, 3), 2),
        (Share(1.0, 1.0, num_nodes=3), gpus(2, 2, 2, 1, 1), 2),
        (Share(1.0, 1.0, num_nodes=3), gpus(8, 8), 0),
    ],
)
def test_room_is_counted_node_by_node(share: Share, nodes: list[Node], room: int) -> None:
    assert share.room(nodes) == room


def test_one_machine_is_no_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "alive_nodes", lambda: cpus(8.0))
    with pytest.raises(ValueError, match="--nodes-per-replica asks for 2 nodes, but 1 can be had here"):
        pool._share(PoolSettings(nodes_per_replica=2))


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The nodes of a cluster that a test changes."""
    there = cpus(2.0)
    monkeypatch.setattr(placement, "alive_nodes", lambda: there)
    monkeypatch.setattr(placement.ray, "available_resources", lambda: {"CPU": 1.0})
    return there


def test_as_many_replicas_are_wanted_as_nodes_have_room_for(nodes: list[Node]) -> None:
    room = WantedReplicas(Share(0.0, 1.0), replicas=0)
    before = room.wanted
    nodes += cpus(3.0)
    room.count_again()
    assert (before, room.wanted) == (2, 5)


def test_one_replica_is_wanted_where_there_is_no_room_yet(nodes: list[Node]) -> None:
    assert WantedReplicas(Share(4.0, 1.0), replicas=0).wanted == 1


def test_a_given_number_of_replicas_is_wanted_whatever_is_there(nodes: list[Node]) -> None:
    assert WantedReplicas(Share(0.0, 1.0), replicas=7).wanted == 7


def test_nothing_is_said_of_a_short_wait(nodes: list[Node]) -> None:
    assert Patience(Share(0.0, 1.0)).note(["replica-0"], 0) is None


def test_a_long_wait_is_said_once(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(Share(0.0, 1.0))
    patience.note(["replica-0"], 0)
    later = placement.time.monotonic() + 20
    monkeypatch.setattr(placement.time, "monotonic", lambda: later)
    assert [patience.note(["replica-0"], 0) is None for _ in range(2)] == [False, True]


def test_a_wait_names_what_is_wanted_and_what_is_free() -> None:
    line = waiting_line(["replica-1", "replica-2"], 1, Share(0.0, 2.0), cpus(2.0, 2.0), {"CPU": 1.0})
    assert "2 replicas wait for a place with 2 CPUs: the cluster's 2 nodes have 4 CPU, 1 of them free" in line


def test_a_wait_for_a_node_that_is_not_there_says_so() -> None:
    assert "no node that is there is large enough" in waiting_line(["replica-0"], 0, Share(4.0, 1.0), gpus(2.0), {})


def test_a_wait_for_enough_nodes_says_how_many_one_replica_takes() -> None:
    line = waiting_line(["replica-0"], 0, Share(4.0, 4.0, num_nodes=2), gpus(2.0, 4.0), {})
    assert "with 4 GPUs and 4 CPUs on each of 2 nodes" in line
    assert "1 of them large enough, where one replica takes 2" in line
