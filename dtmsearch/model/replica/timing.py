"""What the parts of an evaluation take on this device, timed on one batch of random tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import EvalRequest, PromptTokens, Reference, Speed
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.model.forward.head_metrics import compare, fetch
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.replica.plan_evaluator import Bench, PlanEvaluator

# Tokens generated to time generation.
_TIMED_TOKENS = 8
# Candidates of a layer that are timed at most: a Llama's layer has seven.
_MOST_TIMED = 7


@dataclass(frozen=True)
class BatchSeconds:
    """Seconds of a whole batch: all layers, the head where continuations are predicted; of generating these for a batch
    of its own size."""

    layers: float
    head: float
    generation: float


def time_batch(
    body: Body,
    never: Tensor,
    generating: Callable[[], AbstractContextManager[None]],
    rows: int,
    prompt_tokens: int,
    continuation_tokens: int,
    rows_continued: int,
) -> BatchSeconds:
    """Time a batch of `rows` prompts. `never` [vocabulary] marks tokens that are not chosen; generation happens within
    `generating()`, of `rows_continued` prompts."""
    length = prompt_tokens + continuation_tokens
    tokens = torch.randint(body.vocabulary_size, (rows, length), device=body.input_device)
    hidden = body.finish(tokens, None, 0)[:, prompt_tokens - 1 : -1]
    suppressed = tuple(never.nonzero().flatten().tolist())
    prompts = torch.randint(body.vocabulary_size, (rows_continued, prompt_tokens), device=body.input_device)

    def head() -> None:
        fetch([compare(body, hidden, tokens[:, prompt_tokens:], None, never)])

    def generate() -> None:
        with generating():
            body.generate(prompts, _TIMED_TOKENS, suppressed).cpu()

    return BatchSeconds(
        layers=_seconds(lambda: body.finish(tokens, None, 0)[:, -1].cpu()),
        head=_seconds(head),
        generation=_seconds(generate) * continuation_tokens / _TIMED_TOKENS,
    )


def measured_speed(
    bench: Bench,
    evaluator: PlanEvaluator,
    mode: NumericMode,
    count: int,
    prompt_tokens: int,
    continuation_tokens: int,
) -> Speed:
    """What one of `count` prompts takes on a bench, timed on one batch of random tokens."""
    length, body = prompt_tokens + continuation_tokens, bench.standing.body
    rows = min(count, bench.batches.rows(length))
    continued = min(count, bench.batches.rows_continued(length, body.cached_bytes))
    seconds = time_batch(body, bench.never, bench.standing.eagerly, rows, prompt_tokens, continuation_tokens, continued)
    memory_bytes = _memory_bytes(bench)  # before any states are kept
    tokens = torch.randint(body.vocabulary_size, (rows, length))
    text = PromptTokens(tokens.numpy().astype(np.int32), prompt_tokens)
    suppressed = tuple(bench.never.nonzero().flatten().tolist())
    reference = timed_reference(text, bench.manifest.id, mode, suppressed)
    evaluator.use(reference)
    timed = [candidates_of(layer, bench.manifest, reference) for layer in (0, bench.manifest.num_layers - 1)]
    try:
        first, last, whole = (
            time_candidates(evaluator.evaluate, requests)
            for requests in (*timed, whole_plans(bench.manifest, reference))
        )
    finally:
        evaluator.leave(reference.id)
    return Speed(
        layers_seconds=seconds.layers / rows,
        first_layer_seconds=max(first - seconds.head, 0.0) / rows,
        last_layer_seconds=max(last - seconds.head, 0.0) / rows,
        compress_seconds=max(whole - first, 0.0),
        head_seconds=seconds.head / rows,
        text_head_factor=(length - 1) / continuation_tokens,
        generation_seconds=seconds.generation / continued,
        memory_bytes=memory_bytes,
        states_kept=evaluator.kept_for(np.zeros((count, length), np.int32), prompt_tokens),
    )


def _memory_bytes(bench: Bench) -> int:
    """Weights and the activations of one batch: the device's own count, or what the widest layer makes of it."""
    body = bench.standing.body
    if body.input_device.type == "cuda":
        devices = {body.device_of(layer) for layer in range(body.num_layers + 1)}
        return sum(int(torch.cuda.max_memory_allocated(device)) for device in devices)
    widest = max(max(c.shape) for c in bench.manifest.components)
    return int(bench.weight_bytes + 4 * bench.batches.tokens * widest * body.itemsize)


def timed_reference(text: PromptTokens, manifest_id: str, mode: NumericMode, suppressed: tuple[int, ...]) -> Reference:
    """A reference whose continuations are the text's own."""
    targets = text.tokens[:, text.prompt_tokens :]
    return Reference("timed", manifest_id, mode, text.tokens, targets, np.ones(targets.shape, np.bool_), suppressed)


def candidates_of(layer: int, manifest: ModelManifest, reference: Reference) -> list[EvalRequest]:
    """Requests that change one component each of a layer."""
    components = [component for component in manifest.components if component.layer == layer][:_MOST_TIMED]
    plans = [Plan.of({component.name: "int8-channel"}) for component in components]
    return [EvalRequest(plan, reference.id, (0, reference.num_prompts)) for plan in plans]


def whole_plans(manifest: ModelManifest, reference: Reference) -> list[EvalRequest]:
    """Requests that change every component, each to something else than the one before."""
    plans = [Plan.of(dict.fromkeys((c.name for c in manifest.components), f"int{bits}-channel")) for bits in (8, 4, 6)]
    return [EvalRequest(plan, reference.id, (0, reference.num_prompts)) for plan in plans]


def time_candidates(evaluate: Callable[[Sequence[EvalRequest]], object], requests: Sequence[EvalRequest]) -> float:
    """Seconds that each of some requests takes, which leave their parent at one place, once its states are there."""
    evaluate(requests[:1])
    started_at = time.perf_counter()
    evaluate(requests)
    return (time.perf_counter() - started_at) / len(requests)


def _seconds(work: Callable[[], object]) -> float:
    """The shorter of two runs, after one to warm up. `work` waits for the device itself."""
    work()
    seconds = []
    for _ in range(2):
        started_at = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_at)
    return min(seconds)
