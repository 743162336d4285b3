"""Top-5 agreement for dtmsearch: how many of the base model's five likeliest tokens are among the compressed model's
five likeliest, as a share, averaged over the predicted positions of a prompt.
"""

from __future__ import annotations

from typing import Any

from dtmsearch.core.metric_registry import Metric, Numbers, PromptOutputs, mean_of_positions

NUM_TOKENS = 5


def agreement(logits: Any, base_logits: Any, tokens: Any) -> Any:
    """[positions, vocabulary] of both models -> [positions], from 0 to 1."""
    own, base = (values.topk(NUM_TOKENS, dim=1).indices for values in (logits, base_logits))
    shared = (own.unsqueeze(2) == base.unsqueeze(1)).any(dim=2)
    return shared.sum(dim=1) / NUM_TOKENS


def of_prompts(outputs: PromptOutputs) -> Numbers:
    assert outputs.own is not None
    return mean_of_positions(outputs.own)


METRIC = Metric(
    "top5",
    of_prompts,
    at_positions=agreement,
    higher_is_better=True,
    limits=lambda continuation_tokens: (0.0, 1.0),
    title="top-5 agreement",
    digits=".4f",
)
