"""Weight matrices as families keep them, seen as all others see them: [outputs, inputs], by a component's name.

Linear layers are that already; GPT-2's Conv1D keeps the transpose; mixtures of experts keep all experts of a layer in
one stacked parameter [experts, ., .]. Knows no family's name: only these three ways. Other parameters of three
dimensions, such as the kernels of convolutions and matrices of one attention head each, are none of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dtmsearch.model.modules.compat import Conv1D, experts_transposed

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True)
class Matrix:
    """A matrix found in a module: its name below the module searched, shape [outputs, inputs], whether the model keeps
    its transpose, and in which stack it lies, if in one. `routes`: it chooses among experts, or weighs one."""

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    stack: str | None = None
    routes: bool = False


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is one matrix with, perhaps, a bias."""
    return isinstance(module, nn.Linear | Conv1D)


def matrices_of(module: nn.Module) -> Iterator[Matrix]:
    """All matrices in a module, in its own order; those of a stack expert by expert."""
    modules = dict(module.named_modules())
    routers = {router for name in modules for router in _routers(name, modules)}
    for name, inner in modules.items():
        if isinstance(inner, nn.Linear):
            routes = inner.out_features == 1 or name in routers
            yield Matrix(name, (inner.out_features, inner.in_features), routes=routes)
        elif isinstance(inner, Conv1D):
            yield Matrix(name, (inner.nf, inner.nx), transposed=True)
        else:
            yield from _stacked(name, modules)


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters of three dimensions that no convolution slides over its input."""
    if isinstance(module, _CONVOLUTIONS):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}


def _routers(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """What chooses among the experts that a module holds, in a stack or a list: matrices beside it, in the same block,
    with a row for each of them. None for a module that holds no experts."""
    inner = modules[name]
    num_experts = len(inner) if isinstance(inner, nn.ModuleList) else min(map(len, _stacks(inner).values()), default=0)
    if num_experts < 2:
        return []
    block = name.rpartition(".")[0]
    beside = (other for other in modules if not block or other.startswith(f"{block}."))
    return [
        other
        for other in beside
        if other != name and not other.startswith(f"{name}.") and _rows(modules[other]) == num_experts
    ]


def _rows(module: nn.Module) -> int:
    weight = _own_weight(module)
    return 0 if weight is None or weight.ndim != 2 else len(weight)


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    return dict(module.named_parameters(recurse=False)).get("weight")


def _stacked(name: str, modules: Mapping[str, nn.Module]) -> Iterator[Matrix]:
    stacks, routers = _stacks(modules[name]), _routers(name, modules)
    says = experts_transposed(modules[name])
    if not stacks or (not routers and says is None):
        return
    router = _own_weight(modules[routers[0]]) if routers else None
    inputs = None if router is None else int(router.shape[1])
    transposed = _is_transposed([(p.shape[1], p.shape[2]) for p in stacks.values()], inputs, bool(says))
    for expert in range(min(len(stack) for stack in stacks.values())):
        for stack, parameter in stacks.items():
            first, second = parameter.shape[1:]
            shape = (second, first) if transposed else (first, second)
            yield Matrix(f"{name}.{expert}.{stack}", shape, transposed, f"{name}.{stack}")


def _is_transposed(shapes: Sequence[tuple[int, int]], inputs: int | None, says: bool) -> bool:
    """Whether stacks are [experts, inputs, outputs]. Of several the first takes what the router takes, `inputs`
    features, and the last gives as many; where that does not tell, what the module `says` counts."""
    if inputs is None or len(shapes) < 2:
        return says
    for first, second in (shapes[0], shapes[-1][::-1]):
        if first != second and inputs in (first, second):
            return first == inputs
    return says


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
