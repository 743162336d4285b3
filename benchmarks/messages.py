"""What the driver does in a second: the messages of 512 replicas, batched as in production, into the real store.

    python benchmarks/messages.py [--replicas 512] [--evaluation-ms 200] [--seconds 20]

A beam over 224 components through the real pool, the real Ray and the real store. The pool sees 512 replicas; a few
processes answer for all of them, after as long as a replica would have taken. What counts is the driver's own processor
time for each result: what it could do in a second if it had a processor for itself.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import click
import ray
from overhead import Silence
from sleeping import Sleeping, make_manifest

from dtmsearch.cluster.joining import connect
from dtmsearch.cluster.pool import PoolSettings, ReplicaPool
from dtmsearch.plans.evaluation import EvalRequest, ModelSpec, Outcome, ReplicaSettings
from dtmsearch.plans.plan import Plan
from dtmsearch.results.store import ResultStore
from dtmsearch.search.beam import Beam
from dtmsearch.search.scheduler import search
from dtmsearch.search.space import SearchSpace

_LAYERS = 32


class Many:
    """Answers for many replicas at once: each of its calls waits on its own."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._replica = Sleeping(ModelSpec(f"{_LAYERS} 0"), ReplicaSettings(), "many", "here")

    async def load(self, *_: Any) -> tuple[str, int]:
        return "here", os.getpid()

    async def call(self, method: str, *arguments: Any) -> Any:
        return make_manifest(_LAYERS) if method == "manifest" else await self._evaluate(*arguments)

    async def _evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        await asyncio.sleep(self._seconds * len(requests))
        return self._replica.evaluate(requests)


@click.command(help=__doc__)
@click.option("--replicas", default=512, show_default=True)
@click.option("--processes", default=2, show_default=True)
@click.option("--evaluation-ms", default=200.0, show_default=True)
@click.option("--seconds", default=20.0, show_default=True)
@click.option("--prompts", default=100, show_default=True)
@click.option("--width", default=50, show_default=True, help="Plans kept: so many that rounds do not end all the time.")
def main(replicas: int, processes: int, evaluation_ms: float, seconds: float, prompts: int, width: int) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    connect(None)
    actor_class: Any = ray.remote(Many)
    actors = [
        actor_class.options(num_cpus=0, max_concurrency=4 * replicas).remote(evaluation_ms / 1000)
        for _ in range(processes)
    ]
    started = iter(range(1 << 30))

    def start_host(*_: Any) -> Any:
        actor = actors[next(started) % processes]
        return SimpleNamespace(
            actor=actor, placed=actor.load.remote(), group=None, end=lambda: None, leave=lambda: None
        )

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "messages", (0, prompts), (), parent)

    with (
        patch("dtmsearch.cluster.crew.start_host", start_host),
        tempfile.TemporaryDirectory() as folder,
        ReplicaPool(ModelSpec(""), PoolSettings(replicas=replicas)) as pool,
        ResultStore(folder).writer("messages") as writer,
    ):
        manifest = pool.manifest()
        pool.wait_until_ready()
        writer.put_components(manifest, manifest.components)
        beam = Beam(SearchSpace(manifest.components, ("int8-channel",)), request_for, width=width)
        started_at, cpu_started_at = time.perf_counter(), time.process_time()
        search(beam, pool, writer, Silence(), limit_seconds=seconds)
        elapsed, cpu = time.perf_counter() - started_at, time.process_time() - cpu_started_at
        number = ResultStore(folder).table("evaluations", ["evaluation_id"]).num_rows
    click.echo(f"{replicas} replicas, {number} results in {elapsed:.1f} s, {number / elapsed:.0f} a second")
    click.echo(f"driver: {cpu:.1f} s of processor time, {number / cpu:.0f} results for each second of it")
    ray.shutdown()


if __name__ == "__main__":
    main()
