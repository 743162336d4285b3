"""The head, compared with the reference in chunks: who is chosen, how likely the reference's token is, how far the
distribution has moved. Never holds logits of more than a chunk of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtmsearch.core.evaluation import FloatArray
from dtmsearch.core.metric_registry import Metric
from dtmsearch.errors import UserError
from dtmsearch.model.forward.gpu_hops import moved
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.forward.shared_noise import Sampling, overlap

# Logits of a chunk: what a CPU multiplies fast and still has near, what a GPU fills its units with.
_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
# The same where noise is added, for which there are integers of 64 bits beside each.
_CHUNK_NOISE = {"cpu": 1 << 20, "cuda": 1 << 25}


@dataclass(frozen=True)
class Divergence:
    """Per prompt and target token, each [num_prompts, targets]: whether the greedy choice is another token than the
    reference's, the reference token's negative log likelihood in nats, and KL(base || compressed) in nats (None when
    not asked for). `own`: what metrics of other packages found there, by name. `overlap`: see `shared_noise.overlap`;
    None when not asked for."""

    diverged: NDArray[np.bool_]
    nll: FloatArray
    kl: FloatArray | None
    own: Mapping[str, FloatArray] = field(default_factory=dict)
    overlap: FloatArray | None = None


@dataclass(frozen=True)
class Scores:
    """The values of a `Divergence` for one batch, in the host's memory or, before `arrived`, on their way there."""

    diverged: Tensor
    nll: Tensor
    kl: Tensor | None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    overlap: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def sent(self) -> Scores:
        """On their way to the host. What the device is given to do from now on is not waited for with them."""
        if not self.nll.is_cuda:
            return self
        there = _send(self.diverged), _send(self.nll), None if self.kl is None else _send(self.kl)
        own = {name: _send(values) for name, values in self.own.items()}
        overlap = None if self.overlap is None else _send(self.overlap)
        return Scores(*there, own, overlap, torch.cuda.current_stream(self.nll.device).record_event())


def _send(values: Tensor) -> Tensor:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def fetch(batches: Sequence[Scores]) -> Divergence:
    """Wait until what the device has found is there, and take it."""
    for batch in batches:
        if batch.arrived is not None:
            batch.arrived.synchronize()
    kl = [batch.kl for batch in batches if batch.kl is not None]
    overlaps = [batch.overlap for batch in batches if batch.overlap is not None]
    return Divergence(
        torch.cat([batch.diverged for batch in batches]).numpy(),
        torch.cat([batch.nll for batch in batches]).numpy(),
        torch.cat(kl).numpy() if kl else None,
        {name: torch.cat([batch.own[name] for batch in batches]).numpy() for name in batches[0].own},
        torch.cat(overlaps).numpy() if overlaps else None,
    )


def compare(
    body: Body,
    hidden: Tensor,
    targets: Tensor,
    base_hidden: Tensor | None,
    never: Tensor,
    metrics: Sequence[Metric] = (),
    base: Body | None = None,
    as_base: Callable[[], AbstractContextManager[None]] = nullcontext,
    sampling: Sampling | None = None,
    overlaps: bool = False,
) -> Scores:
    """Compare the head's choices from `hidden` [prompts, targets, hidden] with `targets` [prompts, targets].

    The choice is what greedy generation takes: the largest logit in the model's dtype, the lowest index among equals,
    tokens marked in `never` [vocabulary] not at all. Likelihoods are of the full distribution. `metrics` look at the
    logits themselves, and need `base_hidden`. `base_hidden` are inputs of the same head or, where `base` is given, of
    that model's, which may be of another width; of two vocabularies the tokens that both have are compared. Within
    `as_base` the head is the base model's, where it is another now. With `sampling` the choice is what it samples, by
    the same noise as the target was, and `overlaps` asks for what the distributions sampled from have in common;
    likelihoods and KL stay those of all tokens at a temperature of 1. Returns before a GPU has done the work.
    """
    score = _fused_score() if hidden.is_cuda else _score
    shape = targets.shape
    # A single column of targets is a view with gaps, which no kernel reads as a row.
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).contiguous()
    base_rows = None if base_hidden is None else base_hidden.reshape(-1, base_hidden.shape[-1])
    base_body = base or body
    diverged: list[Tensor] = []
    nll: list[Tensor] = []
    kl: list[Tensor] = []
    own: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
    common: list[Tensor] = []
    with body.head_only(), nullcontext() if base is None else base.head_only():
        held = _CHUNK_LOGITS[hidden.device.type] if sampling is None else _CHUNK_NOISE[hidden.device.type]
        most = max(1, held // body.vocabulary_size)
        chunk = math.ceil(len(rows) / math.ceil(len(rows) / most))  # as large as the others
        for at in range(0, len(rows), chunk):
            part = slice(at, at + chunk)
            logits = body.logits(rows[part])
            wanted = moved(wanted, logits.device)
            base_logits = None
            if base_rows is not None:
                with as_base():
                    base_logits = base_body.logits(base_rows[part])
            if base is not None and base_logits is not None:
                logits, base_logits = _of_both(logits, base_logits)
            for metric in metrics:
                own[metric.name].append(_at_positions(metric, logits, base_logits, wanted[part]))
            allowed = never[: logits.shape[1]]
            left = None if sampling is None else _leaves(sampling, logits, wanted[part], allowed, at, shape[1])
            if sampling is not None and overlaps and base_logits is not None:
                common.append(overlap(logits, base_logits, allowed, sampling.decoding))
            greedy, *likelihoods = score(logits, wanted[part], base_logits, allowed)
            diverged.append(greedy if left is None else left)
            for column, values in zip((nll, kl), likelihoods, strict=True):
                column.append(values)
    found = Scores(
        torch.cat(diverged).reshape(shape),
        torch.cat(nll).reshape(shape),
        None if base_rows is None else torch.cat(kl).reshape(shape),
        {name: torch.cat(values).reshape(shape) for name, values in own.items()},
        torch.cat(common).reshape(shape) if common else None,
    )
    return found.sent()


def _leaves(
    sampling: Sampling, logits: Tensor, targets: Tensor, never: Tensor, first: int, num_positions: int
) -> Tensor:
    """Whether other tokens than `targets` [rows] are sampled from `logits`, of rows from `first` on."""
    rows = torch.arange(first, first + len(targets), device=logits.device)
    return sampling.noisy(logits, never, sampling.of_rows(rows, num_positions)).argmax(dim=1) != targets


def _of_both(logits: Tensor, base_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both over the tokens that both have: heads of one tokenizer may be padded to different sizes."""
    size = min(logits.shape[1], base_logits.shape[1])
    return logits[:, :size], base_logits.to(logits.device)[:, :size]


def _at_positions(metric: Metric, logits: Tensor, base_logits: Tensor | None, targets: Tensor) -> Tensor:
    """What a metric of its own kind makes of a chunk, in 32 bits. Raises `UserError` where that is not a number for
    each position."""
    assert metric.at_positions is not None and base_logits is not None
    values = metric.at_positions(logits, base_logits, targets)
    if not isinstance(values, Tensor) or values.shape != targets.shape:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"metric {metric.name} made {found} of {len(targets)} positions, wanted a tensor of as many")
    return values.float()


def _score(logits: Tensor, targets: Tensor, base_logits: Tensor | None, never: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(diverged, negative log likelihood, KL), each [rows], from logits [rows, vocabulary]; KL empty without the base
    model's. `never` [vocabulary] marks tokens that may not be chosen. Overwrites `logits`."""
    scores = logits.float()
    log_probabilities = scores.log_softmax(dim=1)
    nll = -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
    if base_logits is None:
        kl = nll.new_empty(0)
    else:
        base = base_logits.float().log_softmax(dim=1)
        kl = (base.exp() * (base - log_probabilities)).sum(dim=1).clamp(min=0.0)
    return _diverged(scores, targets, never), nll, kl


def _diverged(scores: Tensor, targets: Tensor, never: Tensor) -> Tensor:
    """Whether the largest allowed of `scores` [rows, vocabulary], the first among equals, is at another place than the
    target's. Overwrites `scores`.

    The largest of all others is found in a tenth of the time that `argmax` takes on a CPU.
    """
    wanted = targets.unsqueeze(1)
    scores.index_fill_(1, never.nonzero().squeeze(1), -torch.inf)  # a mask takes longer than all the rest
    own = scores.gather(1, wanted)
    best = scores.scatter_(1, wanted, -torch.inf).amax(dim=1, keepdim=True)
    diverged = ~(own > best).squeeze(1)
    equal = (own == best).squeeze(1).nonzero().squeeze(1)
    first = (scores[equal] == best[equal]).int().argmax(dim=1)
    diverged[equal] = (first < targets[equal]) | never[targets[equal]]
    return diverged


@cache
def _fused_score() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_score` as one pass over the logits, where there is Triton, as there is with torch for CUDA."""
    try:
        from dtmsearch.model.forward.kernels import score
    except ImportError:
        return _score
    return score
