"""ReplicaPool: an Evaluator over Ray actors. Sends requests, holds answers until they are verified, hands them over.

Keeps its own table of what is in flight, because an actor that dies does not say what it held. Knows neither the
search nor what a replica does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from dtmsearch.cluster.canaries import Canaries, WrongNumbers
from dtmsearch.cluster.connect import check_alive, connect
from dtmsearch.cluster.health import Check, Health, Pace, Sample
from dtmsearch.cluster.outstanding import Work
from dtmsearch.cluster.placement import Share, alive_nodes, share_of
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.cluster.prometheus import Metrics
from dtmsearch.cluster.queue import RequestQueue
from dtmsearch.cluster.ray_compat import was_preempted
from dtmsearch.cluster.replica_calls import Services
from dtmsearch.cluster.replica_handle import Call, Held, Member
from dtmsearch.cluster.replicas import Crew
from dtmsearch.cluster.sizing import CALL_SECONDS, call_seconds, guess_seconds
from dtmsearch.cluster.train import train_on_cluster
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import (
    EvalFailure,
    EvalRequest,
    ModelSpec,
    Outcome,
    Provenance,
    ReplicaSettings,
)
from dtmsearch.errors import UserError
from dtmsearch.model.training.main import STOP_FILE, STOPPED
from dtmsearch.model.training.training_process import train_apart

log = logging.getLogger(__name__)

REPLICA_CLASS = "dtmsearch.model.replica.replica:Replica"
_STAGES = "dtmsearch.model.pipeline_parallel.pipelined_replica:make_stage"

# Calls that a replica holds: the one it works on, and the next, so that it never waits for the driver.
_CALLS_AHEAD = 2
_WAIT_FOR_ONE_IN, _MOMENT_SECONDS = 32, 0.02
_CHECK_TIME_SECONDS = 0.2
# Outcomes are handed over this far apart, for each time costs the driver a commit; at once when no more are under way.
_GATHER_SECONDS = 0.1
# Guesses that a replica without work takes at once: its next real work waits until it has done them.
_MOST_GUESSES = 8


class ReplicaPool(Services):
    """Replicas of one model. Use as a context manager: leaving it lets the actors go, and a local Ray with them."""

    def __init__(
        self,
        spec: ModelSpec,
        settings: PoolSettings = PoolSettings(),
        on_note: Callable[[str], None] = log.warning,
        replica_class: str | None = None,
        health: Health = Health(),
        run: str = "",
    ) -> None:
        self._settings, self._on_note = settings, on_note
        self._own_ray = connect(settings.address)
        self.metrics = Metrics(run)
        self._share = _share(settings)
        replica_settings = ReplicaSettings(
            batch_tokens=settings.batch_tokens,
            num_devices=max(1, int(self._share.num_gpus / self._share.stages_on_node)),
            num_threads=0 if self._share.num_gpus else max(1, int(self._share.num_cpus)),
            weights_folder=settings.weights_folder,
            num_stages=self._share.num_stages,
        )
        replica_class = replica_class or (REPLICA_CLASS if self._share.num_nodes == 1 else _STAGES)
        crew = Crew(replica_class, spec, replica_settings, self._share, settings.replicas, on_note, self._take_back)
        super().__init__(crew, check_alive if self._own_ray else lambda: None)
        self._health, self._pace, self._canaries = health, Pace(health), Canaries(health, crew.references)
        self._work: Work | None = None
        self._arrived: list[Outcome] = []
        self._gather_until = 0.0
        self._check_time_at = 0.0

    def __enter__(self) -> ReplicaPool:
        self._say_share()
        self._crew.fill()
        return self

    @property
    def num_replicas(self) -> int:
        """Replicas that are asked for, there or not."""
        return self._crew.wanted

    @property
    def num_at_work(self) -> int:
        """Replicas that have loaded and take requests."""
        return len(self._crew.ready)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._crew.close()
        if self._own_ray:
            ray.shutdown()

    def rest(self) -> None:
        """Let all replicas go, for work that needs their places; whatever is asked next starts others. Nothing may be
        under way."""
        assert not self._in_flight
        self._crew.leave()

    def train(self, job: Path, stop_requested: Callable[[], bool]) -> int:
        """On a cluster by its workers, in the places of the replicas; on this machine in a process of its own."""
        if self._settings.address is None:
            return train_apart(job, stop_requested)
        self.rest()
        return STOPPED if train_on_cluster(str(job), str(job.parent / STOP_FILE), stop_requested) else 0

    def decided(self, fdt_mean: float, bits_per_weight: float) -> None:
        """Ray's metrics show it."""
        self.metrics.decided(fdt_mean, bits_per_weight)

    def wait_until_ready(self) -> None:
        """Wait for every replica; a search need not, for it begins with the first."""
        while not all(member.ready for member in self._crew.members):
            self._crew.welcome(timeout_seconds=1.0)

    def _say_share(self) -> None:
        """On a cluster that others may use, say how much of it this search will hold."""
        if self._settings.address is None or self._share.num_gpus:
            return
        free = ray.available_resources().get("CPU", 0.0)
        if self.num_replicas * self._share.num_cpus >= free:
            self._on_note(
                f"this search holds all {free:g} free CPUs of the cluster ({self.num_replicas} x {self._share}), "
                "so another one would wait: --replicas with --cpus-per-replica leaves some to others"
            )

    def manifest(self) -> ModelManifest:
        """The model's manifest; read before anything is submitted."""
        manifest = super().manifest()
        self._work = Work(manifest)
        return manifest

    # Evaluator.

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        assert self._work is not None, "the manifest is read first"
        self._work.add(requests)
        self._dispatch()

    def num_idle(self) -> int:
        """See `dtmsearch.search.protocols.Offering`: what would fill up the calls that replicas may hold."""
        if self._work is None or len(self._work.real):
            return 0
        ready = self._crew.ready
        if len(ready) < self._settings.guess_from:
            return 0
        each = min(max(int(CALL_SECONDS / self._pace.seconds_per_request), 1), _MOST_GUESSES)
        free = sum(max(_CALLS_AHEAD - len(m.calls), 0) for m in ready)
        return max(free * each - len(self._work.guesses), 0)

    def submit_guesses(self, requests: Sequence[EvalRequest]) -> None:
        """See `dtmsearch.search.protocols.Offering`."""
        assert self._work is not None
        self._work.add_guesses(requests)
        self._dispatch()

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        """See `dtmsearch.search.protocols.Evaluator`. What arrives within moments is handed over together."""
        self._check_alive()
        if not self._arrived:
            self._wait(timeout_seconds)
        while self._arrived and self._in_flight and (left := self._gather_until - time.monotonic()) > 0:
            self._wait(left)
        if self._arrived:
            self._gather_until = time.monotonic() + _GATHER_SECONDS
        arrived, self._arrived = self._arrived, []
        self._report(arrived)
        return arrived

    def _report(self, arrived: Sequence[Outcome]) -> None:
        """Tell Ray's metrics and the log what has arrived, and who works."""
        ready = self._crew.ready
        busy = sum(bool(member.calls) for member in ready)
        self.metrics.replicas(busy, len(ready) - busy, len(self._crew.members) - len(ready))
        if arrived:
            self.metrics.answered(arrived)
        if log.isEnabledFor(logging.INFO):
            for outcome in arrived:
                status = outcome.kind if isinstance(outcome, EvalFailure) else "ok"
                about = {"request": outcome.request_id, "status": status}
                log.info("evaluation", extra=about | asdict(outcome.provenance))

    @property
    def _in_flight(self) -> bool:
        return any(member.calls for member in self._crew.members)

    def _wait(self, timeout_seconds: float) -> None:
        """Wait for a call or a start to end, take what has ended, keep the replicas busy."""
        owner = {reference: member for member in self._crew.members for reference in member.calls}
        waiting = [*owner, *(member.starting for member in self._crew.members if not member.ready)]
        done: set[Any] = set()
        if waiting:
            # Of many replicas some end at any moment. Each wait costs as much as a few of them.
            ray.wait(waiting, num_returns=1, timeout=timeout_seconds)
            if (several := len(waiting) // _WAIT_FOR_ONE_IN) > 1:
                ray.wait(waiting, num_returns=several, timeout=_MOMENT_SECONDS)
            done = set(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])
        self._crew.fill()
        self._crew.welcome(timeout_seconds=0)
        answers = _fetch([reference for reference in done if reference in owner])
        for member in {owner[reference]: None for reference in answers}:
            self._collect(member, answers)
        if (now := time.monotonic()) > self._check_time_at:
            self._check_time_at = now + _CHECK_TIME_SECONDS
            for member in list(self._crew.members):
                self._check_time(member)
        self._dispatch()

    def _collect(self, member: Member, answers: Mapping[Any, Any]) -> None:
        """Take what a replica has finished; give it up if it is lost, or its canary is wrong."""
        try:
            for reference in list(member.calls):  # in the order in which the replica does them
                if reference in answers:
                    if isinstance(answer := answers[reference], RayError):
                        raise answer
                    self._accept(member.calls.pop(reference), answer, member)
        except (RayError, WrongNumbers) as error:
            self._crew.lose(member, error)

    def _check_time(self, member: Member) -> None:
        """Give a replica up that has been at one thing for longer than it can need."""
        head = next(iter(member.calls.values()), None)
        if head is not None:
            since, limit = max(head.started_at, member.idle_since), self._pace.limit_seconds(head.cost)
        elif member.taking_since is not None:
            since, limit = member.taking_since, self._health.first_seconds
        else:
            return
        seconds = time.monotonic() - since
        if seconds > limit:
            self._crew.lose(member, TimeoutError(f"no answer for {seconds:.0f} s, where {limit:.0f} s are the most"))

    def _accept(self, call: Call, answer: Any, member: Member) -> None:
        now = time.monotonic()
        seconds = now - max(call.started_at, member.idle_since)
        member.idle_since = now
        if call.check is not None:
            self._verify(member, call.check, Sample(*answer), seconds)
            return
        own_seconds = sum(outcome.provenance.wall_seconds for outcome in answer)
        self._pace.learn(call.cost, seconds, len(call.requests), own_seconds)
        member.held.append(Held(call, answer))
        if call.requests[0].reference_id not in member.references:  # nothing to hold it against
            self._release(member)

    def _verify(self, member: Member, check: Check, found: Sample, seconds: float) -> None:
        """Hand over what the replica has answered before its canary. Raises `WrongNumbers`."""
        self._canaries.verify(member, check, found, seconds)
        self._crew.trusted()
        self._release(member)

    def _release(self, member: Member) -> None:
        assert self._work is not None
        verified = member.take_held()
        self._canaries.learn(verified)
        self._arrived += [self._work.finished(outcome) for held in verified for outcome in held.outcomes]

    def _dispatch(self) -> None:
        work = self._work
        if work is None:
            return
        ready, now = self._crew.ready, time.monotonic()
        num_free = sum(len(m.calls) < _CALLS_AHEAD for m in ready)
        for ahead in range(_CALLS_AHEAD):  # everyone's first call before anyone's second
            for member in [m for m in ready if len(m.calls) <= ahead]:
                if self._canaries.is_due(member, work, now):
                    self._send_canary(member, work)
                # Towards the end of a round nobody takes a second call while others have none.
                elif member.calls and (work.real.has_suspects or self._holds_suspect(member, work)):
                    continue
                elif len(work.real) > ahead * len(ready):
                    self._send(member, work.real, call_seconds(self._seconds_in(work.real), len(ready)))
                elif not len(work.real) and len(work.guesses):
                    self._send(member, work.guesses, guess_seconds(self._seconds_in(work.guesses), num_free))

    def _holds_suspect(self, member: Member, work: Work) -> bool:
        """Whether a request is under way there that may have killed replicas. Nothing goes before or behind it, so that
        no other is blamed for its next victim."""
        return any(work.has_suspect(call.requests) for call in member.calls.values())

    def _send_canary(self, member: Member, work: Work) -> None:
        check = self._canaries.next_check(member)
        call = member.actor.call.remote("check", check.plan, check.reference_id, check.num_prompts)
        member.calls[call] = Call([], work.real.full_cost(check.num_prompts), time.monotonic(), check)

    def _seconds_in(self, queue: RequestQueue) -> float:
        """How long what waits would take one replica; 0 while no pace is known."""
        return queue.cost * (self._pace.seconds_per_cost or 0.0)

    def _send(self, member: Member, queue: RequestQueue, seconds: float) -> None:
        """Send a replica what it will be at for about so long, one request at least."""
        rate = self._pace.seconds_per_cost
        requests, member.parent_id, cost = queue.take(seconds / rate if rate else 0.0, member.parent_id)
        if not member.calls:
            member.idle_since = time.monotonic()
        call = member.actor.call.remote("evaluate", requests)
        member.calls[call] = Call(requests, cost, time.monotonic())

    def _take_back(self, member: Member, error: Exception, reason: str) -> None:
        """Send again what a replica held that was lost.

        Only the oldest call may be to blame, so only its requests are charged an attempt. Preemption and wrong numbers
        charge nothing. What no canary has verified is measured again.
        """
        unverified = sum(len(held.outcomes) for held in member.held)
        self.metrics.lost()
        again = f"; {unverified} results that no canary had verified are measured again" if unverified else ""
        self._on_note(f"{member.name} ({member.node or 'starting'}) was lost and is replaced: {reason}{again}")
        blameless = was_preempted(error) or isinstance(error, WrongNumbers)
        for held in member.take_held():
            self._send_again(held.call, member, reason, charged=False)
        for position, call in enumerate(member.calls.values()):
            self._send_again(call, member, reason, charged=position == 0 and not blameless)
        member.calls = {}

    def _send_again(self, call: Call, member: Member, reason: str, charged: bool) -> None:
        assert self._work is not None
        for given_up in self._work.again(call.requests, charged):
            attempts = given_up.attempts
            provenance = Provenance(member.name, member.node, attempts, finished_at=time.time())
            message = f"{attempts} replicas were lost while they measured it; the last: {reason}"
            self._arrived.append(EvalFailure(given_up.request.id, "replica_lost", message, provenance))


def _fetch(references: Sequence[Any]) -> dict[Any, Any]:
    """What calls that have ended gave, or the error that ended them: together, for each fetch costs as much as an
    answer."""
    try:
        return dict(zip(references, ray.get(list(references)), strict=True))
    except RayError:
        return {reference: _fetch_one(reference) for reference in references}


def _fetch_one(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        return error


def _share(settings: PoolSettings) -> Share:
    """The share of each replica. Raises `UserError` for what this machine does not have; a cluster may grow."""
    nodes = alive_nodes()
    share = share_of(
        nodes, settings.replicas, settings.gpus_per_replica, settings.cpus_per_replica, settings.nodes_per_replica
    )
    if settings.address is None and len(nodes) < share.num_nodes:
        raise UserError(
            f"--nodes-per-replica asks for {share.num_nodes} nodes, but {len(nodes)} can be had "
            "here: a replica is spread over nodes of a cluster (--address), over the GPUs of one by --gpus-per-replica"
        )
    if settings.address is None and not share.room(nodes):
        for option, kind, each in (("gpus", "GPU", share.num_gpus), ("cpus", "CPU", share.num_cpus)):
            has = sum(node.get(kind, 0.0) for node in nodes)
            if each > has:
                raise UserError(f"--{option}-per-replica asks for {each:g} {kind}s, but this machine has {has:g}")
    return share
