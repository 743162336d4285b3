"""What the driver and Ray cost: the share of replica time that is spent evaluating when an evaluation takes 50 ms.

    python benchmarks/overhead.py [--replicas 1,2,4,8,16] [--seconds 20] [--evaluation-ms 50] [--width 10]

A beam search over 224 components through the real pool and the real store, in which only the replicas' work is
replaced by sleeping, so that a few cores host many. It begins when all replicas have started. A replica's time runs
from its first recorded evaluation to its last, the waits between rounds included. The driver's own CPU time is
given beside it: what it has left is room for more replicas.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import ray

from dtmsearch.cluster.connect import connect
from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.core.evaluation import EvalRequest, ModelSpec
from dtmsearch.core.plan import Plan
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task
from dtmsearch.store.store import ResultStore

_LAYERS = 32


@dataclass(frozen=True)
class Load:
    """How busy the replicas of one search were, and its driver."""

    evaluations: int
    rounds: int
    wall_seconds: float
    evaluating: float
    driver: float


def measure_load(num_replicas: int, seconds: float, evaluation_seconds: float, width: int, num_prompts: int) -> Load:
    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "sleeping", (0, num_prompts), (), parent)

    spec = ModelSpec(f"{_LAYERS} {evaluation_seconds}")
    where = PoolSettings(replicas=num_replicas)
    with (
        tempfile.TemporaryDirectory() as folder,
        ReplicaPool(spec, where, replica_class="sleeping:Sleeping") as pool,
        ResultStore(folder).writer("overhead") as writer,
    ):
        manifest = pool.manifest()
        pool.wait_until_ready()
        writer.put_components(manifest, manifest.components)
        beam = Beam(Task(SearchSpace(manifest.components, ("int8-channel",)), request_for), TreeSettings(width=width))
        started_at, cpu_started_at = time.perf_counter(), time.process_time()
        search(beam, pool, writer, Silent(), limit_seconds=seconds)
        elapsed, cpu = time.perf_counter() - started_at, time.process_time() - cpu_started_at
        rows = ResultStore(folder).table("evaluations", ["replica", "wall_seconds", "finished_at"])
    return Load(rows.num_rows, beam.step + 1, elapsed, evaluating_share(rows), cpu / elapsed)


def evaluating_share(rows: pa.Table) -> float:
    """The part of replica time, summed over replicas, that lies within evaluations."""
    busy, replica = rows["wall_seconds"].to_numpy(), np.array(rows["replica"].to_pylist())
    finished_at = rows["finished_at"].to_numpy().astype("datetime64[us]").astype(np.int64) / 1e6
    started_at = finished_at - busy
    own = [replica == name for name in np.unique(replica)]
    held = sum(finished_at[mine].max() - started_at[mine].min() for mine in own)
    return float(busy.sum() / held)


@click.command()
@click.option("--replicas", default="1,2,4,8,16", show_default=True, help="Numbers of replicas, one search each.")
@click.option("--seconds", default=20.0, show_default=True, help="Length of a search.")
@click.option("--evaluation-ms", default=50.0, show_default=True)
@click.option("--width", default=10, show_default=True)
@click.option("--prompts", default=128, show_default=True)
def main(replicas: str, seconds: float, evaluation_ms: float, width: int, prompts: int) -> None:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the actors find `sleeping`
    connect(None)
    click.echo(f"{'replicas':>8} {'evaluations':>12} {'rounds':>7} {'a second':>9} {'evaluating':>11} {'driver':>7}")
    for number in map(int, replicas.split(",")):
        load = measure_load(number, seconds, evaluation_ms / 1000, width, prompts)
        rate = load.evaluations / load.wall_seconds
        click.echo(
            f"{number:>8} {load.evaluations:>12} {load.rounds:>7} {rate:>9.1f} {load.evaluating:>11.1%} "
            f"{load.driver:>7.1%}"
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
