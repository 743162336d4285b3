"""`min_fdt`, kept with confidence: which plans are tried on prompts that no search has seen, and which of them is shown
to keep it.

A search goes on until its own prompts say that the next plan falls below; so near the limit the plan that it ends with
is as likely to lie below it as above. Plans from the least compressed on are therefore tested in an order that was
fixed before (fixed-sequence testing: Maurer, Hothorn and Lehmacher, 1995): as long as each is shown to keep the limit,
the next may be tested at the same confidence, for all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from dtmsearch.core.evaluation import EvalResult, Outcome
from dtmsearch.core.plan import Plan
from dtmsearch.core.statistics import lower_bound
from dtmsearch.search.protocols import Strategy


@runtime_checkable
class Laddered(Protocol):
    """A strategy that can say which plans are less compressed than its best."""

    def ladder(self) -> Sequence[Plan]:
        """Plans up to the best, from the least compressed to the most."""
        ...


def ladder_of(strategy: Strategy) -> list[Plan]:
    """The plans to test, from the least compressed on to the strategy's best: its own, else some of its decisions, the
    last ones closest together."""
    if strategy.best is None or not strategy.best.entries:
        return []
    if isinstance(strategy, Laddered):
        return list(strategy.ladder())
    plans = [decision.plan for decision in strategy.decisions]
    if strategy.best in plans:
        plans = plans[: len(plans) - plans[::-1].index(strategy.best)]
    else:
        plans.append(strategy.best)
    return [plans[-1 - back] for back in reversed(list(_steps_back(len(plans))))]


def _steps_back(count: int) -> Iterator[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., and the first of so many."""
    back, step = 0, 1
    while back < count - 1:
        yield back
        back += step
        if back >= 4 * step:
            step *= 2
    if count:
        yield count - 1


def smallest_that_keeps(outcomes: Sequence[Outcome], min_fdt: float, confidence: float) -> int | None:
    """Which of the plans, from the least compressed on, is the last that is shown to keep a mean FDT of `min_fdt`
    before one is not; None where the first is not. One that could not be measured is not."""
    kept = None
    for number, outcome in enumerate(outcomes):
        if not isinstance(outcome, EvalResult) or bound(outcome, confidence) < min_fdt:
            break
        kept = number
    return kept


def bound(result: EvalResult, confidence: float) -> float:
    """What the mean FDT of a plan over all such prompts is at least, at this confidence."""
    return lower_bound(result.fdt, 0.0, confidence)
