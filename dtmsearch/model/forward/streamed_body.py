"""The forward pass of a model whose layers are brought to the device one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtmsearch.errors import UserError
from dtmsearch.model.forward.partial import Body


class StreamedBody(Body):
    """A body whose weights of layers pass through the device (`StreamedLayers`): every proof takes each layer once or
    twice. Raises `UserError` for a model whose passes cannot start at every layer."""

    # A token takes as long as a whole pass.
    _proved_continuation = 2

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if len(self.cuts) <= self.num_layers:
            raise UserError(
                f"{self.how_it_runs()}, so its weights cannot stay outside of the GPU: give each replica more GPUs "
                "(--gpus-per-replica), or one that holds it"
            )

    def device_of(self, layer: int) -> torch.device:
        return self.input_device

    def boundaries_of(self, batches: Sequence[Tensor]) -> list[list[Tensor]]:
        """See `Body`. A layer takes all batches before the next is brought."""
        found: list[list[Tensor]] = [[] for _ in batches]
        for layer in range(self.num_layers):
            for states, tokens in zip(found, batches, strict=True):
                if layer == 0:
                    states.append(self._first_inputs(tokens))
                start = states[layer] if layer else None
                states.append(self.through(start, layer, layer + 1, partial(self.run, tokens)))
        return found

    def _first_inputs(self, tokens: Tensor) -> Tensor:
        """The state at the first boundary."""
        with self._only(0, 0):
            self.run(tokens)
            seen = self._stand_ins[0].seen
        assert seen is not None
        return seen

    def _proved_cuts(self, tokens: Tensor, others: Tensor, whole: Tensor) -> set[int]:
        """See `Body`. A layer that gives each next state by itself does so in a pass of several, too."""
        states: list[Tensor] = []

        def found_states() -> bool:
            states.extend(self.boundaries(tokens))
            return len(states) == self.num_layers + 1

        if not self._proves(found_states):
            return set()
        self.run(others)
        self.cuts = frozenset(range(self.num_layers + 1))

        def same(boundary: int) -> bool:
            start = states[boundary] if boundary else None
            if boundary >= self.num_layers - 1:
                return torch.equal(self.finish(tokens, start, boundary), whole)
            found = self.advance(tokens, start, boundary, boundary + 1)
            return isinstance(found, Tensor) and torch.equal(found, states[boundary + 1])

        proved = {b for b in reversed(range(self.num_layers + 1)) if self._proves(lambda b=b: same(b))}  # type: ignore[misc]
        return proved if 0 in proved else set()
