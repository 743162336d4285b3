"""The real driver over the toy model: searches of a tenth of a second, in which only the model is not real."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import yaml
from fakes import MODE, RULES, FakeEvaluator, evaluate, toy_manifest
from gate import at_speed, gate_here

import dtmsearch as dtm
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import (
    Continuation,
    EvalRequest,
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


class ToyModel(FakeEvaluator):
    """What a run asks of a model (see `dtmsearch.ModelEvaluator`), answered for the toy one."""

    num_replicas = 1

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__(per_poll=10)
        self._manifest = toy_manifest(num_layers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def manifest(self) -> ModelManifest:
        return self._manifest

    def conditions(self) -> tuple[NumericMode, GenerationRules]:
        return MODE, RULES

    def cut_prompts(
        self, texts: Sequence[str], count: int, prompt_tokens: int, continuation_tokens: int, seed: int, *_: Any
    ) -> tuple[PromptTokens, str]:
        tokens = np.arange(count * (prompt_tokens + continuation_tokens), dtype=np.int32).reshape(count, -1)
        prompts = PromptTokens(tokens + seed, prompt_tokens)
        return prompts, self.reference_id(prompts)

    def reference_id(self, prompts: PromptTokens) -> str:
        return reference_id(self.manifest().id, MODE, prompts, RULES)

    def make_reference(self, prompts: PromptTokens) -> Reference:
        continuation = prompts.tokens[:, prompts.prompt_tokens :]
        agrees = np.ones(continuation.shape, np.bool_)
        manifest_id = self.manifest().id
        return Reference(self.reference_id(prompts), manifest_id, MODE, prompts.tokens, continuation, agrees, ())

    def tokenized(self, texts: Sequence[str]) -> list[Any]:
        return []

    def use(self, reference: Reference) -> None: ...

    def continuations(self, plan: Plan, *_: Any) -> list[Continuation]:
        return []

    def decided(self, *_: float) -> None: ...


# Layers of the toy model of a command that is gated, and the least that it takes for an evaluation.
TOY_LAYERS = 8
_SECONDS = 0.002


def toy_must_wait(requests: Sequence[EvalRequest]) -> bool:
    gate, most = gate_here(), max((len(request.plan) for request in requests), default=0)
    return gate is not None and not gate.allows("components", most)


class ToyReplicas(ToyModel):
    """The toy model in a command's own process, behind a gate: while it waits, the command hears that it is to stop."""

    def __init__(self, *_: object) -> None:
        super().__init__(TOY_LAYERS)

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        if toy_must_wait(self._waiting[: self._per_poll]):
            time.sleep(0.01)
            return []
        with at_speed(_SECONDS * len(self._waiting[: self._per_poll])):
            return super().poll(timeout_seconds)


class ToyReplica(ToyModel):
    """The same as what a Ray actor hosts."""

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, name: str, node: str) -> None:
        super().__init__(TOY_LAYERS)
        self._name, self._node = name, node

    def canary(self, reference_id: str) -> float:
        return 0.0

    def check(self, plan: Plan, reference_id: str, num_prompts: int) -> tuple[Any, Any]:
        found = evaluate(EvalRequest(plan, reference_id, (0, num_prompts)))
        return found.sdt, found.dppl

    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        while toy_must_wait(requests):
            time.sleep(0.01)
        with at_speed(_SECONDS * len(requests)):
            by = Provenance(self._name, self._node, wall_seconds=_SECONDS)
            return [replace(evaluate(request), provenance=by) for request in requests]


def toy_search(folder: Path, **search: Any) -> Path:
    """A search file over the toy model."""
    (folder / "text.txt").write_text("a text that nobody reads, long enough to hold all prompts\n" * 400)
    content = {
        "run": "toy",
        "model": {"path": "toy"},
        "prompts": {"files": ["text.txt"], "count": 8, "prompt_tokens": 10, "continuation_tokens": 100},
        "validation": {"files": ["text.txt"], "count": 8, "seed": 1},
        "search": {"strategy": "beam", "width": 2, "schemes": ["int4-channel", "int8-channel"]} | search,
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(content))
    return folder / "toy.yaml"


def run_toy(file: Path, store: Path, model: ToyModel | None = None) -> dtm.Run:
    """`dtmsearch.run` with the toy model in the place of replicas."""
    return dtm.run(file, store, evaluator=lambda *_: cast(dtm.ModelEvaluator, model or ToyModel()))


# What a process does to files, by the names of Python's audit events.
_CHANGES = ("open", "os.rename", "os.remove", "os.link", "os.mkdir")


def _before_each_change(store: Path, do: Callable[[int], None]) -> None:
    """From now on this process calls `do` with the number of every change that it is about to make below `store`."""
    numbers, place, busy = itertools.count(), f"{store}/", False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if event not in _CHANGES or busy or not str(arguments[0]).startswith(place):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        busy = True
        do(next(numbers))
        busy = False

    sys.addaudithook(hook)


def run_with_snapshots(file: str, folder: str) -> int:
    """A search in `folder`/undisturbed, and in `folder`/N what its store is before the Nth change to it: what a kill
    there would leave."""
    store = Path(folder) / "undisturbed"
    _before_each_change(store, lambda number: _copy(store, Path(folder) / str(number)))
    return 0 if run_toy(Path(file), store).status == "finished" else 1


def _copy(store: Path, to: Path) -> None:
    shutil.copytree(store, to) if store.exists() else to.mkdir()


def run_killed_at(file: str, store: str, number: str) -> int:
    """A search whose process kills itself before the Nth change to its store."""

    def kill(at: int) -> None:
        if at == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    _before_each_change(Path(store), kill)
    run_toy(Path(file), Path(store))
    return 0
