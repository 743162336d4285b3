"""`floating`: which blocks of a model to drop, and which to cut how far, a step at a time, with steps back where these
pay.

Removals go beyond second order and help or hinder each other, so plans are measured. A round drops the block that adds
the least loss for what it brings towards the budget; what each added when it was last measured orders the queue, and
only its head is measured again (Minoux, 1978). Then blocks that were dropped earlier are put back, each alone; where a
plan of no more progress is better than the best that was known of as much, the search goes on from that one (sequential
floating forward selection: Pudil, Novovicova and Kittler, 1994), until a plan meets the budget from which no step back
leads to a better one. From there blocks are exchanged, one for one or more for others, those first of which by what was
measured last most is expected (`exchanges.py`), as long as that gains. The best plans that meet the budget are compared
on more prompts.

Where blocks may be cut, a step takes one to its next width, or drops it after the last one, and a step back leads to
the width before; what the next width adds is held for at least what the last one did until it is measured, and of the
steps back those are tried that would gain most for what they give up. Nothing is exchanged.

With trainings it goes in rounds of as much progress: what is left at the end of a round is trained, and the next round
goes on from there, over these weights. What a round before it has taken stays out, for its weights were held at zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from dtmsearch.core.evaluation import EvalResult, Outcome, combine
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.schemes import DENSE
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.errors import SearchFailed
from dtmsearch.search.protocols import TrainRequest
from dtmsearch.search.strategies.exchanges import Exchange, Step, exchanges
from dtmsearch.search.strategies.generator import (
    DENSE_PLAN,
    Milestone,
    Part,
    Procedure,
    Script,
    Trial,
    losses,
    mean_loss,
)
from dtmsearch.search.strategies.task import Task
from dtmsearch.search.units import Unit

# Plans of the same progress but for rounding.
_ALIKE = 1e-9
# Losses that differ by less than this part are one.
_LEAST_GAIN = 1e-4
# Steps back that are tried at a time where blocks are cut.
_MOST_BACK = 6


@dataclass(frozen=True)
class _Found:
    """A plan that was measured: its progress towards the budget, its loss on the search's few prompts."""

    plan: Plan
    progress: float
    loss: float


class Floating(Procedure):
    """See the module. `settings` say on how many prompts blocks are chosen, how many plans are compared last, and when
    exchanges end; `trains`, whether the model of every round is trained."""

    def __init__(self, task: Task, settings: FloatingSettings = FloatingSettings(), trains: bool = False) -> None:
        super().__init__(task.space, task.request_for, ("kl", task.rank_by))
        self._rank_by, self._settings, self._trains = task.rank_by, settings, trains
        units = [unit for unit in task.space.units if unit.is_block]
        self._blocks = tuple(unit.name for unit in units)
        # The schemes of each block, from all of it to the least.
        self._ladders = {unit.name: _ladder(unit) for unit in units}
        self._found: dict[Plan, _Found] = {}
        self._answers: dict[Plan, Outcome] = {}
        # What each step of a block added to the loss when it was last measured.
        self._added: dict[tuple[str, str], float] = {}
        # Of the round: its number from 0, the plan that it began with, the weights that its plans are over.
        self._number, self._start, self._weights_id = 0, DENSE_PLAN, ""

    def script(self) -> Script:
        rounds, now = self._settings.rounds, _Found(DENSE_PLAN, 0.0, 0.0)
        for number in range(rounds):
            self._number, self._start = number, now.plan
            left = rounds - number
            self._foresee(
                (left * self._usual // rounds, self._settings.prompts),
                (left * (self._settings.finalists + self._trains), self.num_prompts),
            )
            plan = yield from self._round_from(now)
            if self._trains:
                now = yield from self._after_training(plan)

    def _round_from(self, now: _Found) -> Part[Plan]:
        """The plan of a round that begins with what is known of one; that itself where it has come far enough."""
        if self._meets(now.plan):
            return now.plan
        self._found, self._answers, self._added = {now.plan: now}, {}, {}
        self.stage = f"{self._said}blocks alone"
        steps = ((name, self._step(now.plan, name, 1)) for name in self._blocks)
        first = [Perturbation(name, scheme) for name, scheme in steps if scheme is not None]
        first = [edge for edge in first if not self._start.drops(edge.component)]
        for edge, found in zip(first, (yield from self._measured(now.plan, first)), strict=True):
            self._added[edge.component, edge.scheme] = found.loss - now.loss
        while not self._meets(now.plan):
            way = f"{now.progress:.0%} of the way" if self._space.cut else f"{len(now.plan.dropped) + 1} blocks dropped"
            self.stage = self._said + way
            now = yield from self._one_more(now)
            now = yield from self._back(now)
        if not self._space.cut:
            self.stage = f"{self._said}exchanges"
            now = yield from self._exchanged(now)
        return (yield from self._compared(now))

    def _after_training(self, plan: Plan) -> Part[_Found]:
        """A round's plan over the weights that its training came to, which is decided for."""
        label = f"round-{self._number + 1}"
        self.milestones.append(Milestone(label, plan, self._weights_id))
        self._weights_id = yield from self._train(TrainRequest(self._number, plan, self._weights_id))
        self.stage = f"{self._said}trained"
        (answer,) = yield [Trial(plan, (0, self.num_prompts), plan, weights_id=self._weights_id)]
        self._conclude(plan, answer, self._rank_by)
        self.milestones.append(Milestone(f"{label}:trained", plan, self._weights_id))
        few = losses(answer, self._rank_by)[: self._settings.prompts]
        return _Found(plan, min(self._space.progress(plan), 1.0), float(few.mean()))

    @property
    def _said(self) -> str:
        return f"round {self._number + 1} of {self._settings.rounds}: " if self._settings.rounds > 1 else ""

    @property
    def _usual(self) -> int:
        steps = math.ceil(self._space.expected_steps)
        exchanged = 0 if self._space.cut else self._settings.patience * (_exchanges_at_a_time(steps) + steps // 2)
        return len(self._blocks) + steps * (4 + steps // 2) + exchanged * self._settings.rounds

    def _meets(self, plan: Plan) -> bool:
        """Whether a plan comes as far as its round has to."""
        if self._number + 1 == self._settings.rounds:
            return self._space.budget.reached(self._space.size(plan))
        return self._space.progress(plan) >= self._goal - _ALIKE

    @property
    def _goal(self) -> float:
        """The progress that the round has to come to."""
        return (self._number + 1) / self._settings.rounds

    def _measured(self, parent: Plan, edges: Sequence[Perturbation]) -> Part[list[_Found]]:
        """Plans one step from another, measured on the few prompts; what is known is not measured again."""
        return (yield from self._measured_plans(parent, {parent.with_(edge): edge for edge in edges}))

    def _measured_plans(self, parent: Plan, plans: Mapping[Plan, Perturbation | None]) -> Part[list[_Found]]:
        """As `_measured`, of plans any steps from another; of one step, by which."""
        prompts = 0, min(self._settings.prompts, self.num_prompts)
        unknown = [plan for plan in plans if plan not in self._found]
        if unknown:
            answers = yield [Trial(plan, prompts, parent, plans[plan], self._weights_id) for plan in unknown]
            for plan, answer in zip(unknown, answers, strict=True):
                progress = self._space.progress(plan)
                self._found[plan] = _Found(plan, min(progress, 1.0), mean_loss(answer, self._rank_by))
                self._answers[plan] = answer
        return [self._found[plan] for plan in plans]

    def _one_more(self, now: _Found) -> Part[_Found]:
        """A plan with one block more, by what that adds for what it brings towards the budget."""
        edges = self._steps_on(now.plan)
        if not edges:
            raise SearchFailed("all blocks that may be dropped or cut are, and the budget is not met")
        progress = {e.component: min(self._space.progress(now.plan.with_(e)), 1.0) - now.progress for e in edges}

        def dear(edge: Perturbation, added: float) -> float:
            return added / max(progress[edge.component], _ALIKE) if added > 0.0 else added

        def believed(edge: Perturbation) -> float:
            found = self._added.get((edge.component, edge.scheme))
            last = now.plan.schemes.get(edge.component, DENSE)
            return self._added.get((edge.component, last), math.inf) if found is None else found

        queue = sorted(edges, key=lambda e: dear(e, believed(e)))
        chosen: tuple[float, _Found] | None = None
        for edge in queue:
            if chosen is not None and chosen[0] <= dear(edge, believed(edge)):
                break
            (found,) = yield from self._measured(now.plan, [edge])
            self._added[edge.component, edge.scheme] = found.loss - now.loss
            value = dear(edge, found.loss - now.loss)
            if math.isfinite(found.loss) and (chosen is None or value < chosen[0]):
                chosen, taken = (value, found), edge
        if chosen is None:
            raise SearchFailed("no plan with one block more can be measured")
        self._note(chosen[1], taken)
        return chosen[1]

    def _back(self, now: _Found) -> Part[_Found]:
        """The plan that steps back lead to, each to one that is better than all that are known of as much progress."""
        while len(now.plan) > 2:
            # What was measured before, as the plan before it, has been passed over already.
            edges = [edge for edge in self._steps_back(now.plan) if now.plan.with_(edge) not in self._found]
            edges = self._most_gainful(now, edges) if self._space.cut else edges
            if not edges:
                break
            before = list(self._found.values())
            found = yield from self._stepped_back(now, edges)
            gains = []
            for each in found:
                least = min((o.loss for o in before if o.progress >= each.progress - _ALIKE), default=math.inf)
                gains.append(least - each.loss if _is_less(each.loss, least) else 0.0)
            at = max(range(len(gains)), key=gains.__getitem__)
            if gains[at] <= 0.0:
                break
            now = found[at]
            self._note(now, edges[at])
        return now

    def _exchanged(self, now: _Found) -> Part[_Found]:
        """The plan that exchanges lead to."""
        failed = 0
        while failed < self._settings.patience:
            yield from self._stepped_back(now, self._steps_back(now.plan))
            new = (each for each in self._exchanges(now) if each.plan not in self._found and self._meets(each.plan))
            proposed = {each.plan: each for each in islice(new, _exchanges_at_a_time(len(now.plan.dropped)))}
            if not proposed:
                break
            found = yield from self._measured_plans(now.plan, dict.fromkeys(proposed))
            for each in found:
                exchange = proposed[each.plan]
                if len(exchange.forward) == 1 and exchange.between in self._found:
                    self._believe(exchange.forward[0], each.loss - self._found[exchange.between].loss)
            best = min(found, key=lambda each: each.loss)
            if _is_less(best.loss, now.loss):
                now, failed = best, 0
                self._conclude(now.plan, self._answers[now.plan], self._rank_by)
            else:
                failed += 1
        return now

    def _exchanges(self, now: _Found) -> list[Exchange]:
        """Exchanges of blocks of a plan whose steps back were measured, best believed first."""
        progress = self._space.progress(now.plan)

        def step(edge: Perturbation, added: float) -> Step:
            return Step(edge, self._space.progress(now.plan.with_(edge)) - progress, added)

        back = [step(edge, now.loss - self._found[now.plan.with_(edge)].loss) for edge in self._steps_back(now.plan)]
        ahead = self._steps_on(now.plan)
        forward = [step(edge, self._added.get((edge.component, edge.scheme), math.inf)) for edge in ahead]
        return exchanges(now.plan, progress - self._goal, back, forward)

    def _stepped_back(self, now: _Found, edges: Sequence[Perturbation]) -> Part[list[_Found]]:
        """Plans a step back, measured, and what by them the step had added."""
        found = yield from self._measured(now.plan, edges)
        for edge, each in zip(edges, found, strict=True):
            self._believe(Perturbation(edge.component, now.plan.schemes[edge.component]), now.loss - each.loss)
        return found

    def _believe(self, edge: Perturbation, added: float) -> None:
        """Note what a step added; of plans that could not be measured nothing follows."""
        if math.isfinite(added):
            self._added[edge.component, edge.scheme] = added

    def _steps_on(self, plan: Plan) -> list[Perturbation]:
        """The steps that blocks can take from a plan."""
        edges = [edge for edge in self._space.perturbations(plan) if edge.component in self._ladders]
        return [edge for edge in edges if edge.scheme == self._step(plan, edge.component, 1)]

    def _steps_back(self, plan: Plan) -> list[Perturbation]:
        """The steps back of the blocks that this round has dropped or cut."""
        taken = sorted(name for name, scheme in plan.entries if self._is_of_round(name, scheme))
        return [Perturbation(name, self._step(plan, name, -1) or DENSE) for name in taken]

    def _is_of_round(self, block: str, scheme: str) -> bool:
        """Whether this round has dropped or cut a block, in which nothing was before."""
        inside = any(name.startswith(f"{block}.") for name in self._start.schemes)
        return self._start.schemes.get(block) != scheme and not inside

    def _step(self, plan: Plan, block: str, step: int) -> str | None:
        """The scheme of a block one step further along its widths, or one back; None at the end."""
        ladder = self._ladders[block]
        at = ladder.index(plan.schemes.get(block, DENSE)) + step
        return ladder[at] if 0 <= at < len(ladder) else None

    def _most_gainful(self, now: _Found, edges: Sequence[Perturbation]) -> list[Perturbation]:
        """Some steps back: those that by what was measured last gain most for what they give up."""

        def gain(edge: Perturbation) -> float:
            given_up = now.progress - min(self._space.progress(now.plan.with_(edge)), 1.0)
            added = self._added.get((edge.component, now.plan.schemes[edge.component]), 0.0)
            return added / max(given_up, _ALIKE)

        chosen = set(sorted(edges, key=gain, reverse=True)[:_MOST_BACK])
        return [edge for edge in edges if edge in chosen]

    def _note(self, found: _Found, edge: Perturbation) -> None:
        self._conclude(found.plan, self._answers[found.plan], self._rank_by, edge)

    def _compared(self, best: _Found) -> Part[Plan]:
        """The best of the plans that come far enough, on all prompts; those are measured that were not yet."""
        self.stage = "last comparison"
        meeting = sorted((f for f in self._found.values() if self._meets(f.plan)), key=lambda f: f.loss)
        field = list(dict.fromkeys([best, *meeting[: self._settings.finalists]]))[: self._settings.finalists]
        few = min(self._settings.prompts, self.num_prompts)
        if few < self.num_prompts:
            over = self._weights_id
            rest = yield [Trial(f.plan, (few, self.num_prompts), best.plan, weights_id=over) for f in field]
            answers = [_joined(self._answers[f.plan], more) for f, more in zip(field, rest, strict=True)]
        else:
            answers = [self._answers[f.plan] for f in field]
        at = min(range(len(field)), key=lambda i: mean_loss(answers[i], self._rank_by))
        self._conclude(field[at].plan, answers[at], self._rank_by)
        return field[at].plan


def _is_less(loss: float, than: float) -> bool:
    """Whether a loss is less by more than rounding; of metrics of which more is better losses are below zero."""
    return than - loss > _LEAST_GAIN * abs(than) if math.isfinite(than) else loss < than


def _exchanges_at_a_time(num_dropped: int) -> int:
    return max(4, (num_dropped + 1) // 2)


def _ladder(unit: Unit) -> tuple[str, ...]:
    """The schemes of a block, from all of it to the least; of those that leave as much the first."""
    by_size: dict[int, str] = {}
    for edge in unit.edges:
        by_size.setdefault(unit.sizes[edge.scheme].removed_weights, edge.scheme)
    return (DENSE, *(by_size[gone] for gone in sorted(by_size)))


def _joined(first: Outcome, rest: Outcome) -> Outcome:
    """What was measured of one plan on some prompts and on those after them."""
    if isinstance(first, EvalResult) and isinstance(rest, EvalResult):
        return combine(rest.request_id, [first, rest])
    return rest if isinstance(first, EvalResult) else first
