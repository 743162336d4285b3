"""How much of a cluster a replica takes, how many replicas it has room for, and what they wait for.

Counts node by node, because a replica, or each of its parts, lies on one: two nodes of four CPUs have no room for
a replica of eight.
Knows resources, nothing of what replicas do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ray

# Nodes come and go in seconds at most, and asking costs a message to the head.
_COUNT_SECONDS = 5.0
# So long a replica may wait for its place before a word is said, and so long until the next.
_SILENT_SECONDS, _SAY_SECONDS = 15.0, 120.0

Node = Mapping[str, float]


@dataclass(frozen=True)
class Share:
    """What a replica takes of each of the `num_nodes` over which it is spread."""

    num_gpus: float
    num_cpus: float
    num_nodes: int = 1

    @property
    def stages_on_node(self) -> int:
        """Stages of a replica on each of its nodes: one for each GPU. On a single node its model is not cut."""
        return max(1, int(self.num_gpus)) if self.num_nodes > 1 else 1

    @property
    def bundle(self) -> dict[str, float]:
        """What is to be reserved of a node, as Ray names it."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})

    @property
    def num_stages(self) -> int:
        return self.num_nodes * self.stages_on_node

    def fits(self, node: Node) -> int:
        """How many replicas' parts a node has room for when nothing else is on it."""
        counts = [
            int(node.get(kind, 0.0) / each + 1e-9)
            for kind, each in (("GPU", self.num_gpus), ("CPU", self.num_cpus))
            if each
        ]
        return min(counts)

    def room(self, nodes: Sequence[Node]) -> int:
        """How many replicas nodes have room for, when the parts of one lie on different nodes."""
        fitting = [self.fits(node) for node in nodes]
        replicas = sum(fitting) // self.num_nodes
        while sum(min(fits, replicas) for fits in fitting) < replicas * self.num_nodes:
            replicas -= 1
        return replicas

    def __str__(self) -> str:
        gpus = f"{self.num_gpus:g} GPU{'' if self.num_gpus == 1 else 's'} and " if self.num_gpus else ""
        nodes = f" on each of {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        return f"{gpus}{self.num_cpus:.3g} CPU{'' if self.num_cpus == 1 else 's'}{nodes}"


def share_of(
    nodes: Sequence[Node],
    replicas: int,
    gpus_per_replica: float | None,
    cpus_per_replica: float | None,
    nodes_per_replica: int = 1,
) -> Share:
    """The share of each replica, of each of its nodes. Without a wish: a GPU where there are any, and a CPU for
    each stage; on CPUs alone, as many as the wanted replicas leave each, one if their number is not given
    (`replicas` 0)."""
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    num_gpus = gpus_per_replica if gpus_per_replica is not None else (1.0 if gpus else 0.0)
    if cpus_per_replica is not None:
        return Share(num_gpus, cpus_per_replica, nodes_per_replica)
    if num_gpus or not replicas:
        one = Share(num_gpus, 1.0, nodes_per_replica)
        return replace(one, num_cpus=float(one.stages_on_node))
    largest = int(max((node.get("CPU", 0.0) for node in nodes), default=1.0))
    for num_cpus in range(largest, 0, -1):
        share = Share(0.0, float(num_cpus), nodes_per_replica)
        if share.room(nodes) >= replicas:
            return share
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    return Share(0.0, max(0.01, cpus / (replicas * nodes_per_replica)) if cpus else 1.0, nodes_per_replica)


def alive_nodes() -> list[Node]:
    """The resources of each node that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class WantedReplicas:
    """How many replicas of a share there shall be: `replicas` of them or, for 0, as many as the nodes that are there
    have room for, counted again as they come and go. Never none, so that a cluster that grows on demand grows."""

    def __init__(self, share: Share, replicas: int) -> None:
        self._share, self._replicas = share, replicas
        self._counted = 0
        self._count_again_at = 0.0

    @property
    def wanted(self) -> int:
        if self._replicas:
            return self._replicas
        if time.monotonic() >= self._count_again_at:
            self._counted = max(1, self._share.room(alive_nodes()))
            self._count_again_at = time.monotonic() + _COUNT_SECONDS
        return self._counted

    def count_again(self) -> None:
        """A node may be gone: do not trust the last count."""
        self._count_again_at = 0.0


class Patience:
    """When to say that replicas wait for a place, and what for."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._since: float | None = None
        self._say_at = 0.0

    def note(self, waiting: Sequence[str], num_at_work: int) -> str | None:
        """A line about the replicas of these names, if it is time for one."""
        now = time.monotonic()
        if not waiting:
            self._since = None
            return None
        if self._since is None:
            self._since, self._say_at = now, now + _SILENT_SECONDS
        if now < self._say_at:
            return None
        self._say_at = now + _SAY_SECONDS
        return waiting_line(waiting, num_at_work, self._share, alive_nodes(), ray.available_resources())


def waiting_line(
    waiting: Sequence[str], num_at_work: int, share: Share, nodes: Sequence[Node], free: Mapping[str, float]
) -> str:
    """Which replicas wait for which share of what a cluster of these nodes has, and what would help."""
    kinds = [kind for kind, each in (("GPU", share.num_gpus), ("CPU", share.num_cpus)) if each]
    has = " and ".join(
        f"{sum(node.get(kind, 0.0) for node in nodes):g} {kind}, {free.get(kind, 0.0):g} of them free" for kind in kinds
    )
    names = waiting[0] if len(waiting) == 1 else f"{len(waiting)} replicas"
    verb = "waits" if len(waiting) == 1 else "wait"
    goes_on = f"the search goes on with {num_at_work}" if num_at_work else "the search begins with the first"
    if not any(share.fits(node) for node in nodes):
        help_ = "no node that is there is large enough" + (" for one" if share.num_nodes == 1 else "")
    elif not share.room(nodes):
        fitting = sum(share.fits(node) > 0 for node in nodes)
        help_ = f"{fitting} of them large enough, where one replica takes {share.num_nodes}"
    else:
        help_ = "another program holds the rest, or a process is slow to start; a smaller --cpus-per-replica needs less"
    return f"{names} {verb} for a place with {share}: the cluster's {len(nodes)} nodes have {has} ({help_}); {goes_on}"
