"""Blocks of a model that are taken out: an attention or an MLP that adds nothing, a layer that hands its input on.

What is taken out does not run, but for once in a process: by then it has shown how it returns, and whether it is its
layer or the block itself that adds the residual. It stands where it stood, with all that lies in it, and its `forward`
is another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


def _has_layer(value: Any, index: int) -> bool:
    """Whether it is a cache that has such a layer of keys and values, or makes it when it is first written to. One of
    linear attention's states has no length."""
    if not isinstance(value, Cache):
        return False
    if index < len(value.layers):
        return hasattr(value.layers[index], "update")
    return getattr(value, "layer_class_to_replicate", None) is not None


def grow_cache(index: int, hidden_states: Tensor, arguments: Iterable[Any]) -> None:
    """What the model's code asks a cache's layer about lengths is answered as if the layer had run, for next to no
    memory."""
    for cache in arguments:
        if _has_layer(cache, index):
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, index)


# Where a block finds what it adds its output to: an argument's position or name. None where its layer adds it.
Residual = int | str | None


@dataclass(frozen=True)
class _Manner:
    """How a block returns, and what it hands on where it adds nothing."""

    returns: Returned
    residual: Residual


# Of blocks that have been out of their models.
_manners: WeakKeyDictionary[nn.Module, _Manner] = WeakKeyDictionary()


class _TakenOut:
    """What runs in the place of a block's `forward`. Its first call in a process runs the block as well, beside the
    model, to learn its manner."""

    def __init__(self, module: nn.Module, block: Component) -> None:
        self._own: Callable[..., Any] = module.forward
        self._module, self._block = module, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        if self._module not in _manners:
            with torch.no_grad():
                _manners[self._module] = self._learn(states, args, kwargs)
        manner = _manners[self._module]
        if self._block.kind != "mlp":
            grow_cache(self._block.layer, states, [*args, *kwargs.values()])
        if manner.residual is None:
            return as_returned(torch.zeros_like(states), manner.returns)
        held: Any = args if isinstance(manner.residual, int) else kwargs
        return as_returned(held[manner.residual], manner.returns)

    def _learn(self, states: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Manner:
        """Run the block with all its matrices at zero, and with arguments of the hidden states' shape that can be told
        apart: multiples of the same numbers, which no norm leaves as they are. Raises `UserError` for one that returns
        none of them, nor zero."""
        given: dict[int | str, Any] = dict(enumerate(args)) | dict(kwargs)
        given = {key: _apart(value, self._block.layer) for key, value in given.items()}
        first: int | str = 0 if args else "hidden_states"
        if self._block.kind == "layer":
            return _Manner(returned_kind(self._run(states, given, len(args))), first)
        like = [key for key, value in given.items() if _is_like(value, states)]
        numbers = (torch.arange(states.shape[-1], device=states.device) % 7 + 1).to(states.dtype).expand_as(states)
        given |= {key: numbers * at for at, key in enumerate(like, 1)}
        with _without_matrices(self._module):
            output = self._run(states, given, len(args))
        made = state_of(output)
        manners: list[Residual] = [None, *like]
        found = [each for at, each in enumerate(manners) if torch.equal(made, numbers * at)]
        further = output[1:] if isinstance(output, tuple | list) else ()
        if not found or any(_is_like(value, states) for value in further):
            raise UserError(
                f"{self._block.name} cannot be dropped: {type(self._module).__name__} does more than add to the "
                "hidden states. Leave it out (search.components.exclude), or drop whole layers (search.drop: [layer])"
            )
        return _Manner(returned_kind(output), found[0])

    def _run(self, states: Tensor, given: Mapping[int | str, Any], num_args: int) -> Any:
        named = {key: value for key, value in given.items() if isinstance(key, str)}
        output = self._own(*(given[at] for at in range(num_args)), **named)
        if state_of(output).shape != states.shape:
            raise UserError(
                f"{self._block.name} cannot be dropped: it makes {list(state_of(output).shape)} of "
                f"{list(states.shape)}. Leave it out (search.components.exclude)"
            )
        return output


def _is_like(value: Any, states: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == states.shape and value.is_floating_point()


def _apart(value: Any, index: int) -> Any:
    """A cache to one layer of which may be written without its being seen; anything else as it is."""
    if not isinstance(value, Cache):
        return value
    found = copy.copy(value)
    found.layers = [copy.deepcopy(own) if at == index else own for at, own in enumerate(value.layers)]
    return found


@contextmanager
def _without_matrices(block: nn.Module) -> Iterator[None]:
    """Within, what a block multiplies by any of its matrices is zero."""

    def zeros(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)([zeros(each) for each in value])
        return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    own = {name: held for name, held in block.named_parameters(recurse=False) if held.ndim > 1}
    hooks = [
        module.register_forward_hook(lambda module, args, output: zeros(output))
        for module in block.modules()
        if module is not block and _has_matrices(module)
    ]
    try:
        block._parameters.update({name: nn.Parameter(torch.zeros_like(held), False) for name, held in own.items()})
        yield
    finally:
        block._parameters.update(own)
        for hook in hooks:
            hook.remove()


def _has_matrices(module: nn.Module) -> bool:
    return any(held.ndim > 1 for held in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def set_to_zero(module: nn.Module) -> None:
    """Write zeros into all matrices of a block, and into what is added to their products."""
    for inside in module.modules():
        if _has_matrices(inside):
            for parameter in inside.parameters(recurse=False):
                parameter.data.zero_()


def is_taken_out(module: nn.Module) -> bool:
    """Whether a block is out of its model."""
    return isinstance(module.__dict__.get("forward"), _TakenOut)


def needs_no_weights(module: nn.Module) -> bool:
    """Whether a block that is called does not run: it is out of its model, and how it returns is known."""
    return is_taken_out(module) and module in _manners


def take_out(module: nn.Module, block: Component, out: bool) -> None:
    """Have a block out of its model, or in it again."""
    if out and not is_taken_out(module):
        module.__dict__["forward"] = _TakenOut(module, block)
    elif not out and is_taken_out(module):
        del module.__dict__["forward"]
