"""Weight matrices as families keep them, seen as every other room sees them: [outputs, inputs], by a component's name.

Linear layers are that already; GPT-2's Conv1D keeps the transpose; mixtures of experts keep all experts of a layer in
one stacked parameter [experts, ., .]. Knows no family's name: only these three ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Matrix:
    """A matrix found in a module: its name below the module searched, shape [outputs, inputs], whether the model keeps
    its transpose, and in which stack it lies, if in one."""

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    stack: str | None = None


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is one matrix with, perhaps, a bias."""
    return isinstance(module, nn.Linear | Conv1D)


def matrices_of(module: nn.Module) -> Iterator[Matrix]:
    """All matrices in a module, in its own order; those of a stack expert by expert."""
    for name, inner in module.named_modules():
        if isinstance(inner, nn.Linear):
            yield Matrix(name, (inner.out_features, inner.in_features))
        elif isinstance(inner, Conv1D):
            yield Matrix(name, (inner.nf, inner.nx), transposed=True)
        else:
            yield from _stacked(name, inner)


def _stacked(name: str, module: nn.Module) -> Iterator[Matrix]:
    stacks = {n: p for n, p in module._parameters.items() if p is not None and p.ndim == 3}
    transposed = bool(getattr(module, "is_transposed", False))
    for expert in range(min((len(stack) for stack in stacks.values()), default=0)):
        for stack, parameter in stacks.items():
            first, second = parameter.shape[1:]
            shape = (second, first) if transposed else (first, second)
            yield Matrix(f"{name}.{expert}.{stack}", shape, transposed, f"{name}.{stack}")


class StackedMatrix(nn.Module):
    """One expert's matrix in a stacked parameter: read as a copy, written into its place."""

    def __init__(self, parameter: nn.Parameter, expert: int, transposed: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_stack", parameter)  # it is the model's, and no parameter of this module's own
        self._expert, self._transposed = expert, transposed

    def _view(self) -> Tensor:
        stack: Tensor = self._stack.data  # type: ignore[assignment]
        view = stack[self._expert]
        return view.t() if self._transposed else view

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The stack that it lies in, which says where it is."""
        yield self._stack  # type: ignore[misc]

    def read(self) -> Tensor:
        return self._view().clone().contiguous()

    def write(self, weight: Tensor) -> None:
        self._view().copy_(weight)


def read(module: nn.Module) -> Tensor:
    """The matrix [outputs, inputs] of a module, as a pointer where the module is one matrix."""
    if isinstance(module, StackedMatrix):
        return module.read()
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def write(module: nn.Module, weight: Tensor) -> None:
    """Put a matrix [outputs, inputs] into a module, by pointer where the module is one matrix."""
    if isinstance(module, StackedMatrix):
        module.write(weight)
    else:
        module.weight.data = weight.t().contiguous() if isinstance(module, Conv1D) else weight
