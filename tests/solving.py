"""Searches for the strategies around the solver: the toy model, whose damage is known, and small settings."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from fakes import CONTINUATION_TOKENS, NUM_PROMPTS, REFERENCE_ID, chance
from numpy.typing import NDArray

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, EvalResult
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.prices import PriceKind, priced_schemes
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.strategy_settings import (
    AutoSettings,
    EvolutionSettings,
    FisherSettings,
    KnapsackSettings,
    LocalSettings,
    SpdySettings,
)
from dtmsearch.search.protocols import Strategy
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.priced import TakePrices
from dtmsearch.search.strategies.strategy_registry import SolverSettings, make_strategy

LEVELS = tuple(f"int{bits}-channel" for bits in range(2, 7))
BY_PRICES = ("fisher", "squared_gradients", "gradient_changes")
STRATEGIES = ("knapsack", *BY_PRICES, "sensitivity", "auto", "auto by prices", "spdy", "evolution", "local")
SMALL = SolverSettings(
    auto=AutoSettings(probe_prompts=2, samples=4, slopes=2, rounds=2, prompts=4, plans=4),
    knapsack=KnapsackSettings(4),
    fisher=FisherSettings(8),
    spdy=SpdySettings(starts=6, generations=3, children=3, prompts=4),
    evolution=EvolutionSettings(generations=6, children=4, prompts=(2, 4), survivors=(2,)),
    local=LocalSettings(rounds=5, children=6, prompts=4),
)


def equal_components(number: int = 5) -> tuple[Component, ...]:
    return tuple(Component(f"model.layers.{i}.mlp.up_proj", i, "up", (64, 64)) for i in range(number))


def errors_of(space: SearchSpace) -> dict[tuple[str, str], float]:
    """A quarter for every bit more."""
    return {(c.name, s): 4.0 ** (1 - parse_scheme(s).bits) for c in space.components for s in space.schemes}


def alpha(component: str) -> float:
    return 0.02 + chance("alpha", component)


def additive_damage(plan: Plan) -> float:
    return sum(alpha(c) * 4.0 ** (1 - parse_scheme(s).bits) for c, s in plan.entries)


@functools.cache
def sensitivity(prompts: tuple[int, int]) -> NDArray[np.float64]:
    return np.array([0.5 + chance("prompt", p) for p in range(*prompts)])


def additive(request: EvalRequest) -> EvalResult:
    """A model for which the law holds exactly: KL is the sum over components, every prompt's in proportion."""
    kl = (additive_damage(request.plan) * sensitivity(request.prompts)).astype(np.float32)
    share = np.minimum(0.28 * np.sqrt(kl), 1.0)
    fdt = np.floor(CONTINUATION_TOKENS * (1.0 - share)).astype(np.int32)
    sdt = np.round(CONTINUATION_TOKENS * share).astype(np.int32)
    return EvalResult(request.id, fdt, sdt, np.exp(kl), kl if "kl" in request.extra_metrics else None)


def take_from(space: SearchSpace) -> TakePrices:
    """Prices of that model: products whose mean squares are the damages, slopes of a KL that is a sum, and scores that
    are the damages."""

    def take(kind: PriceKind, around: Plan, samples: tuple[int, int]) -> NDArray[np.float32]:
        schemes = priced_schemes(kind, space.schemes)
        found = np.zeros((samples[1] - samples[0], len(space.components), len(schemes)), np.float32)
        for at, sample in enumerate(range(*samples)):
            for row, component in enumerate(space.components):
                sign = 1 if chance("sign", sample, component.name) < 0.5 else -1
                for column, scheme in enumerate(schemes):
                    root = np.sqrt(additive_damage(Plan.of({component.name: scheme})))
                    now = np.sqrt(additive_damage(Plan.of({component.name: around.scheme_of(component.name)})))
                    fisher = sign * np.sqrt(2 * CONTINUATION_TOKENS) * root
                    slope = CONTINUATION_TOKENS * 2 * now * (root - now)
                    scores = {"squared": root**2, "changes": now**2}
                    found[at, row, column] = {"fisher": fisher, "slope": slope, **scores}[kind]
        return found

    return take


def request_for(plan: Plan, parent: Plan) -> EvalRequest:
    return EvalRequest(plan, REFERENCE_ID, (0, NUM_PROMPTS), (), parent)


def space_with(budget: Budget, components: tuple[Component, ...] | None = None, **changes: Any) -> SearchSpace:
    return SearchSpace(components or equal_components(), LEVELS, budget=budget, **changes)


def strategy(name: str, space: SearchSpace, settings: SolverSettings = SMALL, **changes: Any) -> Strategy:
    name, priced = ("auto", True) if name == "auto by prices" else (name, name in BY_PRICES)
    take = take_from(space) if priced else None
    settings = replace(settings, errors=errors_of(space), take=take, **changes)
    return make_strategy(
        name, space, request_for, rank_by="kl", continuation_tokens=CONTINUATION_TOKENS, solver=settings
    )


def schemes_by_bits(plan: Plan) -> Mapping[str, int]:
    return {component: parse_scheme(scheme).bits for component, scheme in plan.entries}
