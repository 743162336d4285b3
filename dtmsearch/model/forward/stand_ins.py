"""What stands in the places of layers, and of all that is below the head, while a model's own code runs around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dtmsearch.model.modules.compat import BodyOutput, Cache

# What a layer returns: a tensor (None), or a tuple or list of so many with it at the head.
Returned = tuple[type, int] | None


def returned_kind(output: Any) -> Returned:
    """What kind of thing a layer returned."""
    return (type(output), len(output)) if isinstance(output, tuple | list) else None


def state_of(output: Any) -> Tensor:
    """A layer's state in what it returned."""
    state: Tensor = output[0] if isinstance(output, tuple | list) else output
    return state


class StandIn(nn.Module):
    """In place of a layer: hands on its input, or `state` if there is one, and remembers what came in."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # no submodule: its weights are the model's
        self.index = index
        self.state: Tensor | None = None
        self.seen: Tensor | None = None
        self.returns: Returned = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen = hidden_states
        _grow_cache(self.index, hidden_states, [*args, *kwargs.values()])
        handed = self.handed_on(hidden_states)
        return handed if self.returns is None else self.returns[0]([handed, *[None] * (self.returns[1] - 1)])

    def handed_on(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.state is None else self.state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)  # what the model's loop asks its layers about themselves


def _grow_cache(index: int, hidden_states: Tensor, arguments: Iterable[Any]) -> None:
    """What the model's code asks a cache's layer about lengths is answered as if the layer had run, for next to no
    memory."""
    for cache in arguments:
        if isinstance(cache, Cache) and index < len(cache.layers):
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, index)


class HiddenStates(nn.Module):
    """In place of everything below the head: gives `hidden_states`; of `body`, which it stands for, what else is
    asked."""

    hidden_states: Tensor

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "body", body)  # no submodule: its weights are the model's

    @property
    def decoder(self) -> nn.Module:
        """What OPT's head runs: the part of the body that does the work."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BodyOutput:
        return BodyOutput(last_hidden_state=self.hidden_states)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["body"], name)
