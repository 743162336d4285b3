"""Where components stand in a model: what is in a component's place can be taken and replaced, by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from dtmsearch.model.compiled import Slot


class Places:
    """The places of a model. Where layers are compiled, one of `slots` stands in a component's place for good."""

    def __init__(self, model: nn.Module, slots: Mapping[str, Slot]) -> None:
        self._model = model
        self._slots = slots

    def get(self, component: str) -> nn.Module:
        if component in self._slots:
            return self._slots[component].module
        return self._model.get_submodule(component)

    def put(self, component: str, module: nn.Module) -> None:
        if component in self._slots:
            self._slots[component].put(module)
        else:
            parent, _, attribute = component.rpartition(".")
            self._model.get_submodule(parent)._modules[attribute] = module

    @contextmanager
    def holding(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within, other modules stand in the components' places."""
        before = {component: self.get(component) for component in modules}
        try:
            for component, module in modules.items():
                self.put(component, module)
            yield
        finally:
            for component, module in before.items():
                self.put(component, module)
