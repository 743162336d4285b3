"""What every strategy shows of its search: its decisions so far, the plan that is best, whether it has ended."""

from __future__ import annotations

from collections.abc import Sequence

from dtmsearch.core.plan import Plan
from dtmsearch.search.protocols import AgainstUniform, Decision


class Course:
    """The part of `Strategy` that is read; a strategy that keeps one of these elsewhere says so itself."""

    def __init__(self) -> None:
        self._decisions: list[Decision] = []
        self._best: Plan | None = None
        self._done = False
        self.stage = ""
        self.against_uniform: AgainstUniform | None = None

    @property
    def done(self) -> bool:
        return self._done

    @property
    def step(self) -> int:
        return len(self._decisions)

    @property
    def best(self) -> Plan | None:
        return self._best

    @property
    def decisions(self) -> Sequence[Decision]:
        return self._decisions
