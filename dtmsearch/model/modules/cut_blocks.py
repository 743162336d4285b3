"""Whether a family's code runs a block that is cut: a copy of it is tried, beside one with zeros for what goes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.components import Component
from dtmsearch.core.widths import Width, side_of
from dtmsearch.model.compress.width import indices
from dtmsearch.model.modules.blocks import state_of
from dtmsearch.model.modules.matrices import read, write

# Outputs differ by less than this part where only the order of sums does, in 32 bits.
_ALIKE = 1e-3


def why_not_cut(
    module: nn.Module,
    name: str,
    inside: Sequence[Component],
    width: Width,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> str:
    """Why a block, as the model calls it, cannot be cut; empty where it can. `inside` are its matrices."""
    block = copy.deepcopy(module)
    dtype = torch.promote_types(next(module.parameters()).dtype, torch.float32)
    block.to(dtype)
    args, kwargs = in_dtype(args, dtype), in_dtype(kwargs, dtype)
    last = inside[-1]
    units = width.units(last)
    # Every other unit is tried, so that none is where it was before.
    kept = torch.arange(units, device=next(block.parameters()).device).flip(0)[::2].flip(0)[: width.left(units)]
    matrices = {c: block.get_submodule(c.name.removeprefix(f"{name}.")) for c in inside}
    at = indices(last, kept, units)
    zeroed = torch.zeros_like(read(matrices[last]))
    zeroed[:, at] = read(matrices[last])[:, at]
    write(matrices[last], zeroed)
    wanted = state_of(block(*args, **kwargs))
    for matrix, held in matrices.items():
        at, weight = indices(matrix, kept, units), read(held)
        rows = side_of(matrix) == "rows"
        write(held, weight[at] if rows else weight[:, at])
        bias = getattr(held, "bias", None)
        if rows and bias is not None:
            bias.data = bias.data[at]
    try:
        found = state_of(block(*args, **kwargs))
    except (RuntimeError, ValueError, IndexError) as error:
        return f"{type(module).__name__} does not run so ({str(error).splitlines()[0]})"
    if found.shape != wanted.shape or float((found - wanted).norm()) > _ALIKE * float(wanted.norm()):
        return (
            f"{type(module).__name__} then computes something else than with zeros in the place of what goes: its code "
            "takes units apart in a way of its own, or they are others than the name says"
        )
    return ""


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Arguments with their floating-point numbers in a dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: in_dtype(each, dtype) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(in_dtype(each, dtype) for each in value)
    return value
