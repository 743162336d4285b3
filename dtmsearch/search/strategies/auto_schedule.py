"""What a search by `auto` measures, how often and on which prompts: one schedule, by which it runs and is foreseen."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dtmsearch.core.prices import PASSES
from dtmsearch.core.strategy_settings import AutoSettings

# Of how many units one is moved alone: in the first round, and later.
_DOUBTED = (2, 4)
# A round doubles the prompts of the last, whose differences it must tell apart at half their size.
_GROWTH = 2
# Prompts on which swaps are told apart.
_POLISHED_ON = 32
# So many rounds are foreseen; whether more follow, measurements say.
_USUAL_ROUNDS = 2
# Prompts on which a round's plans are measured where slopes are taken, in those of a probing search's first round.
_MEASURED_ON = 2
# Rounds in which two plans are gone on from, where two are.
_TOGETHER = 2
# Prompts on which the plan that prices lead to is held against them.
HELD_AGAINST = 64
# Plans of the last comparison, which takes as many prompts as tell them apart.
FINALISTS = 3
# Where the smallest plan is sought, sizes are told apart down to this part of them.
SIZE_STEP = 0.005

# Trials that are foreseen, and the prompts of each.
Lot = tuple[int, int]
Stretch = tuple[int, int]


@dataclass(frozen=True)
class CorrectionRound:
    """A round of correction, from 0: the stretch of the prompts by which it learns around the plan that leads (units
    moved alone, or a slope), and the one that whole plans are measured on: each round on others. `num_moves` units are
    moved alone, `num_measured` plans in all are measured; it may forward `cost` prompts."""

    number: int
    learns_on: Stretch
    plans_on: Stretch
    num_moves: int
    num_measured: int
    cost: int


@dataclass(frozen=True)
class Schedule(ABC):
    """A search over so many units and prompts, whose plans have so many rivals."""

    effort: AutoSettings
    num_units: int
    num_prompts: int
    num_rivals: int

    @abstractmethod
    def correction_round(self, number: int) -> CorrectionRound: ...

    @abstractmethod
    def usual(self, num_probed: int) -> Iterator[Lot]:
        """What searches mostly ask for, after probes of so many units: whether they do, measurements say."""

    def rounds(self) -> list[CorrectionRound]:
        """The rounds of correction that stay within what they may forward together."""
        found, left = [], self.effort.correction_prompts
        for each in map(self.correction_round, range(self.effort.rounds)):
            left -= each.cost
            if left < 0:
                break
            found.append(each)
        return found

    def swap_lots(self, most_prompts: int) -> list[Stretch]:
        """The prompts of each lot of swaps that stay within what they may forward together."""
        count = min(_POLISHED_ON, self.num_prompts)
        firsts = [
            number * count % (self.num_prompts - count + 1)
            for number in range(most_prompts // (_POLISHED_ON * (self.effort.plans + 1)))
        ]
        return [(first, first + count) for first in firsts]

    def halvings(self) -> Lot:
        """Where the smallest plan is sought."""
        return 3 - round(math.log2(SIZE_STEP)), self.num_prompts


class ProbedSchedule(Schedule):
    """Where units are probed one by one."""

    def correction_round(self, number: int) -> CorrectionRound:
        counts = [min(self.effort.prompts * _GROWTH**n, self.num_prompts) for n in range(number + 1)]
        stretches = []
        for half in (0, 1):  # after the last one's, from the front again where they end
            first = (2 * sum(counts[:-1]) + half * counts[-1]) % (self.num_prompts - counts[-1] + 1)
            stretches.append((first, first + counts[-1]))
        moves = max(self.num_units // _DOUBTED[number > 0], 1)
        measured = moves + self.effort.plans + 2  # each lot beside the leader
        return CorrectionRound(number, stretches[0], stretches[1], moves, measured, counts[-1] * measured)

    def usual(self, num_probed: int) -> Iterator[Lot]:
        yield num_probed, self.effort.probe_prompts
        for each in self.rounds()[:_USUAL_ROUNDS]:
            yield each.num_measured, each.learns_on[1] - each.learns_on[0]
        yield self.effort.polish_prompts // _POLISHED_ON, _POLISHED_ON
        yield 2 + self.num_rivals, self.num_prompts


@dataclass(frozen=True)
class PricedSchedule(Schedule):
    """Where prices are taken: a round tries so many steps from the plan that leads where prices hold, and where they do
    not: `num_steps`."""

    num_steps: tuple[int, int]

    def correction_round(self, number: int) -> CorrectionRound:
        counts = self.effort.slopes, _MEASURED_ON * self.effort.prompts
        stretches = []
        for half in (0, 1):
            count = min(counts[half], self.num_prompts)
            first = (number * sum(counts) + half * counts[0]) % (self.num_prompts - count + 1)
            stretches.append((first, first + count))
        learns_on, plans_on = stretches
        measured = max(self.num_steps) + 1
        cost = PASSES["slope"] * (learns_on[1] - learns_on[0]) + (plans_on[1] - plans_on[0]) * measured
        return CorrectionRound(number, learns_on, plans_on, 0, measured, cost)

    def side_by_side(self) -> list[tuple[CorrectionRound, int]]:
        """The same rounds where two plans are gone on from, until two rounds have shown which is the better: with from
        how many. Slopes take half of the prompts. Together they forward no more than the other rounds may."""
        small = replace(self, effort=replace(self.effort, slopes=max(self.effort.slopes // 2, 2)))
        found, left = [], sum(each.cost for each in self.rounds())
        for each in map(small.correction_round, range(self.effort.rounds)):
            ways = 2 if each.number < _TOGETHER else 1
            left -= each.cost * ways
            if left < 0:
                break
            found.append((each, ways))
        return found

    def usual(self, num_probed: int) -> Iterator[Lot]:
        """Whether prices hold is not known before."""
        first = self.correction_round(0)
        yield 1 + self.num_rivals, HELD_AGAINST
        yield len(self.rounds()) // 3 * (1 + self.num_steps[0]), first.plans_on[1] - first.plans_on[0]
        yield 1, 2 * HELD_AGAINST
