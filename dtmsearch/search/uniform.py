"""Never worse than uniform: whether a uniform plan of at most a plan's size does as well on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping

from dtmsearch.plans.evaluation import EvalResult, Outcome
from dtmsearch.plans.metrics import rank_key, summarize
from dtmsearch.plans.plan import Plan
from dtmsearch.search.space import SearchSpace


def better_uniform(
    space: SearchSpace, plan: Plan, plans: Mapping[str, Plan], outcomes: Mapping[str, Outcome], metric: str
) -> str | None:
    """The label of the best uniform plan that `plan` does not beat in `metric`; None if it beats them all.

    `plans` by label, `plan` itself among them as `plan`; only uniform ones within the budget count that store no more
    than it. A plan that could not be measured beats nothing.
    """
    size = space.size(plan)
    rivals: dict[str, tuple[float, ...]] = {}
    for label, other in plans.items():
        outcome, other_size = outcomes[label], space.size(other)
        within = space.budget.reached(other_size) or not space.budget.reached(size)
        if _is_uniform(space, other) and within and other_size.stored_bits <= size.stored_bits:
            if isinstance(outcome, EvalResult):
                rivals[label] = rank_key(summarize(outcome), metric)
    if not rivals:
        return None
    best = min(rivals, key=lambda label: rivals[label])
    found = outcomes["plan"]
    beaten = isinstance(found, EvalResult) and rank_key(summarize(found), metric)[0] < rivals[best][0]
    return None if beaten else best


def _is_uniform(space: SearchSpace, plan: Plan) -> bool:
    """Whether all components of the search have one scheme, and a scheme at all."""
    return len(plan) == len(space.components) and len(set(plan.schemes.values())) == 1
