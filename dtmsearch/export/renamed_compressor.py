"""A compressor that is asked by the names of a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dtmsearch.core.schemes import Scheme
from dtmsearch.model.compress.compressor import Compressor
from dtmsearch.model.compress.number_rounding import NumberCodes


class RenamedCompressor(Compressor):
    """A compressor of the base model's components, asked by the names that they have in a smaller model.

    `_own` is the same compressor, asked by the names of the base model: what it asks of itself is named so already, and
    the name of a layer may be that of another before."""

    def __init__(
        self, inner: Compressor, base: Mapping[str, str], columns: Mapping[str, Tensor], cut: frozenset[str]
    ) -> None:
        self.__dict__.update(inner.__dict__)
        squares = self._mean_squares
        self._mean_squares = squares | {
            name: squares[name][at.to(squares[name].device)] for name, at in columns.items() if name in squares
        }
        self._alone = cut  # as it was measured
        self._own = Compressor.__new__(Compressor)
        self._own.__dict__ = self.__dict__
        self._base, self._smaller = dict(base), {old: new for new, old in base.items()}

    def share_scales(self, largest: Callable[[str], Tensor]) -> None:
        super().share_scales(lambda name: largest(self._smaller.get(name, name)))

    def share_inputs(self, readers: Callable[[str], Mapping[str, Tensor]]) -> None:
        def named(name: str) -> dict[str, Tensor]:
            # What is cut was measured with no scales of columns.
            found = {} if name in self._alone else readers(self._smaller.get(name, name))
            return {self._base.get(reader, reader): weight for reader, weight in found.items()}

        super().share_inputs(named)

    def column_scales(self, component: str, scheme: Scheme) -> Tensor | None:
        return self._own.column_scales(self._base.get(component, component), scheme)

    def compress(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor:
        return self._own.compress(self._base.get(component, component), weight, scheme)

    def number_codes(self, component: str, weight: Tensor, scheme: Scheme) -> NumberCodes:
        return self._own.number_codes(self._base.get(component, component), weight, scheme)

    def solved(self, component: str, scheme: Scheme) -> Any:
        return self._own.solved(self._base.get(component, component), scheme)

    def mean_squares(self, component: str) -> Tensor:
        return self._own.mean_squares(self._base.get(component, component))

    def largest_input(self, component: str) -> Tensor:
        return self._own.largest_input(self._base.get(component, component))

    def packed(self, component: str, weight: Tensor, scheme: Scheme) -> Any:
        return self._own.packed(self._base.get(component, component), weight, scheme)
