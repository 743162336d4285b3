"""How busy 512 replicas are: the real search, the real pool and its queue, in virtual time.

    python benchmarks/utilisation.py [--replicas 512] [--width 10] [--components 560] [--rounds 12] [--sigma 0.5]

An evaluation takes time in proportion to the layers that must run, times a log-normal factor of mean 1. A beam runs for
some rounds with idle replicas given guesses, and once more without; both must come to the same plan. Replica time runs
from the first request to the last decision; canaries and idle time are not evaluating.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any
from unittest.mock import patch

import click
import numpy as np
from virtual import Clock, VirtualActor, virtual_pool

from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, Outcome, Reference, first_changed_layer
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.records import EvaluationRecord, StepRecord
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task

_KINDS = ("q", "k", "v", "o", "gate", "up", "down")
_PROMPTS = 128
_NORMAL = NormalDist()


class Log:
    """A `ResultLog` that only counts and remembers decisions."""

    def __init__(self) -> None:
        self.recorded = 0
        self.steps: list[StepRecord] = []

    def replay(self) -> Sequence[Outcome]:
        return ()

    def recorded_elsewhere(self, request_ids: Sequence[str]) -> Mapping[str, tuple[str, Outcome]]:
        return {}

    def append(self, records: Sequence[EvaluationRecord]) -> None:
        self.recorded += len(records)

    def decisions(self) -> Sequence[StepRecord]:
        return ()

    def decide(self, steps: Sequence[StepRecord]) -> None:
        self.steps += steps


class Noting(Silent):
    def on_note(self, text: str) -> None:
        print("note:", text)


def fraction(text: str) -> float:
    """A number in (0, 1) that follows from a text."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") + 0.5) / 2**48


@cache
def harm_of(component: str) -> float:
    return fraction(component)


class Formula:
    """A replica without a model: the damage of a plan is the sum over its components, and some noise of its own."""

    def __init__(self, manifest: ModelManifest) -> None:
        self._manifest = manifest
        self._sensitivity = np.linspace(0.5, 1.5, _PROMPTS)

    def manifest(self) -> ModelManifest:
        return self._manifest

    def check(self, plan: Plan, reference_id: str, num_prompts: int) -> tuple[Any, Any]:
        found = self._measure(EvalRequest(plan, reference_id, (0, num_prompts)))
        return found.sdt[:num_prompts], found.dppl[:num_prompts]

    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        return [self._measure(request) for request in requests]

    def _measure(self, request: EvalRequest) -> EvalResult:
        harm = sum(harm_of(name) for name, _ in request.plan.entries)
        harm += 0.05 * fraction(request.plan.id) if request.plan.entries else 0.0
        fdt = (10_000 * np.exp(-0.01 * harm * self._sensitivity)).astype(np.int32)
        return EvalResult(request.id, fdt, 10_000 - fdt, np.exp(harm * self._sensitivity * 1e-3).astype(np.float32))


@dataclass(frozen=True)
class Use:
    """Of one search: what the replicas did, in shares of their time, and what they measured."""

    plan: str
    recorded: int
    told: int
    seconds: float
    evaluating: float
    checking: float
    driver_seconds: float


def make_manifest(num_components: int) -> ModelManifest:
    components = tuple(
        Component(f"model.layers.{i // 7}.{_KINDS[i % 7]}_proj", i // 7, _KINDS[i % 7], (64, 64))
        for i in range(num_components)
    )
    return ModelManifest("virtual", None, "bfloat16", -(-num_components // 7), "0" * 32, components)


def measure_use(
    replicas: int, width: int, num_components: int, rounds: int, sigma: float, mean_seconds: float, guess_share: float
) -> Use:
    manifest, clock = make_manifest(num_components), Clock()
    replica = Formula(manifest)
    of_a_layer = mean_seconds / (manifest.num_layers / 2)

    def seconds_of(method: str, arguments: tuple[Any, ...]) -> float:
        if method == "check":
            return of_a_layer * manifest.num_layers * arguments[2] / _PROMPTS
        return sum(seconds_for(request) for request in arguments[0]) if method == "evaluate" else 0.0

    def seconds_for(request: EvalRequest) -> float:
        factor = math.exp(sigma * _NORMAL.inv_cdf(fraction(request.id)) - sigma**2 / 2)
        return of_a_layer * (manifest.num_layers - first_changed_layer(request, manifest)) * factor

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "reference", (0, _PROMPTS), (), parent)

    tokens = np.zeros((_PROMPTS, 20_000), np.int32)
    agrees = np.ones((_PROMPTS, 10_000), np.bool_)
    reference = Reference(
        "reference", manifest.id, NumericMode("virtual", "cpu", "none"), tokens, tokens[:, :10_000], agrees, ()
    )
    space = SearchSpace(manifest.components, ("int8-channel",), budget=Budget(components=rounds))
    actors: list[VirtualActor] = []
    log, cpu_started_at = Log(), time.process_time()
    with (
        virtual_pool(clock, actors, lambda: VirtualActor(clock, replica, seconds_of), replicas),
        patch("dtmsearch.search.eta.time", clock),
        ReplicaPool(ModelSpec(""), PoolSettings(replicas=replicas)) as pool,
    ):
        pool.manifest()
        pool.use(reference)
        started_at = clock.now
        plan = search(
            Beam(Task(space, request_for), TreeSettings(width=width)), pool, log, Noting(), guess_share=guess_share
        )
    assert plan is not None
    held = replicas * (clock.now - started_at)
    return Use(
        plan=plan.id,
        recorded=log.recorded,
        told=log.steps[-1].evaluations,
        seconds=clock.now - started_at,
        evaluating=sum(actor.evaluating for actor in actors) / held,
        checking=sum(actor.checking for actor in actors) / held,
        driver_seconds=time.process_time() - cpu_started_at,
    )


@click.command(help=__doc__)
@click.option("--replicas", default=512, show_default=True)
@click.option("--width", default=10, show_default=True)
@click.option("--components", default=560, show_default=True)
@click.option("--rounds", default=12, show_default=True)
@click.option("--sigma", default=0.5, show_default=True, help="Of the logarithm of an evaluation's time.")
@click.option("--mean-seconds", default=2.0, show_default=True, help="Of an evaluation.")
def main(replicas: int, width: int, components: int, rounds: int, sigma: float, mean_seconds: float) -> None:
    uses = {
        name: measure_use(replicas, width, components, rounds, sigma, mean_seconds, share)
        for name, share in (("without guesses", 0.0), ("with guesses", 0.15))
    }
    assert len({use.plan for use in uses.values()}) == 1, "guesses have changed the plan"
    click.echo(f"{replicas} replicas, width {width}, {components} components, {rounds} rounds, sigma {sigma}")
    click.echo(f"{'':<17}{'evaluating':>11}{'canaries':>9}{'evaluations':>12}{'more':>7}{'hours':>7}{'driver':>8}")
    for name, use in uses.items():
        more = use.recorded / use.told - 1
        click.echo(
            f"{name:<17}{use.evaluating:>11.1%}{use.checking:>9.2%}{use.recorded:>12}{more:>7.1%}"
            f"{use.seconds / 3600:>7.3f}{use.driver_seconds:>6.0f} s"
        )


if __name__ == "__main__":
    main()
