"""The machines of `chaos.py`: a Ray cluster of two nodes, and the processes that it can kill."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
PATIENCE_SECONDS = 240.0


class Stuck(RuntimeError):
    """Something that must happen did not."""


def until(happened: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise Stuck(f"waited {seconds:.0f} s: {what}")
        time.sleep(0.05)


def environment(folder: Path) -> dict[str, str]:
    """For the cluster and the driver: short timeouts, so that a death is noticed in seconds."""
    paths = os.pathsep.join((str(_HERE), str(_HERE.parent), os.environ.get("PYTHONPATH", "")))
    return {
        "PYTHONPATH": paths,
        "CHAOS_FOLDER": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_initial_delay_ms": "2000",
        "RAY_health_check_failure_threshold": "5",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "4",
        "RAY_gcs_server_request_timeout_seconds": "4",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


class Machines:
    """Two nodes of a Ray cluster: a head and a worker, one replica's CPUs each."""

    def __init__(self) -> None:
        self._cluster: Any = None
        self._worker: Any = None
        self.start()

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self._worker = self._cluster.add_node(num_cpus=1)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def kill_worker(self) -> None:
        self._kill(self._worker, "raylet")
        self._cluster.remove_node(self._worker, allow_graceful=False)
        self._worker = self._cluster.add_node(num_cpus=1)

    def kill_head(self) -> None:
        self._kill(self._cluster.head_node, "gcs_server")

    def restart(self) -> None:
        with suppress(Exception):  # half of it is dead
            self._cluster.remove_node(self._worker, allow_graceful=False)
        with suppress(Exception):
            self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)
        self._cluster.worker_nodes.clear()
        self.start()

    @staticmethod
    def _kill(node: Any, kind: str) -> None:
        process = node.all_processes[kind][0].process
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        with suppress(Exception):
            self._cluster.shutdown()

    def replicas(self) -> list[int]:
        """Process ids of the replicas, which run below our raylets."""
        return [pid for pid, command in below(os.getpid()) if command.startswith("ray::_Host")]


def below(pid: int) -> list[tuple[int, str]]:
    """(process id, command line) of all processes below one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    commands = []
    for child in sorted(found - {pid}):
        with suppress(OSError):
            commands.append((child, Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()))
    return commands
