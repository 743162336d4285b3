"""What a search on GPUs costs beyond its evaluations, at a Llama-2-7B shape with random weights.

    PYTHONPATH=benchmarks python benchmarks/gpu.py generation     the reference, against transformers' caches
    PYTHONPATH=benchmarks python benchmarks/gpu.py pool --gpus 1,2    a probe through a search's pool
    PYTHONPATH=benchmarks python benchmarks/gpu.py beam --gpus 1      a beam search: how much of it the GPUs work

`benchmarks/replica.py` measures the evaluations themselves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

import click
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from overhead import evaluating_share
from shapes import SHAPES, ShapedReplica

import dtmsearch
from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.core.evaluation import EvalRequest, ModelSpec, PromptTokens, Reference, ReplicaSettings
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task
from dtmsearch.store.store import ResultStore

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
    with torch.inference_mode(), replica._standing.eagerly():
        return timed(lambda: replica.model.generate(tokens, generation_config=settings))


def disagreement() -> float:
    """Share of tokens on which the packaged trained model, compiled, leaves what it chose in eager mode."""
    spec = ModelSpec(str(Path(dtmsearch.__file__).parent / "demo" / "model"), dtype="bfloat16", compile="never")
    text = (Path(dtmsearch.__file__).parent / "run.py").read_text(encoding="utf-8")
    eager = Replica(spec, ReplicaSettings())
    prompts, _ = eager.cut_prompts([text], 16, PROMPT, CONTINUATION, 0)
    compiled = Replica(replace(spec, compile="always"), ReplicaSettings())
    compiled.use(replace(eager.make_reference(prompts), mode=compiled.mode))
    return compiled.canary(next(iter(compiled._evaluator.references)))


def pool_of(shape: str, gpus: int) -> ReplicaPool:
    """A replica a GPU; with none, one on the CPU."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    spec = ModelSpec(shape, dtype="bfloat16", compile="always" if gpus else "never")
    settings = PoolSettings(replicas=gpus or 1, gpus_per_replica=1.0 if gpus else None)
    # Random weights leave many choices at near ties, where compiled layers and a canary's eager ones part.
    return ReplicaPool(spec, settings, click.echo, replica_class="shapes:ShapedReplica")


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


class Utilisation:
    """What the driver of the GPUs that are visible counts, once a second: the part of the time since in which a kernel
    ran. Nothing where there is no `nvidia-smi`."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=1000"]
        query += [f"--id={visible}"] if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) else []
        self._process: subprocess.Popen[str] | None = None
        if shutil.which(query[0]):
            self._process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)  # noqa: S603 - no user's words
            Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.samples.append((time.time(), float(line) / 100))

    def __enter__(self) -> Utilisation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()

    def within(self, start: float, stop: float) -> list[float]:
        """The samples of seconds that lie wholly between two times."""
        return [share for at, share in self.samples if start + 1 < at < stop]


@dataclass(frozen=True)
class Spans:
    """When each evaluation began and ended, in seconds since the epoch, ordered by replica and time."""

    replica: NDArray[np.str_]
    started_at: NDArray[np.float64]
    finished_at: NDArray[np.float64]

    @staticmethod
    def of(rows: pa.Table) -> Spans:
        replica = np.array(rows["replica"].to_pylist())
        finished_at = rows["finished_at"].to_numpy().astype("datetime64[us]").astype(np.int64) / 1e6
        order = np.lexsort((finished_at, replica))
        started_at = finished_at - rows["wall_seconds"].to_numpy()
        return Spans(replica[order], started_at[order], finished_at[order])

    @property
    def gaps(self) -> NDArray[np.float64]:
        """Seconds of a replica between one evaluation and the next."""
        same = self.replica[1:] == self.replica[:-1]
        return (self.started_at[1:] - self.finished_at[:-1])[same]


@main.command()
@click.option("--shape", default="llama2-7b", type=click.Choice(list(SHAPES)))
@click.option("--prompts", default=128, show_default=True)
@click.option("--gpus", default=1, show_default=True, help="0: a replica on the CPU.")
@click.option("--width", default=3, show_default=True)
@click.option("--expand", default=16, show_default=True, help="How many children a plan has after the first round.")
@click.option("--seconds", default=120.0, show_default=True, help="The search ends with the evaluation then under way.")
def beam(shape: str, prompts: int, gpus: int, width: int, expand: int, seconds: float) -> None:
    """A beam search with its pool and its store: the part of the wall time in which the GPUs work.

    Rounds after the first are short, so that there are more ends of rounds in the time than a real search has.
    """
    began_at = time.perf_counter()

    def say(what: str) -> None:
        click.echo(f"{time.perf_counter() - began_at:6.1f} s  {what}")

    with (
        tempfile.TemporaryDirectory() as folder,
        pool_of(shape, gpus) as replicas,
        ResultStore(folder).writer("beam") as writer,
    ):
        manifest = replicas.manifest()
        say("a replica has loaded")
        reference = reference_in(replicas, shape, prompts)
        say(f"the reference of {prompts} prompts is made, and every replica has repeated it")
        writer.put_components(manifest, manifest.components)

        def request_for(plan: Plan, parent: Plan) -> EvalRequest:
            return EvalRequest(plan, reference.id, (0, prompts), (), parent)

        space = SearchSpace(manifest.components, ("int8-channel",))
        strategy = Beam(Task(space, request_for), TreeSettings(width=width, expand=expand))
        with Utilisation() as utilisation:
            search(strategy, replicas, writer, Silent(), limit_seconds=seconds)
        say("the search is over")
        rows = ResultStore(folder).table("evaluations", ["replica", "wall_seconds", "finished_at"])
    spans = Spans.of(rows)
    gaps = np.sort(spans.gaps)[::-1]
    sampled = utilisation.within(float(spans.started_at.min()), float(spans.finished_at.max()))
    click.echo(
        f"{gpus} GPUs, beam of width {width}, {strategy.step} rounds decided, {rows.num_rows} evaluations of {prompts} "
        f"prompts in {np.ptp([spans.started_at.min(), spans.finished_at.max()]):.1f} s"
    )
    click.echo(f"evaluating: {evaluating_share(rows):.2%} of the time from a replica's first evaluation to its last")
    click.echo(f"between evaluations: {gaps.sum():.2f} s; the longest, in ms: {np.round(1e3 * gaps[:12]).tolist()}")
    if sampled:
        click.echo(f"a kernel ran in {np.mean(sampled):.2%} of the time (nvidia-smi, {len(sampled)} samples)")


if __name__ == "__main__":
    main()
