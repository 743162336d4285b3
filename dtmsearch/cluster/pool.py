"""ReplicaPool: an Evaluator over Ray actors. Dispatch, retries, health, replacement.

Keeps its own table of what is in flight, because an actor that dies does not say what it held. Knows neither the
search nor what a replica does.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    AuthenticationError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from dtmsearch.cluster.health import Check, Health, Known, Pace, Record, Sample
from dtmsearch.cluster.host import Hosted, give_back, start_host
from dtmsearch.cluster.metrics import Metrics
from dtmsearch.cluster.placement import Patience, Room, Share, alive_nodes, share_of
from dtmsearch.cluster.queue import RequestQueue
from dtmsearch.cluster.tokens import refused
from dtmsearch.plans.calibration import Calibration, InputStatistics, PackedMatrix, WeightError
from dtmsearch.plans.components import ModelManifest
from dtmsearch.plans.evaluation import (
    Continuation,
    EvalFailure,
    EvalRequest,
    EvalResult,
    ModelSpec,
    Outcome,
    Provenance,
    Reference,
    ReplicaSettings,
    Speed,
)
from dtmsearch.plans.plan import Plan

log = logging.getLogger(__name__)

REPLICA_CLASS = "dtmsearch.model.replica:Replica"

# A call's length: long enough that its own cost (about 2 ms) vanishes, short enough that a lost one is a small loss.
_CALL_SECONDS = 1.0
# Calls that a replica holds: the one it works on, and the next, so that it never waits for the driver.
_CALLS_AHEAD = 2
_WAIT_FOR_ONE_IN, _MOMENT_SECONDS = 32, 0.02
_CHECK_TIME_SECONDS = 0.2
# Outcomes are handed over this far apart, for each time costs the driver a commit; at once when no more are under way.
_GATHER_SECONDS = 0.1
_MAX_ATTEMPTS = 3
# Guesses that a replica without work takes at once: its next real work waits until it has done them.
_MOST_GUESSES = 8
_MAX_FAILED_STARTS = 3
# Processes of a local Ray without which nothing goes on.
_VITAL = ("raylet", "gcs_server")
# A canary may diverge by near ties on other hardware; more than this share is a broken replica.
_CANARY_LIMIT = 0.02
_CONNECT_SECONDS = 10.0


class ClusterUnreachable(RuntimeError):
    """There is no Ray cluster at the address, or it does not let us in."""


class ClusterLost(RuntimeError):
    """The Ray that was started for this search has died; the search can be resumed."""


class ReplicasFailed(RuntimeError):
    """No replica can be brought up; the message says why."""


@dataclass(frozen=True)
class PoolSettings:
    """Where replicas run. `replicas` 0 are as many as there is room for, also as nodes come and go; shares that are
    None are chosen from what the cluster has. From `guess_from` replicas on, those that idle are offered to guesses:
    with fewer, the end of a round costs too little. `weights_folder` is where trained weights lie, for all nodes."""

    address: str | None = None
    replicas: int = 0
    gpus_per_replica: float | None = None
    batch_tokens: int = 0
    cpus_per_replica: float | None = None
    guess_from: int = 8
    weights_folder: str = ""


class WrongNumbers(RuntimeError):
    """A replica's canary says that it cannot be trusted."""


@dataclass
class _Call:
    """Requests under way on a replica, or a canary; `cost` in the queue's units."""

    requests: list[EvalRequest]
    cost: float
    started_at: float
    check: Check | None = None


@dataclass(frozen=True)
class _Held:
    """What a replica has answered since its last good canary."""

    call: _Call
    outcomes: list[Outcome]


@dataclass(eq=False)
class _Member:
    """A replica as the pool sees it. `calls` by object reference, oldest first."""

    name: str
    actor: Any
    starting: Any
    host: Hosted
    node: str = ""
    parent_id: str | None = None
    ready: bool = False
    taking_since: float | None = None
    idle_since: float = 0.0
    references: set[str] = field(default_factory=set)
    calls: dict[Any, _Call] = field(default_factory=dict)
    held: list[_Held] = field(default_factory=list)
    record: Record = field(default_factory=Record)

    @property
    def checking(self) -> bool:
        return any(call.check is not None for call in self.calls.values())

    @property
    def unverified(self) -> list[_Call]:
        """Calls whose outcomes no canary that has been sent will verify, oldest first."""
        return [] if self.checking else [*(held.call for held in self.held), *self.calls.values()]


class ReplicaPool:
    """Replicas of one model. Use as a context manager: leaving it lets the actors go, and a local Ray with them."""

    def __init__(
        self,
        spec: ModelSpec,
        settings: PoolSettings = PoolSettings(),
        on_note: Callable[[str], None] = log.warning,
        replica_class: str = REPLICA_CLASS,
        health: Health = Health(),
        run: str = "",
    ) -> None:
        self._spec, self._settings, self._on_note = spec, settings, on_note
        self._health, self._pace, self._known = health, Pace(health), Known(health)
        self._replica_class = replica_class
        self._own_ray = connect(settings.address)
        self.metrics = Metrics(run)
        self._share = _share(settings)
        self._room, self._patience = Room(self._share, settings.replicas), Patience(self._share)
        self._replica_settings = ReplicaSettings(
            batch_tokens=settings.batch_tokens,
            num_devices=max(1, int(self._share.num_gpus)),
            num_threads=0 if self._share.num_gpus else max(1, int(self._share.num_cpus)),
            weights_folder=settings.weights_folder,
        )
        self._members: list[_Member] = []
        self._groups: list[Any] = []  # reserved places whose replica was lost
        self._started = 0
        self._failed_starts = 0
        self._dismissed = 0
        self._references: dict[str, tuple[Any, Reference]] = {}
        self._gifts: list[tuple[str, tuple[Any, ...]]] = []
        self._solved: dict[str, dict[tuple[str, str], Any]] = {}
        self._queue: RequestQueue | None = None
        self._guesses: RequestQueue | None = None
        self._guessed: set[str] = set()  # under way, submitted as guesses only
        self._attempts: dict[str, int] = {}
        self._arrived: list[Outcome] = []
        self._gather_until = 0.0
        self._check_time_at = 0.0

    def __enter__(self) -> ReplicaPool:
        self._say_share()
        self._fill()
        return self

    @property
    def num_replicas(self) -> int:
        """Replicas that are asked for, there or not."""
        return self._room.wanted

    @property
    def num_at_work(self) -> int:
        """Replicas that have loaded and take requests."""
        return sum(member.ready for member in self._members)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for member in self._members:
            member.host.leave()
        for group in self._groups:
            give_back(group)
        self._members.clear()
        if self._own_ray:
            ray.shutdown()

    def rest(self) -> None:
        """Let all replicas go, for work that needs their places; whatever is asked next starts others. Nothing may be
        under way."""
        assert not self._in_flight
        for member in self._members:
            member.host.leave()
        self._members.clear()

    def wait_until_ready(self) -> None:
        """Wait for every replica; a search need not, for it begins with the first."""
        while not all(member.ready for member in self._members):
            self._welcome(timeout_seconds=1.0)

    # Preparation: whole answers from any one replica.

    def manifest(self) -> ModelManifest:
        manifest: ModelManifest = self._ask_one("manifest")
        self._queue, self._guesses = RequestQueue(manifest), RequestQueue(manifest)
        return manifest

    def cut_prompts(self, *arguments: Any) -> Any:
        """See `dtmsearch.model.replica.Replica.cut_prompts`."""
        return self._ask_one("cut_prompts", *arguments)

    def make_reference(self, prompts: Any) -> Reference:
        """See `dtmsearch.model.replica.Replica.make_reference`."""
        reference: Reference = self._ask_one("make_reference", prompts)
        return reference

    def measure_speed(self, count: int, prompt_tokens: int, continuation_tokens: int) -> Speed:
        """See `dtmsearch.model.replica.Replica.measure_speed`."""
        speed: Speed = self._ask_one("measure_speed", count, prompt_tokens, continuation_tokens)
        return speed

    def continuations(
        self, plan: Plan, reference_id: str, prompts: Sequence[int], weights_id: str = ""
    ) -> list[Continuation]:
        """See `dtmsearch.model.replica.Replica.continuations`."""
        written: list[Continuation] = self._ask_one("continuations", plan, reference_id, tuple(prompts), weights_id)
        return written

    def save_pruned(self, plan: Plan, weights_id: str, calibration_id: str, folder: str) -> None:
        """See `dtmsearch.model.replica.Replica.save_pruned`."""
        self._ask_one("save_pruned", plan, weights_id, calibration_id, folder)

    def routed_tokens(self, reference_id: str) -> dict[str, int]:
        """See `dtmsearch.model.replica.Replica.routed_tokens`."""
        routed: dict[str, int] = self._ask_one("routed_tokens", reference_id)
        return routed

    def use(self, reference: Reference) -> None:
        """Give a reference to every replica, those to come included; each repeats the base model's own evaluation."""
        if reference.id in self._references:
            return
        self._references[reference.id] = ray.put(reference), reference
        for member in self._members:
            if member.ready:
                self._begin_or_take(member)

    def cut_calibration(self, texts: Sequence[str], count: int, tokens: int, seed: int) -> Calibration:
        """See `dtmsearch.model.replica.Replica.cut_calibration`."""
        calibration: Calibration = self._ask_one("cut_calibration", texts, count, tokens, seed)
        return calibration

    def gather_statistics(self, calibration: Calibration) -> InputStatistics:
        """See `dtmsearch.model.replica.Replica.gather_statistics`."""
        statistics: InputStatistics = self._ask_one("gather_statistics", calibration)
        return statistics

    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[str], calibration_id: str = "", by_hessian: bool = False
    ) -> list[WeightError]:
        """See `dtmsearch.model.replica.Replica.weight_errors`."""
        errors: list[WeightError] = self._ask_one("weight_errors", components, schemes, calibration_id, by_hessian)
        return errors

    def outlier_shares(self, calibration_id: str) -> dict[int, float]:
        """See `dtmsearch.model.replica.Replica.outlier_shares`."""
        shares: dict[int, float] = self._ask_one("outlier_shares", calibration_id)
        return shares

    def use_calibration(self, calibration: Calibration, statistics: InputStatistics) -> None:
        """Give a calibration to every replica, those to come included."""
        self._give("call", "use_calibration", ray.put(calibration), ray.put(statistics))

    def use_solved(self, calibration_id: str, matrices: Iterable[PackedMatrix]) -> None:
        """Give solved matrices to every replica, those to come included; they lie in the cluster's memory."""
        held = self._solved.setdefault(calibration_id, {})
        held |= {(packed.component, packed.scheme): ray.put(packed) for packed in matrices}
        self._give("take_solved", calibration_id, dict(held))

    def solve(
        self, calibration_id: str, parts: Sequence[Sequence[tuple[str, str]]]
    ) -> Iterator[Sequence[PackedMatrix]]:
        """Have (component, scheme) pairs solved, a part on whichever replica is free; yields a part as it is done.

        In order of layers each replica gathers on its way up. A part whose replica is lost goes to another.
        """
        waiting = deque((number, 1) for number in range(len(parts)))
        under_way: dict[Any, tuple[_Member, int, int]] = {}
        while waiting or under_way:
            self._first_ready()
            busy = [member for member, _, _ in under_way.values()]
            for member in (m for m in self._members if m.ready and m not in busy):
                if waiting:
                    number, attempt = waiting.popleft()
                    call = member.actor.call.remote("solve", calibration_id, parts[number])
                    under_way[call] = member, number, attempt
            done, _ = ray.wait(list(under_way), timeout=1.0)
            for call in done:
                member, number, attempt = under_way.pop(call)
                try:
                    yield ray.get(call)
                except RayTaskError as error:
                    raise _cause(error) from None
                except RayActorError as error:
                    if attempt >= _MAX_ATTEMPTS:
                        raise ReplicasFailed(f"{attempt} replicas were lost while they solved a layer") from error
                    waiting.appendleft((number, attempt + 1))
                    self._lose(member, error)

    def _give(self, method: str, *arguments: Any) -> None:
        """Have every replica's host take something, those to come included, before whatever it is asked next."""
        self._gifts.append((method, arguments))
        for member in self._members:
            getattr(member.actor, method).remote(*arguments)

    def _ask_one(self, method: str, *arguments: Any) -> Any:
        """The answer of whichever replica is up first; another is asked if that one is lost."""
        while True:
            member = self._first_ready()
            try:
                return ray.get(member.actor.call.remote(method, *arguments))
            except RayTaskError as error:
                raise _cause(error) from None
            except RayActorError as error:
                self._lose(member, error)

    def _first_ready(self) -> _Member:
        while not (ready := [m for m in self._members if m.ready]):
            self._check_ray()
            self._fill()
            self._welcome(timeout_seconds=1.0)
        return ready[0]

    def _check_ray(self) -> None:
        """Raise `ClusterLost` if a Ray of our own has lost what it cannot live without.

        Ray itself would end this process at its next call, without a word.
        """
        node = ray._private.worker._global_node if self._own_ray else None
        if node is None:
            return
        dead = [kind for kind, _ in node.dead_processes() if kind in _VITAL]
        if dead:
            raise ClusterLost(
                f"Ray's {dead[0]} process on this machine was killed, perhaps for want of memory. Nothing that was "
                "recorded is lost: run again to resume"
            )

    # Evaluator.

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        assert self._queue is not None and self._guesses is not None, "the manifest is read first"
        ids = self._guessed.intersection(request.id for request in requests)
        self._guessed -= ids
        self._queue.add([request for request in requests if request.id not in ids])
        self._queue.add(self._guesses.remove(ids))
        self._dispatch()

    def num_idle(self) -> int:
        """See `dtmsearch.search.scheduler.Offering`: what would fill up the calls that replicas may hold."""
        if self._queue is None or self._guesses is None or len(self._queue):
            return 0
        ready = [m for m in self._members if m.ready]
        if len(ready) < self._settings.guess_from:
            return 0
        each = min(max(int(_CALL_SECONDS / self._pace.seconds_per_request), 1), _MOST_GUESSES)
        free = sum(max(_CALLS_AHEAD - len(m.calls), 0) for m in ready)
        return max(free * each - len(self._guesses), 0)

    def submit_guesses(self, requests: Sequence[EvalRequest]) -> None:
        """See `dtmsearch.search.scheduler.Offering`."""
        assert self._guesses is not None
        self._guessed |= {request.id for request in requests}
        self._guesses.add(requests)
        self._dispatch()

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        """See `dtmsearch.search.scheduler.Evaluator`. What arrives within moments is handed over together."""
        self._check_ray()
        self._dispatch()
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
        ready = [member for member in self._members if member.ready]
        busy = sum(bool(member.calls) for member in ready)
        self.metrics.replicas(busy, len(ready) - busy, len(self._members) - len(ready))
        if arrived:
            self.metrics.answered(arrived)
        if log.isEnabledFor(logging.INFO):
            for outcome in arrived:
                status = outcome.kind if isinstance(outcome, EvalFailure) else "ok"
                about = {"request": outcome.request_id, "status": status}
                log.info("evaluation", extra=about | asdict(outcome.provenance))

    @property
    def _in_flight(self) -> bool:
        return any(member.calls for member in self._members)

    def _wait(self, timeout_seconds: float) -> None:
        """Wait for a call or a start to end, take what has ended, keep the replicas busy."""
        owner = {reference: member for member in self._members for reference in member.calls}
        waiting = [*owner, *(member.starting for member in self._members if not member.ready)]
        done: set[Any] = set()
        if waiting:
            # Of many replicas some end at any moment. Each wait costs as much as a few of them.
            ray.wait(waiting, num_returns=1, timeout=timeout_seconds)
            if (several := len(waiting) // _WAIT_FOR_ONE_IN) > 1:
                ray.wait(waiting, num_returns=several, timeout=_MOMENT_SECONDS)
            done = set(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])
        self._fill()
        self._welcome(timeout_seconds=0)
        for member in {owner[reference]: None for reference in done if reference in owner}:
            self._collect(member, done)
        if (now := time.monotonic()) > self._check_time_at:
            self._check_time_at = now + _CHECK_TIME_SECONDS
            for member in list(self._members):
                self._check_time(member)
        self._dispatch()

    def _collect(self, member: _Member, done: set[Any]) -> None:
        """Take what a replica has finished; give it up if it is lost, or its canary is wrong."""
        try:
            for reference in list(member.calls):  # in the order in which the replica does them
                if reference in done:
                    answer = ray.get(reference)
                    self._accept(member.calls.pop(reference), answer, member)
        except (RayError, WrongNumbers) as error:
            self._lose(member, error)

    def _check_time(self, member: _Member) -> None:
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
            self._lose(member, TimeoutError(f"no answer for {seconds:.0f} s, where {limit:.0f} s are the most"))

    def _accept(self, call: _Call, answer: Any, member: _Member) -> None:
        now = time.monotonic()
        seconds = now - max(call.started_at, member.idle_since)
        member.idle_since = now
        if call.check is not None:
            self._verify(member, call.check, Sample(*answer), seconds)
            return
        self._pace.learn(call.cost, seconds, len(call.requests))
        member.held.append(_Held(call, answer))
        if call.requests[0].reference_id not in member.references:  # nothing to hold it against
            self._release(member)

    def _verify(self, member: _Member, check: Check, found: Sample, seconds: float) -> None:
        """Hand over what the replica has answered before its canary. Raises `WrongNumbers`."""
        fault = self._known.fault(check, found, member.record.samples.get(check.key))
        if fault is not None:
            raise WrongNumbers(fault)
        member.record.keep(check, found, time.monotonic(), seconds)
        self._dismissed = 0
        self._release(member)

    def _release(self, member: _Member) -> None:
        held, member.held = member.held, []
        for each in held:
            for request, outcome in zip(each.call.requests, each.outcomes, strict=True):
                if isinstance(outcome, EvalResult) and request.reference_id in self._references:
                    num_prompts = self._num_canary_prompts(self._references[request.reference_id][1])
                    self._known.learn(request, outcome, num_prompts)
                attempts = self._attempts.pop(outcome.request_id, 0) + 1
                self._guessed.discard(outcome.request_id)
                self._arrived.append(replace(outcome, provenance=replace(outcome.provenance, attempts=attempts)))

    def _dispatch(self) -> None:
        if self._queue is None or self._guesses is None:
            return
        ready = [m for m in self._members if m.ready]
        for ahead in range(_CALLS_AHEAD):  # everyone's first call before anyone's second
            for member in [m for m in ready if len(m.calls) <= ahead]:
                if self._canary_is_due(member):
                    self._send_canary(member)
                # Towards the end of a round nobody takes a second call while others have none.
                elif member.calls and (self._queue.has_suspects or self._holds_suspect(member)):
                    continue
                elif len(self._queue) > ahead * len(ready):
                    self._send(member, self._queue, len(ready))
                elif not len(self._queue) and len(self._guesses):
                    self._send(member, self._guesses, len(ready))

    def _holds_suspect(self, member: _Member) -> bool:
        """Whether a request is under way there that may have killed replicas. Nothing goes before or behind it, so that
        no other is blamed for its next victim."""
        return any(request.id in self._attempts for call in member.calls.values() for request in call.requests)

    def _canary_is_due(self, member: _Member) -> bool:
        """After its interval; and at once when nothing else waits and a round may wait for what is unverified."""
        unverified = member.unverified if member.held or member.calls else ()
        if not unverified or unverified[-1].requests[-1].reference_id not in member.references:
            return False
        interval = self._health.canary_interval(member.record.seconds)
        assert self._queue is not None
        waited_for = any(request.id not in self._guessed for call in unverified for request in call.requests)
        return (waited_for and not len(self._queue)) or time.monotonic() - member.record.verified_at > interval

    def _send_canary(self, member: _Member) -> None:
        """Of the plan that the replica holds, if it is known what comes out, and else of the dense model."""
        last = member.unverified[-1].requests[-1]
        reference = self._references[last.reference_id][1]
        num_prompts = self._num_canary_prompts(reference)
        known = (last.parent.id, reference.id) in self._known
        plan = last.parent if known else Plan()
        check = Check(plan, reference.id, num_prompts, reference.continuation_tokens)
        call = member.actor.call.remote("check", plan, reference.id, num_prompts)
        assert self._queue is not None
        member.calls[call] = _Call([], self._queue.full_cost(num_prompts), time.monotonic(), check)

    def _num_canary_prompts(self, reference: Reference) -> int:
        return self._health.num_canary_prompts(reference.num_prompts)

    def _send(self, member: _Member, queue: RequestQueue, num_ready: int) -> None:
        rate = self._pace.seconds_per_cost
        budget = 0.0 if rate is None else _CALL_SECONDS / rate
        budget = min(budget, queue.cost / (2 * num_ready))
        requests, member.parent_id, cost = queue.take(budget, member.parent_id)
        if not member.calls:
            member.idle_since = time.monotonic()
        call = member.actor.call.remote("evaluate", requests)
        member.calls[call] = _Call(requests, cost, time.monotonic())

    # Members: starting, welcoming, losing.

    def _start_member(self) -> None:
        name = f"replica-{self._started}"
        self._started += 1
        group = self._groups.pop() if self._groups else None
        host = start_host(self._replica_class, name, self._share.num_cpus, self._share.num_gpus, group)
        starting = host.actor.load.remote(self._spec, self._replica_settings)
        for method, arguments in self._gifts:
            getattr(host.actor, method).remote(*arguments)
        self._members.append(_Member(name, host.actor, starting, host))

    def _fill(self) -> None:
        """Ask for as many replicas as there shall be, let go of those that wait for a place that is gone, and say
        what the others wait for."""
        wanted = self._room.wanted
        while len(self._members) < wanted:
            self._start_member()
        while self._groups:
            give_back(self._groups.pop())
        unplaced = self._unplaced()
        while unplaced and len(self._members) > wanted:
            self._members.remove(unplaced[-1])
            unplaced.pop().host.leave()
        note = self._patience.note([m.name for m in unplaced], sum(m.ready for m in self._members))
        if note is not None:
            self._on_note(note)

    def _unplaced(self) -> list[_Member]:
        """Replicas that have no place in the cluster yet."""
        waiting = {m.host.placed: m for m in self._members if not m.ready}
        if not waiting:
            return []
        placed, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        return [member for reference, member in waiting.items() if reference not in placed]

    def _say_share(self) -> None:
        """On a cluster that others may use, say how much of it this search will hold."""
        if self._settings.address is None or self._share.num_gpus:
            return
        free = ray.available_resources().get("CPU", 0.0)
        if self.num_replicas * self._share.num_cpus >= free:
            self._on_note(
                f"this search holds all {free:g} free processors of the cluster ({self.num_replicas} x {self._share}), "
                "so another one would wait: --replicas with --cpus-per-replica leaves some to others"
            )

    def _welcome(self, timeout_seconds: float) -> None:
        """Let replicas that have loaded take the references, and those that have taken them begin."""
        starting = {m.starting: m for m in self._members if not m.ready}
        if not starting:
            return
        done, _ = ray.wait(list(starting), num_returns=len(starting), timeout=timeout_seconds)
        for reference in done:
            member = starting[reference]
            try:
                self._advance_start(member, ray.get(reference))
            except RayTaskError as error:
                cause = _cause(error)
                if isinstance(cause, ValueError):
                    raise cause from None
                self._lose(member, error)
            except RayError as error:
                self._lose(member, error)

    def _advance_start(self, member: _Member, answer: tuple[str, int] | float) -> None:
        if isinstance(answer, tuple):
            member.node = f"{answer[0]}:{answer[1]}"
        elif answer > _CANARY_LIMIT:
            raise RayError(f"its dense model diverges on {answer:.1%} of the reference's tokens")
        self._begin_or_take(member)

    def _begin_or_take(self, member: _Member) -> None:
        """Let a replica begin, once it has every reference."""
        missing = self._references.keys() - member.references
        member.ready = not missing
        if missing:
            member.references |= missing
            member.taking_since = time.monotonic()
            member.starting = member.actor.take.remote(*(self._references[i][0] for i in sorted(missing)))
        else:
            self._failed_starts = 0
            member.taking_since = None
            member.record.verified_at = time.monotonic()

    def _lose(self, member: _Member, error: Exception) -> None:
        """Kill a replica, send again what it held, and start another in its place.

        Only the oldest call may be to blame, so only its requests are charged an attempt, and they go out one by one
        from now on. Preemption and wrong numbers charge nothing. What no canary has verified is measured again.
        """
        self._members.remove(member)
        member.host.end()
        if member.host.group is not None:
            self._groups.append(member.host.group)
        reason = str(_cause(error) if isinstance(error, RayTaskError) else error).strip().splitlines()[0][:300]
        unverified = sum(len(held.outcomes) for held in member.held)
        self.metrics.lost()
        again = f"; {unverified} results that no canary had verified are measured again" if unverified else ""
        self._on_note(f"{member.name} ({member.node or 'starting'}) was lost and is replaced: {reason}{again}")
        preempted = isinstance(error, ActorDiedError) and bool(error.preempted)
        blameless = preempted or isinstance(error, WrongNumbers)
        for held in member.held:
            self._send_again(held.call, member, reason, charged=False)
        for position, call in enumerate(member.calls.values()):
            self._send_again(call, member, reason, charged=position == 0 and not blameless)
        member.held, member.calls = [], {}
        if isinstance(error, WrongNumbers):
            self._dismissed += 1
            if self._dismissed > self.num_replicas + _MAX_FAILED_STARTS:
                raise ReplicasFailed(f"{self._dismissed} replicas in a row returned wrong numbers; the last: {reason}")
        if isinstance(error, RayActorError):
            self._room.count_again()
        if not member.ready and not _with_its_node(error):
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise ReplicasFailed(f"{self._failed_starts} replicas in a row did not start; the last: {reason}")
        self._fill()

    def _send_again(self, call: _Call, member: _Member, reason: str, charged: bool) -> None:
        assert self._queue is not None and self._guesses is not None
        for request in call.requests:
            queue = self._guesses if request.id in self._guessed else self._queue
            if charged:
                self._attempts[request.id] = self._attempts.get(request.id, 0) + 1
            if self._attempts.get(request.id, 0) < _MAX_ATTEMPTS:
                queue.add([request], alone=charged)
                continue
            self._guessed.discard(request.id)
            attempts = self._attempts.pop(request.id)
            provenance = Provenance(member.name, member.node, attempts, finished_at=time.time())
            message = f"{attempts} replicas were lost while they measured it; the last: {reason}"
            self._arrived.append(EvalFailure(request.id, "replica_lost", message, provenance))


def connect(address: str | None) -> bool:
    """Join the cluster at `address`, or start a local one. True when Ray is ours to shut down again.

    Raises `ClusterUnreachable`.
    """
    if ray.is_initialized():
        return False
    if address is not None:
        check_listening(address)
    try:
        with _keeping_sigterm():
            ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="dtmsearch",
            )
    except AuthenticationError as error:
        raise ClusterUnreachable(refused(address or "this machine", str(error))) from None
    except ConnectionError as error:
        # It listens, as was checked: a wrong token looks to Ray as if nobody were there.
        raise ClusterUnreachable(refused(address) if address else f"Ray did not start here: {error}") from error
    except (RuntimeError, TimeoutError, GetTimeoutError) as error:
        where = f"no Ray cluster at {address}" if address else "Ray did not start here"
        raise ClusterUnreachable(f"{where}: {str(error).strip().splitlines()[0][:300]}") from error
    return True


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Ray puts handlers of its own in the place of ours, which end the process as if the search had failed."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's own handler, while it starts
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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


def _share(settings: PoolSettings) -> Share:
    """The share of each replica. Raises `ValueError` for what this machine does not have; a cluster may grow."""
    nodes = alive_nodes()
    share = share_of(nodes, settings.replicas, settings.gpus_per_replica, settings.cpus_per_replica)
    if settings.address is None and not share.room(nodes):
        for option, kind, each in (("gpus", "GPU", share.num_gpus), ("cpus", "CPU", share.num_cpus)):
            has = sum(node.get(kind, 0.0) for node in nodes)
            if each > has:
                raise ValueError(f"--{option}-per-replica asks for {each:g} {kind}s, but this machine has {has:g}")
    return share


def _with_its_node(error: Exception) -> bool:
    """Whether a replica died because its node did, which says nothing about the replica."""
    if isinstance(error, ActorDiedError):
        return bool(error.preempted) or "node has died" in str(error)
    return isinstance(error, ActorUnavailableError)  # what the first call hears of a node that has just died


def _cause(error: RayTaskError) -> Exception:
    cause = error.cause
    return cause if isinstance(cause, Exception) else error
