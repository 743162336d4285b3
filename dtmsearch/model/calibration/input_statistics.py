"""What the unquantized model's components read over calibration text: mean squares of their inputs, and Hessians X^T X.

Hooks on the components as the model's own code calls them, and a watch on products with the experts of mixtures.
Components that are handed the same tensor share what is gathered over it. Knows nothing of schemes; the model must
stand dense, with its layers eager, while it works.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dtmsearch.core.calibration import FloatArray
from dtmsearch.core.components import Component
from dtmsearch.model.calibration.expert_inputs import ExpertInputs
from dtmsearch.model.forward.boundary_states import State
from dtmsearch.model.forward.partial import Body

# Inputs that are remembered to know them again: those who read the same are called in short succession.
_REMEMBERED = 4


@dataclass(frozen=True)
class SharedHessian:
    """X^T X / rows of X [cols, cols], float32, over the input of `components`, which all read the same, of so many
    tokens."""

    components: tuple[str, ...]
    hessian: Tensor
    num_tokens: int


@dataclass
class _Gathered:
    """Sums over what one leading component read, and who reads the same."""

    components: list[str]
    sums: Tensor | None = None
    num_tokens: int = 0
    largest: Tensor | None = None


@dataclass
class _Inputs:
    """Adds up what components read, pass by pass; `hessians` or only squares."""

    hessians: bool
    leader_of: dict[str, str] = field(default_factory=dict)
    gathered: dict[str, _Gathered] = field(default_factory=dict)
    seen: list[tuple[Tensor, str]] = field(default_factory=list)

    def note(self, component: str, values: Tensor) -> None:
        if component not in self.leader_of:
            same = [leader for tensor, leader in self.seen if tensor is values]
            leader = self.leader_of[component] = same[0] if same else component
            self.gathered.setdefault(leader, _Gathered([])).components.append(component)
        if self.leader_of[component] == component:
            self.seen.append((values, component))
            del self.seen[:-_REMEMBERED]
            self._add(self.gathered[component], values.reshape(-1, values.shape[-1]))

    def _add(self, gathered: _Gathered, rows: Tensor) -> None:
        sums = _products(rows) if self.hessians else rows.float().square().sum(dim=0).double()
        gathered.sums = sums if gathered.sums is None else gathered.sums.add_(sums)
        if not self.hessians and len(rows):
            largest = rows.abs().amax().float()
            gathered.largest = largest if gathered.largest is None else torch.maximum(gathered.largest, largest)
        gathered.num_tokens += len(rows)


def _products(rows: Tensor) -> Tensor:
    """X^T X in float32. The products of 16-bit numbers are exact there, so a GPU may multiply them as such."""
    if rows.is_cuda and rows.element_size() == 2:
        return torch.mm(rows.T, rows, out_dtype=torch.float32)
    rows = rows.float()
    return rows.T @ rows


class Gatherer:
    """Runs `tokens` [rows, length], in batches of `rows_in_batch`, through the unquantized model.

    Layers are gone through upwards, with the text's states carried from one to the next: from the tokens or, where the
    model's first layers are not here, from `entry`, the text's states [rows, length, hidden] at the first that is.
    `everywhere`: experts read all tokens, wherever the model's router sends them.
    """

    def __init__(
        self,
        body: Body,
        tokens: Tensor,
        components: Sequence[Component],
        rows_in_batch: int,
        entry: Tensor | None = None,
        everywhere: bool = False,
    ) -> None:
        self._body, self._everywhere = body, everywhere
        self._batches = tokens.split(rows_in_batch)
        self._components = {c.name: c for c in components if c.layer in body.own}
        self._entry: tuple[Tensor, ...] = () if entry is None else entry.split(rows_in_batch)
        self._boundary = body.own.start
        self._states: Sequence[State] = self._entry

    @property
    def batches(self) -> Sequence[Tensor]:
        """The text's tokens [rows, length], a batch at a time."""
        found: Sequence[Tensor] = self._batches
        return found

    def mean_squares(self) -> tuple[dict[str, FloatArray], dict[str, int], dict[str, float]]:
        """Component -> mean squares [cols] of its inputs, how many tokens these are of, and the largest absolute input;
        without those that the text does not reach."""
        inputs = _Inputs(hessians=False)
        with self._hooked(list(self._components.values()), inputs):
            for batch, state in zip(self._batches, self._entered(self._entry), strict=True):
                inputs.seen.clear()
                self._body.finish(batch, state, self._body.own.start)
        reached = [g for g in inputs.gathered.values() if g.sums is not None and g.num_tokens]
        squares = {
            component: (gathered.sums / gathered.num_tokens).float().cpu().numpy()
            for gathered in reached
            if gathered.sums is not None
            for component in gathered.components
        }
        tokens = {name: gathered.num_tokens for gathered in reached for name in gathered.components}
        largest = {name: float(g.largest) for g in reached if g.largest is not None for name in g.components}
        return squares, tokens, largest

    def hessians(self, layer: int, stay: bool = False, only: Collection[str] | None = None) -> list[SharedHessian]:
        """The Hessians of a layer's components, or of some of them `only`; without those that the text does not reach.

        The text goes on to the next layer with it, or it is to `stay` below this one.
        """
        self.advance(layer)
        inputs = _Inputs(hessians=True)
        below = self._states
        here = (c for c in self._components.values() if c.layer == layer and (only is None or c.name in only))
        with self._hooked(list(here), inputs):
            self._pass(layer, inputs)
        if stay:
            self._states, self._boundary = below, layer
        return [
            SharedHessian(tuple(gathered.components), gathered.sums.div_(gathered.num_tokens), gathered.num_tokens)
            for gathered in inputs.gathered.values()
            if gathered.sums is not None and gathered.num_tokens
        ]

    def module(self, name: str) -> nn.Module:
        """A module of the model."""
        found: nn.Module = self._body.model.get_submodule(name)
        return found

    def calls(self, layer: int, modules: Sequence[str]) -> dict[str, list[list[Any]]]:
        """The arguments of every call of some modules of a layer, batch by batch; the text goes on to the next layer
        with it."""
        self.advance(layer)
        found: dict[str, list[list[Any]]] = {name: [] for name in modules}

        def noting(name: str) -> Any:
            def note(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                found[name].append([*arguments, *named.values()])

            return note

        handles = [self.module(n).register_forward_pre_hook(noting(n), with_kwargs=True) for n in found]
        try:
            self._pass(layer, _Inputs(hessians=False))
        finally:
            for handle in handles:
                handle.remove()
        return found

    def advance(self, layer: int) -> None:
        """Take the text to the input of a layer, through the layers below as they stand now."""
        if layer < self._boundary:
            self._boundary, self._states = self._body.own.start, self._entry
        if layer > self._boundary:
            self._states = [
                self._body.advance(batch, state, self._boundary, layer)
                for batch, state in zip(self._batches, self._present(), strict=True)
            ]
            self._boundary = layer

    def _pass(self, layer: int, inputs: _Inputs) -> None:
        """Through one layer, and to the next boundary if there is one."""
        last = layer + 1 == self._body.num_layers
        states: list[State] = []
        for batch, state in zip(self._batches, self._present(), strict=True):
            inputs.seen.clear()
            if last or not self._body.is_cut(layer + 1):
                self._body.finish(batch, state, layer)
            if not last:
                states.append(self._body.advance(batch, state, layer, layer + 1))
        inputs.seen.clear()
        if not last:
            self._states, self._boundary = states, layer + 1

    def _present(self) -> Iterator[State | None]:
        return self._entered(self._states)

    def _entered(self, states: Sequence[State]) -> Iterator[State | None]:
        """States of all batches on the device, one at a time; none before the first layer of all."""
        return iter([None] * len(self._batches)) if not states else (s.to(self._body.input_device) for s in states)

    @contextmanager
    def _hooked(self, components: Sequence[Component], inputs: _Inputs) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        for component in components:
            module = None if component.stacked else _module(self._body.model, component.name)
            if module is not None:
                handles.append(module.register_forward_pre_hook(_noting(component.name, inputs)))
        stacked = ExpertInputs(self._body.model, [c for c in components if c.stacked], self._everywhere)
        try:
            with stacked.noted(inputs.note):
                yield
        finally:
            inputs.seen.clear()
            for handle in handles:
                handle.remove()


def _module(model: nn.Module, component: str) -> nn.Module | None:
    try:
        return model.get_submodule(component)
    except AttributeError:
        return None


def _noting(component: str, inputs: _Inputs) -> Any:
    def note(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            inputs.note(component, arguments[0])

    return note
