"""What stands in the places of layers, and of all that is below the head, while a model's own code runs around them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dtmsearch.model.modules.blocks import Returned, as_returned, grow_cache
from dtmsearch.model.modules.compat import BodyOutput


def below_head(model: Any, layers_name: str) -> str:
    """Name of the part of a model that holds the layers, and all else that runs before the head."""
    head = model.get_output_embeddings()
    parts = layers_name.split(".")
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return next(name for name in names if all(module is not head for module in model.get_submodule(name).modules()))


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
        grow_cache(self.index, hidden_states, [*args, *kwargs.values()])
        return as_returned(self.handed_on(hidden_states), self.returns)

    def handed_on(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.state is None else self.state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)  # what the model's loop asks its layers about themselves


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
