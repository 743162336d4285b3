"""A reference as a replica holds it: its prompts in use as streams of tokens on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from dtmsearch.core.evaluation import IntArray, Reference
from dtmsearch.model.forward.activation_cache import Stream


@dataclass
class Loaded:
    """A reference, and its streams for the range of prompts in use: `continuation` (prompts and the base model's own
    continuations of them) and `text`. `base_hidden`: the base model's inputs of the head, a batch at a time."""

    reference: Reference
    prompts: tuple[int, int] | None = None
    streams: dict[str, Stream] = field(default_factory=dict)
    base_hidden: list[Tensor] | None = None

    def set_range(self, prompts: tuple[int, int], stream_of: Callable[[IntArray, int], Stream]) -> None:
        """Have streams of these prompts, made by `stream_of` (tokens, position of the first target)."""
        if self.prompts == prompts:
            return
        rows, start = slice(*prompts), self.reference.prompt_tokens
        text = stream_of(self.reference.text[rows], 1)
        self.prompts, self.base_hidden = prompts, None
        self.streams = {"continuation": stream_of(greedy(self.reference, rows), start), "text": text}

    def forget(self) -> None:
        """Hold nothing that can be made again."""
        self.prompts, self.base_hidden, self.streams = None, None, {}


def greedy(reference: Reference, rows: slice | IntArray) -> IntArray:
    """Prompts and the base model's own continuations of them, [rows, tokens]."""
    return np.concatenate([reference.text[rows, : reference.prompt_tokens], reference.continuation[rows]], axis=1)
