"""Mixtures that run with fewer experts: a smaller router and smaller stacks.

What has a part of each expert (rows of the router, matrices, biases), and the numbers by which a family's code goes,
are found once; while such a block runs, those of the experts that stay are in their places. What stands in the model
is whole all the time, so that matrices are compressed, read and written as in any other plan.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.components import Component
from dtmsearch.errors import UserError
from dtmsearch.model.modules.blocks import state_of
from dtmsearch.model.modules.compat import Operations, storage_of
from dtmsearch.model.modules.cut_blocks import in_dtype
from dtmsearch.model.modules.matrices import matrices_of

_PRODUCTS = {"mm", "bmm", "addmm", "matmul", "linear"}
# Outputs differ by less than this part where only the order of sums does, in 32 bits.
_ALIKE = 1e-3


@dataclass(frozen=True)
class ExpertTensor:
    """A parameter or buffer, by its module's path in the block and its name, with a part of each expert along `side`.
    `is_router`: it is a matrix by which experts are chosen."""

    module: str
    name: str
    side: int
    is_router: bool = False

    @property
    def path(self) -> str:
        """Its path in the block."""
        return f"{self.module}.{self.name}" if self.module else self.name

    def of(self, values: Tensor, kept: Tensor, num_experts: int) -> Tensor:
        """What is left of its values with the experts that stay."""
        parts = values.unflatten(self.side, (num_experts, -1)).index_select(self.side, kept.to(values.device))
        found: Tensor = parts.flatten(self.side, self.side + 1).contiguous()
        return found


@dataclass(frozen=True)
class MixtureParts:
    """What of a block says how many experts there are: `tensors`, `numbers` (module, attribute) that its code goes by,
    and `lists` of modules, one an expert."""

    num_experts: int
    tensors: tuple[ExpertTensor, ...]
    numbers: tuple[tuple[str, str], ...]
    lists: tuple[str, ...]


def parts_of(model: nn.Module, block: Component, matrices: Sequence[Component]) -> MixtureParts:
    """The parts of a block that holds a mixture, of a model with values or without; `matrices` are those in the block.
    Raises `UserError` where no matrix is known by which it chooses, and where something else does."""
    inside = f"{block.name}."
    experts = {c.name: c for c in matrices if c.mixture}
    tensors: dict[str, ExpertTensor] = {}
    lists = dict.fromkeys(_list_of(c).removeprefix(inside) for c in experts.values() if not c.stacked)
    for matrix in matrices_of(model):
        if matrix.routes and matrix.shape[0] == block.num_experts and matrix.name.startswith(inside):
            found = ExpertTensor(matrix.name.removeprefix(inside), "weight", int(matrix.transposed), is_router=True)
            tensors[found.path] = found
        elif matrix.name in experts and matrix.slice is not None:
            owner, _, leaf = matrix.slice.parameter.removeprefix(inside).rpartition(".")
            tensors[matrix.slice.parameter] = ExpertTensor(owner, leaf, matrix.slice.side)
    if not any(tensor.is_router for tensor in tensors.values()):
        raise UserError(f"{block.name} cannot be cut: by which matrix it chooses among experts is not told")
    module = model.get_submodule(block.name)
    above = block.mixture.removeprefix(block.name).removeprefix(".")
    paths = _ways([*lists, *(tensor.module for tensor in tensors.values())], above)
    routers = {tensor.module for tensor in tensors.values() if tensor.is_router}
    below = [f"{path}.{name}" for path in routers for name, _ in module.get_submodule(path).named_modules() if name]
    known = {tensor.path for tensor in tensors.values()}
    for path in (*routers, *below):
        for name, held in _own(module.get_submodule(path)).items():
            if held.ndim and not held.is_floating_point():
                raise UserError(f"{block.name} cannot be cut: {path}.{name} chooses experts by a table of its own")
    further = [
        ExpertTensor(path, name, side)
        for path in (*paths, *below)
        for name, held in _own(module.get_submodule(path)).items()
        if (side := _side_of(held, block.num_experts)) is not None and ExpertTensor(path, name, 0).path not in known
    ]
    numbers = [
        (path, key)
        for path in paths
        for key, value in vars(module.get_submodule(path)).items()
        if type(value) is int and value == block.num_experts and _counts_experts(key, path in routers)
    ]
    return MixtureParts(block.num_experts, (*tensors.values(), *further), tuple(numbers), tuple(lists))


def _list_of(component: Component) -> str:
    """The path of the list that an expert of its own module stands in."""
    parts = component.name[len(component.mixture) + 1 :].split(".")
    at = next(at for at, part in enumerate(parts) if part.isdigit())
    return ".".join([component.mixture, *parts[:at]])


def _ways(paths: Sequence[str], above: str) -> list[str]:
    """The paths, and all modules between them and one that is above them, itself included."""
    found: dict[str, None] = {above: None}
    for path in paths:
        parts = path.split(".") if path else []
        found |= dict.fromkeys(".".join(parts[:end]) for end in range(len(parts) + 1) if end >= _depth(above))
    return list(found)


def _depth(path: str) -> int:
    return len(path.split(".")) if path else 0


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module itself."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _side_of(held: Tensor, num_experts: int) -> int | None:
    """Along which side a tensor beside the matrices has a part of each expert; None where it has none."""
    if held.ndim and len(held) == num_experts:
        return 0
    return 1 if held.shape == (1, num_experts) else None


def _counts_experts(attribute: str, of_router: bool) -> bool:
    other = any(part in attribute for part in ("per_", "shared", "group"))
    return ("expert" in attribute and not other) or (of_router and attribute == "out_features")


class FewerExperts:
    """What runs in the place of a block's `forward`: the block itself, with some of its experts."""

    def __init__(self, module: nn.Module, parts: MixtureParts, kept: Tensor) -> None:
        self._module, self._parts, self._kept = module, parts, kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _running_with(self._module, self._parts, self._kept):
            return type(self._module).forward(self._module, *args, **kwargs)


def fewer_experts(module: nn.Module) -> FewerExperts | None:
    """By what a block runs with fewer experts; None where it does not."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, FewerExperts) else None


def run_with(module: nn.Module, fewer: FewerExperts | None) -> None:
    """Have a block that is in its model run with fewer experts, or with all of them again."""
    if fewer is not None:
        module.__dict__["forward"] = fewer
    elif fewer_experts(module) is not None:
        del module.__dict__["forward"]


@contextmanager
def _running_with(block: nn.Module, parts: MixtureParts, kept: Tensor) -> Iterator[None]:
    """Within, a block consists of some of its experts."""
    with ExitStack() as before:
        for tensor in parts.tensors:
            module = block.get_submodule(tensor.module)
            values = _own(module)[tensor.name]
            made = tensor.of(values.data, kept, parts.num_experts)
            before.callback(setattr, module, tensor.name, values)
            setattr(module, tensor.name, nn.Parameter(made, False) if isinstance(values, nn.Parameter) else made)
        for path, attribute in parts.numbers:
            own = block.get_submodule(path).__dict__
            before.callback(own.__setitem__, attribute, own[attribute])
            own[attribute] = len(kept)
        for path in parts.lists:
            of_list = block.get_submodule(path)
            before.callback(setattr, of_list, "_modules", of_list._modules)
            stays = {str(at): of_list._modules[str(expert)] for at, expert in enumerate(kept.tolist())}
            of_list._modules = stays
        yield


def why_not_fewer(
    module: nn.Module, parts: MixtureParts, left: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str:
    """Why a block, as the model calls it, cannot run with so many experts; empty where it does what it does when its
    router gives the others minus infinity. A copy of it is tried, in 32 bits, in which routers compute."""
    block = copy.deepcopy(module).float()
    args, kwargs = in_dtype(args, torch.float32), in_dtype(kwargs, torch.float32)
    order = [*range(1, parts.num_experts, 2), *range(0, parts.num_experts, 2)]  # so that one at least moves
    kept = torch.tensor(sorted(order[:left]), device=next(block.parameters()).device)
    gone = torch.ones(parts.num_experts, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    try:
        with _running_with(block, parts, kept):
            found = state_of(block(*args, **kwargs))
    except (RuntimeError, ValueError, IndexError) as error:
        return f"{type(module).__name__} does not run so ({str(error).splitlines()[0]})"
    masked = _Masked(block, parts, gone)
    with masked:
        wanted = state_of(block(*args, **kwargs))
    if not masked.seen:
        return f"the product with its router is not one that is known in {type(module).__name__}"
    if found.shape != wanted.shape or not float((found - wanted).norm()) <= _ALIKE * float(wanted.norm()):
        return (
            f"{type(module).__name__} then computes something else than with a router that gives the others minus "
            "infinity: it may choose among groups of experts first"
        )
    return ""


class _Masked(Operations):
    """Within, a router gives some experts minus infinity: before and after what is added to its product."""

    def __init__(self, block: nn.Module, parts: MixtureParts, gone: Tensor) -> None:
        super().__init__()
        self._gone, self.seen = gone, False
        self._routers = set[int]()
        for tensor in parts.tensors:
            values = _own(block.get_submodule(tensor.module))[tensor.name]
            if tensor.is_router:
                self._routers.add(storage_of(values.data))
            elif values.numel() == len(gone) and values.is_floating_point():
                values.data.view(-1)[gone] = -torch.inf  # the copy's own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _PRODUCTS and made.shape[-1] == len(self._gone):
            factors = [value for value in args if isinstance(value, Tensor)]
            if any(storage_of(factor) in self._routers for factor in factors):
                self.seen = True
                made = made.masked_fill(self._gone, -torch.inf)
        return made
