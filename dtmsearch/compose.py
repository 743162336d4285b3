"""From a search file to the objects of its search: the space, the requests, the strategy."""

from __future__ import annotations

from dtmsearch.config import SearchFile
from dtmsearch.plans.components import ModelManifest
from dtmsearch.plans.evaluation import EXTRA_METRICS, EvalRequest
from dtmsearch.plans.plan import Plan
from dtmsearch.search.additive import SpdySearch
from dtmsearch.search.auto import Effort
from dtmsearch.search.evolution import Stages, Switching
from dtmsearch.search.scheduler import Strategy
from dtmsearch.search.sensitivity import WeightErrors
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies import SolverSettings, make_strategy


def space_of(file: SearchFile, manifest: ModelManifest) -> SearchSpace:
    """The space of a search file over a model. Raises `ValueError` for components, ties or budgets that cannot be."""
    section = file.search
    return SearchSpace(
        components=manifest.select(section.components.include, section.components.exclude),
        schemes=section.schemes,
        tied=section.tied,
        dense_bits=manifest.dense_bits,
        budget=section.stop.budget,
    )


def extra_metrics_of(file: SearchFile) -> tuple[str, ...]:
    """What is measured of every candidate beside fdt, sdt and dppl: the metric that ranks, if it is another."""
    return tuple(metric for metric in EXTRA_METRICS if metric == file.search.rank_by)


def strategy_of(
    file: SearchFile, space: SearchSpace, reference_id: str, errors: WeightErrors | None = None
) -> Strategy:
    """The strategy of a search file, which asks for evaluations against a reference of the file's prompts. `errors`
    are what some strategies (`NEED_ERRORS`) know of schemes without measuring them."""
    section, extra = file.search, extra_metrics_of(file)

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, reference_id, (0, file.prompts.count), extra, parent)

    return make_strategy(
        section.strategy,
        space,
        request_for,
        rank_by=section.rank_by,
        width=section.width,
        expand=section.expand,
        min_fdt=section.stop.min_fdt,
        confidence=section.confidence,
        continuation_tokens=file.prompts.continuation_tokens,
        audit=section.audit,
        seed=file.seed,
        solver=_solver_settings(file, errors),
    )


def _solver_settings(file: SearchFile, errors: WeightErrors | None) -> SolverSettings:
    section = file.search
    return SolverSettings(
        auto=Effort(**section.auto.model_dump()),
        knapsack_prompts=section.knapsack.prompts,
        spdy=SpdySearch(**section.spdy.model_dump()),
        evolution=Stages(**section.evolution.model_dump()),
        local=Switching(**section.local.model_dump()),
        errors=errors,
    )
