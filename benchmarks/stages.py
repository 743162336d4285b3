"""What a replica in stages takes for an evaluation, beside one process: `python benchmarks/stages.py MODEL --stages 2`.

Every stage gets a node of its own: Ray nodes on this machine, which on a machine of one GPU share it. Measures the same
requests in one process, its layers eager too, and says whether all numbers are the same bit for bit.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import click
import ray
import torch
from ray.cluster_utils import Cluster

from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, Outcome, Reference, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.model.replica.replica import Replica


def requests_of(reference: Reference, manifest: ModelManifest, count: int) -> list[EvalRequest]:
    """Single components, evenly from the first layer to the last."""
    step = max(1, len(manifest.components) // count)
    plans = [Plan.of({component.name: "int4-g32"}) for component in manifest.components[::step][:count]]
    return [EvalRequest(plan, reference.id, (0, reference.num_prompts), ("kl",)) for plan in plans]


def numbers(outcome: Outcome) -> tuple[bytes, ...]:
    assert isinstance(outcome, EvalResult) and outcome.kl is not None, outcome
    return outcome.fdt.tobytes(), outcome.dppl.tobytes(), outcome.kl.tobytes()


def in_one_process(
    spec: ModelSpec, batch_tokens: int, reference: Reference, count: int
) -> tuple[list[Outcome], list[float]]:
    """Outcomes, and the seconds of each."""
    replica = Replica(spec, ReplicaSettings(batch_tokens=batch_tokens, num_threads=1))
    replica.use(reference)
    asked = requests_of(reference, replica.manifest(), count)
    replica.evaluate(asked[:1])
    outcomes = replica.evaluate(asked)
    return outcomes, [outcome.provenance.wall_seconds for outcome in outcomes]


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--stages", default=2, show_default=True)
@click.option("--prompts", default=64, show_default=True, help="Prompts of 64 + 64 tokens.")
@click.option("--batch-tokens", default=2048, show_default=True)
@click.option("--count", default=24, show_default=True, help="Evaluations.")
@click.option("--dtype", default="float32", show_default=True)
def main(model: Path, text: Path, stages: int, prompts: int, batch_tokens: int, count: int, dtype: str) -> None:
    num_gpus = 1 if torch.cuda.is_available() else 0
    spec = ModelSpec(str(model.absolute()), dtype=dtype, compile="never")
    node: dict[str, Any] = {"num_cpus": 1, "num_gpus": num_gpus}
    nodes = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    for _ in range(stages - 1):
        nodes.add_node(**node)
    ray.init(nodes.address, namespace="dtmsearch", log_to_driver=False)
    settings = PoolSettings(
        nodes.address, 1, float(num_gpus), batch_tokens, cpus_per_replica=1.0, nodes_per_replica=stages
    )
    with ReplicaPool(spec, settings, click.echo) as pool:
        manifest = pool.manifest()
        cut, _ = pool.cut_prompts([text.read_text(errors="replace")], prompts, 64, 64, 0)
        started_at = time.perf_counter()
        reference = pool.make_reference(cut)
        generating = time.perf_counter() - started_at
        pool.use(reference)
        pool.wait_until_ready()
        asked = requests_of(reference, manifest, count)
        outcomes = gathered(pool, asked[:1]) and gathered(pool, asked)
    ray.shutdown()
    nodes.shutdown()
    alone, seconds = in_one_process(spec, batch_tokens, reference, count)
    same = [numbers(outcome) for outcome in outcomes] == [numbers(outcome) for outcome in alone]
    staged = [outcome.provenance.wall_seconds for outcome in outcomes]
    moved = prompts * 128 * torch.finfo(getattr(torch, dtype)).bits // 8 * width_of(model)
    click.echo(f"{len(outcomes)} evaluations, {prompts} prompts, {moved / 1e6:.1f} MB of states a cut, {stages} stages")
    click.echo(f"one process  {statistics.median(seconds):.4f} s an evaluation (median)")
    click.echo(f"in stages    {statistics.median(staged):.4f} s; the reference in {generating:.1f} s")
    click.echo(f"the same bit for bit: {same}")


def width_of(model: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).get_text_config().hidden_size)


def gathered(pool: ReplicaPool, requests: list[EvalRequest]) -> list[Outcome]:
    """The outcomes of requests, in their order."""
    pool.submit(requests)
    arrived: dict[str, Outcome] = {}
    while len(arrived) < len(requests):
        arrived |= {outcome.request_id: outcome for outcome in pool.poll(1.0)}
    return [arrived[request.id] for request in requests]


if __name__ == "__main__":
    main()
