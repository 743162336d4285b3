"""Sampling by noise that is computed from integers: of a prompt's tokens, a seed, a position and a token.

Nothing is drawn from a generator, so that a position's noise is the same for every model, batch, replica and device;
between devices it may differ in the last bit, as logits do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtmsearch.core.decoding import Decoding
from dtmsearch.model.forward.gpu_hops import moved

_BITS_32 = 0xFFFFFFFF
_FACTOR = 0x45D9F3B  # odd and below 2^31, so that no product of 32 bits leaves a signed integer of 64
_LARGEST_BELOW_1 = 1.0 - 2.0**-24


def _mixed(numbers: Tensor) -> Tensor:
    """A hash of integers of 32 bits (in 64), each by itself: two rounds of shift and product, each of which can be
    undone, so that different numbers stay different."""
    numbers = ((numbers >> 16) ^ numbers) * _FACTOR & _BITS_32
    numbers = ((numbers >> 16) ^ numbers) * _FACTOR & _BITS_32
    return (numbers >> 16) ^ numbers


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a batch are sampled: `keys` [prompts], a number of each prompt."""

    decoding: Decoding
    keys: Tensor

    @staticmethod
    def of(decoding: Decoding, prompts: Tensor) -> Sampling | None:
        """For `prompts` [prompts, tokens], by whose tokens alone each is known; None where decoding is greedy."""
        if decoding.is_greedy:
            return None
        places = torch.arange(1, prompts.shape[1] + 1, device=prompts.device)
        own = _mixed(prompts.long() ^ _mixed(places)).sum(dim=1)
        return Sampling(decoding, _mixed(own + _mixed(torch.full_like(own, decoding.seed)) & _BITS_32))

    def states(self, prompts: Tensor, positions: Tensor) -> Tensor:
        """The noise's state at positions [rows], counted from the continuation's first token, of prompts [rows], given
        by their places in the batch."""
        keys = moved(self.keys, prompts.device)
        return _mixed(keys[prompts] + _mixed(positions + 1) & _BITS_32)

    def of_rows(self, rows: Tensor, num_positions: int) -> Tensor:
        """The same at `rows` of [prompts, num_positions] laid out in one line."""
        return self.states(rows // num_positions, rows % num_positions)

    def noisy(self, logits: Tensor, never: Tensor, states: Tensor) -> Tensor:
        """The scores [rows, vocabulary] whose largest is the token that is sampled at each state [rows] from `logits`
        [rows, vocabulary], which it leaves as they are; tokens marked in `never` [vocabulary] are not."""
        scores = left_over(logits, never, self.decoding)
        if self.decoding.filters and not scores.is_cuda:  # on a GPU counting them would wait for all that it is given
            rows, tokens = (scores > -torch.inf).nonzero(as_tuple=True)
            scores[rows, tokens] += gumbel(states[rows], tokens)
        else:
            scores += gumbel(states.unsqueeze(1), torch.arange(scores.shape[1], device=scores.device))
        return scores

    def processor(self, prompt_tokens: int, suppressed: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        """For transformers' generation: leaves of scores only what is sampled, for a choice of the largest."""

        def process(tokens: Tensor, scores: Tensor) -> Tensor:
            never = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            never[list(suppressed)] = True
            rows = torch.arange(len(scores), device=scores.device)
            states = self.states(rows, torch.full_like(rows, tokens.shape[1] - prompt_tokens))
            chosen = self.noisy(scores, never, states).argmax(dim=1, keepdim=True)
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

        return process


def gumbel(states: Tensor, tokens: Tensor) -> Tensor:
    """Noise of tokens at states, which broadcast: -log(-log(1 - u)) of u uniform between 0 and 1, in 32 bits. Its upper
    tail, which decides, is as fine as u is near 0: 2^-33."""
    uniform = (_mixed(states ^ _mixed(tokens + 1)).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp_(max=_LARGEST_BELOW_1)))


def left_over(logits: Tensor, never: Tensor, decoding: Decoding) -> Tensor:
    """Logits over the temperature [rows, vocabulary] in 32 bits, -inf where a token cannot be sampled: those marked in
    `never` [vocabulary], and what `top_k` and `top_p` leave out."""
    scores = logits.float() / decoding.temperature
    scores.masked_fill_(never, -torch.inf)
    if not decoding.filters:
        return scores
    size = scores.shape[1]
    ordered = scores.topk(min(decoding.top_k, size), dim=1).values if decoding.top_k else scores.sort(dim=1)[0].flip(1)
    if decoding.top_p < 1.0:
        shares = ordered.softmax(dim=1)
        before = shares.cumsum(dim=1) - shares
        ordered = ordered.masked_fill(before >= decoding.top_p, torch.inf)
    return scores.masked_fill_(scores < ordered.amin(dim=1, keepdim=True), -torch.inf)


def overlap(logits: Tensor, base_logits: Tensor, never: Tensor, decoding: Decoding) -> Tensor:
    """[rows]: the probability that the distributions which two models' tokens are sampled from have in common, which is
    1 - their total variation. So often speculative sampling accepts one's token for the other (arXiv 2211.17192)."""
    own, base = (left_over(scores, never, decoding).softmax(dim=1) for scores in (logits, base_logits))
    return torch.minimum(own, base).sum(dim=1).clamp(max=1.0)
