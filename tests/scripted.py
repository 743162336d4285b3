"""A replica without a model, for tests of the pool: answers by the toy formula, and misbehaves where a plan says so.

What it does to a request is written in the plan's component names, so it crosses the process border with the request.
`marks` is a folder in which faults that happen once leave a mark.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from fakes import MODE, RULES, evaluate, toy_manifest
from numpy.typing import NDArray

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import (
    EvalRequest,
    EvalResult,
    ModelSpec,
    Outcome,
    PromptTokens,
    Provenance,
    Reference,
    ReplicaSettings,
    Speed,
    reference_id,
)
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.errors import LibraryMissing, UserError

SECONDS_VARIABLE = "SCRIPTED_SECONDS"


class Scripted:
    """`spec.path` holds its orders, separated by spaces: `seconds=S` an evaluation, `die-once=FOLDER`, `die-on=SCHEME`,
    `bad-start=FOLDER` (the first to start fails), `liar=FOLDER` (the first to start has another model), `liars` (each),
    `hang-once=FOLDER` and `wrong-once=FOLDER` (of the replicas that have evaluated `after=N` requests the first stops
    answering, or returns wrong numbers from then on), `fast=FOLDER` (the first is fast), `wrong-on=SCHEME` (and so does
    each that evaluates it), `check-fails` (each canary raises), `mistake` (a user's mistake at the start), `broken`
    (every start fails), `lacking` (no library to evaluate by)."""

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, name: str, node: str) -> None:
        self._orders = dict(order.partition("=")[::2] for order in spec.path.split())
        self._name, self._node = name, node
        if "mistake" in self._orders:
            raise UserError("no model at all")
        if "broken" in self._orders or self._first("bad-start"):
            raise OSError("the disk is on fire")
        self._lies = "liars" in self._orders or self._first("liar")
        self._wrong = False
        self._evaluated = 0

    def _first(self, order: str) -> bool:
        """True for the first that asks, among all replicas."""
        folder = self._orders.get(order)
        if folder is None:
            return False
        try:
            (Path(folder) / order).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def manifest(self) -> ModelManifest:
        return toy_manifest(num_layers=8)

    def conditions(self) -> tuple[NumericMode, GenerationRules]:
        return MODE, RULES

    def cut_prompts(
        self, texts: Sequence[str], count: int, prompt: int, continuation: int, seed: int
    ) -> tuple[PromptTokens, str]:
        prompts = PromptTokens(np.zeros((count, prompt + continuation), np.int32) + seed, prompt)
        return prompts, reference_id(self.manifest().id, MODE, prompts, RULES)

    def make_reference(self, prompts: PromptTokens) -> Reference:
        continuation = prompts.tokens[:, prompts.prompt_tokens :]
        agrees = np.ones(continuation.shape, np.bool_)
        made = reference_id("toy", MODE, prompts, RULES)
        return Reference(made, "toy", MODE, prompts.tokens, continuation, agrees, ())

    def use(self, reference: Reference) -> None:
        return None

    def canary(self, reference_id: str) -> float:
        return 1.0 if self._lies else 0.0

    def check(self, plan: Plan, reference_id: str, num_prompts: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        if "check-fails" in self._orders:
            raise RuntimeError("a tensor of another mode")
        found = self._measured(EvalRequest(plan, reference_id, (0, num_prompts)))
        return found.sdt, found.dppl

    def evaluate(self, requests: Sequence[EvalRequest]) -> list[Outcome]:
        if "lacking" in self._orders:
            raise LibraryMissing("no quantizer here")
        return [self._answer(request) for request in requests]

    def measure_speed(self, count: int, prompt_tokens: int, continuation_tokens: int) -> Speed:
        """A second for one of two replicas, three for the other; one that dies leaves the other's."""
        if self._first("die-once"):
            os.kill(os.getpid(), signal.SIGKILL)
        seconds = 1.0 if self._first("fast") else 3.0
        return Speed(seconds, seconds, seconds, seconds, seconds, 2.0, seconds, int(seconds), "device")

    def _answer(self, request: EvalRequest) -> Outcome:
        started_at = time.perf_counter()
        if self._orders.get("die-on") in request.plan.schemes.values() or self._first("die-once"):
            os.kill(os.getpid(), signal.SIGKILL)
        self._evaluated += 1
        if self._evaluated > int(self._orders.get("after", 0)):
            if self._first("hang-once"):
                os.kill(os.getpid(), signal.SIGSTOP)
            self._wrong |= self._first("wrong-once")
        self._wrong |= self._orders.get("wrong-on") in request.plan.schemes.values()
        time.sleep(float(self._orders.get("seconds", 0)))
        seconds = time.perf_counter() - started_at
        return replace(self._measured(request), provenance=Provenance(self._name, self._node, wall_seconds=seconds))

    def _measured(self, request: EvalRequest) -> EvalResult:
        right = evaluate(request)
        return replace(right, sdt=right.sdt + 9, dppl=2 * right.dppl, fdt=right.fdt // 2) if self._wrong else right
