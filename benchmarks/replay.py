"""How long a search takes to go through 100,000 recorded outcomes: a beam over 224 components, a log in memory.

    python benchmarks/replay.py [--outcomes 100000] [--width 4] [--prompts 100]

Reading the store is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import click
import numpy as np

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import EvaluationRecord, StepRecord
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import SearchStopped
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task

KINDS = ("q", "k", "v", "o", "gate", "up", "down")


class Records:
    """A `ResultLog` that remembers outcomes only."""

    def __init__(self, outcomes: Sequence[Outcome] = ()) -> None:
        self.outcomes = list(outcomes)

    def replay(self) -> Sequence[Outcome]:
        return self.outcomes

    def recorded_elsewhere(self, request_ids: Sequence[str]) -> Mapping[str, tuple[str, Outcome]]:
        return {}

    def append(self, records: Sequence[EvaluationRecord]) -> None:
        self.outcomes += [record.outcome for record in records]

    def decisions(self) -> Sequence[StepRecord]:
        return ()

    def decide(self, steps: Sequence[StepRecord]) -> None:
        pass


class Answers:
    """An `Evaluator` whose results share a few arrays."""

    def __init__(self, num_prompts: int) -> None:
        generator = np.random.default_rng(0)
        self._results = [
            EvalResult(
                "",
                fdt=generator.integers(0, 100, num_prompts, dtype=np.int32),
                sdt=generator.integers(0, 100, num_prompts, dtype=np.int32),
                dppl=generator.uniform(1, 2, num_prompts).astype(np.float32),
            )
            for _ in range(997)
        ]
        self._pending: list[str] = []
        self.answered = 0

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self._pending += [request.id for request in requests]

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        pending, self._pending = self._pending, []
        self.answered += len(pending)
        return [replace(self._results[int(i[:8], 16) % 997], request_id=i) for i in pending]


def make_beam(width: int, num_prompts: int) -> Beam:
    components = tuple(
        Component(f"model.layers.{layer}.block.{kind}_proj", layer, kind, (4096, 4096))
        for layer in range(32)
        for kind in KINDS
    )

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "reference", (0, num_prompts), (), parent)

    return Beam(Task(SearchSpace(components, ("int8-channel",)), request_for), TreeSettings(width=width))


@click.command()
@click.option("--outcomes", default=100_000, show_default=True)
@click.option("--width", default=4, show_default=True, help="Plans kept; 4 go through all 224 depths in 100,000.")
@click.option("--prompts", default=100, show_default=True)
def main(outcomes: int, width: int, prompts: int) -> None:
    recorded, evaluator = Records(), Answers(prompts)
    with suppress(SearchStopped):
        search(make_beam(width, prompts), evaluator, recorded, Silent(), lambda: evaluator.answered >= outcomes)
    recorded = Records(recorded.outcomes[:outcomes])
    beam = make_beam(width, prompts)
    started_at, cpu_started_at = time.perf_counter(), time.process_time()
    search(beam, evaluator, recorded, Silent(), limit_seconds=0.0)
    seconds, cpu_seconds = time.perf_counter() - started_at, time.process_time() - cpu_started_at
    click.echo(
        f"{len(recorded.outcomes)} outcomes of {prompts} prompts replayed to depth {beam.step} in {seconds:.2f} s "
        f"({cpu_seconds:.2f} s of CPU time)"
    )


if __name__ == "__main__":
    main()
