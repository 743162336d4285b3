"""A replica without a model, for `chaos.py`: answers follow from the plan, and it lies where it is told to.

The folder in the environment variable `CHAOS_FOLDER` holds what differs between a calm search and a disturbed one, and
so is no part of what the search is: `seconds` (of an evaluation), and `lie` (whoever takes it away returns wrong
numbers from then on).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import (
    EvalRequest,
    EvalResult,
    ModelSpec,
    Outcome,
    PromptTokens,
    Provenance,
    Reference,
    ReplicaSettings,
    reference_id,
)
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme

FOLDER_VARIABLE = "CHAOS_FOLDER"
_MODE = NumericMode("faulty", "cpu", "none")


@cache
def chance(*parts: object) -> float:
    """A number in [0, 1) that follows from the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


def damage(plan: Plan) -> float:
    """More for fewer bits; and neighbours disturb each other, so that rankings change along the way."""
    alone = sum(chance(name) * 4 ** (1 - parse_scheme(scheme).bits / 4) for name, scheme in plan.entries)
    return 0.05 * (alone + sum(chance(a, b) for (a, _), (b, _) in zip(plan.entries, plan.entries[1:], strict=False)))


class Faulty:
    """`spec.path` is `faulty LAYERS`; each layer has four components."""

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, name: str, node: str) -> None:
        num_layers = int(spec.path.split()[1])
        components = tuple(
            Component(f"model.layers.{layer}.{kind}_proj", layer, kind, (64, 64))
            for layer in range(num_layers)
            for kind in ("q", "k", "v", "o")
        )
        self._manifest = ModelManifest("faulty", None, "bfloat16", num_layers, "0" * 32, components)
        self._folder = Path(os.environ[FOLDER_VARIABLE])
        self._seconds = float((self._folder / "seconds").read_text())
        self._name, self._node = name, node
        self._lies = False

    def manifest(self) -> ModelManifest:
        return self._manifest

    def conditions(self) -> tuple[NumericMode, GenerationRules]:
        return _MODE, GenerationRules()

    def cut_prompts(
        self, texts: Sequence[str], count: int, prompt: int, continuation: int, seed: int, *_: object
    ) -> tuple[PromptTokens, str]:
        rows = np.arange(count, dtype=np.int32) + count * seed
        prompts = PromptTokens(np.repeat(rows[:, None], prompt + continuation, axis=1), prompt)
        return prompts, self.reference_id(prompts)

    def reference_id(self, prompts: PromptTokens) -> str:
        return reference_id(self._manifest.id, _MODE, prompts, GenerationRules())

    def make_reference(self, prompts: PromptTokens) -> Reference:
        continuation = prompts.tokens[:, prompts.prompt_tokens :]
        agrees = np.ones(continuation.shape, np.bool_)
        return Reference(self.reference_id(prompts), self._manifest.id, _MODE, prompts.tokens, continuation, agrees, ())

    def continuations(self, *_: object) -> None:
        raise RuntimeError("a replica without a model writes no texts")

    def use(self, reference: Reference) -> None:
        self._tokens = reference.continuation_tokens

    def canary(self, reference_id: str) -> float:
        return 0.0

    def check(self, plan: Plan, reference_id: str, num_prompts: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        found = self._measure(EvalRequest(plan, reference_id, (0, num_prompts)))
        return found.sdt, found.dppl

    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        return [self._measure(request, self._seconds) for request in requests]

    def _measure(self, request: EvalRequest, seconds: float = 0.0) -> EvalResult:
        with suppress(FileNotFoundError):
            (self._folder / "lie").unlink()
            self._lies = True
        started_at = time.perf_counter()
        time.sleep(seconds)
        sensitivity = np.array([0.2 + chance("prompt", prompt) for prompt in range(*request.prompts)])
        harm = damage(request.plan) * sensitivity + (1.0 if self._lies else 0.0)
        fdt = np.floor(self._tokens * np.exp(-harm)).astype(np.int32)
        return EvalResult(
            request.id,
            fdt=fdt,
            sdt=((self._tokens - fdt) // 3).astype(np.int32),
            dppl=np.exp(0.1 * harm).astype(np.float32),
            kl=(0.1 * harm).astype(np.float32) if "kl" in request.extra_metrics else None,
            ppl=np.exp(1 + 0.1 * harm).astype(np.float32) if "ppl" in request.extra_metrics else None,
            provenance=Provenance(
                self._name, self._node, wall_seconds=time.perf_counter() - started_at, finished_at=time.time()
            ),
        )
