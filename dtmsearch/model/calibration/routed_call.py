"""A call of a module that holds experts, as its arguments tell which of them each token is given to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtmsearch.core.components import Component


@dataclass(frozen=True)
class RoutedCall:
    """A call of a module that holds experts: `tensors` are its arguments, a row a token, `chosen` [tokens, k] the
    experts that each token is given to, `weights` [tokens, k] with what weight, which `given_weights` of the tensors
    says, perhaps of all experts."""

    tensors: tuple[Tensor, ...]
    chosen: Tensor
    weights: Tensor
    given_weights: Tensor

    @staticmethod
    def of(arguments: Sequence[Any]) -> RoutedCall | None:
        """None where the arguments do not tell which experts a token is given to."""
        tensors = tuple(value for value in arguments if isinstance(value, Tensor))
        chosen = next((t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool and t.ndim == 2), None)
        if chosen is None or len(tensors) != len(arguments) or any(len(t) != len(chosen) for t in tensors):
            return None
        given = next((t for t in tensors[1:] if t.is_floating_point() and t.ndim == 2), None)
        if given is None or given.shape[1] < chosen.shape[1]:
            return None
        weights = given if given.shape == chosen.shape else given.gather(1, chosen.long())
        return RoutedCall(tensors, chosen, weights, given)

    def of_expert(self, expert: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Which tokens an expert is given [tokens], and the arguments of these alone."""
        given = (self.chosen == expert).any(dim=1)
        return given, tuple(tensor[given] for tensor in self.tensors)

    def given_to(self, expert: int) -> tuple[Tensor, ...]:
        """The arguments by which all tokens are given to one expert, with a weight of 1."""
        one = self.chosen[:, :1]

        def other(tensor: Tensor) -> Tensor:
            if tensor is self.chosen:
                return torch.full_like(one, expert)
            if tensor is self.given_weights:
                return torch.ones_like(one if tensor.shape == self.chosen.shape else tensor, dtype=tensor.dtype)
            return tensor

        return tuple(other(tensor) for tensor in self.tensors)


def owner_of(component: Component) -> tuple[str, int]:
    """The module that holds a stacked expert's matrix, and the expert's number in it."""
    owner, expert, _ = component.name.rsplit(".", 2)
    return owner, int(expert)
