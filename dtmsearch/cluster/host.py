"""The actor that hosts a replica, and how it is started: one process, one device share, one replica."""

from __future__ import annotations

import importlib
import os
import socket
from typing import Any

import ray

from dtmsearch.cluster import pins
from dtmsearch.plans.evaluation import ModelSpec, Reference, ReplicaSettings


class _Host:
    """Hosts the class named by an import string (`package.module:Class`). Loading is a method of its own, so that a
    user's mistake comes back as the exception that it is, not as an actor that died."""

    def __init__(self, replica_class: str, name: str) -> None:
        self._replica_class, self._name = replica_class, name
        self._replica: Any = None

    def load(self, spec: ModelSpec, settings: ReplicaSettings) -> tuple[str, int]:
        """Load the model; where this process runs: (host name, process id)."""
        pins.check()
        # Threads that wait for each other spinning, as is the default, bring a busy machine to a standstill.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        module, _, name = self._replica_class.partition(":")
        replica = getattr(importlib.import_module(module), name)
        self._replica = replica(spec, settings, self._name, socket.gethostname())
        return socket.gethostname(), os.getpid()

    def take(self, *references: Reference) -> float:
        """Take references; the canary's share of divergent tokens on the first."""
        for reference in references:
            self._replica.use(reference)
        return float(self._replica.canary(references[0].id)) if references else 0.0

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._replica, method)(*arguments)


def start_host(replica_class: str, name: str, num_cpus: float, num_gpus: float) -> Any:
    """A handle to a new actor; it waits for its share of the cluster. It is never restarted by Ray: what an actor
    held is ours to send again."""
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_task_retries": 0}
    return ray.remote(_Host).options(**options).remote(replica_class, name)
