"""Requests that wait, in the order in which replicas do them cheaply. Pure.

Grouped by parent and sorted by the first layer that must run, so that a replica carries its parent's states upward
once. A replica stays with its parent while there is work there; then it takes a parent nobody has, then helps out.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import FIXED_COST, EvalRequest, evaluation_cost, first_changed_layer


class _Waiting(NamedTuple):
    """A request and what it will cost, ordered as replicas do them. No two that wait have the same id."""

    layer: int
    id: str
    cost: float
    request: EvalRequest


@dataclass
class _Group:
    requests: list[_Waiting] = field(default_factory=list)
    cost: float = 0.0
    taken: int = 0


class RequestQueue:
    """Costs are in layers times prompts."""

    def __init__(self, manifest: ModelManifest) -> None:
        self._manifest = manifest
        self._groups: dict[str, _Group] = {}
        self._alone: deque[_Waiting] = deque()
        self.cost = 0.0
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, requests: Sequence[EvalRequest], alone: bool = False) -> None:
        """`alone`: to be sent by itself, and before all others."""
        for request in requests:
            waiting = self._waiting(request)
            self._num += 1
            self.cost += waiting.cost
            if alone:
                self._alone.append(waiting)
                continue
            group = self._groups.setdefault(request.parent.id, _Group())
            insort(group.requests, waiting)
            group.cost += waiting.cost

    def _waiting(self, request: EvalRequest) -> _Waiting:
        layer = first_changed_layer(request, self._manifest)
        return _Waiting(layer, request.id, evaluation_cost(request, self._manifest), request)

    def remove(self, ids: Collection[str]) -> list[EvalRequest]:
        """Take requests out of turn: those of `ids` that wait here."""
        removed = [waiting for waiting in self._alone if waiting.id in ids]
        self._alone = deque(waiting for waiting in self._alone if waiting.id not in ids)
        for parent, group in list(self._groups.items()):
            mine = [waiting for waiting in group.requests if waiting.id in ids]
            if mine:
                group.requests = [waiting for waiting in group.requests if waiting.id not in ids]
                group.cost -= sum(waiting.cost for waiting in mine)
                removed += mine
            if not group.requests:
                del self._groups[parent]
        self.cost -= sum(waiting.cost for waiting in removed)
        self._num -= len(removed)
        return [waiting.request for waiting in removed]

    def full_cost(self, num_prompts: int) -> float:
        """The cost of all layers over so many prompts."""
        return (self._manifest.num_layers + FIXED_COST) * num_prompts

    @property
    def has_suspects(self) -> bool:
        """Whether the next to be taken is one that is to be sent by itself."""
        return bool(self._alone)

    def take(
        self, budget: float, parent_id: str | None, most: int | None = None, of_all_layers: bool = False
    ) -> tuple[list[EvalRequest], str, float]:
        """The next requests of about `budget` in cost, at least one and at most so many, all of one parent: (requests,
        parent, cost).

        `parent_id` is the parent whose states the replica holds; `of_all_layers`: as many, but of all the layers for
        which requests wait.
        """
        if self._alone:
            taken = [self._alone.popleft()]
            parent = taken[0].request.parent.id
        else:
            parent = self._choose(parent_id)
            taken = _take_from(self._groups[parent], budget, most, of_all_layers)
            if not self._groups[parent].requests:
                del self._groups[parent]
        cost = sum(waiting.cost for waiting in taken)
        self.cost -= cost
        self._num -= len(taken)
        return [waiting.request for waiting in taken], parent, cost

    def _choose(self, parent_id: str | None) -> str:
        if parent_id in self._groups:
            return str(parent_id)
        return max(self._groups, key=lambda parent: (self._groups[parent].taken == 0, self._groups[parent].cost))


def _take_from(group: _Group, budget: float, most: int | None, of_all_layers: bool = False) -> list[_Waiting]:
    waiting = group.requests
    count, cost = 0, 0.0
    average = group.cost / len(waiting)
    available = len(waiting) if most is None else min(most, len(waiting))
    while count < available and (count == 0 or cost < budget):
        cost += average if of_all_layers else waiting[count].cost
        count += 1
    chosen = {(2 * at + 1) * len(waiting) // (2 * count) for at in range(count)} if of_all_layers else set(range(count))
    taken = [waiting[at] for at in sorted(chosen)]
    group.requests = [request for at, request in enumerate(waiting) if at not in chosen]
    group.cost -= sum(request.cost for request in taken)
    group.taken += count
    return taken
