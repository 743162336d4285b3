"""What a search will cost, before it runs: evaluations, tokens, operations, memory, hours at a measured rate.

Loads one replica and times its parts on random tokens; records nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.config import SearchFile, texts
from dtmsearch.core.calibration import ExpertUse
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import EXTRA_METRICS, Speed, StatesFound, first_changed_layer
from dtmsearch.core.metric_registry import METRICS
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PASSES, PriceKind, priced_schemes
from dtmsearch.search.baselines import preset_rivals, rivals_of_size
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.generator import Procedure
from dtmsearch.search.strategies.strategy_registry import STRATEGIES
from dtmsearch.workflows.build import extra_metrics_of, space_of, strategy_of
from dtmsearch.workflows.session import OpenEvaluator, pool_for
from dtmsearch.workflows.take_prices import missing_prices

# So many plans are tested where one is to be shown to keep an FDT.
_USUAL_RUNGS = 12


@dataclass(frozen=True)
class Estimate:
    """`evaluations` that the search asks for; `tokens` that they run through layers, counted whole; `operations` of
    their matrix products, shared prefixes left out; `memory_bytes` of one replica, on all its `nodes_per_replica`,
    with the activations of a batch, beside which it keeps hidden states of parent plans where `states_kept` says;
    `search_seconds` with all `replicas` at work; `other_seconds` for the reference and the validation, of every round's
    models too; `training_seconds` of all rounds, on one replica's device; `start_seconds` until replicas answer."""

    evaluations: int
    tokens: int
    operations: float
    replicas: int
    memory_bytes: int
    states_kept: StatesFound
    evaluation_seconds: float
    search_seconds: float
    other_seconds: float
    nodes_per_replica: int = 1
    training_seconds: float = 0.0
    start_seconds: float = 0.0


def estimate(
    file: SearchFile, where: PoolSettings = PoolSettings(), evaluator: OpenEvaluator | None = None
) -> Estimate:
    """Estimate the search of a file on the machines of `where`. Raises what `dtmsearch.workflows.run.run` raises."""
    texts.check_readable(file)
    prompts = file.prompts
    started = time.monotonic()
    with pool_for(file, where, Silent(), evaluator) as pool:
        manifest = pool.manifest()
        start_seconds = time.monotonic() - started
        space = space_of(file, manifest)
        by_prices = _takes_prices(file) and not missing_prices(file.search.strategy, space, pool)
        speed = pool.measure_speed(prompts.count, prompts.prompt_tokens, prompts.continuation_tokens)
        replicas = pool.num_replicas
    extra = extra_metrics_of(file)
    expected = _expected(file, space, manifest, by_prices)
    evaluations, prompts_each, share = expected.evaluations, expected.prompts_each, expected.share_of_layers
    each = prompts_each * candidate_seconds(speed, share, manifest.num_layers, extra)
    each += speed.compress_seconds * expected.share_of_plans
    chooses = file.search.strategy == "sparsity" or not STRATEGIES[file.search.strategy].only_measures
    held_out = file.validation_prompts if chooses else None
    validated = 0 if held_out is None else _validated_prompts(file, space, held_out.count)
    whole = _with_head(speed, speed.layers_seconds, EXTRA_METRICS)
    references = prompts.count + (0 if held_out is None else held_out.count)
    if file.min_fdt_prompts is not None:  # the plans that are tested, and the prompts that only they are tested on
        validated += file.min_fdt_prompts.count * _USUAL_RUNGS
        references += file.min_fdt_prompts.count
    streams = 2 if any("text" in METRICS[name].needs for name in extra) else 1
    row_tokens = prompts.prompt_tokens + prompts.continuation_tokens
    # A backward pass is counted as two forward ones, through all layers.
    priced = expected.priced * row_tokens
    tokens = round(evaluations * prompts_each * streams * row_tokens) + priced
    pricing_seconds = expected.priced * _with_head(speed, speed.layers_seconds, ())
    weights = sum(c.num_weights for c in manifest.components)
    return Estimate(
        evaluations=evaluations,
        tokens=tokens,
        operations=2.0 * weights * (share * (tokens - priced) + priced),
        replicas=replicas,
        memory_bytes=speed.memory_bytes,
        states_kept=speed.states_kept,
        evaluation_seconds=each,
        search_seconds=(evaluations * each + pricing_seconds) / replicas,
        nodes_per_replica=where.nodes_per_replica,
        other_seconds=references * speed.generation_seconds + validated * whole / replicas,
        training_seconds=_training_seconds(file, _with_head(speed, speed.layers_seconds, ()) / row_tokens),
        start_seconds=start_seconds,
    )


def _validated_prompts(file: SearchFile, space: SearchSpace, count: int) -> int:
    """Held-out prompts that validation runs whole plans over, as `workflows.validate` does: on one half the rivals, and
    the plan where one of them may take its place; on the other the plan, the base model, every scheme's uniform plan,
    llama.cpp's mixture and the rival that was chosen."""
    prunes = file.search.strategy == "sparsity"
    stays = prunes or file.search.training_rounds > 0 or file.search.stop.min_fdt is not None
    named = set(space.schemes)
    if not prunes and len(named) == 1 and space.progress(space.uniform(space.schemes[0])) <= 1.0:
        named = set()  # its uniform plan is the plan
    cost = space.expected_cost
    smaller = {scheme for scheme in named if space.budget.counted(space.size(space.uniform(scheme))) <= cost}
    rivals = (set(rivals_of_size(space, cost)) - set(space.schemes)) | smaller
    presets = len(preset_rivals(space, cost))
    reported = len(named) + presets + 2 + _num_milestones(file)
    if len(rivals) + presets <= (1 if stays else 0):  # nothing is chosen
        return count * (reported + len(rivals - named))
    reported += 0 if rivals <= named else 1
    return count // 2 * (len(rivals) + presets + (0 if stays else 1)) + (count - count // 2) * reported


def _num_milestones(file: SearchFile) -> int:
    """The models that a search in rounds comes to before its last: pruned or smaller ones, and trained ones."""
    rounds = len(file.search.pruning_rounds) if file.search.strategy == "sparsity" else file.search.training_rounds
    return max(0, rounds + file.search.training_rounds - 1)


def _training_seconds(file: SearchFile, forward_seconds: float) -> float:
    """Seconds of a search's trainings, where a forward pass takes so long a token. A step goes forward once and
    backward at twice that; forward once more where activations are computed anew, or a teacher is asked. A fit reads
    its text in both models, and once more in what it fits."""
    section = file.search.recovery
    if section is None:
        return 0.0
    passes = 3.0 + section.checkpointing + section.asks_base
    tokens = section.num_steps * section.batch_tokens * passes + section.repair_tokens * 3.0
    return file.search.training_rounds * tokens * forward_seconds


def candidate_seconds(
    speed: Speed, share_of_layers: float, num_layers: int, extra_metrics: tuple[str, ...] = ()
) -> float:
    """Seconds a prompt of candidates that run through so much of the layers on average: between those that change the
    first layer and those that change the last."""
    first, last = speed.first_layer_seconds, speed.last_layer_seconds
    height = (share_of_layers * num_layers - 1) / max(num_layers - 1, 1)
    return _with_head(speed, last + (first - last) * height, extra_metrics)


def _with_head(speed: Speed, layers: float, extra_metrics: tuple[str, ...]) -> float:
    """The layers, the head once more for KL and others of its kind, all of it again over human text for PPL."""
    head = speed.head_seconds
    metrics = [METRICS[name] for name in extra_metrics]
    text = layers + head * speed.text_head_factor if any("text" in metric.needs for metric in metrics) else 0.0
    return layers + head * (2 if any(metric.needs_base for metric in metrics) else 1) + text


@dataclass(frozen=True)
class _Expected:
    """`evaluations` that a search asks for; the prompts that one of them runs over and the share of the layers, on
    average; the share of them that are plans of many components, which no parent of theirs holds; the prompts that
    prices forward, slopes of rounds left out, for whether there are any measurements say."""

    evaluations: int
    prompts_each: float
    share_of_layers: float
    share_of_plans: float = 0.0
    priced: int = 0


def _takes_prices(file: SearchFile) -> bool:
    return file.search.strategy != "sparsity" and STRATEGIES[file.search.strategy].takes_prices


def _expected(file: SearchFile, space: SearchSpace, manifest: ModelManifest, by_prices: bool) -> _Expected:
    # How much is asked for hardly depends on the errors of weights: those of a model like any other do.
    nominal = {(c.name, s.name): 4.0 ** -(s.bits or 2) for c in space.components for s in space.parsed}

    priced = 0

    def take(kind: PriceKind, around: Plan, samples: tuple[int, int]) -> NDArray[np.float32]:
        nonlocal priced
        priced += PASSES[kind] * (samples[1] - samples[0])
        schemes = priced_schemes(kind, space.schemes)
        one = [[nominal.get((c.name, s), 0.0) ** 0.5 for s in schemes] for c in space.components]
        return np.full((samples[1] - samples[0], len(one), len(schemes)), one, np.float32)

    sparsity = file.search.strategy == "sparsity"  # which is put together apart from the others
    uses = [
        ExpertUse(c.mixture, c.expert, s.name, 1, 1, 1.0, nominal[c.name, s.name])
        for c in space.components
        for s in space.parsed
        if c.mixture
    ]
    strategy = strategy_of(file, space, "", nominal, take=take if by_prices else None, uses=uses)
    asks = strategy.ask()
    layers = [manifest.num_layers - first_changed_layer(ask.request, manifest) for ask in asks]
    share = sum(layers) / (len(layers) * manifest.num_layers) if layers else 1.0
    evaluations = strategy.expected_evaluations() or 0
    if sparsity or not isinstance(strategy, Procedure) or not evaluations:
        return _Expected(evaluations, file.prompts.count, share)
    prompts, plans = strategy.expected_prompts(), 1.0
    if all(ask.perturbation is not None for ask in asks):
        # What follows on components alone are moves around a plan, alike, and whole plans, about as many of each.
        alone = sum(ask.request.prompts[1] - ask.request.prompts[0] for ask in asks)
        share = (alone * share + (prompts - alone) * (1.0 + share) / 2.0) / prompts
        plans = (1.0 - len(asks) / evaluations) / 2.0
    return _Expected(evaluations, prompts / evaluations, share, plans, priced)
