"""What a model writes, for a person to read: a text in the pieces that its tokens add, and how sure each choice was.

Knows tokenizers and the head; nothing of plans or of what is compared with what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.evaluation import Continuation, FloatArray, IntArray, PromptTokens, Writing
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.forward.shared_noise import Sampling

# The last tokens of a prompt that stand before a text while it is decoded, so that its first piece keeps its space.
_TAIL_TOKENS = 8
# What decoders put for bytes that make no character yet, or never will.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Nats that stand for a choice that was none.
_SURE = 99.0

_Written = tuple[IntArray, FloatArray] | tuple[Sequence[IntArray], Sequence[FloatArray]]


def written_out(
    tokenizer: Any,
    prompts: Sequence[int],
    start: PromptTokens,
    base: _Written,
    own: _Written,
) -> list[Continuation]:
    """Continuations in text. `base` and `own` are tokens and margins, each [prompts, continuation_tokens], or an array
    a prompt where they are not of one length."""

    def writing(row: int, source: _Written) -> Writing:
        tokens = source[0][row].tolist()
        tail = start.tokens[row, : start.prompt_tokens][-_TAIL_TOKENS:].tolist()
        return Writing(tuple(tokens), tuple(pieces(tokenizer, tail, tokens)), tuple(source[1][row].tolist()))

    return [
        Continuation(
            prompt=prompt,
            prompt_text=tokenizer.decode(start.tokens[row, : start.prompt_tokens].tolist()),
            base=writing(row, base),
            own=writing(row, own),
        )
        for row, prompt in enumerate(prompts)
    ]


def pieces(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """The characters that each token adds to the text of `before` and the tokens so far.

    A character of several tokens comes with its last one; what never becomes a character comes, marked as such, with
    the last token of all.
    """
    found: list[str] = []
    text = tokenizer.decode(list(before))
    for stop in range(1, len(tokens) + 1):
        longer = tokenizer.decode([*before, *tokens[:stop]])
        is_whole = not longer.endswith(_REPLACEMENT) or stop == len(tokens)
        found.append(longer[len(text) :] if is_whole else "")
        text = longer if is_whole else text
    return found


def margins(body: Body, tokens: Tensor, first: int, never: Tensor, decoding: Decoding = GREEDY) -> FloatArray:
    """[rows, targets]: how many nats likelier the best token is than the runner-up, in one pass over `tokens` [rows,
    tokens], from position `first` on. Tokens marked in `never` [vocabulary] take no part. Where tokens are sampled, of
    logits over the temperature with their noise, where one token alone can be `_SURE`."""
    hidden = body.finish(tokens, None, 0)[:, first - 1 : -1]
    with body.head_only():
        logits = body.logits(hidden.reshape(-1, hidden.shape[-1])).float()
    sampling = Sampling.of(decoding, tokens[:, :first])
    if sampling is not None:
        states = sampling.of_rows(torch.arange(len(logits), device=logits.device), hidden.shape[1])
        logits = sampling.noisy(logits, never.to(logits.device), states)
    best = logits.masked_fill(never.to(logits.device), -torch.inf).topk(2, dim=1).values
    values: FloatArray = (best[:, 0] - best[:, 1]).clamp(max=_SURE).reshape(hidden.shape[:2]).cpu().numpy()
    return values
