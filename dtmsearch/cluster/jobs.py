"""Searches as jobs of a Ray cluster: one job at a time for a run, found again by the run's name.

Knows the Jobs API and its tokens, nothing of what a search is or what its files mean.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from dtmsearch.cluster.connect import check_listening
from dtmsearch.cluster.ray_compat import NO_ENVIRONMENT, TALKATIVE
from dtmsearch.cluster.tokens import refused
from dtmsearch.errors import ClusterUnreachable, JobEnded, JobNotBegun, UserError

# Between a run's name, which cannot hold it, and the number of a later session of the run.
_SESSION = "~"
_POLL_SECONDS = 0.5
# A dashboard that is out of reach for this long, while a job is followed, is given up; the job goes on.
_PATIENCE_SECONDS = 60.0
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class Job:
    """A session of a run on a cluster; `attached` if it was at work before it was asked for."""

    id: str
    attached: bool


@dataclass(frozen=True)
class Order:
    """What a job runs: a shell command, in a copy of `folder`, with `packages` (folders of Python modules) importable.
    `facts` are shown with the job, and tell two searches of one name apart."""

    command: str
    folder: Path
    packages: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    pip: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def runtime_env(self) -> dict[str, Any]:
        values: dict[str, Any] = {"working_dir": str(self.folder), "env_vars": dict(self.environment)}
        if self.packages:
            values["py_modules"] = [str(package) for package in self.packages]
        if self.pip:
            values["pip"] = {"packages": list(self.pip), "pip_check": False}
        return values


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`, such as `http://127.0.0.1:8265`.

    Raises `ClusterUnreachable` when nobody answers there, or the cluster does not let us in.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        check_listening(address if "://" in address else f"http://{address}")
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._explained(), _without_overriding():
            self._client = JobSubmissionClient(address if "://" in address else f"http://{address}")

    def submit(self, run: str, order: Order) -> Job:
        """Start a session of a run, or attach to the one at work. Raises `UserError` if that one is another search."""
        while True:
            sessions = self._sessions(run)
            last = sessions[max(sessions)] if sessions else None
            if last is not None and not last.status.is_terminal():
                _check_same(run, last, order)
                return Job(_id(last), attached=True)
            job_id = _session_id(run, max(sessions, default=0) + 1)
            try:
                with self._explained():
                    self._client.submit_job(
                        entrypoint=order.command,
                        submission_id=job_id,
                        runtime_env=order.runtime_env,
                        metadata=dict(order.facts),
                    )
            except RuntimeError as error:
                if "already exists" in str(error):  # somebody was quicker: attach to theirs
                    continue
                raise
            return Job(job_id, attached=False)

    def follow(self, job_id: str, write: Callable[[str], None]) -> int:
        """Write what a job says until it ends; its exit code. Raises `JobNotBegun` or `JobEnded` where it has none."""
        written = 0
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                written = asyncio.run(self._tail(job_id, write, written))
                details = self._details(job_id)
                give_up_at = time.monotonic() + _PATIENCE_SECONDS
            except (OSError, RuntimeError) as error:
                if time.monotonic() > give_up_at:
                    raise ClusterUnreachable(f"lost sight of job {job_id} at {self._address}: {error}") from error
                time.sleep(_POLL_SECONDS)
                continue
            if details.status.is_terminal():
                return _exit_code(details)
            time.sleep(_POLL_SECONDS)

    async def _tail(self, job_id: str, write: Callable[[str], None], already: int) -> int:
        """Write the log beyond its first `already` characters until it breaks off; the number of characters seen."""
        seen = 0
        async for text in self._client.tail_job_logs(job_id):
            fresh = text[max(0, already - seen) :]
            seen += len(text)
            if fresh:
                write(fresh)
        return max(seen, already)

    def _details(self, job_id: str) -> JobDetails:
        with self._explained():
            return self._client.get_job_info(job_id)

    def _sessions(self, run: str) -> dict[int, JobDetails]:
        """The run's jobs by number."""
        pattern = re.compile(rf"{re.escape(run)}(?:{_SESSION}(\d+))?")
        with self._explained():
            jobs = [job for job in self._client.list_jobs() if job.submission_id is not None]
        matches = ((pattern.fullmatch(_id(job)), job) for job in jobs)
        return {int(match[1] or 1): job for match, job in matches if match is not None}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ClusterUnreachable(refused(self._address, str(error))) from None
        except OSError as error:
            raise ClusterUnreachable(f"no Ray dashboard answers at {self._address}: {error}") from error


def _id(job: JobDetails) -> str:
    assert job.submission_id is not None
    return job.submission_id


def _session_id(run: str, number: int) -> str:
    return run if number == 1 else f"{run}{_SESSION}{number}"


def _check_same(run: str, job: JobDetails, order: Order) -> None:
    theirs = job.metadata or {}
    other = [f"{key}: {theirs.get(key)} -> {value}" for key, value in order.facts.items() if theirs.get(key) != value]
    if other:
        lines = "\n  ".join(other)
        raise UserError(
            f"job {_id(job)} at work on this cluster is another search under the name {run!r}:\n  {lines}\n"
            "Give this search another run name, or stop that one first"
        )


def _exit_code(job: JobDetails) -> int:
    if job.driver_exit_code is not None:
        return job.driver_exit_code
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.error_type == NO_ENVIRONMENT:
        raise JobNotBegun(
            f"the cluster could not make the environment of job {_id(job)}: {_gist(job.message or '')}. For `--pins "
            "install` its nodes must reach a package registry; `--pins none` takes the versions that they have"
        )
    raise JobEnded(f"job {_id(job)} ended as {job.status}: {(job.message or 'no reason given').strip()}")


def _gist(message: str) -> str:
    """What counts in the traceback of an environment that could not be made: pip's errors or, without, its end."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return "; ".join(dict.fromkeys(errors)) or next(reversed(lines), "no reason given")


@contextmanager
def _without_overriding() -> Iterator[None]:
    """Ray lets its variables win over the address that it is given; the address that a user typed shall count."""
    hidden = {name: os.environ.pop(name) for name in _OVERRIDING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
