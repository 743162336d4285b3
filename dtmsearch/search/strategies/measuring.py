"""Strategies that answer a study's question: they measure what it asks for, and choose no plan."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import Outcome
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import SearchFailed, UserError
from dtmsearch.search.solver.choices import Choices
from dtmsearch.search.solver.knapsack import Infeasible
from dtmsearch.search.strategies.generator import DENSE_PLAN, Procedure, Script, Trial, losses
from dtmsearch.search.strategies.task import Task

_Settings = TypeVar("_Settings")


def settings_of(kind: type[_Settings], options: Mapping[str, Any], strategy: str) -> _Settings:
    """Settings, a dataclass of whole numbers, from a file's `search.options`. Raises `UserError` for an unknown key
    and for what is no whole number from 1 on."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; {strategy} has {', '.join(sorted(known)) or 'none'}"
            raise UserError(f"unknown key 'search.options.{name}'{hint}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"search.options.{name}: a whole number from 1 on is wanted, got {value!r}")
    return kind(**options)


class Measuring(Procedure):
    """What a study's strategies have in common: a task's space and prompts, and one round after the other."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.space, task.request_for)
        self._seed = task.seed

    def _all_on(self, plan: Plan, parent: Plan = DENSE_PLAN) -> Trial:
        return Trial(plan, (0, self.num_prompts), parent)

    def _alone(self, edge: Perturbation, metrics: tuple[str, ...] | None = None) -> Trial:
        return Trial(DENSE_PLAN.with_(edge), (0, self.num_prompts), DENSE_PLAN, edge, metrics=metrics)


@dataclass(frozen=True)
class BlockSettings:
    """`block`: prompts by which a metric tells two plans apart once. `masks`: random masks that are drawn of each
    component for each block."""

    block: int = 8
    masks: int = 1


class Discriminability(Measuring):
    """Every component alone under the first of two schemes, on all prompts, and under the second, which prunes by
    chance, on one block of them after the other. Each block has masks of its own (one, unless the settings say more:
    `random-0.001-s17` on the 18th), so that blocks are independent draws of masks and prompts at once."""

    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__(task)
        self._settings = settings_of(BlockSettings, options, "discriminability")
        schemes = task.space.schemes
        pruning = parse_scheme(schemes[-1]).pruning
        if len(schemes) != 2 or pruning is None or pruning.saliency != "random" or schemes[-1].count("-") != 1:
            raise UserError(
                "search.schemes: discriminability tells a scheme from random pruning, such as [magnitude-0.001, "
                f"random-0.001], got {list(schemes)}"
            )
        if self.num_prompts < self._settings.block:
            raise UserError(
                f"prompts.count: {self.num_prompts} are less than one block of {self._settings.block} prompts"
            )

    def script(self) -> Script:
        first, second = self._space.schemes
        edges = list(self._space.perturbations(DENSE_PLAN))
        ones = [edge for edge in edges if edge.scheme == first]
        trials = [self._alone(edge) for edge in ones]
        block, masks = self._settings.block, self._settings.masks
        for mask in range(self.num_prompts // block * masks):
            start = mask // masks * block
            edges = [replace(edge, scheme=f"{second}-s{mask}") for edge in ones]
            trials += [Trial(DENSE_PLAN.with_(edge), (start, start + block), perturbation=edge) for edge in edges]
        self._foresee((len(ones), self.num_prompts), (len(trials) - len(ones), block))
        yield trials


@dataclass(frozen=True)
class LadderSettings:
    """`mixed`: plans that give each of a drawn share of the components a scheme by chance."""

    mixed: int = 0


class Ladder(Measuring):
    """The unquantized model, every scheme's uniform plan, and mixed plans from mild to strong."""

    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__(task)
        given = {name: value for name, value in options.items() if (name, value) != ("mixed", 0)}
        self._mixed = settings_of(LadderSettings, given, "ladder").mixed

    def script(self) -> Script:
        uniform = [self._space.uniform(scheme) for scheme in self._space.schemes]
        plans = [DENSE_PLAN, *uniform, *(self._mixture(number) for number in range(self._mixed))]
        # Of two that are one plan, the first.
        yield [self._all_on(plan) for plan in {plan.id: plan for plan in plans}.values()]

    def _mixture(self, number: int) -> Plan:
        random = np.random.default_rng((self._seed, number))
        share = (number + 1) / self._mixed
        plan = DENSE_PLAN
        for unit in self._space.units:
            if unit.edges and random.random() < share:
                plan = plan.with_(unit.edges[random.integers(len(unit.edges))])
        return plan


# What an evaluation may be asked for: the pass alone, the base model's distributions beside it, human text, both.
METRIC_SETS: tuple[tuple[str, ...], ...] = ((), ("kl",), ("ppl",), ("kl", "ppl"))


@dataclass(frozen=True)
class RepeatSettings:
    """`repeats`: evaluations by which the time of one is told."""

    repeats: int = 8


class Costs(Measuring):
    """The same plans measured in one set of metrics after the other. Plans change the first layer, so that every layer
    runs; the first evaluation of each set also makes what the set needs of the base model, and is told apart."""

    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__(task)
        self._repeats = settings_of(RepeatSettings, options, "costs").repeats

    def script(self) -> Script:
        first = min(component.layer for component in self._space.components)
        names = {component.name for component in self._space.components if component.layer == first}
        edges = [edge for edge in self._space.perturbations(DENSE_PLAN) if edge.component in names]
        if len(edges) < self._repeats + 1:
            raise UserError(
                f"search.options.repeats: {self._repeats} need as many plans and one more, and the first layer has "
                f"{len(edges)}: add search.schemes, or ask for fewer"
            )
        for metrics in METRIC_SETS:
            self._foresee((len(edges), self.num_prompts))
            for edge in edges[: self._repeats + 1]:
                # One at a time, so that nothing is on its way beside what is timed.
                yield [self._alone(edge, metrics)]


@dataclass(frozen=True)
class DomainSettings:
    """`domains`: texts that the prompts are a mixture of, in turn."""

    domains: int = 2


class Domains(Measuring):
    """Every component alone under every scheme over a mixture of texts; then for each text the plan that the first half
    of its prompts ask for (least sum of KL within the budget), and for all texts together, each measured on all."""

    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__(task)
        self._domains = settings_of(DomainSettings, options, "domains").domains
        self._choices = Choices(task.space)
        if self.num_prompts < 4 * self._domains:
            raise UserError(f"prompts.count: {self.num_prompts} are less than 4 for each of {self._domains} texts")

    def script(self) -> Script:
        probed = [self._alone(edge, ("kl",)) for edge in self._space.perturbations(DENSE_PLAN)]
        uniform = [self._choices.plan(options) for options in self._choices.uniforms()]
        self._foresee((len(probed) + len(uniform) + self._domains + 1, self.num_prompts))
        answers = yield probed
        damages = iter(losses(answer, "kl") for answer in answers)
        table = [[next(damages) for _ in schemes[1:]] for schemes in self._choices.schemes]
        halves = [half_of(self.num_prompts, self._domains, domain, first=True) for domain in range(self._domains)]
        plans = [self._plan_for(table, rows) for rows in (*halves, np.concatenate(halves))]
        found = {plan.id: plan for plan in (*plans, *uniform)}
        trials = [self._all_on(plan) for plan in found.values()]
        measured: dict[str, Outcome] = dict(zip(found, (yield trials), strict=True))
        for plan in plans:  # a decision for each text in turn, and for all together
            self._conclude(plan, measured[plan.id], "kl")
        self._best = None

    def _plan_for(self, table: Sequence[Sequence[NDArray[np.float64]]], rows: NDArray[np.int64]) -> Plan:
        means = [
            np.array([0.0, *(np.inf if len(each) == 1 else each[rows].mean() for each in options)]) for options in table
        ]
        try:
            return self._choices.plan(self._choices.solve(means).options)
        except Infeasible as error:
            raise SearchFailed(f"no plan is within the budget: {error}") from None


def half_of(num_prompts: int, domains: int, domain: int, first: bool) -> NDArray[np.int64]:
    """The prompts of one of several texts that take turns: of its own the first half, which plans are chosen by, or the
    second, which they are judged by."""
    own = np.arange(domain, num_prompts, domains)
    middle = len(own) // 2
    return own[:middle] if first else own[middle:]
