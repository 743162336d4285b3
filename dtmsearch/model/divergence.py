"""The head, compared with the reference in chunks: who is chosen, how likely the reference's token is, how far the
distribution has moved. Never holds logits of more than a chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtmsearch.model.body import Body
from dtmsearch.plans.evaluation import FloatArray

# Logits of a chunk: what stays in a processor's cache, what a GPU fills its units with.
_CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 28}


@dataclass(frozen=True)
class Divergence:
    """Per prompt and target token, each [num_prompts, targets]: whether the greedy choice is another token than the
    reference's, the reference token's negative log likelihood in nats, and KL(base || compressed) in nats (None when
    not asked for)."""

    diverged: NDArray[np.bool_]
    nll: FloatArray
    kl: FloatArray | None

    @staticmethod
    def join(parts: Sequence[Divergence]) -> Divergence:
        kl = [part.kl for part in parts if part.kl is not None]
        return Divergence(
            np.concatenate([part.diverged for part in parts]),
            np.concatenate([part.nll for part in parts]),
            np.concatenate(kl) if kl else None,
        )


def compare(
    body: Body, hidden: Tensor, targets: Tensor, base_hidden: Tensor | None, suppressed: tuple[int, ...]
) -> Divergence:
    """Compare the head's choices from `hidden` [prompts, targets, hidden] with `targets` [prompts, targets].

    The choice is what greedy generation takes: the largest logit in the model's dtype, the lowest index among equals,
    `suppressed` tokens never. Likelihoods are of the full distribution.
    """
    shape = targets.shape
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    base_rows = None if base_hidden is None else base_hidden.reshape(rows.shape)
    diverged: list[Tensor] = []
    nll: list[Tensor] = []
    kl: list[Tensor] = []
    with body.head_only():
        chunk = max(1, _CHUNK_LOGITS[hidden.device.type] // body.vocabulary_size)
        for at in range(0, len(rows), chunk):
            part = slice(at, at + chunk)
            logits = body.logits(rows[part])
            target = wanted[part].to(logits.device).unsqueeze(1)
            scores = logits.float()
            total = scores.logsumexp(dim=1, keepdim=True)
            nll.append((total - scores.gather(1, target)).squeeze(1))
            if base_rows is not None:
                kl.append(_kl(body.logits(base_rows[part]).float(), scores, total))
            scores[:, list(suppressed)] = -torch.inf
            diverged.append(scores.argmax(dim=1) != target.squeeze(1))
    return Divergence(
        torch.cat(diverged).reshape(shape).cpu().numpy(),
        torch.cat(nll).reshape(shape).cpu().numpy(),
        torch.cat(kl).reshape(shape).cpu().numpy() if kl else None,
    )


def _kl(base_scores: Tensor, scores: Tensor, total: Tensor) -> Tensor:
    """KL(base || compressed) [rows] from logits [rows, vocabulary], the latter's log normaliser given; at least 0."""
    base = base_scores.log_softmax(dim=1)
    return (base.exp() * (base - scores + total)).sum(dim=1).clamp_(min=0.0)
