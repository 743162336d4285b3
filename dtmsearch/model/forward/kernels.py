"""The comparison of logits with the reference as one pass over them, for GPUs.

A row of logits is read once, in the dtype in which it was made; beside each row only a handful of numbers is kept. The
same definitions as `dtmsearch.model.forward.head_metrics._score`, which serves where there is no Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4_096


@triton.jit  # type: ignore[untyped-decorator]
def _score_rows(  # type: ignore[no-untyped-def] # annotations are read as code of the kernel
    logits, base_logits, targets, never, diverged, nll, kl,
    vocabulary: tl.constexpr, with_base: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * vocabulary
    # Running maximum and sum of exponentials of this model's row, and the best token that may be chosen.
    top, total = float("-inf"), 0.0
    best, chosen = float("-inf"), 0
    # The same of the base model's row, and its sum of exponentials times (base logit - logit).
    base_top, base_total, moved = float("-inf"), 0.0, 0.0
    for offset in range(0, vocabulary, block):
        columns = offset + tl.arange(0, block)
        inside = columns < vocabulary
        values = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(values, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(values - higher), axis=0)
        top = higher
        forbidden = tl.load(never + columns, mask=inside, other=1) != 0
        allowed = tl.where(forbidden, float("-inf"), values)
        best_here, at = tl.max(allowed, axis=0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(best_here > best, offset + at, chosen)  # of equals the first stays
        best = tl.maximum(best, best_here)
        if with_base:
            base = tl.load(base_logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            base_higher = tl.maximum(base_top, tl.max(base, axis=0))
            weights = tl.exp(base - base_higher)
            rescale = tl.exp(base_top - base_higher)
            base_total = base_total * rescale + tl.sum(weights, axis=0)
            moved = moved * rescale + tl.sum(tl.where(inside, weights * (base - values), 0.0), axis=0)
            base_top = base_higher
    target = tl.load(targets + row)
    log_total = top + tl.log(total)
    tl.store(nll + row, log_total - tl.load(logits + start + target).to(tl.float32))
    tl.store(diverged + row, (chosen != target).to(tl.int8))
    if with_base:
        distance = moved / base_total + log_total - base_top - tl.log(base_total)
        tl.store(kl + row, tl.maximum(distance, 0.0))


def score(logits: Tensor, targets: Tensor, base_logits: Tensor | None, never: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `dtmsearch.model.forward.head_metrics._score`; leaves `logits` as they are."""
    rows, vocabulary = logits.shape
    logits, targets = logits.contiguous(), targets.contiguous()
    base = logits if base_logits is None else base_logits.contiguous()
    diverged = torch.empty(rows, dtype=torch.int8, device=logits.device)
    nll = torch.empty(rows, dtype=torch.float32, device=logits.device)
    kl = torch.empty(0 if base_logits is None else rows, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):  # a kernel is launched on the current device, whatever holds its tensors
            _score_rows[(rows,)](
                logits, base, targets, never.to(torch.int8), diverged, nll, kl,
                vocabulary=vocabulary, with_base=base_logits is not None, block=_BLOCK,
            )  # fmt: skip
    return diverged.bool(), nll, kl
