"""What the driver does in a second: the messages of 512 replicas, batched as in production, into the real store.

    python benchmarks/messages.py [--replicas 512] [--evaluation-ms 200] [--rounds 4]

A beam over 224 components through the real pool, the real Ray and the real store. The pool sees 512 replicas; a few
processes answer for all of them, each call after as long as a replica would have taken: in proportion to the layers
that must run, `--evaluation-ms` on average. Canaries are sent as always. What counts is the driver's own CPU time
for each result: what it could do in a second if it had a CPU for itself.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import ray
from sleeping import Sleeping, make_manifest

from dtmsearch.cluster.connect import connect
from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.cluster.replica_handle import Call, ReplicaHandle
from dtmsearch.core.evaluation import (
    FIXED_COST,
    EvalRequest,
    EvalResult,
    ModelSpec,
    Outcome,
    Reference,
    ReplicaSettings,
    evaluation_cost,
)
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task
from dtmsearch.store.store import ResultStore

_LAYERS = 32
_PROMPTS = 100


class Many:
    """Answers for many replicas at once: each does its calls one after the other, and waits as long as they take."""

    def __init__(self, seconds: float) -> None:
        self._manifest = make_manifest(_LAYERS)
        self._seconds = seconds / ((_LAYERS + 1) / 2 + FIXED_COST) / _PROMPTS  # for one layer and prompt
        self._replica = Sleeping(ModelSpec(f"{_LAYERS} 0"), ReplicaSettings(), "many", "here")
        self._at_work: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def load(self, *_: Any) -> tuple[str, int]:
        return "here", os.getpid()

    async def take(self, *_: Any) -> float:
        return 0.0

    async def call(self, number: int, method: str, *arguments: Any) -> Any:
        async with self._at_work[number]:
            if method == "evaluate":
                return await self._evaluate(*arguments)
            return self._manifest if method == "manifest" else self._check(*arguments)

    async def _evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        seconds = [self._seconds * evaluation_cost(request, self._manifest) for request in requests]
        await asyncio.sleep(sum(seconds))
        answers = zip(self._answer(requests), seconds, strict=True)
        return [replace(o, provenance=replace(o.provenance, wall_seconds=each)) for o, each in answers]

    def _answer(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        return self._replica.evaluate(requests)

    def _check(self, plan: Plan, reference_id: str, num_prompts: int) -> tuple[Any, Any]:
        if not plan.entries:
            return np.zeros(num_prompts, np.int32), np.ones(num_prompts, np.float32)
        (found,) = self._answer([request_of(plan, Plan(), reference_id)])
        assert isinstance(found, EvalResult)
        return found.sdt[:num_prompts], found.dppl[:num_prompts]


class One:
    """The actor of one replica, for which one of `Many` answers."""

    def __init__(self, actor: Any, number: int) -> None:
        self.load, self.take = actor.load, actor.take
        self.call = SimpleNamespace(remote=partial(actor.call.remote, number))


def request_of(plan: Plan, parent: Plan, reference_id: str = "messages") -> EvalRequest:
    return EvalRequest(plan, reference_id, (0, _PROMPTS), (), parent)


def reference() -> Reference:
    """Prompts that the replicas are given, so that they can be sent canaries."""
    tokens = np.zeros((_PROMPTS, 200), np.int32)
    return Reference(
        "messages",
        "0" * 32,
        NumericMode("none", "cpu", "none"),
        tokens,
        tokens[:, :100],
        np.ones((_PROMPTS, 100), np.bool_),
        (),
    )


@contextmanager
def counting(pool: ReplicaPool) -> Iterator[Counter[str]]:
    """Counts the calls that are sent within the block, canaries apart."""
    sent: Counter[str] = Counter()
    send = pool._send

    def count(replica: ReplicaHandle, call: Call) -> Any:
        sent["calls" if call.check is None else "canaries"] += 1
        return send(replica, call)

    with patch.object(pool, "_send", count):
        yield sent


@click.command(help=__doc__)
@click.option("--replicas", default=512, show_default=True)
@click.option("--processes", default=2, show_default=True)
@click.option("--evaluation-ms", default=200.0, show_default=True)
@click.option("--rounds", default=4, show_default=True, help="The first of them has one parent only.")
@click.option("--width", default=50, show_default=True, help="Plans kept: so many that rounds do not end all the time.")
def main(replicas: int, processes: int, evaluation_ms: float, rounds: int, width: int) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    connect(None)
    actor_class: Any = ray.remote(Many)
    actors = [
        actor_class.options(num_cpus=0, max_concurrency=4 * replicas).remote(evaluation_ms / 1000)
        for _ in range(processes)
    ]
    started = iter(range(1 << 30))

    def start_host(*_: Any) -> Any:
        number = next(started)
        actor = One(actors[number % processes], number)
        placed = actor.load.remote()
        return SimpleNamespace(actor=actor, placed=placed, group=None, end=lambda: None, leave=lambda: None)

    with (
        patch("dtmsearch.cluster.replicas.start_host", start_host),
        tempfile.TemporaryDirectory() as folder,
        ReplicaPool(ModelSpec(""), PoolSettings(replicas=replicas)) as pool,
        ResultStore(folder).writer("messages") as writer,
    ):
        manifest = pool.manifest()
        pool.use(reference())
        pool.wait_until_ready()
        writer.put_components(manifest, manifest.components)
        space = SearchSpace(manifest.components, ("int8-channel",), budget=Budget(components=rounds))
        beam = Beam(Task(space, request_of), TreeSettings(width=width))
        started_at, cpu_started_at = time.perf_counter(), time.process_time()
        with counting(pool) as sent:
            search(beam, pool, writer, Silent())
        elapsed, cpu = time.perf_counter() - started_at, time.process_time() - cpu_started_at
        number = ResultStore(folder).table("evaluations", ["evaluation_id"]).num_rows
    click.echo(f"{replicas} replicas, {number} results in {elapsed:.1f} s, {number / elapsed:.0f} per second")
    click.echo(
        f"{sent['calls']} calls and {sent['canaries']} canaries sent, {number / sent['calls']:.1f} results a call"
    )
    click.echo(f"driver: {cpu:.1f} s of CPU time, {number / cpu:.0f} results for each second of it")
    ray.shutdown()


if __name__ == "__main__":
    main()
