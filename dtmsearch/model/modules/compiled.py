"""Layers through `torch.compile`, with components left opaque: what stands in a component's place can be swapped, for
other weights or for another module, without compiling anything anew and without another fusion around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from dtmsearch.model.modules.compat import allow_graphs, compile_call, uncompiled
from dtmsearch.model.modules.swapping import put, swapped

# Every batch shape has a graph of its own. Dynamic shapes would let history decide which graph serves a shape.
_MOST_SHAPES = 256

_slots: WeakValueDictionary[int, Slot] = WeakValueDictionary()
_numbers = count()


@torch.library.custom_op("dtmsearch::component", mutates_args=())
def _component(values: Tensor, number: Tensor, out_features: int) -> Tensor:
    """What the module in slot `number` (an integer tensor on the CPU: no constant of the graph) makes of
    `values`."""
    module = _slots[int(number)].module
    output: Tensor = module(values)
    return output.contiguous()


@_component.register_fake
def _component_shape(values: Tensor, number: Tensor, out_features: int) -> Tensor:
    return values.new_empty(*values.shape[:-1], out_features)


class Slot(nn.Module):
    """Stands in a component's place for good and calls whatever module is in it."""

    number: Tensor
    module: nn.Module

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.put(linear)
        self.out_features = linear.out_features
        number = next(_numbers)
        self.register_buffer("number", torch.tensor(number), persistent=False)
        _slots[number] = self

    def put(self, module: nn.Module) -> None:
        object.__setattr__(self, "module", module)  # as no submodule, so that graphs know nothing of it

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = torch.ops.dtmsearch.component(values, self.number, self.out_features)
        return output


def compile_layers(layers_name: str, layers: nn.ModuleList) -> dict[str, Slot]:
    """Compile every layer in place; the slots that now stand in the components' places, by name.

    Layers of the same build share their graphs.
    """
    allow_graphs(_MOST_SHAPES)
    slots: dict[str, Slot] = {}
    for index, layer in enumerate(layers):
        linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        slots |= {f"{index}.{name}": Slot(module) for name, module in linears}
        compile_call(layer)
    for name, slot in slots.items():
        put(layers, name, slot)
    return {f"{layers_name}.{name}": slot for name, slot in slots.items()}


def parts_of(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer's modules without their children, what is in slots among them."""
    for module in layer.modules():
        if isinstance(module, Slot):
            yield from module.module.modules()
        else:
            yield module


@contextmanager
def as_loaded(layers_name: str, layers: nn.ModuleList, slots: Mapping[str, Slot]) -> Iterator[None]:
    """Within, layers run eagerly and what is in the slots stands in its own place."""
    own = {name.removeprefix(f"{layers_name}."): slot.module for name, slot in slots.items()}
    with swapped(layers, own), uncompiled(layers):
        yield
