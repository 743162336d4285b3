"""What the strategies around the solver share: probes of units alone, plans for damages, comparisons on all prompts.

A candidate is a choice of options (see `choices`); plans are made where something is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import EvalFailure, EvalResult, Outcome, combine
from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import DENSE
from dtmsearch.errors import SearchFailed
from dtmsearch.search.protocols import AgainstUniform
from dtmsearch.search.solver.choices import Choices, Options
from dtmsearch.search.solver.damage_model import Probing
from dtmsearch.search.solver.knapsack import Infeasible
from dtmsearch.search.strategies.generator import DENSE_PLAN, Part, Procedure, Trial, losses, mean_loss
from dtmsearch.search.strategies.task import Task

Floats = NDArray[np.float64]

# Uniform plans of less than this part of the largest one's bits are no rivals of a plan that uses them all.
_NEAR = 0.95
# Prompts on which the last comparison begins; a difference of so many standard errors is certain; plans that are alike
# to this part of their loss need not be told apart.
_TOLD_FIRST, _CERTAIN, _ALIKE = 64, 2.0, 0.02


class Solver(Procedure):
    """A procedure over choices. Until it has measured anything, the best is the first uniform plan of the budget."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.space, task.request_for, ("kl", task.rank_by))
        self._task, self._rank_by = task, task.rank_by
        self._choices = Choices(task.space)
        uniforms = self._choices.uniforms()
        self._best = self._choices.plan(uniforms[0]) if uniforms else None
        # What was measured as a whole, by prompts: (loss, value) in the metric that ranks.
        self._values: dict[tuple[int, int], dict[Options, tuple[float, float]]] = {}

    def _solve(self, damages: Sequence[Floats]) -> Options:
        """The options of least total damage within the budget. Raises `SearchFailed` when what could be measured
        leaves none."""
        try:
            return self._choices.solve(damages).options
        except Infeasible as error:
            raise SearchFailed(f"without what cannot be measured no plan is within the budget: {error}") from None

    def _largest_start(self) -> Options:
        """The uniform plan of the budget that stores most, or where none fits, what fits with the fewest bits cut."""
        uniforms = self._choices.uniforms()
        if uniforms:
            return max(uniforms, key=lambda options: self._choices.cost(self._choices.counted, options))
        cut = [
            (np.square(1.0 - bits / bits[0]) * bits[0]) if bits[0] else -bits.astype(np.float64)
            for bits in self._choices.bits
        ]
        return self._solve(cut)

    def _rivals(self) -> list[Options]:
        """The uniform plans of the budget to which no other is near in size and larger: those worth measuring."""
        cost = [(self._choices.cost(self._choices.counted, options), options) for options in self._choices.uniforms()]
        most = max((bits for bits, _ in cost), default=0)
        return [options for bits, options in cost if bits >= _NEAR * most]

    def _random(self, *place: int) -> np.random.Generator:
        """Derived from the run's seed and a place in the search: no generator's state is carried."""
        return np.random.default_rng((self._task.seed, *place))

    def _first(self, count: int) -> tuple[int, int]:
        return 0, min(count, self.num_prompts)

    def _alone(self, probed: Sequence[Probing], prompts: tuple[int, int]) -> Part[Sequence[Outcome]]:
        """Units measured alone, each under one option."""
        self.stage = self.stage or "probing components alone"
        edges = [self._choices.perturbation(probing.unit, probing.option) for probing in probed]
        return (yield [Trial(DENSE_PLAN.with_(edge), prompts, DENSE_PLAN, edge) for edge in edges])

    def _moves(
        self, leader: Options, moves: Sequence[tuple[int, int]], prompts: tuple[int, int]
    ) -> Part[Sequence[Outcome]]:
        """A choice with one unit moved to another option, for each of `moves`."""
        plan = self._choices.plan(leader)
        edges = [self._choices.perturbation(unit, option) for unit, option in moves]
        return (yield [Trial(plan.with_(edge), prompts, plan, edge) for edge in edges])

    def _measured(
        self, candidates: Sequence[Options], prompts: tuple[int, int], parent: Plan = DENSE_PLAN
    ) -> Part[Sequence[Outcome]]:
        answers = yield [Trial(self._choices.plan(options), prompts, parent) for options in candidates]
        self._hold_against_uniform(candidates, answers, prompts)
        return answers

    def _hold_against_uniform(
        self, candidates: Sequence[Options], answers: Sequence[Outcome], prompts: tuple[int, int]
    ) -> None:
        """Note the best candidate and the best uniform plan that were measured on the same prompts, for who watches."""
        known = self._values.setdefault(prompts, {})
        for options, answer in zip(candidates, answers, strict=True):
            if isinstance(answer, EvalResult):
                known[options] = mean_loss(answer, self._rank_by), summarize(answer).value(self._rank_by)
        rivals = set(self._rivals())
        found, uniform = ([o for o in known if (o in rivals) == given] for given in (False, True))
        if found and uniform:
            plan, rival = (min(each, key=lambda options: known[options][0]) for each in (found, uniform))
            schemes = self._choices.plan(rival).schemes.values()
            named = next((s for s in schemes if s != DENSE), DENSE)
            self.against_uniform = AgainstUniform(self._rank_by, known[plan][1], named, known[rival][1])

    def _lead(self, leader: Options, answer: Outcome) -> None:
        self._conclude(self._choices.plan(leader), answer, self._rank_by)

    def _final(self, candidates: Sequence[Options], prompts: int | None = None) -> Part[Options]:
        """The best of a few candidates on all prompts (or that many), in the metric that ranks; of equals the first.

        The largest uniform plan of the budget is among them.
        """
        self.stage = "last comparison"
        field = list(dict.fromkeys((*candidates, *self._rivals())))
        answers = yield from self._measured(field, self._first(prompts or self.num_prompts))
        values = [(mean_loss(answer, self._rank_by), mean_loss(answer, "kl")) for answer in answers]
        at = min(range(len(field)), key=lambda i: values[i])
        self._lead(field[at], answers[at])
        return field[at]

    def _measurable(self, damages: Sequence[Floats], prompts: tuple[int, int]) -> Part[tuple[Options, Outcome]]:
        """The best plan for damages that no measurement has tried, and its answer. Where the plan cannot be measured,
        each of its options is, on one prompt; those that cannot either are not taken. Marks them in `damages`."""
        while True:
            options = self._solve(damages)
            (answer,) = yield from self._measured([options], prompts)
            if isinstance(answer, EvalResult):
                return options, answer
            taken = [Probing(unit, option, "") for unit, option in enumerate(options) if option > 0]
            answers = yield from self._alone(taken, self._first(1))
            failed = [p for p, alone in zip(taken, answers, strict=True) if isinstance(alone, EvalFailure)]
            if not failed:
                raise SearchFailed(f"the plan that leads cannot be measured ({answer.kind}): {answer.message}")
            for probing in failed:
                damages[probing.unit][probing.option] = np.inf

    def _told_apart(self, candidates: Sequence[Options]) -> Part[Options]:
        """As `_final`, on as many prompts as tell the plans apart: twice as many each time, until all but one are worse
        with certainty or differ from the best by next to nothing. The same prompts are measured once."""
        self.stage = "last comparison"
        field = list(dict.fromkeys((*candidates, *self._rivals())))
        parts: dict[Options, list[Outcome]] = {options: [] for options in field}
        start, end = 0, min(_TOLD_FIRST, self.num_prompts)
        while True:
            answers = yield from self._measured(field, (start, end))
            for options, answer in zip(field, answers, strict=True):
                parts[options].append(answer)
            values = {options: _losses(parts[options], self._rank_by) for options in field}
            best = min(field, key=lambda options: float(values[options].mean()))
            field = [o for o in field if o == best or not _settled(values[o], values[best])]
            if len(field) == 1 or end == self.num_prompts:
                break
            start, end = end, min(2 * end, self.num_prompts)
        self._lead(best, _whole(parts[best]))
        return best


def _losses(parts: Sequence[Outcome], metric: str) -> Floats:
    return np.concatenate([losses(part, metric) for part in parts])


def _settled(own: Floats, best: Floats) -> bool:
    """Whether a candidate is worse than the best for certain, or as good to within next to nothing."""
    if not np.isfinite(own).all():
        return True
    if len(own) < 2:  # how far a single prompt may be off, nobody knows
        return False
    difference = own - best
    mean, error = float(difference.mean()), float(difference.std(ddof=1)) / float(np.sqrt(len(difference)))
    worse = mean > _CERTAIN * error
    alike = abs(mean) + _CERTAIN * error < _ALIKE * abs(float(best.mean()))
    return worse or alike


def _whole(parts: Sequence[Outcome]) -> Outcome:
    """The outcome on all the prompts of its parts."""
    results = [part for part in parts if isinstance(part, EvalResult)]
    return combine(results[0].request_id, results) if len(results) == len(parts) and len(parts) > 1 else parts[0]


def paired(a: Outcome, b: Outcome, metric: str) -> tuple[float, float]:
    """Mean over prompts of a's loss less b's, and the variance of that mean; infinite where one of them failed."""
    if isinstance(a, EvalFailure):
        return np.inf, 0.0
    if isinstance(b, EvalFailure):
        return -np.inf, 0.0
    difference = losses(a, metric) - losses(b, metric)
    variance = float(difference.var(ddof=1)) / len(difference) if len(difference) > 1 else float(difference[0] ** 2)
    return float(difference.mean()), variance


def probe_noise(answers: Sequence[Outcome]) -> float:
    """Relative standard error of a unit's mean over prompts, what all units of a prompt have in common left out."""
    rows = [losses(answer, "kl") for answer in answers if isinstance(answer, EvalResult)]
    if not rows or len(rows[0]) < 2:
        return 0.5
    values = np.array(rows)
    relative = values / np.maximum(values.mean(axis=1, keepdims=True), 1e-12)
    relative -= relative.mean(axis=0, keepdims=True)
    return float(np.sqrt(relative.var(axis=1, ddof=1).mean() / values.shape[1]))
