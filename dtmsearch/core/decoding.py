"""How continuations are decoded: greedily, or sampled by noise that base and compressed model share.

The noise is Gumbel's, added to the logits of each position (arXiv 1611.01144: the largest of logits plus Gumbel noise
is a sample of their softmax). It is computed from integers alone, so that it is the same wherever and in whatever
batches it is computed (`dtmsearch.model.forward.shared_noise`); with the noise given, a sampled continuation is as
determined as a greedy one, and so are the positions at which another model leaves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Raise it when the same decoding would choose other tokens.
_VERSION = 1
_GREEDY = "greedy"
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Decoding:
    """Every next token is the largest of logits / `temperature` + noise; at a temperature of 0 of the logits alone, and
    nothing else is used then.

    Before noise is added, tokens are left out that are not among the `top_k` likeliest (0: all), then those beyond the
    likeliest that make up `top_p` of what is left; equals of the last one stay. `seed` chooses the noise. Raises
    `ValueError` for numbers that make no distribution.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature is a number from 0 up, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k is a number of tokens, or 0 for all, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is more than 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed is from 0 to {MOST_SEED}, got {self.seed}")

    @property
    def is_greedy(self) -> bool:
        """Whether no noise is added."""
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out beforehand."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def note(self) -> str:
        """What is said of sampled continuations behind what their prompts are; empty for greedy ones."""
        if self.is_greedy:
            return ""
        top_k = f", top-k {self.top_k}" if self.top_k else ""
        top_p = f", top-p {self.top_p:g}" if self.top_p < 1.0 else ""
        return f"; continuations are sampled, temperature {self.temperature:g}{top_k}{top_p}"

    def __str__(self) -> str:
        """As it stands in a reference's rules and its rows; `parse` reads it."""
        if self.is_greedy:
            return _GREEDY
        values = f"temperature={self.temperature!r} top_k={self.top_k} top_p={self.top_p!r} seed={self.seed}"
        return f"gumbel-{_VERSION} {values}"

    @staticmethod
    def parse(text: str) -> Decoding:
        """What `str` wrote. Raises `ValueError` for anything else, that of other versions among it."""
        if text == _GREEDY:
            return GREEDY
        kind, *parts = text.split(" ")
        values = dict(part.partition("=")[::2] for part in parts)
        if kind != f"gumbel-{_VERSION}" or values.keys() != {"temperature", "top_k", "top_p", "seed"}:
            raise ValueError(f"unknown decoding {text!r}")
        numbers = float(values["temperature"]), int(values["top_k"]), float(values["top_p"]), int(values["seed"])
        return Decoding(*numbers)


GREEDY = Decoding()
