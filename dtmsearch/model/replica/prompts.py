"""Text -> prompt tokens: windows of documents, drawn by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtmsearch.core.evaluation import IntArray, PromptTokens
from dtmsearch.errors import UserError


def cut_prompts(
    texts: Sequence[str], tokenizer: Any, count: int, prompt_tokens: int, continuation_tokens: int, seed: int
) -> PromptTokens:
    """`count` windows of prompt_tokens + continuation_tokens tokens; see `cut_windows`."""
    windows = cut_windows(texts, tokenizer, count, prompt_tokens + continuation_tokens, seed)
    if len(windows) < count:
        raise UserError(
            f"prompts.count asks for {count} prompts of {prompt_tokens} + {continuation_tokens} tokens, but the text "
            f"holds {len(windows)} of that length: give more text, or a smaller count, prompt_tokens or "
            "continuation_tokens"
        )
    return PromptTokens(windows, prompt_tokens)


def cut_calibration(texts: Sequence[str], tokenizer: Any, count: int, length: int, seed: int) -> IntArray:
    """`count` windows of `length` tokens; see `cut_windows`."""
    windows = cut_windows(texts, tokenizer, count, length, seed)
    if len(windows) < count:
        raise UserError(
            f"calibration.count asks for {count} rows of {length} tokens, but the text holds {len(windows)} of that "
            "length: give more text, or a smaller calibration.count or calibration.tokens"
        )
    return windows


def cut_windows(texts: Sequence[str], tokenizer: Any, count: int, length: int, seed: int) -> IntArray:
    """`count` windows of `length` tokens, none overlapping, drawn from `texts` by `seed`; all where there are fewer.

    Every document is cut into whole windows; the rest at its end is left out. A tokenizer that opens texts with a
    token of its own opens every window with it. A larger `count` extends a smaller one.
    """
    opening = list(tokenizer("")["input_ids"])
    body = length - len(opening)
    windows: list[list[int]] = []
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows += [opening + tokens[at : at + body] for at in range(0, len(tokens) - body + 1, body)]
    chosen = np.random.default_rng(seed).permutation(len(windows))[:count]
    return np.array([windows[i] for i in chosen], dtype=np.int32).reshape(-1, length)
