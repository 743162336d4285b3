"""Stand-ins for what a search needs: a toy model, an evaluator whose damage is a formula, a log in memory.

The damage of a plan is the sum over its components of a number drawn from their names, more for fewer bits, and an
interaction between neighbours, so that rankings change along the way. Nothing here depends on order or time.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import EvaluationRecord, StepRecord
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Silent, Strategy

NUM_PROMPTS = 8
CONTINUATION_TOKENS = 100
REFERENCE_ID = "toy-reference"
MODE = NumericMode("float32", "cpu", "sdpa")
RULES = GenerationRules()


def toy_components(num_layers: int = 2) -> tuple[Component, ...]:
    """q, k and up of each layer: three components of three shapes."""
    shapes = {"self_attn.q_proj": ("q", (64, 64)), "self_attn.k_proj": ("k", (16, 64)), "mlp.up_proj": ("up", (96, 64))}
    return tuple(
        Component(f"model.layers.{layer}.{name}", layer, kind, shape)
        for layer in range(num_layers)
        for name, (kind, shape) in shapes.items()
    )


def toy_manifest(num_layers: int = 2, content_hash: str = "toy") -> ModelManifest:
    head = Component("lm_head", num_layers, "lm_head", (512, 64))
    return ModelManifest("toy", None, "bfloat16", num_layers, content_hash, toy_components(num_layers), (head,))


def request_for(plan: Plan, parent: Plan) -> EvalRequest:
    return EvalRequest(plan, REFERENCE_ID, (0, NUM_PROMPTS), ("kl", "ppl"), parent)


@functools.lru_cache(maxsize=1 << 18, typed=True)
def chance(*parts: str | int) -> float:
    """A number in [0, 1) that follows from the parts alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def damage(plan: Plan) -> float:
    alone = sum(chance(c) * 4 ** (1 - parse_scheme(s).bits / 4) for c, s in plan.entries)
    names = [c for c, _ in plan.entries]
    together = sum(0.3 * chance(a, b) for a, b in pairwise(names))
    return alone + together


def evaluate(request: EvalRequest) -> EvalResult:
    """What the toy model would answer: FDT falls, everything else rises with the damage."""
    harm = damage(request.plan)
    prompts = np.arange(*request.prompts)
    sensitivity = np.array([0.2 + chance("prompt", int(p)) for p in prompts])
    nats = (0.1 * harm * sensitivity).astype(np.float32)
    fdt = np.floor(CONTINUATION_TOKENS * np.exp(-harm * sensitivity)).astype(np.int32)
    return EvalResult(
        request.id,
        fdt=fdt,
        sdt=((CONTINUATION_TOKENS - fdt) // 3).astype(np.int32),
        dppl=np.exp(nats),
        kl=nats if "kl" in request.extra_metrics else None,
        ppl=np.exp(nats + np.float32(1.0)) if "ppl" in request.extra_metrics else None,
    )


class FakeEvaluator:
    """Answers from `answer`, `per_poll` requests at a time, in the order that `order` gives those that wait.

    `evaluated` lists the ids that it was asked for, in order.
    """

    def __init__(
        self,
        answer: Callable[[EvalRequest], Outcome] = evaluate,
        order: Callable[[list[EvalRequest]], list[EvalRequest]] = lambda waiting: waiting,
        per_poll: int = 1,
    ) -> None:
        self._answer, self._order, self._per_poll = answer, order, per_poll
        self._waiting: list[EvalRequest] = []
        self.evaluated: list[str] = []

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        self._waiting = self._order([*self._waiting, *requests])
        self.evaluated += [request.id for request in requests]

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        now, self._waiting = self._waiting[: self._per_poll], self._waiting[self._per_poll :]
        return [self._answer(request) for request in now]


class MemoryLog:
    """A `ResultLog` that lasts as long as this object. `others` are the logs of other runs, by their names."""

    def __init__(self, others: Mapping[str, MemoryLog] | None = None) -> None:
        self.records: list[EvaluationRecord] = []
        self.steps: list[StepRecord] = []
        self._others = others or {}

    def replay(self) -> Iterable[Outcome]:
        return [record.outcome for record in self.records]

    def recorded_elsewhere(self, request_ids: Sequence[str]) -> Mapping[str, tuple[str, Outcome]]:
        wanted = set(request_ids)
        return {
            outcome.request_id: (run, outcome)
            for run, log in self._others.items()
            for outcome in log.replay()
            if outcome.request_id in wanted and isinstance(outcome, EvalResult)
        }

    def append(self, records: Sequence[EvaluationRecord]) -> None:
        self.records += records

    def decisions(self) -> Sequence[StepRecord]:
        return list(self.steps)

    def decide(self, steps: Sequence[StepRecord]) -> None:
        self.steps += steps


class Killed(Exception):
    """The driver was killed."""


class KilledAfter(MemoryLog):
    """Remembers `num_records` outcomes of this session; the driver dies over the next one."""

    def __init__(self, earlier: MemoryLog, num_records: int) -> None:
        super().__init__()
        self.records, self.steps = earlier.records, earlier.steps
        self._left = num_records

    def append(self, records: Sequence[EvaluationRecord]) -> None:
        if len(records) > self._left:
            raise Killed
        self._left -= len(records)
        super().append(records)


def run_search(
    strategy: Strategy, evaluator: FakeEvaluator | None = None, log: MemoryLog | None = None, **settings: Any
) -> Plan | None:
    """A search over the toy model with what is not given made fresh."""
    return search(strategy, evaluator or FakeEvaluator(), log or MemoryLog(), Silent(), **settings)


def failing(kinds: Mapping[str, str]) -> Callable[[EvalRequest], Outcome]:
    """As `evaluate`, but a plan with a component whose name holds a key of `kinds` fails in that way."""

    def answer(request: EvalRequest) -> Outcome:
        for text, kind in kinds.items():
            if any(text in component for component, _ in request.plan.entries):
                return EvalFailure(request.id, kind, f"{text} cannot be measured")  # type: ignore[arg-type]
        return evaluate(request)

    return answer


def readable_tree(log: MemoryLog) -> dict[str, Any]:
    """A finished search as JSON: every round's candidates with their FDT, best first, and what was decided."""
    rounds: dict[int, list[tuple[float, str]]] = {}
    for record in log.records:
        parent = ", ".join(f"{c}={s}" for c, s in record.request.parent.entries) or "dense"
        fdt = 0.0 if isinstance(record.outcome, EvalFailure) else float(record.outcome.fdt.mean())
        rounds.setdefault(record.step or 0, []).append((-fdt, _short(f"{parent} + {record.perturbation}")))
    return {
        "rounds": [{edge: -fdt for fdt, edge in sorted(found)} for _, found in sorted(rounds.items())],
        "decisions": [f"{_short(s.perturbation or '')}: {s.score:.4f}, share {s.share:.4f}" for s in log.steps],
    }


def _short(text: str) -> str:
    for part in ("model.layers.", "self_attn.", "mlp.", "_proj"):
        text = text.replace(part, "")
    return text
