"""What the experts of a mixture read: the rows that the products with each expert's matrix are taken of.

Stacks are parameters, which no hook is told of: so the products themselves are watched, and a factor is known by its
place in the stack's memory. Experts may run one after the other, several in one batched product, or grouped by tokens
that lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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
_ADDING = {"addmm", "baddbmm"}


@dataclass(frozen=True)
class _Stack:
    """A parameter of a model that holds matrices of experts above each other: `names` by the expert's number, None
    where one is not asked for; each matrix has `inputs` columns."""

    parameter: Tensor
    names: tuple[str | None, ...]
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
            yield _Stack(parameter.data, names, first.shape[1])


class _Watch(Operations):
    def __init__(self, stacks: Sequence[_Stack], note: Note) -> None:
        super().__init__()
        self._stacks: Mapping[int, _Stack] = {storage_of(stack.parameter): stack for stack in stacks}
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS or name in _GROUPED:
            tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            first, second = tensors[1:3] if name in _ADDING else tensors[:2]
            if (stack := self._stacks.get(storage_of(second))) is not None:
                rows = first.reshape(-1, first.shape[-1]) if second.ndim == 2 else first
                self._seen(stack, second, rows, tensors[2] if name in _GROUPED else None)
            elif (stack := self._stacks.get(storage_of(first))) is not None:
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
                self._one(stack, at, rows[at][rows[at].any(dim=-1)])  # others are given zeros

    def _one(self, stack: _Stack, at: int, rows: Tensor) -> None:
        name = stack.names[at]
        if name is not None and len(rows) and rows.shape[-1] == stack.inputs:
            self._note(name, rows)
