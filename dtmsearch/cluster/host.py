"""The actor that hosts a replica, and how it is started: one process, one device share, one replica."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dtmsearch.cluster import pins
from dtmsearch.plans.calibration import PackedMatrix
from dtmsearch.plans.evaluation import ModelSpec, Reference, ReplicaSettings


class _Host:
    """Hosts the class named by an import string (`package.module:Class`). Loading is a method of its own, so that a
    user's mistake comes back as the exception that it is, not as an actor that died."""

    def __init__(self, replica_class: str, name: str) -> None:
        self._replica_class, self._name = replica_class, name
        self._replica: Any = None

    def where(self) -> tuple[str, int]:
        """Where this process runs: (host name, process id)."""
        return socket.gethostname(), os.getpid()

    def load(self, spec: ModelSpec, settings: ReplicaSettings) -> tuple[str, int]:
        """Load the model; where this process runs: (host name, process id)."""
        pins.check()
        # Threads that wait for each other spinning, as is the default, bring a busy machine to a standstill.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        module, _, name = self._replica_class.partition(":")
        replica = getattr(importlib.import_module(module), name)
        self._replica = replica(spec, settings, self._name, socket.gethostname())
        return self.where()

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


@dataclass(frozen=True)
class Hosted:
    """A host's actor. `placed` is ready as soon as the actor has its place in the cluster; `group` reserves that place
    where it is more than one GPU."""

    actor: Any
    placed: Any
    group: Any

    def end(self) -> None:
        """End the process; its group stays reserved for whoever comes in its place."""
        ray.kill(self.actor)

    def leave(self) -> None:
        """End the process and give its place back."""
        self.end()
        give_back(self.group)


def give_back(group: Any) -> None:
    if group is not None:
        remove_placement_group(group)


def start_host(replica_class: str, name: str, num_cpus: float, num_gpus: float, group: Any = None) -> Hosted:
    """Start an actor; it waits for its share of the cluster. It is never restarted by Ray: what an actor held is ours
    to send again.

    Several GPUs are reserved as a placement group, which outlives the actor: when it dies, nobody takes one of its GPUs
    and leaves the rest idle before `start_host` is called again with that `group`. Inside a group that somebody else
    has reserved, as a sweep does for each search, the share comes from there.
    """
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_task_retries": 0}
    if group is None and num_gpus > 1 and get_current_placement_group() is None:
        group = placement_group([{"GPU": num_gpus, "CPU": num_cpus}], strategy="STRICT_PACK")
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
    actor: Any = ray.remote(_Host).options(**options).remote(replica_class, name)
    return Hosted(actor, actor.where.remote(), group)
