"""How long `auto` searches on a large model: a shape with random weights on one GPU, default settings.

    PYTHONPATH=benchmarks python benchmarks/search_seconds.py [--shape llama2-7b] [--prompts 256] [--errors]

An average of four bits of code from 3, 4, 5, 6 and 8, in groups of 128. Continuations are random tokens: the same work,
without generating them. Prints the seconds of prices (by backward passes; with `--errors`: of weight errors, and probes
in the place of prices) and of the search.
"""

from __future__ import annotations

import time

import click
import numpy as np
import torch
from numpy.typing import NDArray
from search_quality import PRICE_BLOCK, Counter, Forgetful, Watcher
from shapes import SHAPES, ShapedReplica

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.prices import PriceKind, PriceRequest, priced_schemes
from dtmsearch.search.loop import search
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import SolverSettings, make_strategy

PROMPT, CONTINUATION = 100, 100
SCHEMES = tuple(f"int{bits}-g128" for bits in (3, 4, 5, 6, 8))


@click.command()
@click.option("--shape", default="llama2-7b", type=click.Choice(list(SHAPES)), show_default=True)
@click.option("--prompts", default=256, show_default=True)
@click.option("--compile", "compiled", default="never", type=click.Choice(["always", "never"]), show_default=True)
@click.option("--errors", "by_errors", is_flag=True)
def main(shape: str, prompts: int, compiled: str, by_errors: bool) -> None:
    started_at = time.perf_counter()
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    replica = ShapedReplica(ModelSpec(shape, dtype=dtype, compile=compiled), ReplicaSettings())
    manifest = replica.manifest()
    reference = random_reference(replica, prompts, SHAPES[shape]["vocab_size"])
    replica.use(reference)
    warm_up(replica, reference)
    print(f"loading and warming up: {time.perf_counter() - started_at:.1f} s", flush=True)
    space = SearchSpace(manifest.components, SCHEMES, dense_bits=manifest.dense_bits)
    bits = space.size(space.uniform("int4-g128")).bits_per_weight
    space = SearchSpace(manifest.components, SCHEMES, (), manifest.dense_bits, Budget(bits_per_weight=bits))
    counter = Counter(replica, PROMPT + CONTINUATION)
    pricing_seconds = 0.0
    settings = SolverSettings()
    if by_errors:
        started_at = time.perf_counter()
        found = replica.weight_errors([c.name for c in manifest.components], SCHEMES)
        pricing_seconds = time.perf_counter() - started_at
        settings = SolverSettings(errors={(e.component, e.scheme): e.plain for e in found})

    def take(kind: PriceKind, around: Plan, samples: tuple[int, int]) -> NDArray[np.float32]:
        nonlocal pricing_seconds
        taken_at = time.perf_counter()
        names, parts = tuple(c.name for c in manifest.components), []
        schemes = priced_schemes(kind, SCHEMES)
        for first in range(*samples, PRICE_BLOCK):
            part = first, min(first + PRICE_BLOCK, samples[1])
            block = replica.price(PriceRequest(reference.id, part, names, schemes, 0, kind, around, ""))
            counter.tokens += block.tokens
            parts.append(block.products)
        seconds = time.perf_counter() - taken_at
        pricing_seconds += seconds
        print(
            f"  {kind} of {len(names) * len(SCHEMES)} options by {samples[1] - samples[0]} samples: {seconds:.1f} s",
            flush=True,
        )
        return np.concatenate(parts)

    if not by_errors:
        settings = SolverSettings(take=take)

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, reference.id, (0, reference.num_prompts), (), parent)

    strategy = make_strategy("auto", space, request_for, "kl", continuation_tokens=CONTINUATION, solver=settings)
    watcher = Timed(counter)
    started_at = time.perf_counter()
    plan = search(strategy, counter, Forgetful(), watcher)
    seconds = time.perf_counter() - started_at
    assert plan is not None
    for at, tokens, score in watcher.decided:
        print(f"  after {at - started_at:5.1f} s and {tokens / 1e6:.3f} Mtokens a plan of KL {score:.4f}")
    print(
        f"{shape}, {len(manifest.components)} components, {prompts} prompts, {compiled} compiled: "
        f"{'errors' if by_errors else 'prices'} of {len(SCHEMES)} schemes {pricing_seconds:.1f} s, search "
        f"{seconds:.1f} s{'' if by_errors else ' with them'}, {counter.evaluations} evaluations, "
        f"{counter.tokens / 1e6:.2f} Mtokens, {space.size(plan).bits_per_weight:.4f} of {bits:.4f} bits per weight"
    )


class Timed(Watcher):
    """Notes when each decision was made, too."""

    def __init__(self, counter: Counter) -> None:
        super().__init__(counter)
        self.decided: list[tuple[float, int, float]] = []

    def on_decision(self, decision: object, replayed: bool) -> None:
        self.decided.append((time.perf_counter(), self.counter.tokens, getattr(decision, "score", 0.0)))


def random_reference(replica: ShapedReplica, count: int, vocabulary: int) -> Reference:
    tokens = np.random.default_rng(0).integers(3, vocabulary, (count, PROMPT + CONTINUATION)).astype(np.int32)
    agrees = np.ones((count, CONTINUATION), np.bool_)
    return Reference(f"random-{count}", replica.manifest().id, replica.mode, tokens, tokens[:, PROMPT:], agrees, (2,))


def warm_up(replica: ShapedReplica, reference: Reference) -> None:
    """One evaluation of each batch shape that the search will use, so that no compiling falls into its time."""
    for count in (4, 16, 32, reference.num_prompts):
        replica.evaluate([EvalRequest(Plan(), reference.id, (0, min(count, reference.num_prompts)), ("kl",))])


if __name__ == "__main__":
    main()
