"""Where components stand in a model: what is in a component's place can be taken and replaced, by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from dtmsearch.errors import UserError
from dtmsearch.model.modules.compiled import Slot
from dtmsearch.model.modules.matrices import StackedMatrix, sliced_matrices
from dtmsearch.model.modules.swapping import put


def _stacked_matrices(model: nn.Module) -> dict[str, StackedMatrix]:
    """The matrices that lie in stacked parameters, by name."""
    return {
        name: StackedMatrix(model.get_parameter(matrix.slice.parameter), matrix.slice, matrix.transposed)
        for name, matrix in sliced_matrices(model).items()
        if matrix.slice is not None
    }


class Places:
    """The places of a model. Where layers are compiled, one of `slots` stands in a component's place for good."""

    def __init__(self, model: nn.Module, slots: Mapping[str, Slot]) -> None:
        self._model = model
        self._slots = slots
        self._stacked = _stacked_matrices(model)

    def get(self, component: str) -> nn.Module:
        if component in self._slots:
            return self._slots[component].module
        if component in self._stacked:
            return self._stacked[component]
        return self._model.get_submodule(component)

    def block(self, name: str) -> nn.Module:
        """A block or a layer, which can be taken out of a model that runs eagerly. Raises `UserError`."""
        if self._slots:
            raise UserError(f"{name} cannot be dropped where layers are compiled: set model.compile: never")
        return self._model.get_submodule(name)

    def put(self, component: str, module: nn.Module) -> None:
        if component in self._slots:
            self._slots[component].put(module)
        elif component not in self._stacked:  # what lies in a stack stays there, and its weights are written into it
            put(self._model, component, module)

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
