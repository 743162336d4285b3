"""A replica without a model, for `overhead.py`: an evaluation is a sleep, its values follow from the request's id."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, Outcome, Provenance, ReplicaSettings

_KINDS = ("q", "k", "v", "o", "gate", "up", "down")
_CONTINUATION_TOKENS = 100


def make_manifest(num_layers: int) -> ModelManifest:
    components = tuple(
        Component(f"model.layers.{layer}.block.{kind}_proj", layer, kind, (4096, 4096))
        for layer in range(num_layers)
        for kind in _KINDS
    )
    return ModelManifest("sleeping", None, "bfloat16", num_layers, "0" * 32, components)


class Sleeping:
    """`spec.path` is `LAYERS SECONDS`: the model's layers, and how long an evaluation takes."""

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, name: str, node: str) -> None:
        layers, seconds = spec.path.split()
        self._manifest, self._seconds = make_manifest(int(layers)), float(seconds)
        self._name, self._node = name, node

    def manifest(self) -> ModelManifest:
        return self._manifest

    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: EvalRequest) -> Outcome:
        started_at = time.perf_counter()
        time.sleep(self._seconds)
        generator = np.random.default_rng(int(request.id[:12], 16))
        num_prompts = request.prompts[1] - request.prompts[0]
        seconds = time.perf_counter() - started_at
        return EvalResult(
            request.id,
            fdt=generator.integers(0, _CONTINUATION_TOKENS, num_prompts, dtype=np.int32),
            sdt=generator.integers(0, _CONTINUATION_TOKENS, num_prompts, dtype=np.int32),
            dppl=generator.uniform(1, 2, num_prompts).astype(np.float32),
            provenance=Provenance(self._name, self._node, wall_seconds=seconds, finished_at=time.time()),
        )
