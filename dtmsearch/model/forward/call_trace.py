"""How the layers of a model call what is in them: in which order, and who reads whose input. Found out from the model
itself, by watching a pass over a few tokens; nothing here knows a model's family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Calls:
    """A layer's components in the order of their calls; which of the layer's inputs to components each reads, numbered
    as they come; and its blocks (any other modules with weights), each with how many components had been called when
    it was done."""

    components: tuple[str, ...]
    reads: dict[str, int]
    blocks: dict[str, int]

    def spared(self, changed: Collection[str]) -> set[str]:
        """Components and blocks, none within another, that need not run again when the weights of the components
        `changed` change, for what they make stays as it is.

        Blocks are done before the first that changed is called. Components are called before it, or read what was there
        before its output was.
        """
        first = min((self.components.index(component) for component in changed), default=len(self.components))
        earlier = {self.reads[component] for component in self.components[: first + 1]}
        unreached = {component for component in self.components if self.reads[component] in earlier} - set(changed)
        done = {block for block, called in self.blocks.items() if called <= first}
        return {name for name in done | unreached if not any(name.startswith(f"{block}.") for block in done)}


@dataclass
class Watched:
    """What was seen in a pass: the calls of each layer, modules into whose outputs something was written later, and the
    features of outputs, by module."""

    calls: list[Calls]
    written_into: frozenset[str]
    features: dict[str, int]


@dataclass
class _Seen:
    """Calls that are over, in this order: (module, what a component read, what was made, a copy of it)."""

    ended: list[tuple[str, Tensor | None, Tensor, Tensor]] = field(default_factory=list)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            read = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            made = made_by(output)
            if made is not None:
                self.ended.append((name, read, made, made.clone()))

        return note


def made_by(output: Any) -> Tensor | None:
    """The tensor that a module has made, alone or at the head of a tuple that has no other."""
    if isinstance(output, tuple):
        return made_by(output[0]) if output and not any(isinstance(o, Tensor) for o in output[1:]) else None
    return output if isinstance(output, Tensor) else None


def watch(
    components: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module], layer_of: Mapping[str, int],
    num_layers: int, shape: tuple[int, ...], run: Callable[[], object],
) -> Watched:  # fmt: skip
    """Watch `run`, a pass over tokens of `shape`. What is not called once, on every token, is left out of calls."""
    seen = _Seen()
    with _hooked({**components, **blocks}, seen):
        run()
    names = [name for name, _, _, _ in seen.ended]
    # The tensors are still held, so that no two have the same identity.
    whole = [
        (name, id(read))
        for name, read, made, _ in seen.ended
        if names.count(name) == 1 and made.ndim == 3 and made.shape[:2] == shape
        if name in blocks or (read is not None and read.shape[:2] == shape)
    ]
    calls = [_calls([w for w in whole if layer_of[w[0]] == layer], components) for layer in range(num_layers)]
    written_into = frozenset(name for name, _, made, before in seen.ended if not made.equal(before))
    return Watched(calls, written_into, {name: made.shape[-1] for name, _, made, _ in seen.ended})


def _calls(ended: list[tuple[str, int]], components: Collection[str]) -> Calls:
    order: list[str] = []
    reads: dict[str, int] = {}
    blocks: dict[str, int] = {}
    distinct = list(dict.fromkeys(read for name, read in ended if name in components))
    for name, read in ended:
        if name in components:
            order.append(name)
            reads[name] = distinct.index(read)
        else:
            blocks[name] = len(order)
    return Calls(tuple(order), reads, blocks)


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], seen: _Seen) -> Iterator[None]:
    hooks = [module.register_forward_hook(seen.hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def weighted_modules(
    layers_name: str, layers: nn.ModuleList, components: Collection[str]
) -> dict[str, tuple[int, nn.Module]]:
    """Modules with weights in each layer that are no components: (layer, module) by name."""
    return {
        name: (index, module)
        for index, layer in enumerate(layers)
        for path, module in layer.named_modules()
        if path and (name := f"{layers_name}.{index}.{path}") not in components
        if next(module.parameters(), None) is not None
    }
