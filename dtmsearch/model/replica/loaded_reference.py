"""A reference as a replica holds it: prompts in use as tokens on the device, with what is kept of passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from dtmsearch.core.evaluation import IntArray, Reference
from dtmsearch.core.metric_registry import Metric
from dtmsearch.model.forward.activation_cache import ActivationCache
from dtmsearch.model.forward.partial import Body


@dataclass(frozen=True)
class BaseOutputs:
    """What a base model that is not the one at hand makes of a reference: `hidden` [num_prompts, continuation_tokens,
    hidden], the inputs of its head, and `body`, whose head makes distributions of them."""

    body: Body
    hidden: Tensor


@dataclass
class Loaded:
    """A reference, and its activation caches for the range of prompts in use: `continuation` (prompts and the base
    model's own continuations of them) and `text`. `base_hidden`: the base model's inputs of the head, a
    batch at a time; of another model than the one at hand they are cut from `base`."""

    reference: Reference
    prompts: tuple[int, int] | None = None
    caches: dict[str, ActivationCache] = field(default_factory=dict)
    base_hidden: list[Tensor] | None = None
    base: BaseOutputs | None = None

    def set_range(self, prompts: tuple[int, int], cache_of: Callable[[IntArray, int], ActivationCache]) -> None:
        """Have caches of these prompts, made by `cache_of` (tokens, position of the first target)."""
        if self.prompts == prompts:
            return
        self.forget()  # before the room for others is measured
        rows, start = slice(*prompts), self.reference.prompt_tokens
        text = cache_of(self.reference.text[rows], 1)
        self.caches = {"continuation": cache_of(greedy(self.reference, rows), start), "text": text}
        self.prompts = prompts

    def base_in_batches(self) -> list[Tensor]:
        """The other model's inputs of its head, in the batches of the continuations' cache."""
        assert self.base is not None and self.prompts is not None
        batches = self.caches["continuation"].batches
        return list(self.base.hidden[slice(*self.prompts)].split([len(batch) for batch in batches]))

    def compares_samples(self, metrics: Iterable[Metric]) -> bool:
        """Whether metrics need what the distributions that tokens are sampled from have in common. Of greedy choices it
        follows from these."""
        return not self.reference.decoding.is_greedy and any("overlap" in metric.needs for metric in metrics)

    def forget(self) -> None:
        """Hold nothing that can be made again."""
        self.prompts, self.base_hidden, self.caches = None, None, {}


def greedy(reference: Reference, rows: slice | IntArray) -> IntArray:
    """Prompts and the base model's own continuations of them, [rows, tokens]."""
    return np.concatenate([reference.text[rows, : reference.prompt_tokens], reference.continuation[rows]], axis=1)
