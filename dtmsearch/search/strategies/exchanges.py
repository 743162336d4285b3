"""Which steps of a plan to take back, and which others to take instead: by what each step is believed to add. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtmsearch.core.plan import Perturbation, Plan

# How many steps are tried as the first that is taken for one that is taken back.
_MOST_FIRST = 4
# Progress that differs by less is the same but for rounding.
ALIKE = 1e-9


@dataclass(frozen=True)
class Step:
    """A step from a plan: the progress towards the budget that it makes, or, of a step back, gives up (below zero),
    and what it adds to the loss, or the step that it takes back had added; infinity where that is not known."""

    edge: Perturbation
    progress: float
    added: float


@dataclass(frozen=True)
class Exchange:
    """The plan after an exchange, the one after the steps back alone, and the steps that were then taken."""

    plan: Plan
    between: Plan
    forward: tuple[Perturbation, ...]


def exchanges(plan: Plan, spare: float, back: Sequence[Step], forward: Sequence[Step]) -> list[Exchange]:
    """Exchanges after which a plan that has `spare` more progress than it needs still has enough, those first after
    which the least loss is believed, as if what steps add were a sum.

    For each step back others are taken, those first that add least for their progress, beginning with each of the
    first four of them; and for each step forward those are taken back that had added most, as far as progress allows.
    Progress, too, is taken for a sum, which it is not where a block encloses another: the caller checks.
    """
    believed: dict[Plan, tuple[float, Exchange]] = {}

    def note(gone: Sequence[Step], come: Sequence[Step]) -> None:
        loss = sum(step.added for step in come) - sum(step.added for step in gone)
        between = _after(plan, gone)
        exchange = Exchange(_after(between, come), between, tuple(step.edge for step in come))
        if exchange.plan not in believed or loss < believed[exchange.plan][0]:
            believed[exchange.plan] = loss, exchange

    cheap = sorted((step for step in forward if step.progress > ALIKE), key=lambda step: step.added / step.progress)
    for out in back:
        others = [step for step in cheap if step.edge.component != out.edge.component]
        for first in others[:_MOST_FIRST]:
            come, left = [first], spare + out.progress + first.progress
            for step in others:
                if left >= -ALIKE:
                    break
                if step is not first:
                    come.append(step)
                    left += step.progress
            if left >= -ALIKE:
                note([out], come)
    for first in cheap:
        gone, left = [], spare + first.progress
        for step in sorted(back, key=lambda step: step.added, reverse=True):
            if step.edge.component != first.edge.component and left + step.progress >= -ALIKE:
                gone.append(step)
                left += step.progress
        if gone:
            note(gone, [first])
    return [exchange for _, exchange in sorted(believed.values(), key=lambda each: each[0])]


def _after(plan: Plan, steps: Sequence[Step]) -> Plan:
    for step in steps:
        plan = plan.with_(step.edge)
    return plan
