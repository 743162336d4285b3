"""From what a model's passes have found to the outcome of a request: its metrics, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dtmsearch.core.evaluation import (
    EvalFailure,
    EvalRequest,
    EvalResult,
    FailureKind,
    Outcome,
    Provenance,
    Reference,
)
from dtmsearch.core.metric_registry import (
    ALWAYS,
    BUILT_IN,
    METRICS,
    PromptOutputs,
    first_divergent_token,
    share_of_divergent_tokens,
)
from dtmsearch.errors import UserError
from dtmsearch.model.forward.head_metrics import Divergence, Scores, fetch


@dataclass(frozen=True)
class Launched:
    """A request whose work is on its way: what its texts will score, a batch at a time, or why there is nothing."""

    request: EvalRequest
    scores: dict[str, list[Scores]] = field(default_factory=dict)
    failure: tuple[FailureKind, str] | None = None

    def fetched(self) -> dict[str, Divergence]:
        """What was found in each text; waits for it."""
        return {name: fetch(scores) for name, scores in self.scores.items()}


def outcome_of(
    launched: Launched, scored: Mapping[str, Divergence], reference: Reference, provenance: Provenance
) -> Outcome:
    """The result of a request whose texts are scored, or its failure."""
    failure = launched.failure or _not_finite(scored)
    if failure is not None:
        return EvalFailure(launched.request.id, *failure, provenance)
    try:
        result = _result(launched.request, scored, reference, provenance)
    except UserError as error:  # of a metric of another package
        return EvalFailure(launched.request.id, "invalid", str(error), provenance)
    for name, values in result.others.items():
        bad = int((~np.isfinite(values)).sum())
        if bad:
            said = f"metric {name} is no finite number on {bad} of {len(values)} prompts"
            return EvalFailure(launched.request.id, "nonfinite", said, provenance)
    return result


def _not_finite(scored: Mapping[str, Divergence]) -> tuple[FailureKind, str] | None:
    for name, found in scored.items():
        bad = ~np.isfinite(found.nll)
        if bad.any():
            return "nonfinite", f"{bad.any(axis=1).sum()} of {len(bad)} prompts ({name}) got non-finite logits"
    return None


def _result(
    request: EvalRequest, scored: Mapping[str, Divergence], reference: Reference, provenance: Provenance
) -> EvalResult:
    measured = scored["continuation"]
    values = _values(request, scored, reference)
    return EvalResult(
        request_id=request.id,
        fdt=values["fdt"],
        sdt=values["sdt"],
        dppl=values["dppl"],
        kl=values.get("kl"),
        ppl=values.get("ppl"),
        provenance=provenance,
        fdt_unmasked=first_divergent_token(measured.diverged),
        sdt_unmasked=share_of_divergent_tokens(measured.diverged),
        others={name: found for name, found in values.items() if name not in BUILT_IN},
    )


def _values(request: EvalRequest, scored: Mapping[str, Divergence], reference: Reference) -> dict[str, Any]:
    """Metric -> its value on each prompt, of all that are asked for. Raises `UserError` for a metric that gives
    something else than a number for each prompt."""
    measured = scored["continuation"]
    diverged = measured.diverged & reference.agrees[slice(*request.prompts)]
    outputs = PromptOutputs(
        diverged=diverged,
        nll=measured.nll,
        kl=measured.kl,
        text_nll=scored["text"].nll if "text" in scored else None,
        text_missed=scored["text"].diverged if "text" in scored else None,
        overlap=(~diverged).astype(np.float32) if reference.decoding.is_greedy else measured.overlap,
    )
    found: dict[str, Any] = {}
    for name in dict.fromkeys((*ALWAYS, *request.extra_metrics)):
        values = METRICS[name].of_prompts(replace(outputs, own=measured.own.get(name)))
        if np.shape(values) != (len(outputs.nll),):
            shape, wanted = list(np.shape(values)), [len(outputs.nll)]
            raise UserError(f"metric {name} made an array of {shape}, wanted {wanted}: a number for each prompt")
        found[name] = values if name in BUILT_IN else np.asarray(values, np.float32)
    return found
