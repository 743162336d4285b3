"""The actors that host a replica, and how they are started: one process, one device share, one replica or a stage of
one."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util import get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dtmsearch.cluster import versions as pins
from dtmsearch.cluster.placement import Share
from dtmsearch.core.calibration import PackedMatrix
from dtmsearch.core.collection import uncollected
from dtmsearch.core.evaluation import ModelSpec, Reference, ReplicaSettings


class _Host:
    """Hosts the class named by an import string (`package.module:Class`). Loading is a method of its own, so that a
    user's mistake comes back as the exception that it is, not as an actor that died. `others` are the hosts of a
    replica's other stages: this is the first, and whatever it is asked it asks them."""

    def __init__(self, replica_class: str, name: str, others: Sequence[Any] = ()) -> None:
        self._replica_class, self._name, self._others = replica_class, name, others
        self._replica: Any = None

    def where(self) -> tuple[str, int]:
        """Where this process runs: (host name, process id)."""
        return socket.gethostname(), os.getpid()

    def load(self, spec: ModelSpec, settings: ReplicaSettings) -> tuple[str, int, bool]:
        """Load the model; where this process runs (host name, process id), and whether it reads all weights in every
        call."""
        pins.check()
        # Threads that wait for each other spinning, as is the default, bring a busy machine to a standstill.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        module, _, name = self._replica_class.partition(":")
        with uncollected():
            replica = getattr(importlib.import_module(module), name)
            loading = [
                other.load.remote(spec, replace(settings, stage=stage))
                for stage, other in enumerate(self._others, start=1)
            ]
            peers = [_Peer(other, loaded) for other, loaded in zip(self._others, loading, strict=True)]
            self._replica = replica(spec, settings, self._name, socket.gethostname(), *([peers] if peers else []))
        return *self.where(), getattr(self._replica, "states_kept", "") == "together"

    def take(self, *references: Reference) -> float:
        """Take references; the canary's share of divergent tokens on the first."""
        for reference in references:
            self._replica.use(reference)
        return float(self._replica.canary(references[0].id)) if references else 0.0

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._replica, method)(*arguments)

    def take_solved(self, calibration_id: str, matrices: Mapping[tuple[str, str], Any]) -> None:
        """Let the replica have solved matrices, (component, scheme) -> object reference, when it needs them."""

        def fetch(component: str, scheme: str) -> PackedMatrix | None:
            held = matrices.get((component, scheme))
            return None if held is None else ray.get(held)

        self._replica.use_solved(calibration_id, fetch)
        for other in self._others:
            other.take_solved.remote(calibration_id, matrices)


class _Peer:
    """See `Peer` in `dtmsearch.model.pipeline_parallel`. What is promised lies in the store of the node where it was
    made, and goes from there to the node that needs it."""

    def __init__(self, actor: Any, loaded: Any) -> None:
        self._actor, self._loaded = actor, loaded

    def ask(self, method: str, *arguments: Any) -> Any:
        return self._actor.call.remote(method, *arguments)

    def answer(self, promise: Any) -> Any:
        try:
            ray.get(self._loaded)
            return ray.get(promise)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None


@dataclass(frozen=True)
class Hosted:
    """A replica's actors, those of its other stages beside the one that is spoken to. `placed` is ready as soon as they
    have their places in the cluster; `group` reserves these where it is more than one GPU or node."""

    actor: Any
    placed: Any
    group: Any
    others: tuple[Any, ...] = ()

    def end(self) -> None:
        """End the processes; their group stays reserved for whoever comes in their place."""
        for actor in (self.actor, *self.others):
            ray.kill(actor)

    def leave(self) -> None:
        """End the processes and give their places back."""
        self.end()
        give_back(self.group)


def give_back(group: Any) -> None:
    """Release a placement group, if there is one."""
    if group is not None:
        remove_placement_group(group)


def start_host(replica_class: str, name: str, share: Share, group: Any = None) -> Hosted:
    """Start a replica's actors, one for each stage; they wait for their share of the cluster. They are never restarted
    by Ray: what an actor held is ours to send again.

    Several GPUs or nodes are reserved as a placement group, all of them or none, which outlives the actors: when a
    replica dies, nobody takes one of its GPUs and leaves the rest idle before `start_host` is called again with that
    `group`. Inside a group that somebody else has reserved, as a sweep does for each search, the share comes from
    there.
    """
    if group is None and get_current_placement_group() is None:
        group = _reserve(share)
    actors: list[Any] = []
    for stage in reversed(range(share.num_stages)):  # the first is told of the others
        others = tuple(reversed(actors)) if stage == 0 else ()
        actors.append(_actor(share, group, stage).remote(replica_class, name, others))
    return Hosted(actors[-1], actors[-1].where.remote(), group, tuple(reversed(actors[:-1])))


def _reserve(share: Share) -> Any:
    """A placement group for what is more than one GPU or node."""
    if share.num_nodes == 1 and share.num_gpus <= 1:
        return None
    strategy = "STRICT_PACK" if share.num_nodes == 1 else "STRICT_SPREAD"
    return placement_group([share.bundle] * share.num_nodes, strategy=strategy)


def _actor(share: Share, group: Any, stage: int) -> Any:
    """The actor class with the options of a stage."""
    options: dict[str, Any] = {
        "num_cpus": share.num_cpus / share.stages_on_node,
        "num_gpus": share.num_gpus / share.stages_on_node,
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    if group is not None:
        bundle = stage // share.stages_on_node
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, bundle)
    return ray.remote(_Host).options(**options)
