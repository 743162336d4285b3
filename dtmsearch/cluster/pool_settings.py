"""Where replicas run. None of it changes what a search finds; nothing here loads Ray."""

from __future__ import annotations

from dataclasses import dataclass

from dtmsearch.core.evaluation import WeightsKept


@dataclass(frozen=True)
class PoolSettings:
    """Where replicas run. `replicas` 0 are as many as there is room for, also as nodes come and go; shares that are
    None are chosen from what the cluster has, and are of each of `nodes_per_replica` nodes. From `guess_from` replicas
    on, those that idle are offered to guesses: with fewer, the end of a round costs too little. `weights_folder` is
    where trained weights lie, for all nodes. `in_process`: one replica in the driver's own process, without Ray.
    `weights` of a model's layers stay on the device or pass through it (`auto`: by the memory of the GPU).
    `retry_out_of_memory`: what ran out of memory before is asked again, for replicas may have more now."""

    address: str | None = None
    replicas: int = 0
    gpus_per_replica: float | None = None
    batch_tokens: int = 0
    cpus_per_replica: float | None = None
    guess_from: int = 8
    weights_folder: str = ""
    nodes_per_replica: int = 1
    in_process: bool = False
    weights: WeightsKept = "auto"
    retry_out_of_memory: bool = False
