"""Models without values: module trees on PyTorch's meta device, and what operations make there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Operations whose output has the shape and the dtype of their first operand, if they have no other or others of its
# dtype that are broadcast to its shape.
_LIKE_FIRST = {"mul", "add", "sub", "div", "pow", "neg", "rsqrt", "cos", "sin", "silu", "sigmoid", "tanh", "relu"}


class _Undrawn(TorchFunctionMode):
    """Parameters stay as they are, instead of being filled."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            getattr(func, "__module__", "") == "torch.nn.init"
            and args
            and isinstance(args[0], Tensor)
            and args[0].is_meta
        ):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Within, modules are made on the meta device, and nothing is spent on drawing values that they do not have."""
    with torch.device("meta"), _Undrawn():
        yield


def made_like_first(name: str, args: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """What operation `name` of ATen makes of contiguous floating-point tensors without values, where only the shape of
    the first decides it; None for all else. PyTorch needs up to a millisecond for it: it asks in Python whether shapes
    fit."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or not first.is_meta or first.ndim == 0 or not first.is_contiguous():
        return None
    if name in ("tril", "triu") and not named:
        return torch.empty_like(first)
    if not first.is_floating_point() or named.keys() - {"alpha"}:
        return None
    if name == "_safe_softmax" and len(args) == 2:
        return torch.empty_like(first)
    if name == "mm":
        second = args[1]
        fits = first.dtype == second.dtype and first.shape[1] == second.shape[0]
        return torch.empty(first.shape[0], second.shape[1], dtype=first.dtype, device="meta") if fits else None
    if name in _LIKE_FIRST and all(_gives_way(other, first) for other in args[1:]):
        return torch.empty_like(first)
    return None


def _gives_way(other: Any, first: Tensor) -> bool:
    """Whether an operand changes neither the shape nor the dtype of what is made with `first`."""
    if not isinstance(other, Tensor):
        return isinstance(other, int | float)
    if other.dtype != first.dtype or other.ndim > first.ndim or not other.is_meta:
        return False
    own = first.shape[first.ndim - other.ndim :]
    return all(size in (1, room) for size, room in zip(other.shape, own, strict=True))
