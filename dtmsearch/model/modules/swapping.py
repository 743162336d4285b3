"""Modules in other modules' places. Nothing else in the package puts a module into a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from dtmsearch.model.modules.compat import exchange_child


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of a name below `root`, for good."""
    parent, _, child = name.rpartition(".")
    exchange_child(root.get_submodule(parent), child, module)


@contextmanager
def swapped(root: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, other modules stand in places below `root`, by name; afterwards those that stood there."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, module in modules.items():
            path, _, child = name.rpartition(".")
            parent = root.get_submodule(path) if path else root
            before.append((parent, child, exchange_child(parent, child, module)))
        yield
    finally:
        for parent, child, module in reversed(before):
            exchange_child(parent, child, module)
