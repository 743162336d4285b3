"""What the experts of a mixture read: the rows that the products with each expert's matrix are taken of, and in a
backward pass the gradients at what these products give.

Stacks are parameters, which no hook is told of: so the products themselves are watched, and a factor is known by its
place in the stack's memory. Experts may run one after the other, several in one batched product, or grouped by tokens
that lie side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dtmsearch.core.components import Component
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.routed_call import RoutedCall, owner_of
from dtmsearch.model.modules.compat import Operations, storage_of
from dtmsearch.model.modules.matrices import Matrix, sliced_matrices

# Notes what a component reads: its name, rows [tokens, inputs].
Note = Callable[[str, Tensor], None]

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul", "linear"}
_GROUPED = {"_grouped_mm", "grouped_mm_fallback"}
# The backward pass of the latter in one: of inputs, the stack, ends and gradients.
_GROUPED_BACKWARD = "grouped_mm_fallback_backward"
_ADDING = {"addmm", "baddbmm"}


@dataclass(frozen=True)
class _Stack:
    """A parameter of a model that holds matrices of experts above each other: `names` by the expert's number, None
    where one is not asked for; each matrix is `outputs` x `inputs`."""

    parameter: Tensor
    names: tuple[str | None, ...]
    outputs: int
    inputs: int


class ExpertInputs:
    """Watches what some components of a model, matrices of experts in stacks, are multiplied with. `everywhere`: all
    tokens of the text go through every expert for it, wherever the router sends them; what the model goes on with is
    what its router says."""

    def __init__(self, model: nn.Module, components: Sequence[Component], everywhere: bool) -> None:
        matrices = sliced_matrices(model) if components else {}
        self._stacks = list(_stacks(model, [matrices[c.name] for c in components if c.name in matrices]))
        self._owners = {owner_of(c)[0] for c in components if c.name in matrices}
        self._model, self._everywhere = model, everywhere

    @contextmanager
    def noted(self, note: Note) -> Iterator[None]:
        """Within, whatever runs is watched."""
        if not self._stacks:
            yield
        elif self._everywhere:
            with self._through_all(note):
                yield
        else:
            with _Watch(self._stacks, note):
                yield

    @contextmanager
    def _through_all(self, note: Note) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        inside = False

        def run(owner: str) -> Any:
            def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                nonlocal inside
                if inside:
                    return
                call = RoutedCall.of([*arguments, *named.values()])
                if call is None:
                    raise UserError(
                        f"calibration.experts: all cannot be had: {owner} is not told by its arguments which experts "
                        "a token is given to. Use experts: routed"
                    )
                inside = True
                try:
                    with _Watch(self._stacks, note):
                        for expert in range(self._number_in(owner)):
                            module(*call.given_to(expert))
                finally:
                    inside = False

            return before

        for owner in sorted(self._owners):
            handles.append(self._model.get_submodule(owner).register_forward_pre_hook(run(owner), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _number_in(self, owner: str) -> int:
        names = [name for stack in self._stacks for name in stack.names if name is not None]
        return max(int(name[len(owner) + 1 :].split(".")[0]) for name in names if name.startswith(f"{owner}.")) + 1


def _stacks(model: nn.Module, matrices: Iterable[Matrix]) -> Iterator[_Stack]:
    by_parameter: dict[str, dict[int, Matrix]] = {}
    for matrix in matrices:
        assert matrix.slice is not None
        by_parameter.setdefault(matrix.slice.parameter, {})[matrix.slice.index] = matrix
    for name, held in by_parameter.items():
        parameter = model.get_parameter(name)
        first = next(iter(held.values()))
        assert first.slice is not None
        # One along another side has no part of the memory to itself: its experts count as reached by no token.
        if first.slice.side == 0 and parameter.is_contiguous():
            names = tuple(held[at].name if at in held else None for at in range(first.slice.count))
            yield _Stack(parameter, names, *first.shape)


class ExpertProducts:
    """Watches a pass through products with some components, matrices of experts in stacks, and the way back: for each
    product the rows that it was taken of, and the gradients at what it gave, row by row. `components` are those that
    can be watched."""

    def __init__(self, model: nn.Module, components: Iterable[str]) -> None:
        matrices = sliced_matrices(model)
        self._model = model
        self._stacks = list(_stacks(model, [matrices[name] for name in components if name in matrices]))
        self.components = frozenset(name for stack in self._stacks for name in stack.names if name is not None)
        self._inputs: list[tuple[str, Tensor]] = []
        self._gradients: list[tuple[str, Tensor]] = []

    def of(self, components: Iterable[str]) -> ExpertProducts:
        """The same of some of the components, with nothing seen."""
        wanted = set(components)
        other = copy.copy(self)
        narrowed = [replace(s, names=tuple(n if n in wanted else None for n in s.names)) for s in self._stacks]
        other._stacks = [stack for stack in narrowed if any(stack.names)]
        other.components = self.components & wanted
        other._inputs, other._gradients = [], []
        return other

    @contextmanager
    def forward(self) -> Iterator[list[Tensor]]:
        """Within, inputs are noted. Gradients reach what enters modules that hold stacks; these tensors are given."""
        entered: list[Tensor] = []
        if not self._stacks:
            yield entered
            return

        def enters(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            values = (v for v in (*arguments, *named.values()) if isinstance(v, Tensor) and v.is_floating_point())
            for value in values:
                if not value.requires_grad:
                    value.requires_grad_()
                entered.append(value)
                return

        self._inputs.clear()
        handles = [self._model.get_submodule(name).register_forward_pre_hook(enters, with_kwargs=True)
                   for name in sorted(self._owners())]  # fmt: skip
        try:
            with _Watch(self._stacks, lambda name, rows: self._inputs.append((name, rows.detach())), "inputs"):
                yield entered
        finally:
            for handle in handles:
                handle.remove()

    def _owners(self) -> set[str]:
        return {str(name).rsplit(".", 2)[0] for stack in self._stacks for name in stack.names if name is not None}

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Within, gradients are noted. Of a pass forward exactly one pass backward may be taken."""
        self._gradients.clear()
        if not self._stacks:
            yield
            return
        with _Watch(self._stacks, lambda name, rows: self._gradients.append((name, rows)), "gradients"):
            yield

    def unseen(self, seen: Container[str]) -> str:
        """A component of a stack of which no matrix is among those `seen`; empty where there is none such."""
        names = ([name for name in stack.names if name is not None] for stack in self._stacks)
        return next((own[0] for own in names if all(name not in seen for name in own)), "")

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Component -> rows [rows, inputs] and gradients [rows, outputs] of all its products; those that none was taken
        with are not among them. Raises `UserError` where the two ways do not fit each other."""
        inputs, gradients = _by_name(self._inputs), _by_name(reversed(self._gradients))
        for name, rows in inputs.items():
            if [len(own) for own in rows] != [len(own) for own in gradients.get(name, ())]:
                raise UserError(f"prices cannot be had: the backward pass of {name} takes other products than its own")
        return {name: (torch.cat(rows), torch.cat(gradients[name])) for name, rows in inputs.items()}


def _by_name(noted: Iterable[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for name, rows in noted:
        found.setdefault(name, []).append(rows)
    return found


class _Watch(Operations):
    """Notes rows of products with stacks: their `inputs`, or in a backward pass the `gradients` at what they gave. With
    `given` alone, of what runs for all experts at once the rows that an expert is given, the others being zeros. Where
    a stack lies is asked at every product: weights may pass through a device, several of them in one memory."""

    def __init__(self, stacks: Sequence[_Stack], note: Note, side: str = "given") -> None:
        super().__init__()
        self._stacks, self._note, self._side = stacks, note, side

    def _stack_of(self, factor: Tensor) -> _Stack | None:
        """The stack that a factor is a part of, or all of."""
        memory, at, size = storage_of(factor), factor.storage_offset(), factor.numel()
        for stack in self._stacks:
            own = stack.parameter
            begin = own.storage_offset()
            if storage_of(own) == memory and begin <= at and at + size <= begin + own.numel():
                return stack
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == _GROUPED_BACKWARD and self._side == "gradients":
            _, weight, ends, gradient = args
            if (stack := self._stack_of(weight)) is not None:
                self._seen(stack, weight, gradient, ends)
        elif name in _PRODUCTS or name in _GROUPED:
            tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            first, second = tensors[1:3] if name in _ADDING else tensors[:2]
            if (stack := self._stack_of(second)) is not None:
                rows = first.reshape(-1, first.shape[-1]) if second.ndim == 2 else first
                self._seen(stack, second, rows, tensors[2] if name in _GROUPED else None)
            elif (stack := self._stack_of(first)) is not None:
                self._seen(stack, first, second.transpose(-1, -2), None)
        return func(*args, **(kwargs or {}))

    def _seen(self, stack: _Stack, weight: Tensor, rows: Tensor, ends: Tensor | None) -> None:
        """A product of rows with a part of a stack: one matrix, or all of them, each with rows of its own or, where
        there are `ends`, with those from the last one's end up to its own."""
        count, numel = len(stack.names), stack.parameter.numel()
        if weight.numel() * count == numel:
            at = (weight.storage_offset() - stack.parameter.storage_offset()) * count // numel
            self._one(stack, at, rows.reshape(-1, rows.shape[-1]))
        elif weight.numel() == numel and ends is not None:
            for at, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
                self._one(stack, at, rows[start:end])
        elif weight.numel() == numel and len(rows) == count:
            for at in range(count):
                self._one(stack, at, rows[at][rows[at].any(dim=-1)] if self._side == "given" else rows[at])

    def _one(self, stack: _Stack, at: int, rows: Tensor) -> None:
        name, wanted = stack.names[at], stack.outputs if self._side == "gradients" else stack.inputs
        if name is not None and len(rows) and rows.shape[-1] == wanted:
            self._note(name, rows)
