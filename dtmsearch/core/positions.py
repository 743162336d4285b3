"""Two models position by position: what is known of both distributions, in full or of their likeliest tokens only.

Arrays alone; knows nothing of models or engines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]
# An engine's log-probabilities are rounded: what is left beside its likeliest tokens is at least this.
_LEAST_REST = 1e-6


@dataclass(frozen=True)
class Positions:
    """What OTHER makes of the positions that BASE generated, each [num_prompts, positions].

    `diverged`: its greedy choice is another token than BASE's. `nll`: nats of BASE's token; None where an engine tells
    no probabilities. `kl`: KL(BASE || OTHER) in nats, or where `covered` is given, a lower bound of it from tokens that
    hold that share of BASE's probability. `text_nll` [num_prompts, text positions]: nats of human text. `first_only`:
    only the first divergence of each prompt is known, and marked, as of text alone.
    """

    diverged: NDArray[np.bool_]
    nll: Floats | None = None
    kl: Floats | None = None
    covered: Floats | None = None
    text_nll: Floats | None = None
    first_only: bool = False


@dataclass(frozen=True)
class Likeliest:
    """Some tokens' log-probabilities at each position, in nats: `ids` and `log_probabilities` [num_prompts, positions,
    tokens], filled up with ids of -1."""

    ids: Tokens
    log_probabilities: Floats

    def of(self, tokens: Tokens) -> Floats:
        """The log-probability of one token at each position [num_prompts, positions]; NaN where it is not among
        them."""
        found = self.ids == tokens[..., None]
        values = np.where(found, self.log_probabilities, -np.inf).max(axis=-1)
        return np.where(found.any(axis=-1), values, np.nan).astype(np.float32)

    def best(self, suppressed: tuple[int, ...]) -> Tokens:
        """The likeliest token that may be chosen, the lowest id among equals: [num_prompts, positions]; -1 where none
        of them may."""
        allowed = (self.ids >= 0) & ~np.isin(self.ids, suppressed)
        values = np.where(allowed, self.log_probabilities, -np.inf)
        equal = allowed & (values == values.max(axis=-1, keepdims=True))
        chosen = np.where(equal, self.ids, np.iinfo(np.int32).max).min(axis=-1)
        return np.where(allowed.any(axis=-1), chosen, -1).astype(np.int32)


def least_kl(base: Floats, other: Floats) -> tuple[Floats, Floats]:
    """A lower bound of KL(base || other) at each position, and the share of the base's probability that it rests on,
    from the log-probabilities [..., tokens] of the same tokens under both; -inf under both stands for no token.

    All other tokens count as one: merging outcomes never raises a KL divergence (the log-sum inequality: Cover and
    Thomas, Elements of Information Theory, 2.7).
    """
    p, q = np.exp(base.astype(np.float64)), np.exp(other.astype(np.float64))
    known = p > 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(known, p * (base.astype(np.float64) - other), 0.0)
    covered = np.minimum(p.sum(axis=-1), 1.0)
    rest, other_rest = 1.0 - covered, np.maximum(1.0 - q.sum(axis=-1), _LEAST_REST)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Of a rest that rounding hides, the least that it can add.
        hidden = _LEAST_REST * (np.log(_LEAST_REST / other_rest) - 1.0 / np.e)
        of_rest = np.where(rest > _LEAST_REST, rest * np.log(rest / other_rest), hidden)
    return np.maximum(terms.sum(axis=-1) + of_rest, 0.0).astype(np.float32), covered.astype(np.float32)


def common(first: Likeliest, second: Likeliest) -> tuple[Floats, Floats]:
    """The log-probabilities of the tokens that both know at each position, under either, each [num_prompts, positions,
    tokens]; -inf for those that the second does not."""
    matches = (first.ids[..., :, None] == second.ids[..., None, :]) & (first.ids >= 0)[..., :, None]
    theirs = np.where(matches, second.log_probabilities[..., None, :], -np.inf).max(axis=-1)
    own = np.where(matches.any(axis=-1), first.log_probabilities, -np.inf)
    return own.astype(np.float32), theirs.astype(np.float32)
