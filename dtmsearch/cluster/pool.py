"""ReplicaPool: an Evaluator over Ray actors. Has replicas, a dispatcher that says what each is sent, and a verifier
that holds their answers; does itself what needs Ray: sends, waits, fetches.

Keeps its own table of what is in flight, because an actor that dies does not say what it held.
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
from dtmsearch.cluster.dispatcher import Dispatcher
from dtmsearch.cluster.health import Health, Sample
from dtmsearch.cluster.placement import Share, alive_nodes, share_of
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.cluster.prometheus import Metrics
from dtmsearch.cluster.ray_compat import was_preempted
from dtmsearch.cluster.replica_calls import Services
from dtmsearch.cluster.replica_handle import Call, ReplicaHandle
from dtmsearch.cluster.replicas import ReplicaSet, cause_of
from dtmsearch.cluster.train import train_on_cluster
from dtmsearch.cluster.verifier import Verifier
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import (
    EvalFailure,
    EvalRequest,
    ModelSpec,
    Outcome,
    ReplicaSettings,
)
from dtmsearch.errors import LibraryMissing, UserError
from dtmsearch.model.training.main import STOP_FILE, STOPPED
from dtmsearch.model.training.training_process import train_apart

log = logging.getLogger(__name__)

REPLICA_CLASS = "dtmsearch.model.replica.replica:Replica"
_STAGES = "dtmsearch.model.pipeline_parallel.pipelined_replica:make_stage"

_WAIT_FOR_ONE_IN, _MOMENT_SECONDS = 32, 0.02
_CHECK_TIME_SECONDS = 0.2
# Outcomes are handed over this far apart, for each time costs the driver a commit; at once when no more are under way.
_GATHER_SECONDS = 0.1


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
            weights=settings.weights,
            weights_folder=settings.weights_folder,
            num_stages=self._share.num_stages,
        )
        replica_class = replica_class or (REPLICA_CLASS if self._share.num_nodes == 1 else _STAGES)
        replicas = ReplicaSet(
            replica_class, spec, replica_settings, self._share, settings.replicas, on_note, self._take_back
        )
        super().__init__(replicas, check_alive if self._own_ray else lambda: None)
        self._health, self._canaries = health, Canaries(health, replicas.references)
        self._dispatcher: Dispatcher | None = None  # once the model is known
        self._verifier = Verifier(self._canaries)
        self._arrived: list[Outcome] = []
        self._gather_until = 0.0
        self._check_time_at = 0.0

    def __enter__(self) -> ReplicaPool:
        self._say_share()
        self._replicas.fill()
        return self

    @property
    def num_replicas(self) -> int:
        """Replicas that are asked for, there or not."""
        return self._replicas.wanted

    @property
    def num_at_work(self) -> int:
        """Replicas that have loaded and take requests."""
        return len(self._replicas.ready)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._replicas.close()
        if self._own_ray:
            ray.shutdown()

    def rest(self) -> None:
        """Let all replicas go, for work that needs their places; whatever is asked next starts others. Nothing may be
        under way."""
        assert not self._in_flight
        self._replicas.leave()

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
        while not all(member.ready for member in self._replicas.members):
            self._replicas.welcome(timeout_seconds=1.0)

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
        if self._dispatcher is None:
            guess_from = self._settings.guess_from
            self._dispatcher = Dispatcher(manifest, self._health, self._canaries, guess_from)
        return manifest

    # Evaluator.

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self._dispatching.add(requests)
        self._dispatch()

    def num_idle(self) -> int:
        """See `dtmsearch.search.protocols.Offering`."""
        return 0 if self._dispatcher is None else self._dispatcher.num_idle(self._replicas.ready)

    def submit_guesses(self, requests: Sequence[EvalRequest]) -> None:
        """See `dtmsearch.search.protocols.Offering`."""
        self._dispatching.add_guesses(requests)
        self._dispatch()

    @property
    def _dispatching(self) -> Dispatcher:
        assert self._dispatcher is not None, "the manifest is read first"
        return self._dispatcher

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
        ready = self._replicas.ready
        busy = sum(bool(member.calls) for member in ready)
        self.metrics.replicas(busy, len(ready) - busy, len(self._replicas.members) - len(ready))
        if arrived:
            self.metrics.answered(arrived)
        if log.isEnabledFor(logging.INFO):
            for outcome in arrived:
                status = outcome.kind if isinstance(outcome, EvalFailure) else "ok"
                about = {"request": outcome.request_id, "status": status}
                log.info("evaluation", extra=about | asdict(outcome.provenance))

    @property
    def _in_flight(self) -> bool:
        return any(member.calls for member in self._replicas.members)

    def _wait(self, timeout_seconds: float) -> None:
        """Wait for a call or a start to end, take what has ended, keep the replicas busy."""
        owner = {reference: member for member in self._replicas.members for reference in member.calls}
        waiting = [*owner, *(member.starting for member in self._replicas.members if not member.ready)]
        done: set[Any] = set()
        if waiting:
            # Of many replicas some end at any moment. Each wait costs as much as a few of them.
            ray.wait(waiting, num_returns=1, timeout=timeout_seconds)
            if (several := len(waiting) // _WAIT_FOR_ONE_IN) > 1:
                ray.wait(waiting, num_returns=several, timeout=_MOMENT_SECONDS)
            done = set(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])
        self._replicas.fill()
        self._replicas.welcome(timeout_seconds=0)
        answers = _fetch([reference for reference in done if reference in owner])
        for member in {owner[reference]: None for reference in answers}:
            self._collect(member, answers)
        if (now := time.monotonic()) > self._check_time_at:
            self._check_time_at = now + _CHECK_TIME_SECONDS
            for member in list(self._replicas.members):
                if (overdue := self._dispatching.overdue(member)) is not None:
                    self._replicas.lose(member, TimeoutError(overdue))
        self._dispatch()

    def _collect(self, member: ReplicaHandle, answers: Mapping[Any, Any]) -> None:
        """Take what a replica has finished; give it up if it is lost, or its canary is wrong."""
        try:
            for reference in list(member.calls):  # in the order in which the replica does them
                if reference in answers:
                    if isinstance(answer := answers[reference], RayError):
                        raise answer
                    self._accept(member.calls.pop(reference), answer, member)
        except (RayError, WrongNumbers) as error:
            if isinstance(lacking := cause_of(error), LibraryMissing):  # another replica there would lack it too
                raise LibraryMissing(f"on {member.node}: {lacking}") from None
            self._replicas.lose(member, error)

    def _accept(self, call: Call, answer: Any, member: ReplicaHandle) -> None:
        dispatching = self._dispatching
        seconds = dispatching.ended(member, call)
        if call.check is not None:
            verified = self._verifier.checked(member, call.check, Sample(*answer), seconds)
            self._replicas.trusted()
        else:
            dispatching.learn(call, seconds, answer)
            verified = self._verifier.answered(member, call, answer)
        self._arrived += dispatching.finished(verified)

    def _dispatch(self) -> None:
        if self._dispatcher is not None:
            for member, call in self._dispatcher.orders(self._replicas.ready):
                member.calls[self._send(member, call)] = call

    def _send(self, member: ReplicaHandle, call: Call) -> Any:
        if call.check is None:
            return member.actor.call.remote("evaluate", call.requests)
        check = call.check
        return member.actor.call.remote("check", check.plan, check.reference_id, check.num_prompts)

    def _take_back(self, member: ReplicaHandle, error: Exception, reason: str) -> None:
        """Send again what a replica held that was lost. Preemption and wrong numbers charge no request an attempt."""
        unverified = sum(len(held.outcomes) for held in member.held)
        self.metrics.lost()
        again = f"; {unverified} results that no canary had verified are measured again" if unverified else ""
        self._on_note(f"{member.name} ({member.node or 'starting'}) was lost and is replaced: {reason}{again}")
        if self._dispatcher is not None:
            is_blameless = was_preempted(error) or isinstance(error, WrongNumbers)
            self._arrived += self._dispatcher.take_back(member, reason, is_blameless)


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
