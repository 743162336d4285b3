"""Blocks of a model that are taken out: an attention or an MLP whose output is zero, a layer that hands its input on.

What is taken out does not run. It stands where it stood, with all that lies in it, and its `forward` is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dtmsearch.core.components import Component
from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import Cache

# What a module returns: a tensor (None), or a tuple or list of so many with it at the head.
Returned = tuple[type, int] | None


def returned_kind(output: Any) -> Returned:
    """How a module returns its tensor."""
    return (type(output), len(output)) if isinstance(output, tuple | list) else None


def state_of(output: Any) -> Tensor:
    """The tensor in what a module returned."""
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def as_returned(values: Tensor, kind: Returned) -> Any:
    """A tensor as such a module would return it."""
    return values if kind is None else kind[0]([values, *[None] * (kind[1] - 1)])


def grow_cache(index: int, hidden_states: Tensor, arguments: Iterable[Any]) -> None:
    """What the model's code asks a cache's layer about lengths is answered as if the layer had run, for next to no
    memory."""
    for cache in arguments:
        if isinstance(cache, Cache) and index < len(cache.layers):
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, index)


# How modules of a class return their tensor, once one of them has run.
_kinds: WeakKeyDictionary[type[nn.Module], Returned] = WeakKeyDictionary()


class _TakenOut:
    """What runs in the place of a block's `forward`. The first call in a process of a block of this class runs the
    block as well, to see how it returns."""

    def __init__(self, module: nn.Module, block: Component) -> None:
        self._own: Callable[..., Any] = module.forward
        self._class, self._block = type(module), block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        if self._class not in _kinds:
            output = self._own(*args, **kwargs)
            if state_of(output).shape != states.shape:
                raise UserError(
                    f"{self._block.name} cannot be dropped: it makes {list(state_of(output).shape)} of "
                    f"{list(states.shape)}. Leave it out (search.components.exclude)"
                )
            _kinds[self._class] = returned_kind(output)
        elif self._block.kind != "mlp":
            grow_cache(self._block.layer, states, [*args, *kwargs.values()])
        values = states if self._block.kind == "layer" else torch.zeros_like(states)
        return as_returned(values, _kinds[self._class])


def is_taken_out(module: nn.Module) -> bool:
    """Whether a block is out of its model."""
    return isinstance(module.__dict__.get("forward"), _TakenOut)


def take_out(module: nn.Module, block: Component, out: bool) -> None:
    """Have a block out of its model, or in it again."""
    if out and not is_taken_out(module):
        module.__dict__["forward"] = _TakenOut(module, block)
    elif not out and is_taken_out(module):
        del module.__dict__["forward"]
