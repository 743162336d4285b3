"""From what a model's passes have found to the outcome of a request: its metrics, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
from dtmsearch.core.metrics import first_divergent_token, perplexity, share_of_divergent_tokens
from dtmsearch.model.forward.head_metrics import Divergence, Scores, fetch


@dataclass(frozen=True)
class Launched:
    """A request whose work is on its way: what its streams will score, a batch at a time, or why there is nothing."""

    request: EvalRequest
    scores: dict[str, list[Scores]] = field(default_factory=dict)
    failure: tuple[FailureKind, str] | None = None

    def fetched(self) -> dict[str, Divergence]:
        """What was found in each stream; waits for it."""
        return {name: fetch(scores) for name, scores in self.scores.items()}


def outcome_of(
    launched: Launched, streams: Mapping[str, Divergence], reference: Reference, provenance: Provenance
) -> Outcome:
    failure = launched.failure or _not_finite(streams)
    if failure is not None:
        return EvalFailure(launched.request.id, *failure, provenance)
    return _result(launched.request, streams, reference, provenance)


def _not_finite(streams: Mapping[str, Divergence]) -> tuple[FailureKind, str] | None:
    for name, stream in streams.items():
        bad = ~np.isfinite(stream.nll)
        if bad.any():
            return "nonfinite", f"{bad.any(axis=1).sum()} of {len(bad)} prompts ({name}) got non-finite logits"
    return None


def _result(
    request: EvalRequest, streams: Mapping[str, Divergence], reference: Reference, provenance: Provenance
) -> EvalResult:
    measured = streams["continuation"]
    diverged = measured.diverged & reference.agrees[slice(*request.prompts)]
    return EvalResult(
        request_id=request.id,
        fdt=first_divergent_token(diverged),
        sdt=share_of_divergent_tokens(diverged),
        dppl=perplexity(measured.nll),
        kl=None if measured.kl is None else measured.kl.mean(axis=1, dtype=np.float64).astype(np.float32),
        ppl=perplexity(streams["text"].nll) if "text" in streams else None,
        provenance=provenance,
        fdt_unmasked=first_divergent_token(measured.diverged),
        sdt_unmasked=share_of_divergent_tokens(measured.diverged),
    )
