"""The store with 100,000 recorded evaluations: time to commit, to replay, to ask for the best; size on disk.

    python benchmarks/store.py

Plans differ from their parents by one component, as in a search; values are random, so they compress worse than real
ones. The store is removed afterwards unless --store names a place to keep it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np

from dtmsearch.analysis.sql import query
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import EvalRequest, EvalResult, Provenance
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.core.records import EvaluationRecord
from dtmsearch.store.store import ResultStore

_PER_COMMIT = 100
_KINDS = ("q", "k", "v", "o", "gate", "up", "down")
_BEST = "SELECT plan_id, fdt_mean FROM evaluations ORDER BY fdt_mean DESC LIMIT 1"
_COUNT = "SELECT count(*) FROM plans"


def make_manifest(num_components: int) -> ModelManifest:
    components = tuple(
        Component(f"model.layers.{i // 7}.{_KINDS[i % 7]}_proj", i // 7, _KINDS[i % 7], (4096, 4096))
        for i in range(num_components)
    )
    return ModelManifest("benchmark", None, "bfloat16", -(-num_components // 7), "0" * 32, components)


def make_plans(manifest: ModelManifest, number: int) -> Iterator[tuple[Plan, Plan]]:
    """(plan, parent) of a search that tries every component on its leader, then takes one."""
    rng = np.random.default_rng(0)
    leader, seen = Plan(), {Plan().id}
    while True:
        free = [c.name for c in manifest.components if c.name not in leader.schemes]
        if not free:
            leader, free = Plan(), [c.name for c in manifest.components]
        scheme = str(rng.choice(["int8-channel", "int4-g128", "nf4", "w8a8"]))
        for plan in (leader.with_(Perturbation(name, scheme)) for name in free):
            if plan.id not in seen:
                if len(seen) > number:
                    return
                seen.add(plan.id)
                yield plan, leader
        leader = leader.with_(Perturbation(str(rng.choice(free)), scheme))


def make_record(plan: Plan, parent: Plan, num_prompts: int, rng: np.random.Generator) -> EvaluationRecord:
    request = EvalRequest(plan, "benchmark", (0, num_prompts), (), parent)
    result = EvalResult(
        request.id,
        fdt=rng.integers(0, 101, num_prompts, np.int32),
        sdt=rng.integers(0, 101, num_prompts, np.int32),
        dppl=1 + rng.random(num_prompts, np.float32),
        provenance=Provenance("replica-0", "node-0", 1, 0.05, num_prompts * 200, 1.7e9),
    )
    return EvaluationRecord(request, result, "search", 0)


def record_all(store: ResultStore, evaluations: int, num_prompts: int, num_components: int) -> list[float]:
    """Seconds of each commit."""
    manifest = make_manifest(num_components)
    rng = np.random.default_rng(1)
    seconds = []
    with store.writer("benchmark") as writer:
        writer.put_components(manifest, manifest.components)
        batch = []
        for plan, parent in make_plans(manifest, evaluations):
            batch.append(make_record(plan, parent, num_prompts, rng))
            if len(batch) == _PER_COMMIT:
                _ = [record.request.id for record in batch]  # known to a search before it records
                seconds.append(timed(lambda records=batch: writer.append(records)))  # type: ignore[misc]
                batch = []
    return seconds


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def replay(store: ResultStore) -> None:
    with store.writer("benchmark") as writer:
        for _ in writer.replay():
            pass


@click.command(help=__doc__)
@click.option("--evaluations", default=100_000)
@click.option("--prompts", default=100)
@click.option("--components", default=224)
@click.option("--store", type=click.Path(path_type=Path), help="A new folder to keep the store in.")
def main(evaluations: int, prompts: int, components: int, store: Path | None) -> None:
    folder = store or Path(tempfile.mkdtemp(prefix="dtmsearch-benchmark-"))
    try:
        commits = record_all(ResultStore(folder), evaluations, prompts, components)
        files = list(folder.rglob("*.parquet"))
        rows = {
            f"commit of {_PER_COMMIT}, median": f"{np.median(commits) * 1e3:.1f} ms",
            f"commit of {_PER_COMMIT}, mean with compactions": f"{np.mean(commits) * 1e3:.1f} ms",
            "replay of all": f"{timed(lambda: replay(ResultStore(folder))):.2f} s",
            "best by FDT, in SQL": f"{timed(lambda: query(ResultStore(folder), _BEST)):.2f} s",
            "number of the plans' rows, in SQL": f"{timed(lambda: query(ResultStore(folder), _COUNT)):.2f} s",
            "size on disk": f"{sum(f.stat().st_size for f in files) / 1e6:.1f} MB in {len(files)} segments",
        }
    finally:
        if store is None:
            shutil.rmtree(folder)
    click.echo(f"{evaluations:,} evaluations of {prompts} prompts, {components} components")
    for name, value in rows.items():
        click.echo(f"  {name:<36}{value:>28}")


if __name__ == "__main__":
    main()
