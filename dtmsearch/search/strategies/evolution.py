"""`evolution` and `local`: a plan changed by swaps at constant real size.

`evolution` is the (1 + lambda) search of EvoPress (arXiv 2410.14649, section 3): each child makes one to three
swaps, most often one; a swap moves one unit to an option with fewer bits and another to one with more. Children
are selected in stages, few left at each and more prompts; the leader goes only for a child that is better.

`local` goes through all swaps of the leader until none of them is better on all prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from dtmsearch.core.evaluation import Outcome
from dtmsearch.core.strategy_settings import EvolutionSettings, LocalSettings
from dtmsearch.search.solver.choices import Options
from dtmsearch.search.strategies.generator import Part, Script, mean_loss
from dtmsearch.search.strategies.solver_based import Solver, paired
from dtmsearch.search.strategies.task import Task

# A swap that finds no partner is tried anew so often.
_MOST_TRIES = 100
# Above this many options in all, only neighbouring ones are paired.
_MOST_MOVES = 1_000


class Evolution(Solver):
    """Starts from the largest uniform plan of the budget, or from `start`."""

    def __init__(
        self, task: Task, stages: EvolutionSettings = EvolutionSettings(), start: Options | None = None
    ) -> None:
        super().__init__(task)
        self._stages = stages
        self._start = start or self._largest_start()

    def script(self) -> Script:
        stages, leader = self._stages, self._start
        *each, last = (stages.children, *stages.survivors)
        for generation in range(stages.generations):
            lots = zip((*each, last + 1), stages.prompts, strict=True)
            self._foresee(*(((stages.generations - generation) * n, prompts) for n, prompts in lots))
            children = [self._child(leader, generation, index) for index in range(stages.children)]
            field = [child for child in dict.fromkeys(children) if child != leader]
            if not field:
                break  # there is nothing to swap
            for stage, count in enumerate(stages.prompts):
                prompts = self._sample(count, generation, stage)
                # The leader defends its place on the prompts of the last stage.
                contenders = [leader, *field] if stage == len(stages.survivors) else field
                answers = yield from self._measured(contenders, prompts, self._choices.plan(leader))
                order = sorted(range(len(contenders)), key=lambda i: mean_loss(answers[i], self._rank_by))
                field = [contenders[i] for i in order[: (*stages.survivors, 1)[stage]]]
            if field[0] != leader:
                leader = field[0]
                self._lead(leader, answers[order[0]])
        yield from self._final([leader])

    def _sample(self, count: int, *place: int) -> tuple[int, int]:
        """Prompts of a stage: a stretch of them from a place by chance."""
        count = min(count, self.num_prompts)
        first = int(self._random(1, *place).integers(self.num_prompts - count + 1))
        return first, first + count

    def _child(self, parent: Options, generation: int, index: int) -> Options:
        random = self._random(2, generation, index)
        # The least of two draws: 1 swap in five of nine cases, 3 in one.
        swaps = int(min(random.integers(1, 4, 2)))
        child = parent
        for _ in range(swaps):
            child = self._swapped(child, random)
        return child

    def _swapped(self, options: Options, random: np.random.Generator) -> Options:
        """One unit to fewer bits, another of equal size to more, such that the budget is met as before."""
        for _ in range(_MOST_TRIES):
            down, up = (int(u) for u in random.choice(len(options), 2, replace=False))
            if self._choices.units[down].sizes["dense"].num_weights != (
                self._choices.units[up].sizes["dense"].num_weights
            ):
                continue
            fewer, more = self._choices.neighbour(options, down, -1), self._choices.neighbour(options, up, +1)
            if fewer is None or more is None:
                continue
            changed = list(options)
            changed[down], changed[up] = fewer, more
            found = self._choices.canonical(changed)
            if found != options and self._choices.meets(found):
                return found
        return options


class Local(Solver):
    """Every swap of the leader, in an order by chance, a round of `children` at a time: those of a round that are
    better by its first prompts are measured on all, the best first, until one is better there and leads.

    Where no swap is left, those that the first prompts spoke against are measured on all prompts too: it ends when
    the leader has no better swap, or after the rounds of its settings.
    """

    def __init__(self, task: Task, settings: LocalSettings = LocalSettings(), start: Options | None = None) -> None:
        super().__init__(task)
        self._settings = settings
        self._start = start or self._largest_start()

    def script(self) -> Script:
        most, size = self._settings.rounds, self._settings.children
        everything, few = self._first(self.num_prompts), self._first(self._settings.prompts)
        leader = self._start
        self._foresee((1, self.num_prompts), (most * (size + 1), self._settings.prompts))
        (answer,) = yield from self._measured([leader], everything)
        self._lead(leader, answer)
        untried, doubtful = self._swaps(leader, 0), list[tuple[float, Options]]()
        for number in range(1, most + 1):
            field = list(islice(untried, size))
            if field:
                self._foresee(((most - number + 1) * (size + 1), self._settings.prompts))
                base, *answers = yield from self._measured([leader, *field], few, self._choices.plan(leader))
                values = [paired(each, base, self._rank_by)[0] for each in answers]
                screened = sorted(zip(values, field, strict=True), key=lambda pair: pair[0])
                doubtful += [pair for pair in screened if 0.0 <= pair[0] < np.inf]
                promising = [options for value, options in screened if value < 0.0]
            elif few != everything and doubtful:
                doubtful.sort(key=lambda pair: pair[0])
                promising, doubtful = [options for _, options in doubtful[:size]], doubtful[size:]
            else:
                break
            found = yield from self._first_better(leader, answer, promising, everything)
            if found is not None:
                leader, answer = found
                self._lead(leader, answer)
                untried, doubtful = self._swaps(leader, number), []
        yield from self._final([leader])

    def _first_better(
        self, leader: Options, answer: Outcome, candidates: Sequence[Options], prompts: tuple[int, int]
    ) -> Part[tuple[Options, Outcome] | None]:
        """The first of some candidates that is better than the leader, and what was measured of it; None without."""
        for candidate in candidates:
            (found,) = yield from self._measured([candidate], prompts, self._choices.plan(leader))
            if paired(found, answer, self._rank_by)[0] < 0.0:
                return candidate, found
        return None

    def _swaps(self, leader: Options, number: int) -> Iterator[Options]:
        """Every choice that one move, or one unit down and another up, leads to within the budget, in an order by
        chance; those first that come nearest to the capacity are not told apart."""
        moves = self._single_moves(leader)
        pairs: list[tuple[tuple[int, int], ...]] = [(move,) for move in moves]
        pairs += [(a, b) for i, a in enumerate(moves) for b in moves[i + 1 :] if a[0] != b[0]]
        for at in self._random(3, number).permutation(len(pairs)).tolist():
            changed = list(leader)
            for unit, option in pairs[at]:
                changed[unit] = option
            found = self._choices.canonical(changed)
            if found != leader and self._choices.meets(found) and not self._pointless(leader, pairs[at]):
                yield found

    def _single_moves(self, leader: Options) -> list[tuple[int, int]]:
        """(unit, option): all options, or where that is too many pairs the next ones up and down."""
        everything = sum(len(schemes) for schemes in self._choices.schemes) <= _MOST_MOVES
        moves: list[tuple[int, int]] = []
        for unit, schemes in enumerate(self._choices.schemes):
            near = (self._choices.neighbour(leader, unit, direction) for direction in (-1, 1))
            options = range(len(schemes)) if everything else [k for k in near if k is not None]
            moves += [(unit, option) for option in options if option != leader[unit]]
        return moves

    def _pointless(self, leader: Options, moves: Sequence[tuple[int, int]]) -> bool:
        """Whether every move goes to fewer bits: no better plan is found that way."""
        bits = self._choices.bits
        return all(bits[unit][option] <= bits[unit][leader[unit]] for unit, option in moves)
