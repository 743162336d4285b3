"""A reference as a replica holds it: prompts in use as tokens on the device, with what is kept of passes over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from dtmsearch.core.evaluation import IntArray, Reference
from dtmsearch.model.forward.activation_cache import ActivationCache


@dataclass
class Loaded:
    """A reference, and its activation caches for the range of prompts in use: `continuation` (prompts and the base
    model's own continuations of them) and `text`. `base_hidden`: the base model's inputs of the head, a
    batch at a time."""

    reference: Reference
    prompts: tuple[int, int] | None = None
    caches: dict[str, ActivationCache] = field(default_factory=dict)
    base_hidden: list[Tensor] | None = None

    def set_range(self, prompts: tuple[int, int], cache_of: Callable[[IntArray, int], ActivationCache]) -> None:
        """Have caches of these prompts, made by `cache_of` (tokens, position of the first target)."""
        if self.prompts == prompts:
            return
        rows, start = slice(*prompts), self.reference.prompt_tokens
        text = cache_of(self.reference.text[rows], 1)
        self.prompts, self.base_hidden = prompts, None
        self.caches = {"continuation": cache_of(greedy(self.reference, rows), start), "text": text}

    def forget(self) -> None:
        """Hold nothing that can be made again."""
        self.prompts, self.base_hidden, self.caches = None, None, {}


def greedy(reference: Reference, rows: slice | IntArray) -> IntArray:
    """Prompts and the base model's own continuations of them, [rows, tokens]."""
    return np.concatenate([reference.text[rows, : reference.prompt_tokens], reference.continuation[rows]], axis=1)
