"""A replica as the driver sees it: its actor, the calls that are under way there, and what it has answered since its
last good canary. Knows neither what is sent when, nor what becomes of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtmsearch.cluster.health import Check, Record
from dtmsearch.core.evaluation import EvalRequest, Outcome

if TYPE_CHECKING:
    from dtmsearch.cluster.actor import Hosted


@dataclass
class Call:
    """Requests under way on a replica, or a canary; `cost` in the queue's units."""

    requests: Sequence[EvalRequest]
    cost: float
    started_at: float
    check: Check | None = None


@dataclass(frozen=True)
class Held:
    """What a replica has answered since its last good canary."""

    call: Call
    outcomes: Sequence[Outcome]


@dataclass(eq=False)
class ReplicaHandle:
    """A replica. `calls` by object reference, oldest first; `starting` is what it was last given to begin with,
    `taking` the reference against which its base model is then held; `together`: it reads all weights in every call;
    `over_devices`: its model lies over several, which candidates of different layers keep busy at once."""

    name: str
    actor: Any
    starting: Any
    host: Hosted
    node: str = ""
    parent_id: str | None = None
    together: bool = False
    over_devices: bool = False
    ready: bool = False
    taking: str = ""
    taking_since: float | None = None
    idle_since: float = 0.0
    references: set[str] = field(default_factory=set)
    calls: dict[Any, Call] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)
    record: Record = field(default_factory=Record)

    @property
    def checking(self) -> bool:
        """Whether a canary is under way."""
        return any(call.check is not None for call in self.calls.values())

    @property
    def in_check(self) -> bool:
        """Whether the oldest call under way, which the replica is at, is a canary."""
        return next((call.check is not None for call in self.calls.values()), False)

    @property
    def last_request(self) -> EvalRequest | None:
        """The latest that is under way or held, if any."""
        call = next(reversed(self.calls.values()), None) or (self.held[-1].call if self.held else None)
        return call.requests[-1] if call is not None and call.requests else None

    @property
    def unverified(self) -> list[Call]:
        """Calls whose outcomes no canary that has been sent will verify, oldest first."""
        return [] if self.checking else [*(held.call for held in self.held), *self.calls.values()]

    def take_held(self) -> list[Held]:
        held, self.held = self.held, []
        return held
