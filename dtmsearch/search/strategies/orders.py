"""`orders`: components in the order that each metric asks for, and what the plans of these orders come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from dtmsearch.core.evaluation import EvalResult, Outcome
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.errors import SearchFailed, UserError
from dtmsearch.search.strategies.generator import DENSE_PLAN, Script
from dtmsearch.search.strategies.measuring import Measuring, settings_of
from dtmsearch.search.strategies.task import Task

ORDERED_BY = ("kl", "sdt", "fdt", "dppl", "ppl")
# Of the order by all of its prompts, plans of these shares of the weights are measured, too.
DEPTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FEWEST = 8


@dataclass(frozen=True)
class OrderSettings:
    """`percent` of the weights that plans compress whose orders follow from fewer prompts."""

    percent: int = 67


@dataclass(frozen=True)
class Ordered:
    """A plan: the first components in the order by a metric on so many prompts, up to a share of the weights."""

    metric: str
    prompts: int
    share: float


def ordered_plans(num_prompts: int, percent: int) -> list[Ordered]:
    """The plans that `orders` measures, in the order of its decisions. Orders follow from the first half of the
    prompts, and from a half, a quarter, ... of these."""
    sizes = []
    size = num_prompts // 2
    while size >= _FEWEST:
        sizes.append(size)
        size //= 2
    by_fewer = [Ordered(metric, size, percent / 100) for size in reversed(sizes) for metric in ORDERED_BY]
    by_depth = [Ordered(metric, sizes[0], depth) for depth in DEPTHS for metric in ORDERED_BY] if sizes else []
    return [*by_fewer, *by_depth]


def order_by(values: Sequence[Mapping[str, NDArray[Any]]], metric: str, prompts: int) -> list[int]:
    """Places of components, the least harmful first by a metric on the first prompts, ties as searches break them: by
    FDT, SDT, DPPL. `values`: of each component alone, metric -> its value on each prompt."""
    keys = [
        [float(METRICS[name].losses(own[name][:prompts]).mean()) for name in (metric, "fdt", "sdt", "dppl")]
        for own in values
    ]
    return sorted(range(len(values)), key=keys.__getitem__)


class Orders(Measuring):
    """Every component alone, on all prompts; then the plans of `ordered_plans`, each a decision."""

    def __init__(self, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__(task)
        self._percent = settings_of(OrderSettings, options, "orders").percent
        if self._percent > 100:
            raise UserError(f"search.options.percent: at most 100, got {self._percent}")
        if self.num_prompts < 2 * _FEWEST:
            raise UserError(f"prompts.count: at least {2 * _FEWEST} are wanted, got {self.num_prompts}")
        if len(task.space.schemes) != 1:
            raise UserError(f"search.schemes: orders compress by one scheme, got {len(task.space.schemes)}")

    def script(self) -> Script:
        edges = self._space.perturbations(DENSE_PLAN)
        wanted = ordered_plans(self.num_prompts, self._percent)
        self._foresee((len(edges) + len(wanted), self.num_prompts))
        alone = yield [self._alone(edge) for edge in edges]
        known = [(edge, answer) for edge, answer in zip(edges, alone, strict=True) if isinstance(answer, EvalResult)]
        if not known:
            raise SearchFailed("no component could be measured alone")
        values = [answer.metrics for _, answer in known]
        plans = []
        for each in wanted:
            order = order_by(values, each.metric, each.prompts)
            plans.append(self._up_to(each.share, [known[at][0] for at in order]))
        distinct = {plan.id: plan for plan in plans}
        trials = [self._all_on(plan) for plan in distinct.values()]
        found: dict[str, Outcome] = dict(zip(distinct, (yield trials), strict=True))
        for each, plan in zip(wanted, plans, strict=True):
            self._conclude(plan, found[plan.id], each.metric)
        self._best = None

    def _up_to(self, share: float, edges: Sequence[Perturbation]) -> Plan:
        plan = DENSE_PLAN
        for edge in edges:
            if self._space.size(plan).share >= share - 1e-9:
                break
            plan = plan.with_(edge)
        return plan
