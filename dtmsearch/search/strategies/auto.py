"""`sensitivity` and `auto`: a plan from one measured scheme a unit, and its correction by measured plans.

1. Every unit alone under one scheme of each family, on few prompts: what all schemes cost, by the law.
2. The solver's plan within the budget.
3. Rounds of correction around the plan that leads: units moved alone, and whole plans drawn from the posterior; each
   measured difference corrects it. They go on as long as they pay, each on more prompts than the last.
4. Swaps of the plan that leads (a unit to another scheme, or two), those first that may gain most: what sums over
   units do not see shows here. They are judged by KL: other metrics hardly tell plans so near to each other apart.
5. The leading plans on all prompts, in the metric that ranks, beside the uniform plans of the budget.

`sensitivity` leaves the third and fourth step out, and compares on fewer prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.strategy_settings import AutoSettings
from dtmsearch.search.solver.choices import Options
from dtmsearch.search.solver.damage_model import WeightErrors, expected_fdt, family_of, predicted, probings, unit_errors
from dtmsearch.search.solver.neighbours import moved, promising
from dtmsearch.search.solver.posterior import Posterior, Spread
from dtmsearch.search.strategies.auto_schedule import (
    FINALISTS,
    SIZE_STEP,
    CorrectionRound,
    Lot,
    ProbedSchedule,
    Schedule,
)
from dtmsearch.search.strategies.generator import Part, Script, mean_loss
from dtmsearch.search.strategies.solver_based import Solver, paired, probe_noise
from dtmsearch.search.strategies.task import Task

Floats = NDArray[np.float64]

# By how much measured damages are off the law's (docs/search-quality.md).
_SPREAD = Spread(common=0.5, family=0.15, option=0.2, interaction=0.15)
# Plans above the smallest that keeps `min_fdt` are larger by this part of it, by twice as much, and so on.
_LADDER_STEP = 0.01
# Divergent tokens over the square root of KL where nothing was measured yet; the search's own measurements decide.
_DIVERGENT_SHARE = 0.28
# Another round follows if by the posterior the leading plan's damage is still further from the least than this part.
_WORTHWHILE = 0.005
# A posterior's variance is put right by no more than these factors at once.
_SURPRISE = (1.0, 16.0)


class Auto(Solver):
    """See the module. `errors` are those of every component under every scheme of the search."""

    def __init__(self, task: Task, errors: WeightErrors | None, effort: AutoSettings = AutoSettings()) -> None:
        super().__init__(task)
        self._min_fdt, self._length = task.min_fdt, task.continuation_tokens
        self._smallest_found: tuple[Sequence[Floats], Options] | None = None
        if task.min_fdt is not None:
            self._best = None  # nothing is known to keep it
        self._effort = effort
        self._errors = () if errors is None else unit_errors(self._choices, errors)

    @cached_property
    def _schedule(self) -> Schedule:
        return ProbedSchedule(self._effort, len(self._choices.units), self.num_prompts, len(self._rivals()))

    def script(self) -> Script:
        self.stage = "probing components alone"
        posterior = yield from self._probe()
        if self._min_fdt is not None:
            yield from self._smallest(posterior, self._min_fdt)
            return
        first = leader = self._solve(posterior.tables())
        self._best = self._choices.plan(leader)
        pool = [leader]
        rounds = self._schedule.rounds()
        for each in rounds:
            self.stage = f"round {each.number + 1} of at most {len(rounds)}"
            posterior, good, regret = yield from self._correct(posterior, leader, each)
            leader, pool = good[0], list(dict.fromkeys((*good, *pool)))
            if regret < _WORTHWHILE:
                break
        better = yield from self._polish(posterior, leader, self._effort.polish_prompts)
        pool = list(dict.fromkeys((*better[: FINALISTS - 1], *pool)))
        yield from self._told_apart([*pool[:FINALISTS], first])

    def _polish(
        self, posterior: Posterior, leader: Options, most_prompts: int, patience: int | None = None
    ) -> Part[list[Options]]:
        """What swaps lead to, the last first: of those that by the posterior may gain most a lot is measured each
        time, which teaches the posterior, and the best leads from there on if it is believed to gain. It ends after
        `patience` lots in which none did."""
        self.stage = "swaps"
        leaders, tried = [leader], {leader}
        failures = 0
        for prompts in self._schedule.swap_lots(most_prompts):
            field = promising(self._choices, posterior, leader, tried, self._effort.plans)
            if not field or failures == patience:
                break
            base, *answers = yield from self._measured([leader, *field], prompts, self._choices.plan(leader))
            if len(tried) == 1:
                self._lead(leader, base)
            seen = [paired(answer, base, "kl") for answer in answers]
            estimates = posterior.estimates(field, leader, seen)
            posterior = posterior.observed(field, leader, seen)
            tried.update(field)
            at = int(np.argmin(estimates))
            mean, variance = seen[at]
            # A posterior that was found wrong must not lead against what was measured.
            gains = estimates[at] < 0.0 and (patience is None or mean + math.sqrt(variance) < 0.0)
            failures = 0 if gains else failures + 1
            if gains:
                leader, tried = field[at], {field[at]}
                leaders.insert(0, leader)
        return leaders

    def _smallest(self, posterior: Posterior, min_fdt: float) -> Script:
        """The plan of the budget if it keeps a mean FDT of `min_fdt` on all prompts, else the smallest that does: sizes
        are halved between one that keeps it and one that does not."""
        self.stage = "smallest plan that keeps min_fdt"
        tables = posterior.tables()
        if self._choices.space.budget != Budget():
            asked = self._solve(tables)
            (answer,) = yield from self._measured([asked], self._first(self.num_prompts))
            if -mean_loss(answer, "fdt") >= min_fdt:
                self._lead(asked, answer)
                self._smallest_found = tables, asked
                return
        least = sum(int(bits[np.isfinite(t)].min()) for bits, t in zip(self._choices.bits, tables, strict=True))
        most = sum(int(bits[0]) for bits in self._choices.bits)
        size = self._foreseen(tables, min_fdt, least, most)
        (answer,) = yield from self._measured([(0,) * len(tables)], self._first(self.num_prompts))
        self._lead((0,) * len(tables), answer)
        fails = least - 1
        while most > least and most - fails > SIZE_STEP * most:
            found = self._choices.within(tables, size)
            (answer,) = yield from self._measured([found.options], self._first(self.num_prompts))
            if -mean_loss(answer, "fdt") >= min_fdt:
                most = self._choices.cost(self._choices.bits, found.options)
                self._lead(found.options, answer)
                self._smallest_found = tables, found.options
            else:
                fails = size
            size = max((most + fails) // 2, least)
            if size <= fails:
                return

    def ladder(self) -> list[Plan]:
        """The smallest plan that keeps `min_fdt` and, from the largest on, plans of more bits than that by what the
        search believes: see `dtmsearch.search.min_fdt`."""
        if self._smallest_found is None:
            return [decision.plan for decision in self.decisions[-1:]]
        tables, smallest = self._smallest_found
        least, most = (self._choices.cost(self._choices.bits, o) for o in (smallest, (0,) * len(smallest)))
        found, step = [smallest], _LADDER_STEP
        while (size := round(least * (1.0 + step))) < most:
            found.append(self._choices.within(tables, size).options)
            step *= 2
        return [self._choices.plan(options) for options in reversed(list(dict.fromkeys(found)))]

    def _foreseen(self, tables: Sequence[Floats], min_fdt: float, least: int, most: int) -> int:
        """The size at which the law has a plan keep `min_fdt`: where a search for it begins."""
        while most - least > SIZE_STEP * most:
            size = (least + most) // 2
            kept = expected_fdt(self._choices.within(tables, size).loss, self._length, _DIVERGENT_SHARE)
            least, most = (least, size) if kept >= min_fdt else (size, most)
        return most

    def _usual(self, num_probed: int) -> list[Lot]:
        """What is foreseen after probes of so many units."""
        if self._min_fdt is None:
            return list(self._schedule.usual(num_probed))
        probes = [(num_probed, self._effort.probe_prompts)] if num_probed else []
        return [*probes, self._schedule.halvings()]

    def _probe(self) -> Part[Posterior]:
        """Sensitivities, and the posterior that they make."""
        probed = probings(self._choices, self._errors)
        self._foresee(*self._usual(len(probed)))
        answers = yield from self._alone(probed, self._first(self._effort.probe_prompts))
        damages = [mean_loss(answer, "kl") for answer in answers]
        tables = predicted(self._choices, self._errors, probed, damages)
        families = [[family_of(scheme) for scheme in schemes] for schemes in self._choices.schemes]
        own = float(np.hypot(_SPREAD.family, min(probe_noise(answers), 1.0)))
        return Posterior.of(tables, self._errors, families, replace(_SPREAD, family=own))

    def _correct(
        self, posterior: Posterior, leader: Options, each: CorrectionRound
    ) -> Part[tuple[Posterior, list[Options], float]]:
        """A round of correction: (posterior; candidates, the best first; the leader's expected regret)."""
        posterior = yield from self._learn_by_moves(posterior, leader, each)
        random = self._random(each.number)
        tables = [
            posterior.tables(),
            *(posterior.tables(posterior.sample(random)) for _ in range(self._effort.plans - 1)),
        ]
        drawn = [self._solve(each) for each in tables]
        regret = _regret(leader, drawn, tables)
        candidates = [options for options in dict.fromkeys(drawn) if options != leader]
        if not candidates:
            return posterior, [leader], regret
        base, *answers = yield from self._measured([leader, *candidates], each.plans_on, self._choices.plan(leader))
        seen = [paired(answer, base, "kl") for answer in answers]
        posterior = posterior.observed(candidates, leader, seen)
        field = list(dict.fromkeys([self._solve(posterior.tables()), leader, *candidates]))
        measured = {leader: (0.0, 0.0)} | dict(zip(candidates, seen, strict=True))
        estimates = posterior.estimates(field, leader, [measured.get(options) for options in field])
        order = [field[at] for at in np.argsort(estimates, kind="stable")]
        return posterior, order, regret

    def _learn_by_moves(self, posterior: Posterior, leader: Options, each: CorrectionRound) -> Part[Posterior]:
        """The posterior after units were moved alone around the leader."""
        # Every time other prompts: what was learnt on some must not be confirmed by the same.
        (base,) = yield from self._measured([leader], each.learns_on)
        self._lead(leader, base)
        moves = self._doubtful(posterior, leader, each.num_moves)
        answers = yield from self._moves(leader, moves, each.learns_on)
        neighbours = [self._choices.canonical(moved(leader, *move)) for move in moves]
        differences = [paired(answer, base, "kl") for answer in answers]
        if each.number == 0:
            posterior = posterior.scaled(
                float(np.clip(posterior.surprise(neighbours, leader, differences), *_SURPRISE))
            )
        return posterior.observed(neighbours, leader, differences)

    def _doubtful(self, posterior: Posterior, leader: Options, number: int) -> list[tuple[int, int]]:
        """So many (unit, option) to move alone: those whose damage is most in doubt."""
        gone = self._choices.nest.gone(leader)
        moves = [(unit, self._telling(posterior, leader, unit)) for unit in range(len(leader)) if unit not in gone]
        neighbours = [self._choices.canonical(moved(leader, *move)) for move in moves]
        doubt = posterior.differences(neighbours, leader).variances
        most = np.argsort(-doubt, kind="stable")[:number]
        return [moves[at] for at in sorted(most.tolist())]

    def _telling(self, posterior: Posterior, leader: Options, unit: int) -> int:
        """The option whose measurement tells most about a unit: the next one that costs fewer bits, else more."""
        errors, now = self._errors[unit], leader[unit]
        known = [k for k in range(len(errors)) if np.isfinite(posterior.damages[unit][k])]
        worse = [k for k in known if errors[k] > errors[now]]
        better = [k for k in known if errors[k] < errors[now]]
        if worse:
            return min(worse, key=lambda k: (errors[k], k))
        return max(better, key=lambda k: (errors[k], k), default=now)


def _regret(leader: Options, best: Sequence[Options], tables: Sequence[Sequence[Floats]]) -> float:
    """By what part of its damage a plan is expected to miss the least, for damages [options] of each unit drawn from
    the posterior and the best plan under each: the expected value of perfect information (Raiffa and Schlaifer, Applied
    Statistical Decision Theory, 1961), which no further measuring can exceed."""
    damage = sum(_damage(leader, each) for each in tables)
    least = sum(_damage(options, each) for options, each in zip(best, tables, strict=True))
    return 1.0 - least / damage if damage > 0.0 else 0.0


def _damage(options: Options, tables: Sequence[Floats]) -> float:
    return float(sum(table[k] for table, k in zip(tables, options, strict=True)))
