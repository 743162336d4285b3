"""What a search will cost, before it runs: evaluations, tokens, operations, memory, hours at a measured rate.

Loads one replica and times its parts on random tokens; records nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtmsearch import texts
from dtmsearch.cluster.pool import PoolSettings, ReplicaPool
from dtmsearch.config import SearchFile
from dtmsearch.plans.components import ModelManifest
from dtmsearch.plans.evaluation import EXTRA_METRICS, EvalRequest, Speed
from dtmsearch.plans.plan import Plan
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies import make_strategy


@dataclass(frozen=True)
class Estimate:
    """`evaluations` that the search asks for; `tokens` that they run through layers, counted whole; `operations` of
    their matrix products, shared prefixes left out; `memory_bytes` of one replica with the activations of a batch;
    `search_seconds` with all `replicas` at work; `other_seconds` for the reference and the validation."""

    evaluations: int
    tokens: int
    operations: float
    replicas: int
    memory_bytes: int
    evaluation_seconds: float
    search_seconds: float
    other_seconds: float


def estimate(file: SearchFile, where: PoolSettings = PoolSettings()) -> Estimate:
    """Estimate the search of a file on the machines of `where`. Raises what `dtmsearch.run.run` raises."""
    if where.address is None:
        texts.check_model(file)
    texts.check_readable(file)
    prompts, held_out = file.prompts, file.validation_prompts
    with ReplicaPool(file.model_spec, where) as pool:
        manifest = pool.manifest()
        space = search_space(file, manifest)
        speed = pool.measure_speed(prompts.count, prompts.prompt_tokens, prompts.continuation_tokens)
        replicas = pool.num_replicas
    extra = tuple(m for m in EXTRA_METRICS if m == file.search.rank_by)
    evaluations = _expected_evaluations(file, space)
    share = sum(manifest.num_layers - max(c.layer, 0) for c in space.components) / (
        manifest.num_layers * len(space.components)
    )
    each = prompts.count * evaluation_seconds(speed, share, extra)
    validated = 0 if held_out is None else held_out.count * (len(space.schemes) + 2)
    whole = evaluation_seconds(speed, 1.0, EXTRA_METRICS)
    references = prompts.count + (0 if held_out is None else held_out.count)
    streams = 2 if "ppl" in extra else 1
    row_tokens = prompts.prompt_tokens + prompts.continuation_tokens
    tokens = evaluations * streams * prompts.count * row_tokens
    weights = sum(c.num_weights for c in manifest.components)
    return Estimate(
        evaluations=evaluations,
        tokens=tokens,
        operations=2.0 * weights * share * tokens,
        replicas=replicas,
        memory_bytes=speed.memory_bytes,
        evaluation_seconds=each,
        search_seconds=evaluations * each / replicas,
        other_seconds=references * speed.generation_seconds + validated * whole / replicas,
    )


def search_space(file: SearchFile, manifest: ModelManifest) -> SearchSpace:
    """The space of a search file over a model. Raises `ValueError` for components, ties or budgets that cannot be."""
    section = file.search
    return SearchSpace(
        components=manifest.select(section.components.include, section.components.exclude),
        schemes=section.schemes,
        tied=section.tied,
        dense_bits=manifest.dense_bits,
        budget=section.stop.budget,
    )


def evaluation_seconds(speed: Speed, share_of_layers: float, extra_metrics: tuple[str, ...]) -> float:
    """Seconds a prompt: the layers that run, the head once more for KL, all of it again over human text for PPL."""
    layers, head = share_of_layers * speed.layers_seconds, speed.head_seconds
    text = layers + head * speed.text_head_factor if "ppl" in extra_metrics else 0.0
    return layers + head * (2 if "kl" in extra_metrics else 1) + text


def _expected_evaluations(file: SearchFile, space: SearchSpace) -> int:
    section = file.search

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "", (0, file.prompts.count), (), parent)

    strategy = make_strategy(
        section.strategy,
        space,
        request_for,
        rank_by=section.rank_by,
        width=section.width,
        expand=section.expand,
        min_fdt=section.stop.min_fdt,
    )
    strategy.ask()
    return strategy.expected_evaluations() or 0
