"""What a search on GPUs costs beyond its evaluations, at a Llama-2-7B shape with random weights.

    PYTHONPATH=benchmarks python benchmarks/gpu.py generation     the reference, against transformers' caches
    PYTHONPATH=benchmarks python benchmarks/gpu.py pool --gpus 1,2    a probe through a search's pool
    PYTHONPATH=benchmarks python benchmarks/gpu.py beam --gpus 1      a beam search: how much of it the GPUs work

`benchmarks/replica.py` measures the evaluations themselves.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from overhead import Silence, evaluating_share
from shapes import SHAPES, ShapedReplica

import dtmsearch
from dtmsearch.cluster.health import Health
from dtmsearch.cluster.pool import PoolSettings, ReplicaPool
from dtmsearch.model.replica import Replica
from dtmsearch.plans.evaluation import EvalRequest, ModelSpec, PromptTokens, Reference, ReplicaSettings
from dtmsearch.plans.plan import Budget, Perturbation, Plan
from dtmsearch.results.store import ResultStore
from dtmsearch.search.beam import Beam
from dtmsearch.search.scheduler import search
from dtmsearch.search.space import SearchSpace

PROMPT, CONTINUATION = 100, 100


def random_prompts(count: int, vocabulary: int) -> PromptTokens:
    tokens = np.random.default_rng(0).integers(3, vocabulary, (count, PROMPT + CONTINUATION))
    return PromptTokens(tokens.astype(np.int32), PROMPT)


def timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started_at = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started_at


def cached_generation_seconds(
    replica: ShapedReplica, prompts: PromptTokens, cache: str | None, compiled: bool
) -> float:
    """Seconds in which transformers generates the same with one of its caches."""
    from transformers import GenerationConfig

    tokens = torch.from_numpy(prompts.tokens[:, :PROMPT]).long().cuda()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=CONTINUATION, suppress_tokens=[2], eos_token_id=None, pad_token_id=0,
        cache_implementation=cache, disable_compile=not compiled,
    )  # fmt: skip
    with torch.inference_mode(), replica._generating():
        return timed(lambda: replica._body.model.generate(tokens, generation_config=settings))


def disagreement() -> float:
    """Share of tokens on which the packaged trained model, compiled, leaves what it chose in eager mode."""
    spec = ModelSpec(str(Path(dtmsearch.__file__).parent / "demo" / "model"), dtype="bfloat16", compile="never")
    text = (Path(dtmsearch.__file__).parent / "run.py").read_text(encoding="utf-8")
    eager = Replica(spec, ReplicaSettings())
    prompts, _ = eager.cut_prompts([text], 16, PROMPT, CONTINUATION, 0)
    compiled = Replica(replace(spec, compile="always"), ReplicaSettings())
    compiled.use(replace(eager.make_reference(prompts), mode=compiled.mode))
    return compiled.canary(next(iter(compiled._references)))


def pool_of(shape: str, gpus: int) -> ReplicaPool:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    spec = ModelSpec(shape, dtype="bfloat16", compile="always")
    settings = PoolSettings(replicas=gpus, gpus_per_replica=1.0)
    # Random weights leave many choices at near ties, where compiled layers and a canary's eager ones part.
    health = Health(token_share=0.5)
    return ReplicaPool(spec, settings, click.echo, replica_class="shapes:ShapedReplica", health=health)


def reference_in(pool: ReplicaPool, shape: str, count: int) -> Reference:
    reference = pool.make_reference(random_prompts(count, SHAPES[shape]["vocab_size"]))
    pool.use(reference)
    pool.wait_until_ready()
    return reference


@click.group()
def main() -> None:
    pass


@main.command()
@click.option("--shape", default="llama2-7b", type=click.Choice(list(SHAPES)))
@click.option("--prompts", default=128, show_default=True)
def generation(shape: str, prompts: int) -> None:
    replica = ShapedReplica(ModelSpec(shape, dtype="bfloat16", compile="always"), ReplicaSettings())
    wanted = random_prompts(prompts, SHAPES[shape]["vocab_size"])
    replica.generate(Plan(), replace(wanted, tokens=wanted.tokens[:, : PROMPT + 2]))
    click.echo(
        f"generating the reference of {prompts} prompts: {timed(lambda: replica.generate(Plan(), wanted)):.2f} s"
    )
    for cache, compiled in ((None, False), ("static", False), ("static", True)):
        seconds = [cached_generation_seconds(replica, wanted, cache, compiled) for _ in range(2)]
        click.echo(f"transformers, cache {cache}, compiled {compiled}: {seconds[0]:.2f} s, again {seconds[1]:.2f} s")
    click.echo(f"compiled and eager choose differently on {disagreement():.2%} of a trained model's tokens")


@main.command()
@click.option("--shape", default="llama2-7b", type=click.Choice(list(SHAPES)))
@click.option("--prompts", default=128, show_default=True)
@click.option("--gpus", default="1,2", show_default=True)
def pool(shape: str, prompts: int, gpus: str) -> None:
    """A probe through the pool of a search, with each number of GPUs."""
    first = 0.0
    for size in map(int, gpus.split(",")):
        with pool_of(shape, size) as replicas:
            manifest, reference = replicas.manifest(), reference_in(replicas, shape, prompts)
            plans = [Plan().with_(Perturbation(c.name, "int8-channel")) for c in manifest.components]
            started_at = time.perf_counter()
            replicas.submit([EvalRequest(plan, reference.id, (0, prompts)) for plan in plans])
            arrived = []
            while len(arrived) < len(plans):
                arrived += replicas.poll(1.0)
            seconds = time.perf_counter() - started_at
        busy = sum(outcome.provenance.wall_seconds for outcome in arrived) / (size * seconds)
        first = first or seconds * size
        click.echo(f"{size} GPUs: {seconds:.1f} s, {first / seconds:.3f} x one, {busy:.1%} evaluating")


@main.command()
@click.option("--shape", default="llama2-7b", type=click.Choice(list(SHAPES)))
@click.option("--prompts", default=32, show_default=True)
@click.option("--gpus", default=1, show_default=True)
@click.option("--width", default=2, show_default=True)
@click.option("--rounds", default=4, show_default=True)
def beam(shape: str, prompts: int, gpus: int, width: int, rounds: int) -> None:
    """A beam search with its pool and its store: the part of the GPUs' time that lies within evaluations."""
    with (
        tempfile.TemporaryDirectory() as folder,
        pool_of(shape, gpus) as replicas,
        ResultStore(folder).writer("beam") as writer,
    ):
        manifest, reference = replicas.manifest(), reference_in(replicas, shape, prompts)
        writer.put_components(manifest, manifest.components)

        def request_for(plan: Plan, parent: Plan) -> EvalRequest:
            return EvalRequest(plan, reference.id, (0, prompts), (), parent)

        space = SearchSpace(manifest.components, ("int8-channel",), budget=Budget(components=rounds))
        started_at = time.perf_counter()
        search(Beam(space, request_for, width=width), replicas, writer, Silence())
        seconds = time.perf_counter() - started_at
        rows = ResultStore(folder).table("evaluations", ["replica", "wall_seconds", "finished_at"])
    click.echo(
        f"{gpus} GPUs, beam of width {width}, {rounds} rounds, {rows.num_rows} evaluations of {prompts} prompts in "
        f"{seconds:.1f} s: {evaluating_share(rows):.1%} evaluating"
    )


if __name__ == "__main__":
    main()
