"""The replicas of one model: started where there is room, given what all of them must hold, replaced when lost.

Knows nothing of what they are asked, nor of what becomes of the work of one that is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from dtmsearch.cluster.actor import give_back, start_host
from dtmsearch.cluster.canaries import WrongNumbers, not_the_replicas
from dtmsearch.cluster.health import tolerated_share
from dtmsearch.cluster.placement import Patience, Share, WantedReplicas
from dtmsearch.cluster.ray_compat import died_with_its_node
from dtmsearch.cluster.replica_handle import ReplicaHandle
from dtmsearch.core.evaluation import ModelSpec, Reference, ReplicaSettings
from dtmsearch.errors import DtmError, ReplicasFailed, UserError, reason_of

_MAX_FAILED_STARTS = 3


class ReplicaSet:
    """`members` are those that are there, ready or not. `on_lost` hears of each that is lost, with the error and its
    one line of reason, once the replica is ended and before another is started."""

    def __init__(
        self,
        replica_class: str,
        spec: ModelSpec,
        settings: ReplicaSettings,
        share: Share,
        replicas: int,
        on_note: Callable[[str], None],
        on_lost: Callable[[ReplicaHandle, Exception, str], None],
    ) -> None:
        self._replica_class, self._spec, self._settings, self._share = replica_class, spec, settings, share
        self._room, self._patience = WantedReplicas(share, replicas), Patience(share)
        self._on_note, self._on_lost = on_note, on_lost
        self.members: list[ReplicaHandle] = []
        self.references: dict[str, Reference] = {}
        self._held_references: dict[str, Any] = {}  # in the cluster's memory
        self._gifts: list[tuple[str, tuple[Any, ...]]] = []
        self._groups: list[Any] = []  # reserved places whose replica was lost
        self._started = 0
        self._failed_starts = 0
        self._dismissed = 0
        # By reference: the last replica whose base model diverged from it at the start, and on what share of tokens.
        self._diverging: dict[str, tuple[str, float]] = {}

    @property
    def wanted(self) -> int:
        """Replicas that are asked for, there or not."""
        return self._room.wanted

    @property
    def ready(self) -> list[ReplicaHandle]:
        """Those that have loaded and take requests."""
        return [member for member in self.members if member.ready]

    @property
    def num_loading(self) -> int:
        """Those that have a place and do not take requests yet."""
        return len(self.members) - len(self.ready) - len(self._unplaced())

    def leave(self) -> None:
        """Let all replicas go; `fill` starts others."""
        for member in self.members:
            member.host.leave()
        self.members.clear()

    def close(self) -> None:
        self.leave()
        for group in self._groups:
            give_back(group)

    def use(self, reference: Reference) -> None:
        """Give a reference to every replica, those to come included; each repeats the base model's own evaluation."""
        if reference.id in self.references:
            return
        self.references[reference.id], self._held_references[reference.id] = reference, ray.put(reference)
        for member in self.ready:
            self._begin_or_take(member)

    def give(self, method: str, *arguments: Any) -> None:
        """Have every replica's host take something, those to come included, before whatever it is asked next."""
        self._gifts.append((method, arguments))
        for member in self.members:
            getattr(member.actor, method).remote(*arguments)

    def trusted(self) -> None:
        """A canary was good: those that were wrong before it, or were lost over theirs, are no series."""
        self._dismissed = 0

    # Starting.

    def fill(self) -> None:
        """Ask for as many replicas as there shall be, let go of those that wait for a place that is gone, and say
        what the others wait for."""
        wanted = self._room.wanted
        while len(self.members) < wanted:
            self._start_member()
        while self._groups:
            give_back(self._groups.pop())
        unplaced = self._unplaced()
        while unplaced and len(self.members) > wanted:
            self.members.remove(unplaced[-1])
            unplaced.pop().host.leave()
        note = self._patience.note([m.name for m in unplaced], len(self.ready))
        if note is not None:
            self._on_note(note)

    def _start_member(self) -> None:
        name = f"replica-{self._started}"
        self._started += 1
        group = self._groups.pop() if self._groups else None
        host = start_host(self._replica_class, name, self._share, group)
        starting = host.actor.load.remote(self._spec, self._settings)
        for method, arguments in self._gifts:
            getattr(host.actor, method).remote(*arguments)
        several = self._settings.num_devices > 1
        self.members.append(ReplicaHandle(name, host.actor, starting, host, over_devices=several))

    def _unplaced(self) -> list[ReplicaHandle]:
        """Replicas that have no place in the cluster yet."""
        waiting = {m.host.placed: m for m in self.members if not m.ready}
        if not waiting:
            return []
        placed, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        return [member for reference, member in waiting.items() if reference not in placed]

    def welcome(self, timeout_seconds: float) -> None:
        """Let replicas that have loaded take the references, and those that have taken them begin."""
        starting = {m.starting: m for m in self.members if not m.ready}
        if not starting:
            return
        done, _ = ray.wait(list(starting), num_returns=len(starting), timeout=timeout_seconds)
        for reference in done:
            member = starting[reference]
            try:
                self._advance_start(member, ray.get(reference))
            except RayTaskError as error:
                cause = cause_of(error)
                if isinstance(cause, UserError):
                    raise cause from None
                self.lose(member, error)
            except RayError as error:
                self.lose(member, error)

    def _advance_start(self, member: ReplicaHandle, answer: tuple[str, int, bool] | float) -> None:
        if isinstance(answer, tuple):
            host, process, member.together = answer
            member.node = f"{host}:{process}"
        elif member.taking:
            self._check_first(member, self.references[member.taking], answer)
        self._begin_or_take(member)

    def _check_first(self, member: ReplicaHandle, reference: Reference, diverging: float) -> None:
        """Raise what becomes of a replica whose base model diverges on too large a share of a reference's tokens."""
        tolerated = tolerated_share(reference, reference.agrees.size)
        if diverging <= tolerated:
            return
        fault = f"its base model diverges on {diverging:.1%} of the reference's tokens"
        name, share = self._diverging.get(reference.id, (member.name, 0.0))
        self._diverging[reference.id] = member.name, diverging
        if name != member.name and abs(share - diverging) <= tolerated:
            raise ReplicasFailed(not_the_replicas(name, member.name, fault))
        raise RayError(f"{fault}, where {tolerated:.1%} may be rounding")

    def _begin_or_take(self, member: ReplicaHandle) -> None:
        """Let a replica begin, once it has every reference."""
        missing = self.references.keys() - member.references
        member.ready = not missing
        if missing:
            member.references |= missing
            member.taking, member.taking_since = min(missing), time.monotonic()
            member.starting = member.actor.take.remote(*(self._held_references[i] for i in sorted(missing)))
        else:
            self._failed_starts = 0
            member.taking, member.taking_since = "", None
            member.record.verified_at = time.monotonic()

    # Losing.

    def lose(self, member: ReplicaHandle, error: Exception) -> None:
        """Kill a replica and start another in its place. Raises `ReplicasFailed` when too many were lost in a row."""
        if is_loss(error):
            error = cause_of(error)
        self.members.remove(member)
        member.host.end()
        if member.host.group is not None:
            self._groups.append(member.host.group)
        reason = _reason(error)
        # No request is to blame for what fails in a canary, which each replica that comes would be sent again.
        in_check = member.in_check and not _with_its_node(error)
        self._on_lost(member, error, reason)
        if isinstance(error, WrongNumbers) or in_check:
            self._dismissed += 1
            if self._dismissed > self.wanted + _MAX_FAILED_STARTS:
                did = (
                    "returned wrong numbers"
                    if isinstance(error, WrongNumbers)
                    else "were wrong, or lost over their canary"
                )
                raise ReplicasFailed(f"{self._dismissed} replicas in a row {did}; the last: {_whole(error)}") from error
        if isinstance(error, RayActorError):
            self._room.count_again()
        if not member.ready and not _with_its_node(error):
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise ReplicasFailed(
                    f"{self._failed_starts} replicas in a row did not start; the last: {_whole(error)}"
                ) from error
        self.fill()


def _with_its_node(error: Exception) -> bool:
    """Whether a replica died because its node did, which says nothing about the replica."""
    if isinstance(error, ActorDiedError):
        return died_with_its_node(error)
    return isinstance(error, ActorUnavailableError)  # what the first call hears of a node that has just died


def cause_of(error: Exception) -> Exception:
    """What the replica itself raised, if it did."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, Exception) else error


def _reason(error: Exception) -> str:
    """Why a replica is lost, in one line: what it raised itself, with its type, or what Ray and we say of it."""
    cause = cause_of(error)
    if isinstance(cause, RayTaskError):  # what was raised could not be sent: its traceback ends with it
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return (lines or [type(cause).__name__])[-1][:300]
    reason = reason_of(cause)
    named = cause is error or isinstance(cause, DtmError | RayError) or reason == type(cause).__name__
    return reason if named else f"{type(cause).__name__}: {reason}"


def _whole(error: Exception) -> str:
    """All that a replica has raised said, however many lines it has; what it said nothing by, its type."""
    cause = cause_of(error)
    said = str(cause).strip()
    return f"{_reason(error)}\n{said}" if "\n" in said else _reason(error) if len(said) < 300 else said


def is_loss(error: Exception) -> bool:
    """Whether a replica's process has died, or that of one of its stages, of which the first has told."""
    return isinstance(cause_of(error), RayActorError)
