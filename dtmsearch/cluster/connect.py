"""Joining a Ray cluster, or starting one on this machine, and seeing that it lives. Knows nothing of replicas."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError

from dtmsearch.cluster.ray_compat import dead_processes, timed_out_at_start
from dtmsearch.cluster.tokens import refused
from dtmsearch.errors import ClusterLost, ClusterUnreachable, reason_of

# Processes of a local Ray without which nothing goes on.
_VITAL = ("raylet", "gcs_server")
_CONNECT_SECONDS = 10.0


def connect(address: str | None) -> bool:
    """Join the cluster at `address`, or start a local one. True when Ray is ours to shut down again.

    Raises `ClusterUnreachable`.
    """
    if ray.is_initialized():
        return False
    if address is not None:
        check_listening(address)
    try:
        with _keeping_signals():
            ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="dtmsearch",
            )
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except AuthenticationError as error:
        raise ClusterUnreachable(refused(address or "this machine", str(error))) from None
    except ConnectionError as error:
        # It listens, as was checked: a wrong token looks to Ray as if nobody were there.
        raise ClusterUnreachable(refused(address) if address else f"Ray did not start here: {error}") from error
    except (RuntimeError, TimeoutError, GetTimeoutError) as error:
        where = f"no Ray cluster at {address}" if address else "Ray did not start here"
        raise ClusterUnreachable(f"{where}: {reason_of(error)}") from error
    except Exception as error:
        if not timed_out_at_start(error):
            raise
        ray.shutdown()
        raise ClusterUnreachable(f"Ray did not start here within its 30 seconds: {error}") from error
    return True


@contextmanager
def _keeping_signals() -> Iterator[None]:
    """Ray puts handlers of its own in the place of ours, which end the process as if the search had failed. And a
    terminal that is closed must not end a local Ray's processes before we have ended our work with them: they inherit
    that SIGHUP is blocked."""
    before = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    except SystemExit:  # Ray's own handler, while it starts
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def check_listening(address: str) -> None:
    """Raises `ClusterUnreachable` where nobody listens.

    Ray itself would try for minutes to reach such a host and port.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        if parts.hostname is not None and parts.port is not None:
            socket.create_connection((parts.hostname, parts.port), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ClusterUnreachable(f"no Ray cluster at {address}: {error}") from error


def check_alive() -> None:
    """Raise `ClusterLost` if the Ray that this process has started has lost what it cannot live without.

    Ray itself would end this process at its next call, without a word.
    """
    dead = [kind for kind in dead_processes() if kind in _VITAL]
    if dead:
        raise ClusterLost(
            f"Ray's {dead[0]} process on this machine was killed, perhaps for want of memory. Nothing that was "
            "recorded is lost: run again to resume"
        )
