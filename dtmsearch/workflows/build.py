"""From a search file to the objects of its search: the space, the requests, the strategy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dtmsearch.config import SearchFile
from dtmsearch.core.calibration import ExpertUse
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import EXTRA_METRICS, EvalRequest
from dtmsearch.core.fusion import FUSED_KINDS
from dtmsearch.core.metric_registry import BUILT_IN, METRICS
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.search.protocols import Strategy
from dtmsearch.search.solver.damage_model import WeightErrors
from dtmsearch.search.solver.pruned_shares import Errors
from dtmsearch.search.solver.pruned_units import scheme_name
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.priced import TakePrices
from dtmsearch.search.strategies.rounds import RequestFactory
from dtmsearch.search.strategies.sparsity import Sparsity, SparsitySettings
from dtmsearch.search.strategies.strategy_registry import STRATEGIES, SolverSettings, make_strategy
from dtmsearch.search.strategies.task import Task
from dtmsearch.store.schemas import EVALUATIONS

# Ends the sentence on a strategy that KV caches are nothing for.
WITHOUT_ERRORS = (
    "KV caches have none: use fisher, knapsack, beam or evolution, or leave caches out (search.components.exclude)"
)


def space_of(file: SearchFile, manifest: ModelManifest) -> SearchSpace:
    """The space of a search file over a model. Raises `UserError` for components, ties or budgets that cannot be, and
    for a size that the unquantized model has already."""
    section = file.search
    sparsity = section.strategy == "sparsity"  # its rounds say when it ends, and its end is what is uniform
    components = manifest.select(section.components.include, section.components.exclude)
    blocks = manifest.droppable(section.drop, components, section.components.exclude)
    if not manifest.source and any(parse_scheme(name).is_source for name in section.schemes):
        raise UserError(
            f"search.schemes: source keeps a component as a quantized base model stores it, but {manifest.model} does "
            "not come quantized: leave it out, for what a plan does not name stays as it is"
        )
    space = SearchSpace(
        components=components,
        schemes=(scheme_name(section.prune, sum(section.pruning_rounds) / 100),) if sparsity else section.schemes,
        tied=(*section.tied, *(_fused_kinds(components) if section.fused else ())),
        dense_bits=manifest.dense_bits,
        budget=Budget() if sparsity else section.stop.budget,
        experts=section.experts,
        times=None if section.times is None else section.times.table,
        manifest=manifest,
        blocks=blocks,
        cut=manifest.cuttable(section.cut, components, section.components.exclude),
        cuts=section.cut,
    )
    kind = None if sparsity else STRATEGIES[section.strategy]
    if kind is not None and kind.needs_errors and not kind.takes_prices and any(c.is_cache for c in components):
        raise UserError(f"search.strategy: {section.strategy} goes by errors of weights, and {WITHOUT_ERRORS}")
    whole = space.size(Plan())
    for rule, own in (
        ("bits_per_weight", whole.bits_per_weight),
        ("size_mb", whole.size_mb),
        ("active_bits_per_weight", whole.active_bits_per_weight),
        ("decode_ms", whole.decode_ms),
        ("prefill_ms", whole.prefill_ms),
    ):
        wanted: float | None = getattr(section.stop, rule)
        if wanted is not None and own is not None and wanted >= own:
            raise UserError(
                f"search.stop.{rule}: {wanted:g} asks for nothing, since the searched components have {own:.4g} "
                "unquantized; give a smaller number"
            )
    return space


def _fused_kinds(components: Sequence[Component]) -> tuple[tuple[str, ...], ...]:
    """What a fused runtime ties, of the kinds that are searched."""
    searched = {component.kind for component in components}
    groups = (tuple(kind for kind in kinds if kind in searched) for kinds in FUSED_KINDS)
    return tuple(group for group in groups if len(group) > 1)


def extra_metrics_of(file: SearchFile) -> tuple[str, ...]:
    """What is measured of every candidate beside fdt, sdt and dppl: the metric that ranks, if it is another, the one
    that sparsity is allocated by, and what the file names."""
    wanted = {file.search.rank_by, *file.search.metrics} | ({"kl"} if file.search.strategy == "sparsity" else set())
    return (*(metric for metric in EXTRA_METRICS if metric in wanted), *_of_packages(wanted))


def held_out_metrics_of(file: SearchFile) -> tuple[str, ...]:
    """What is measured on held-out prompts beside fdt, sdt and dppl."""
    return (*EXTRA_METRICS, *_of_packages({file.search.rank_by, *file.search.metrics}))


def _of_packages(metrics: Collection[str]) -> list[str]:
    """Those of other packages. Raises `UserError` for one that cannot be loaded or stored."""
    found = sorted(set(metrics) - set(BUILT_IN))
    for name in found:
        taken = {METRICS[name].column, METRICS[name].list_column} & set(EVALUATIONS.names)
        if taken:
            raise UserError(
                f"metric {name} has the name of a column of evaluations, {', '.join(sorted(taken))}: rename it"
            )
    return found


def sparsity_of(file: SearchFile) -> SparsitySettings:
    """What the sparsity search of a file is."""
    section = file.search
    return SparsitySettings(**vars(section.pruning), rounds=section.pruning_rounds, trains=section.recovery is not None)


def sparsity_search_of(
    file: SearchFile,
    space: SearchSpace,
    reference_id: str,
    errors: Errors | None = None,
    outliers: Mapping[int, float] | None = None,
    calibration_id: str = "",
) -> Sparsity:
    """The sparsity search of a file, with what is known of the weights."""
    request_for, tokens = _request_factory(file, reference_id, calibration_id), file.prompts.continuation_tokens
    task = Task(space, request_for, file.search.rank_by, continuation_tokens=tokens)
    return Sparsity(task, sparsity_of(file), errors, outliers)


def strategy_of(
    file: SearchFile,
    space: SearchSpace,
    reference_id: str,
    errors: WeightErrors | None = None,
    calibration_id: str = "",
    take: TakePrices | None = None,
    uses: Sequence[ExpertUse] = (),
) -> Strategy:
    """The strategy of a search file, which asks for evaluations against a reference of the file's prompts. `errors`
    are what some strategies (`needs_errors`) know of schemes without measuring them; `calibration_id` names the text by
    which calibrated schemes are calibrated; `take` takes prices for strategies that want them (`takes_prices`), `uses`
    are told to those that want to know how text uses experts (`needs_uses`)."""
    section = file.search
    if section.strategy == "sparsity":
        return sparsity_search_of(file, space, reference_id, calibration_id=calibration_id)
    return make_strategy(
        section.strategy,
        space,
        _request_factory(file, reference_id, calibration_id),
        rank_by=section.rank_by,
        min_fdt=section.stop.min_fdt,
        continuation_tokens=file.prompts.continuation_tokens,
        tree=section.tree,
        options=section.options,
        seed=file.seed,
        solver=_solver_settings(file, errors, take, uses),
    )


def _request_factory(file: SearchFile, reference_id: str, calibration_id: str) -> RequestFactory:
    extra = extra_metrics_of(file)

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, reference_id, (0, file.prompts.count), extra, parent, calibration_id)

    return request_for


def _solver_settings(
    file: SearchFile, errors: WeightErrors | None, take: TakePrices | None, uses: Sequence[ExpertUse]
) -> SolverSettings:
    section = file.search
    return SolverSettings(
        auto=section.auto,
        fisher=section.fisher,
        knapsack=section.knapsack,
        spdy=section.spdy,
        evolution=section.evolution,
        floating=section.floating,
        local=section.local,
        mc_moe=section.mc_moe,
        errors=errors,
        take=take,
        uses=uses,
        trains=section.recovery is not None,
    )
