"""Tensors on their way between the GPUs of one replica, so that these work at the same time.

A copy between GPUs waits, on the stream that it is given to, for all that the other GPU has been given to do. So copies
go by streams of their own: what is next on the GPU that sends does not wait. What all layers read beside their states
(masks, positions) crosses once in a pass, not for every layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import recursively_apply
from torch import Tensor, nn


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; itself where it is there."""
    if tensor.device == device:
        return tensor
    if not (tensor.is_cuda and device.type == "cuda"):
        return tensor.to(device, non_blocking=device.type == "cuda")
    aside = _stream_aside(tensor.device, device)
    aside.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(aside):
        there = tensor.to(device, non_blocking=True)
    tensor.record_stream(aside)
    return there


@cache
def _stream_aside(sender: torch.device, receiver: torch.device) -> torch.cuda.Stream:
    """One for each receiver: what one is not ready for holds up no other."""
    return torch.cuda.Stream(sender)


class Hops:
    """Moves what modules are given to where they are. The same tensor moves once, as long as it lives."""

    def __init__(self) -> None:
        self._there: dict[tuple[int, torch.device], tuple[weakref.ref[Tensor], Tensor]] = {}

    def begin(self, *_: object) -> None:
        """A pass begins: what was moved in the last one may have changed in place since."""
        self._there.clear()

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """See the module's `moved`."""
        if tensor.device == device:
            return tensor
        key = id(tensor), device
        known = self._there.get(key)
        if known is None or known[0]() is not tensor:
            known = weakref.ref(tensor, lambda _: self._there.pop(key, None)), moved(tensor, device)
            self._there[key] = known
        return known[1]

    def before(self, module: nn.Module, device: torch.device) -> None:
        """Have all tensors that a module is called with moved to a device."""

        def to_device(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return recursively_apply(self.moved, args, device), recursively_apply(self.moved, named, device)

        module.register_forward_pre_hook(to_device, with_kwargs=True)


def connect(model: Any, around_layers: nn.Module, devices: Mapping[str, torch.device]) -> None:
    """Connect the parts of a model, `devices` by the names of modules, in place of accelerate's hooks, which copy what
    a layer reads on the streams that compute. `around_layers` is the module whose code runs the layers: once a pass.
    Modules without weights go to the first of the devices, where passes begin."""
    remove_hook_from_module(model, recurse=True)
    hops, first = Hops(), next(iter(devices.values()))
    around_layers.register_forward_pre_hook(hops.begin)
    for name, device in devices.items():
        for module in _called(model.get_submodule(name)):
            if next(module.parameters(), None) is None:
                module.to(first)
                hops.before(module, first)
            else:
                hops.before(module, device)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or those that it holds where it only holds: code calls each of them, never the list."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child in module.children():
            yield from _called(child)
    else:
        yield module
