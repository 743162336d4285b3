"""Text -> prompt tokens: windows of documents, drawn by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtmsearch.plans.evaluation import PromptTokens


def cut_prompts(
    texts: Sequence[str], tokenizer: Any, count: int, prompt_tokens: int, continuation_tokens: int, seed: int
) -> PromptTokens:
    """`count` windows of prompt_tokens + continuation_tokens tokens, none overlapping, drawn from `texts` by `seed`.

    Every document is cut into whole windows; the rest at its end is left out. A tokenizer that opens texts with a
    token of its own opens every window with it. A larger `count` extends a smaller one. Raises `ValueError`, saying
    how many windows there are, when there are too few.
    """
    length = prompt_tokens + continuation_tokens
    opening = list(tokenizer("")["input_ids"])
    body = length - len(opening)
    windows: list[list[int]] = []
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows += [opening + tokens[at : at + body] for at in range(0, len(tokens) - body + 1, body)]
    if len(windows) < count:
        raise ValueError(
            f"prompts.count asks for {count} prompts of {prompt_tokens} + {continuation_tokens} tokens, but the text "
            f"holds {len(windows)} of that length: give more text, or a smaller count, prompt_tokens or "
            "continuation_tokens"
        )
    chosen = np.random.default_rng(seed).permutation(len(windows))[:count]
    return PromptTokens(np.array([windows[i] for i in chosen], dtype=np.int32), prompt_tokens)
