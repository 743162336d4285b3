"""Makes references: prompts cut out of text, the base model's own continuations of them, and how far it agrees with
itself. Knows nothing of plans that are measured against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtmsearch.core.calibration import Calibration, Routing, Through, calibration_id
from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.evaluation import (
    Continuation,
    FloatArray,
    ModelSpec,
    PromptTokens,
    Reference,
    check_agreement,
    reference_id,
)
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.variant import BASE, Variant
from dtmsearch.errors import UserError
from dtmsearch.model.replica.loaded_reference import Loaded
from dtmsearch.model.replica.plan_evaluator import Bench, PlanEvaluator
from dtmsearch.model.replica.prompts import Cutter, around
from dtmsearch.model.replica.samples import margins, written_out

_Tokens = NDArray[np.int32]


class ReferenceMaker:
    """Makes references on a bench, with its tokenizer, whose files have an identity of their own (`fingerprint`).
    `suppressed` tokens are never chosen. `evaluator` tells where the base model leaves its own continuations."""

    def __init__(
        self,
        bench: Bench,
        evaluator: PlanEvaluator,
        spec: ModelSpec,
        mode: NumericMode,
        tokenizer: Any,
        fingerprint: str,
        suppressed: tuple[int, ...],
    ) -> None:
        self._bench, self._evaluator, self._body = bench, evaluator, bench.standing.body
        self._spec, self._mode = spec, mode
        self._tokenizer, self._fingerprint, self._suppressed = tokenizer, fingerprint, suppressed
        model = self._body.model
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        num_embeddings = int(model.get_input_embeddings().weight.shape[0])
        self.cutter = Cutter(tokenizer, spec.path, context, num_embeddings)

    def conditions(self) -> tuple[NumericMode, GenerationRules]:
        """What decides the continuations of prompts, beside the model."""
        opening, _ = around(self._tokenizer)
        return self._mode, GenerationRules(
            self._suppressed, tuple(opening), self._fingerprint, str(self._spec.decoding)
        )

    def id_of(self, prompts: PromptTokens) -> str:
        """The id that the reference of prompts has or will have."""
        mode, rules = self.conditions()
        return reference_id(self._bench.manifest.id, mode, prompts, rules)

    def calibration(self, rows: _Tokens, through: Through, experts: Routing) -> Calibration:
        """A calibration over rows of text."""
        manifest = self._bench.manifest
        mixed = any(component.mixture for component in manifest.components)
        known = calibration_id(manifest.id, self._mode, rows, through, experts if mixed else None)
        return Calibration(known, manifest.id, rows, through, experts)

    def make(self, prompts: PromptTokens) -> Reference:
        """The base model's own continuations of `prompts`, and where its own single pass disagrees with them.

        Raises `UserError` where its logits are not finite, or it agrees with itself too little to measure others by.
        """
        self._bench.become(BASE)
        mode, rules = self.conditions()
        continuation = self._bench.batches.halving(lambda: self.continue_from(prompts, self._spec.decoding))
        reference = Reference(
            id=self.id_of(prompts),
            manifest_id=self._bench.manifest.id,
            mode=mode,
            text=prompts.tokens,
            continuation=continuation,
            agrees=np.ones(continuation.shape, dtype=np.bool_),
            suppressed=rules.suppressed,
            opening=rules.opening,
            tokenizer=rules.tokenizer,
            decoding=self._spec.decoding,
        )
        check = self._evaluator.divergence_of_base(Loaded(reference))
        self._refuse_infinite(int((~np.isfinite(check.nll)).any(axis=1).sum()), reference.num_prompts)
        made = replace(reference, agrees=~check.diverged)
        check_agreement(made)
        return made

    def check_fits(self, reference: Reference) -> None:
        """Raise `UserError` for a reference that was made under other conditions than those here."""
        if reference.mode != self._mode:
            raise UserError(
                f"reference {reference.id} was made in mode {reference.mode}, this replica runs in {self._mode}"
            )
        if reference.suppressed != self._suppressed:
            theirs, own = (", ".join(map(str, ids)) or "none" for ids in (reference.suppressed, self._suppressed))
            raise UserError(
                f"reference {reference.id} was made with the end-of-text tokens {theirs}; {self._spec.path} has {own}"
            )

    def generate(self, variant: Variant, prompts: PromptTokens) -> _Tokens:
        """Free generation: [num_prompts, continuation_tokens]."""
        self._bench.become(variant)
        return self.continue_from(prompts, self._spec.decoding)

    def side_by_side(self, variant: Variant, reference: Reference, prompts: Sequence[int]) -> list[Continuation]:
        """How the base model and a variant each go on from some prompts of a reference."""
        rows = reference.text[list(prompts)]
        start = PromptTokens(rows, reference.prompt_tokens)
        self._bench.become(variant)
        own = self._bench.batches.halving(lambda: self.continue_from(start, reference.decoding))
        own_margins = self.margins_of(start, own, reference.decoding)
        self._bench.become(BASE)
        base = reference.continuation[list(prompts)]
        return written_out(
            self._tokenizer,
            prompts,
            start,
            (base, self.margins_of(start, base, reference.decoding)),
            (own, own_margins),
        )

    def continue_from(self, prompts: PromptTokens, decoding: Decoding = GREEDY) -> _Tokens:
        """Continuations by the model as it stands, [num_prompts, continuation_tokens]."""
        rows = torch.from_numpy(prompts.tokens[:, : prompts.prompt_tokens]).long().to(self._body.input_device)
        batches = rows.split(self._bench.batches.rows_continued(prompts.tokens.shape[1], self._body.cached_bytes))
        length = prompts.continuation_tokens
        with self._bench.standing.eagerly():
            parts = [self._body.generate(batch, length, self._suppressed, decoding).cpu() for batch in batches]
        return torch.cat(parts).numpy().astype(np.int32)

    def margins_of(self, start: PromptTokens, continuation: _Tokens, decoding: Decoding = GREEDY) -> FloatArray:
        """By how many nats the best choice was ahead of the runner-up, noise included, by the model as it stands."""
        tokens = np.concatenate([start.tokens[:, : start.prompt_tokens], continuation], axis=1)
        rows = torch.from_numpy(tokens).long().to(self._body.input_device)
        never = self._bench.never
        return np.concatenate([margins(self._body, row, start.prompt_tokens, never, decoding) for row in rows.split(1)])

    def _refuse_infinite(self, num_infinite: int, num_prompts: int) -> None:
        if num_infinite:
            raise infinite_logits(self._spec, f"on {num_infinite} of {num_prompts} prompts")


def infinite_logits(spec: ModelSpec, where: str) -> UserError:
    """The error of a base model whose logits are not finite."""
    remedy = {
        "float16": "Its activations pass 65504, the most that float16 holds: try model.dtype: bfloat16, which has the "
        "range of float32",
        "float32": "The checkpoint itself may hold values that are no numbers",
    }.get(spec.dtype, "Try model.dtype: float32")
    return UserError(f"the base model {spec.path} gives logits that are not finite in {spec.dtype}, {where}. {remedy}")
