"""`mc_moe`: the widths of a mixture's experts by how much text uses them, as published; a baseline.

Huang et al., "Mixture Compressor for Mixture-of-Experts LLMs Gains More" (MC-MoE, arXiv 2410.06270), section 3.2: in
each layer the widths of experts are those of least sum of phi^alpha w^beta error^gamma under a mean width that is the
same in all layers, an integer programme. phi is the share of the layer's choices that fall on the expert, w its share
of the layer's routing weight, and the error the Frobenius norm of the change of the mixture's output when it alone is
compressed. All other components have one scheme. The exponents are the defaults of the authors' code.

Not kept is their constraint that one expert at least has each of the two larger of three widths: here the schemes are
those of the search, however many.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.calibration import ExpertUse
from dtmsearch.core.components import Component
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.strategy_settings import McMoeSettings
from dtmsearch.errors import SearchFailed, UserError
from dtmsearch.search.solver.knapsack import Infeasible, solve
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.generator import Script, Trial
from dtmsearch.search.strategies.solver_based import Solver
from dtmsearch.search.strategies.task import Task

Floats = NDArray[np.float64]

# Bits of the weights that are no experts', in the published plans.
_USUAL_BITS = 4


class McMoe(Solver):
    """See the module. Raises `UserError` for a space without experts, one that ties them, and a budget of no bits."""

    def __init__(self, task: Task, uses: Sequence[ExpertUse], settings: McMoeSettings = McMoeSettings()) -> None:
        super().__init__(task)
        space = task.space
        if not any(component.mixture for component in space.components):
            raise UserError("strategy: mc_moe divides bits among experts, and none of these components is an expert's")
        if space.experts != "expert":
            raise UserError("strategy: mc_moe divides bits among the experts of a layer: set search.experts: expert")
        if not (space.budget.stores_less or space.budget.reads_less):
            raise UserError("strategy: mc_moe keeps to bits: give stop.bits_per_weight or active_bits_per_weight")
        self._uses, self._settings = uses, settings

    def script(self) -> Script:
        self._foresee((1, self.num_prompts))
        plan = mc_moe_plan(self._task.space, self._uses, self._settings)
        (answer,) = yield [Trial(plan, self._first(self.num_prompts))]
        self._conclude(plan, answer, self._rank_by)


def mc_moe_plan(space: SearchSpace, uses: Sequence[ExpertUse], settings: McMoeSettings) -> Plan:
    """The plan for these uses of experts. Raises `SearchFailed` where the budget leaves experts too few bits, and
    `UserError` for a scheme of the others that the search does not name."""
    found: SearchFailed | None = None
    for scheme in _schemes_of_others(space, settings):
        try:
            return _plan_beside(space, scheme, uses, settings)
        except SearchFailed as error:
            found = error
    assert found is not None
    raise found


def _schemes_of_others(space: SearchSpace, settings: McMoeSettings) -> list[str]:
    """What components may have that are no experts': as named, else the scheme of the search nearest to four bits or,
    where that leaves experts too few, those below it."""
    if settings.others:
        if settings.others not in space.schemes:
            raise UserError(f"search.mc_moe.others: {settings.others} is none of search.schemes")
        return [settings.others]
    parts = [c for c in space.components if not c.mixture] or list(space.components)
    weights = sum(component.num_weights for component in parts)
    # Of schemes that have no width of their own, the bits that they store.
    bits = {s.name: s.bits or _stored_bits(parts, s.name, space.dense_bits) / weights for s in space.parsed}
    nearest = min(bits, key=lambda name: abs(bits[name] - _USUAL_BITS))
    below = sorted((name for name in bits if bits[name] < bits[nearest]), key=lambda name: -bits[name])
    return [nearest, *below]


def _plan_beside(space: SearchSpace, others: str, uses: Sequence[ExpertUse], settings: McMoeSettings) -> Plan:
    """The plan in which all that is no expert's has one scheme."""
    plan = Plan.uniform((c for c in space.components if not c.mixture), others)
    experts = _by_expert(space)
    bits = _bits_for_experts(space, plan)
    significance = _significance(uses, settings)
    errors = {(use.mixture, use.expert, use.scheme): use.error for use in uses}
    chosen: dict[str, str] = {}
    for mixture in dict.fromkeys(mixture for mixture, _ in experts):
        numbers = [number for name, number in experts if name == mixture]
        owned = [experts[mixture, number] for number in numbers]
        costs = [np.array([_stored_bits(parts, s, space.dense_bits) for s in space.schemes]) for parts in owned]
        losses = [
            significance[mixture, n] * np.array([errors[mixture, n, s] for s in space.schemes]) ** settings.gamma
            for n in numbers
        ]
        capacity = int(bits * sum(component.num_weights for parts in owned for component in parts))
        try:
            options = solve(losses, costs, capacity).options
        except Infeasible:
            raise SearchFailed(
                f"mc_moe: with {others} for all that is no expert's the budget leaves {bits:.3g} bits to a weight of "
                f"an expert, and no scheme of the search has so few"
            ) from None
        for parts, option in zip(owned, options, strict=True):
            chosen |= dict.fromkeys((component.name for component in parts), space.schemes[option])
    return Plan.of(plan.schemes | chosen)


def _by_expert(space: SearchSpace) -> dict[tuple[str, int], list[Component]]:
    """(mixture, expert) -> its matrices, in model order."""
    found: dict[tuple[str, int], list[Component]] = {}
    for component in space.components:
        if component.mixture:
            found.setdefault((component.mixture, component.expert), []).append(component)
    return found


def _bits_for_experts(space: SearchSpace, others: Plan) -> float:
    """Bits of each weight of an expert that the budget leaves: of the rules that count bits, by the one that leaves
    most, for a search ends where any is met."""
    size, budget = space.size(others), space.budget
    unquantized = [c for c in space.components if c.mixture]
    stored = sum(c.num_weights for c in unquantized)
    read = sum(c.num_weights * c.read_share for c in unquantized)
    left = []
    for wanted in (
        None if budget.bits_per_weight is None else budget.bits_per_weight * size.num_weights,
        None if budget.size_mb is None else budget.size_mb * 8e6,
    ):
        if wanted is not None:
            left.append((wanted - (size.stored_bits - stored * space.dense_bits)) / stored)
    if budget.active_bits_per_weight is not None:
        wanted = budget.active_bits_per_weight * float(size.active_weights)
        left.append((wanted - float(size.active_bits - read * space.dense_bits)) / float(read))
    return max(left)


def _significance(uses: Sequence[ExpertUse], settings: McMoeSettings) -> dict[tuple[str, int], float]:
    """phi^alpha w^beta of every expert; shares of its mixture."""
    tokens = {(use.mixture, use.expert): use.tokens for use in uses}
    weights = {(use.mixture, use.expert): use.routing_weight for use in uses}

    def share(values: dict[tuple[str, int], float] | dict[tuple[str, int], int], mixture: str, expert: int) -> float:
        whole = sum(value for (name, _), value in values.items() if name == mixture)
        return values[mixture, expert] / whole if whole else 0.0

    return {key: share(tokens, *key) ** settings.alpha * share(weights, *key) ** settings.beta for key in tokens}


def _stored_bits(parts: Sequence[Component], scheme: str, dense_bits: int) -> int:
    parsed = parse_scheme(scheme)
    return sum(parsed.bits_of(component, dense_bits) for component in parts)
