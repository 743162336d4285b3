"""What uniform plans say of a plan on held-out prompts: whether one of at most its size does as well, and whether the
plan's divergence is that of small noise.

Divergence follows the square root of KL, whatever caused the damage; the factor is the model's and the text's own, and
uniform plans show it.
"""

from __future__ import annotations

from collections.abc import Mapping

from dtmsearch.core.evaluation import EvalResult, Outcome
from dtmsearch.core.metrics import rank_key, summarize
from dtmsearch.core.plan import Plan, PlanSize
from dtmsearch.search.space import SearchSpace

# A share of divergent tokens off that of uniform plans by more than this factor was caused by something else.
_OFF_THE_LAW = 1.5
# Fewer divergent tokens than this in all say too little.
_FEW_DIVERGENT = 100


def rivals_of(space: SearchSpace, plans: Mapping[str, Plan]) -> list[str]:
    """The labels of what `plan`, one of the plans, must beat: uniform ones within the budget that store no more."""
    plan = plans["plan"]
    size = space.size(plan)
    return [
        label
        for label, other in plans.items()
        if other.id != plan.id and _is_uniform(space, other) and _fits(space, space.size(other), size)
    ]


def better_uniform(
    space: SearchSpace, plans: Mapping[str, Plan], outcomes: Mapping[str, Outcome], metric: str
) -> str | None:
    """The label of the best uniform plan that `plan`, one of `plans`, does not beat in `metric`; None if it beats them
    all. A plan that could not be measured beats nothing."""
    measured = {label: outcomes[label] for label in rivals_of(space, plans)}
    rivals = {
        label: rank_key(summarize(outcome), metric)
        for label, outcome in measured.items()
        if isinstance(outcome, EvalResult)
    }
    if not rivals:
        return None
    best = min(rivals, key=lambda label: rivals[label])
    found = outcomes["plan"]
    beaten = isinstance(found, EvalResult) and rank_key(summarize(found), metric)[0] < rivals[best][0]
    return None if beaten else best


def law_remarks(
    space: SearchSpace, plans: Mapping[str, Plan], outcomes: Mapping[str, Outcome], length: int
) -> list[str]:
    """A line if the plan's SDT leaves the square root of its KL by more than the uniform plans' do. `outcomes` may hold
    more than those of `plans`."""
    factors = {
        label: divergent_share(outcome, length)
        for label, plan in plans.items()
        if plan.entries and isinstance(outcome := outcomes[label], EvalResult)
    }
    own = factors.pop("plan", None)
    others = sorted(f for label, f in factors.items() if f is not None and _is_uniform(space, plans[label]))
    if own is None or not others:
        return []
    usual = others[len(others) // 2]
    if usual / _OFF_THE_LAW <= own <= usual * _OFF_THE_LAW:
        return []
    return [
        f"the plan's share of divergent tokens is {own:.2f} x sqrt(KL), that of uniform plans {usual:.2f}: something "
        "other than small noise happened to it"
    ]


def divergent_share(result: EvalResult, length: int) -> float | None:
    """The share of divergent tokens of a continuation of `length` over the square root of KL in nats; None where KL
    was not measured, or next to nothing diverged."""
    if result.kl is None or result.sdt.sum() < _FEW_DIVERGENT:
        return None
    kl = float(result.kl.mean())
    return float(result.sdt.mean()) / length / kl**0.5 if kl > 0.0 else None


def _fits(space: SearchSpace, size: PlanSize, plan_size: PlanSize) -> bool:
    """Whether a size is at most the plan's, and within the budget if the plan's is."""
    within = space.budget.reached(size) or not space.budget.reached(plan_size)
    return within and size.stored_bits <= plan_size.stored_bits


def _is_uniform(space: SearchSpace, plan: Plan) -> bool:
    """Whether all components of the search have one scheme, and a scheme at all."""
    return len(plan) == len(space.components) and len(set(plan.schemes.values())) == 1
