"""A compressed model as a draft for its base model in speculative decoding: what follows from where they diverge."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Tokens that a draft model proposes at a time, where nothing else is said.
DRAFT_TOKENS = 5
# Further lengths, of which `accepted1` and so on say the same.
DRAFTS = (1, 2, 3, 8, 16)
# Widths for which it is counted how often no divergence comes within them.
WIDTHS = (1, 2, 4, 8, 16, 32, 64)


def accepted_tokens(overlap: NDArray[np.float32], draft_tokens: int = DRAFT_TOKENS) -> NDArray[np.float32]:
    """How many of `draft_tokens` proposed tokens are accepted at each step of speculative decoding, on average
    [num_prompts], from the overlap at each position [num_prompts, positions].

    A step that starts at a position accepts token after token, each with the probability that is its position's overlap
    (speculative sampling, arXiv 2211.17192, section 3.1), until one is refused or all are accepted; then the base model
    adds a token of its own, after which the next step starts. Steps are weighed by the probability that one starts at
    a position; those that the end of the continuation would cut short are left out. Of greedy choices this is what
    drafting from the continuation's start does, exactly; of sampled ones overlaps along the base model's sample stand
    for those along what is accepted.
    """
    length = overlap.shape[1]
    draft = min(draft_tokens, length)
    starts, accepted = _steps(overlap, draft_tokens)
    whole = slice(0, max(1, length - draft))
    found: NDArray[np.float32] = (accepted[:, whole].sum(axis=1) / starts[:, whole].sum(axis=1)).astype(np.float32)
    return found


def expected_passes(overlap: NDArray[np.float32], draft_tokens: int = DRAFT_TOKENS) -> NDArray[np.float64]:
    """Passes of the base model [num_prompts] until continuations are whole, as `accepted_tokens` reckons them, those at
    the end included, which are drafted no more than is left."""
    passes: NDArray[np.float64] = _steps(overlap, draft_tokens)[0].sum(axis=1)
    return passes


def _steps(overlap: NDArray[np.float32], draft_tokens: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The probability that a step starts at each position, and what it is expected to accept times that probability,
    both [num_prompts, positions]."""
    if draft_tokens < 1:
        raise ValueError(f"a draft has at least one token, got {draft_tokens}")
    num_prompts, length = overlap.shape
    passes = overlap.astype(np.float64)
    starts, accepted = np.zeros((num_prompts, length + 1)), np.zeros((num_prompts, length))
    starts[:, 0] = 1.0
    for at in range(length):
        reached = starts[:, at]
        end = min(at + draft_tokens, length)
        for place in range(at, end):
            refused = reached * (1.0 - passes[:, place])
            starts[:, place + 1] += refused
            reached = reached - refused
            accepted[:, at] += reached
        starts[:, min(end + 1, length)] += reached
    return starts[:, :length], accepted


def clear_runs(diverged: NDArray[np.bool_], width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of divergences at positions [num_prompts, positions]: how often `width` tokens follow a continuation's start or a
    divergence before it ends, and how often none of these diverges, each [num_prompts]. Starts nearer to the end are
    not counted, whatever follows, so that the second over the first is the share of widths of at least so many."""
    num_prompts, length = diverged.shape
    starts = np.concatenate([np.ones((num_prompts, 1), np.bool_), diverged], axis=1)[:, : max(length - width + 1, 0)]
    sums = np.concatenate([np.zeros((num_prompts, 1), np.int64), diverged.cumsum(axis=1)], axis=1)
    clear = sums[:, width:] == sums[:, : max(length - width + 1, 0)]
    counted: tuple[NDArray[np.float32], NDArray[np.float32]] = (
        starts.sum(axis=1).astype(np.float32),
        (starts & clear).sum(axis=1).astype(np.float32),
    )
    return counted
