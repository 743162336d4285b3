"""`floating`: which blocks of a model to drop, and which to cut how far, a step at a time, with steps back where these
pay.

Removals go beyond second order and help or hinder each other, so plans are measured. A round drops the block that adds
the least loss for what it brings towards the budget; what each added when it was last measured orders the queue, and
only its head is measured again (Minoux, 1978). Then blocks that were dropped earlier are put back, each alone; where a
plan of no more progress is better than the best that was known of as much, the search goes on from that one (sequential
floating forward selection: Pudil, Novovicova and Kittler, 1994), until a plan meets the budget from which no step back
leads to a better one. From there blocks are exchanged, one for one or more for others, those first of which by what was
measured last most is expected (`exchanges.py`), as long as that gains. The best plans that meet the budget are compared
on all prompts.

All of them are tried on few prompts; blocks are chosen by more, of those that the few do not rule out, and exchanges
judged by more again (`stages.py`): greedy steps may err, for they are taken back and exchanged, but the plans around
the last differ by little.

Where blocks may be cut, a step takes one to its next width, or drops it after the last one, and a step back leads to
the width before; what the next width adds is held for at least what the last one did until it is measured, and of the
steps back those are tried that would gain most for what they give up. Nothing is exchanged.

With trainings it goes in rounds of as much progress: what is left at the end of a round is trained, and the next round
goes on from there, over these weights. What a round before it has taken stays out, for its weights were held at zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from dtmsearch.core.evaluation import EvalFailure
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.schemes import DENSE
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.errors import SearchFailed
from dtmsearch.search.protocols import TrainRequest
from dtmsearch.search.strategies.exchanges import ALIKE, Exchange, Step, exchanges
from dtmsearch.search.strategies.generator import (
    DENSE_PLAN,
    Floats,
    Milestone,
    Part,
    Procedure,
    Script,
    Trial,
    losses,
    mean_loss,
)
from dtmsearch.search.strategies.stages import Found, Stages, contenders
from dtmsearch.search.strategies.task import Task
from dtmsearch.search.units import Unit

# Losses that differ by less than this part are one.
_LEAST_GAIN = 1e-4
# Steps back that are tried at a time where blocks are cut.
_MOST_BACK = 6
# Steps that are tried together, where others are only tried on few prompts.
_AHEAD = 4


class Floating(Procedure):
    """See the module. `settings` say on how many prompts plans are tried, blocks chosen and exchanges judged, how many
    plans are compared last, and when exchanges end; `trains`, whether the model of every round is trained."""

    def __init__(self, task: Task, settings: FloatingSettings = FloatingSettings(), trains: bool = False) -> None:
        super().__init__(task.space, task.request_for, ("kl", task.rank_by))
        self._rank_by, self._settings, self._trains = task.rank_by, settings, trains
        units = [unit for unit in task.space.units if unit.is_block]
        self._blocks = tuple(unit.name for unit in units)
        # The schemes of each block, from all of it to the least.
        self._ladders = {unit.name: _ladder(unit) for unit in units}
        # What each step of a block added to the loss when it was last measured.
        self._added: dict[tuple[str, str], float] = {}
        # Of the round: its number from 0, the plan that it began with, the weights that its plans are over.
        self._number, self._start, self._weights_id = 0, DENSE_PLAN, ""
        self._stages = self._new_stages()

    def script(self) -> Script:
        rounds = self._settings.rounds
        # Not all metrics are zero of the base model itself.
        (answer,) = yield [Trial(DENSE_PLAN, (0, self._few))]
        if isinstance(answer, EvalFailure):
            raise SearchFailed(f"the base model cannot be measured ({answer.kind}): {answer.message}")
        now = Found(DENSE_PLAN, 0.0, losses(answer, self._rank_by))
        for number in range(rounds):
            self._number, self._start = number, now.plan
            left = rounds - number
            self._foresee(*((left * trials // rounds, prompts) for trials, prompts in self._usual))
            plan = yield from self._round_from(now)
            if self._trains:
                now = yield from self._after_training(plan)

    def _round_from(self, now: Found) -> Part[Plan]:
        """The plan of a round that begins with what is known of one; that itself where it has come far enough."""
        if self._meets(now.plan):
            return now.plan
        self._stages, self._added = self._new_stages(), {}
        self._stages.take(now, self._choosing)
        self.stage = f"{self._said}blocks alone"
        steps = ((name, self._step(now.plan, name, 1)) for name in self._blocks)
        first = [Perturbation(name, scheme) for name, scheme in steps if scheme is not None]
        first = [edge for edge in first if not self._start.drops(edge.component)]
        for edge, tried in zip(first, (yield from self._tried(now.plan, first)), strict=True):
            self._added[edge.component, edge.scheme] = self._more(tried, now)
        while not self._meets(now.plan):
            way = f"{now.progress:.0%} of the way" if self._space.cut else f"{len(now.plan.dropped) + 1} blocks dropped"
            self.stage = self._said + way
            now = yield from self._one_more(now)
            now = yield from self._back(now)
        if not self._space.cut:
            self.stage = f"{self._said}exchanges"
            now = yield from self._exchanged(now)
        return (yield from self._compared(now))

    def _after_training(self, plan: Plan) -> Part[Found]:
        """A round's plan over the weights that its training came to, which is decided for."""
        label = f"round-{self._number + 1}"
        self.milestones.append(Milestone(label, plan, self._weights_id))
        self._weights_id = yield from self._train(TrainRequest(self._number, plan, self._weights_id))
        self.stage = f"{self._said}trained"
        (answer,) = yield [Trial(plan, (0, self.num_prompts), plan, weights_id=self._weights_id)]
        self._conclude(plan, answer, self._rank_by)
        self.milestones.append(Milestone(f"{label}:trained", plan, self._weights_id))
        few = losses(answer, self._rank_by)[: self._few]
        return Found(plan, min(self._space.progress(plan), 1.0), few)

    @property
    def _said(self) -> str:
        return f"round {self._number + 1} of {self._settings.rounds}: " if self._settings.rounds > 1 else ""

    @property
    def _few(self) -> int:
        """Prompts by which blocks are chosen."""
        return min(self._settings.prompts, self.num_prompts)

    def _new_stages(self) -> Stages:
        """Plans are tried on the first prompts, where these are less than half of those by which blocks are chosen; and
        where exchanges are judged by more, these are the last stage."""
        stages, tried = [self._few], self._settings.first_prompts
        if tried and self._few > 2 * tried:
            stages = [tried, self._few]
        judged = min(self._settings.exchange_prompts, self.num_prompts)
        if judged > self._few and self._exchanges_blocks:
            stages.append(judged)
        return Stages(stages, self._space.progress, self._rank_by, self._weights_id)

    @property
    def _choosing(self) -> int:
        """The stage by which blocks are chosen."""
        return self._stages.prompts.index(self._few)

    @property
    def _exchanges_blocks(self) -> bool:
        return not self._space.cut and self._settings.patience > 0

    @property
    def _ahead(self) -> int:
        """How many steps of the queue's head are tried at once."""
        return _AHEAD if self._choosing else 1

    def _exchanges_at_a_time(self, num_dropped: int) -> int:
        return max(4, num_dropped if self._choosing else (num_dropped + 1) // 2)

    @property
    def _usual(self) -> list[tuple[int, int]]:
        """What a search of one round asks for as a rule, each round with its last comparison: (trials, prompts)."""
        steps, rounds = math.ceil(self._space.expected_steps), self._settings.rounds
        exchanged = self._settings.patience * rounds if self._exchanges_blocks else 0
        trials = [len(self._blocks) + steps * (4 + steps // 2)]
        trials[0] += exchanged * (self._exchanges_at_a_time(steps) + steps // 2)
        if self._choosing:
            trials.append(2 * steps + exchanged)
        trials += [exchanged] * (self._stages.last + 1 - len(trials))
        prompts = np.diff([0, *self._stages.prompts, self.num_prompts])
        trials.append(rounds * self._settings.finalists)
        return [*zip(trials, map(int, prompts), strict=True), (rounds * self._trains, self.num_prompts)]

    def _meets(self, plan: Plan) -> bool:
        """Whether a plan comes as far as its round has to."""
        if self._number + 1 == self._settings.rounds:
            return self._space.budget.reached(self._space.size(plan))
        return self._space.progress(plan) >= self._goal - ALIKE

    @property
    def _goal(self) -> float:
        """The progress that the round has to come to."""
        return (self._number + 1) / self._settings.rounds

    def _tried(self, parent: Plan, edges: Sequence[Perturbation]) -> Part[list[Found]]:
        """Plans one step from another, measured on the prompts of the first stage."""
        return (yield from self._stages.measure(parent, {parent.with_(edge): edge for edge in edges}, 0))

    def _more(self, tried: Found, than: Found) -> float:
        """By how much the loss is more than that of another plan, on the prompts of the first stage."""
        return tried.loss - self._stages.at(0, than.plan).loss

    def _one_more(self, now: Found) -> Part[Found]:
        """A plan with one block more, by what that adds for what it brings towards the budget."""
        edges = self._steps_on(now.plan)
        if not edges:
            raise SearchFailed("all blocks that may be dropped or cut are, and the budget is not met")
        progress = {e.component: min(self._space.progress(now.plan.with_(e)), 1.0) - now.progress for e in edges}

        def weight(edge: Perturbation, added: float) -> float:
            return 1.0 / max(progress[edge.component], ALIKE) if added > 0.0 else 1.0

        def dear(edge: Perturbation, added: float) -> float:
            return added * weight(edge, added)

        def believed(edge: Perturbation) -> float:
            found = self._added.get((edge.component, edge.scheme))
            last = now.plan.schemes.get(edge.component, DENSE)
            return dear(edge, self._added.get((edge.component, last), math.inf) if found is None else found)

        queue = sorted(edges, key=believed)
        # Of those of the queue that were tried and may be chosen, by prompt how dear they are.
        tried: dict[Perturbation, Floats] = {}
        best: tuple[float, Found, Perturbation] | None = None
        while best is None:
            while queue and (not tried or min(float(own.mean()) for own in tried.values()) > believed(queue[0])):
                head, queue = queue[: self._ahead], queue[self._ahead :]
                for edge, each in zip(head, (yield from self._tried(now.plan, head)), strict=True):
                    self._added[edge.component, edge.scheme] = added = self._more(each, now)
                    if math.isfinite(added):
                        tried[edge] = (each.losses - self._stages.at(0, now.plan).losses) * weight(edge, added)
            if not tried:
                raise SearchFailed("no plan with one block more can be measured")
            at = contenders(list(tried.values())) if self._choosing else range(len(tried))
            taken = [list(tried)[place] for place in at]
            plans = {now.plan.with_(edge): edge for edge in taken}
            found = yield from self._stages.measure(now.plan, plans, self._choosing)
            for edge, each in zip(taken, found, strict=True):
                del tried[edge]
                value = dear(edge, each.loss - now.loss)
                if math.isfinite(value) and (best is None or value < best[0]):
                    best = value, each, edge
        self._note(*best[1:])
        return best[1]

    def _back(self, now: Found) -> Part[Found]:
        """The plan that steps back lead to, each to one that is better than all that are known of as much progress."""
        while len(now.plan) > 2:
            # What was tried before, as the plan before it, has been passed over already.
            edges = [edge for edge in self._steps_back(now.plan) if now.plan.with_(edge) not in self._stages]
            edges = self._most_gainful(now, edges) if self._space.cut else edges
            if not edges:
                break
            before = self._stages.known(self._choosing)
            tried = yield from self._stepped_back(now, edges)
            # A step back that goes further than all that is known (a width may be slower than the one before it) is
            # held against the plan that it leads back from.
            rivals = [
                _least(o for o in [now, *before] if o is now or o.progress >= each.progress - ALIKE) for each in tried
            ]
            raced = yield from self._stages.race(now.plan, tried, rivals, self._choosing)
            better = [(at, each) for at, each in raced if _is_less(each.loss, rivals[at].loss)]
            if not better:
                break
            at, now = max(better, key=lambda found: rivals[found[0]].loss - found[1].loss)
            self._note(now, edges[at])
        return now

    def _exchanged(self, now: Found) -> Part[Found]:
        """The plan that exchanges lead to."""
        failed = 0
        (judged,) = yield from self._stages.measure(now.plan, {now.plan: None}, self._stages.last)
        if not math.isfinite(judged.loss):
            return now
        now = judged
        while failed < self._settings.patience:
            yield from self._stepped_back(now, self._steps_back(now.plan))
            new = (each for each in self._exchanges(now) if each.plan not in self._stages and self._meets(each.plan))
            proposed = {each.plan: each for each in islice(new, self._exchanges_at_a_time(len(now.plan.dropped)))}
            if not proposed:
                break
            tried = yield from self._stages.measure(now.plan, dict.fromkeys(proposed), 0)
            for each in tried:
                exchange = proposed[each.plan]
                if len(exchange.forward) == 1 and exchange.between in self._stages:
                    self._believe(exchange.forward[0], self._more(each, self._stages.at(0, exchange.between)))
            raced = yield from self._stages.race(now.plan, tried, [now] * len(tried), self._stages.last)
            best = _least([now, *(each for _, each in raced)])
            if _is_less(best.loss, now.loss):
                now, failed = best, 0
                self._conclude(now.plan, self._stages.answer(now.plan), self._rank_by)
            else:
                failed += 1
        return now

    def _exchanges(self, now: Found) -> list[Exchange]:
        """Exchanges of blocks of a plan whose steps back were measured, best believed first."""
        progress = self._space.progress(now.plan)

        def step(edge: Perturbation, added: float) -> Step:
            return Step(edge, self._space.progress(now.plan.with_(edge)) - progress, added)

        back = []
        for edge in self._steps_back(now.plan):
            back.append(step(edge, -self._more(self._stages.at(0, now.plan.with_(edge)), now)))
        ahead = self._steps_on(now.plan)
        forward = [step(edge, self._added.get((edge.component, edge.scheme), math.inf)) for edge in ahead]
        return exchanges(now.plan, progress - self._goal, back, forward)

    def _stepped_back(self, now: Found, edges: Sequence[Perturbation]) -> Part[list[Found]]:
        """Plans a step back, tried, and what by them the step had added."""
        tried = yield from self._tried(now.plan, edges)
        for edge, each in zip(edges, tried, strict=True):
            self._believe(Perturbation(edge.component, now.plan.schemes[edge.component]), -self._more(each, now))
        return tried

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

    def _most_gainful(self, now: Found, edges: Sequence[Perturbation]) -> list[Perturbation]:
        """Some steps back: those that by what was measured last gain most for what they give up."""

        def gain(edge: Perturbation) -> float:
            given_up = now.progress - min(self._space.progress(now.plan.with_(edge)), 1.0)
            added = self._added.get((edge.component, now.plan.schemes[edge.component]), 0.0)
            return added / max(given_up, ALIKE)

        chosen = set(sorted(edges, key=gain, reverse=True)[:_MOST_BACK])
        return [edge for edge in edges if edge in chosen]

    def _note(self, found: Found, edge: Perturbation) -> None:
        self._conclude(found.plan, self._stages.answer(found.plan), self._rank_by, edge)

    def _compared(self, best: Found) -> Part[Plan]:
        """The best of the plans that come far enough, on all prompts. Plans that were tried while others led, and may
        be better than the one that leads now, are measured as far as that first."""
        self.stage = "last comparison"
        tried = [each for each in self._stages.known(0) if self._meets(each.plan)]
        yield from self._stages.race(best.plan, tried, [best] * len(tried), self._stages.last)
        plans = {best.plan: None}
        for stage in range(self._stages.last, self._choosing - 1, -1):
            found = sorted(self._stages.known(stage), key=lambda each: each.loss)
            plans |= dict.fromkeys(f.plan for f in found if math.isfinite(f.loss) and self._meets(f.plan))
        field = list(plans)[: self._settings.finalists]
        answers = yield from self._stages.on_all(field, self.num_prompts)
        at = min(range(len(field)), key=lambda i: mean_loss(answers[i], self._rank_by))
        self._conclude(field[at], answers[at], self._rank_by)
        return field[at]


def _is_less(loss: float, than: float) -> bool:
    """Whether a loss is less by more than rounding; of metrics of which more is better losses are below zero."""
    return than - loss > _LEAST_GAIN * abs(than) if math.isfinite(than) else loss < than


def _least(found: Iterable[Found]) -> Found:
    return min(found, key=lambda each: each.loss)


def _ladder(unit: Unit) -> tuple[str, ...]:
    """The schemes of a block, from all of it to the least; of those that leave as much the first."""
    by_size: dict[int, str] = {}
    for edge in unit.edges:
        by_size.setdefault(unit.sizes[edge.scheme].removed_weights, edge.scheme)
    return (DENSE, *(by_size[gone] for gone in sorted(by_size)))
