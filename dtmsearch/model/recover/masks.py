"""Masks over the parameters of a model that trains. Knows nothing of plans, or of how the model learns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Masks:
    """Which weights of a model stay zero. Gradients there are taken away before the optimiser sees them: its moments
    stay zero, so do its steps, and decay of a zero is zero."""

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor]) -> None:
        named = dict(model.named_parameters())
        self._pairs = [(name, named[name], _placed(mask, named[name])) for name, mask in kept.items()]

    def hold(self) -> None:
        gradients = [p.grad for _, p, _ in self._pairs if p.grad is not None]
        torch._foreach_mul_(gradients, [mask for _, p, mask in self._pairs if p.grad is not None])

    def check(self, what: str) -> None:
        """Raise `ValueError` where a weight is not zero that ought to be."""
        for name, parameter, mask in self._pairs:
            wrong = int(((parameter.detach() != 0) & ~mask).sum())
            if wrong:
                raise ValueError(
                    f"{what} violates its mask: {wrong} weights of {name} are not zero though they were pruned. It was "
                    "written by something else, or damaged: remove it, and the training starts from the one before"
                )


def _placed(mask: Tensor, parameter: nn.Parameter) -> Tensor:
    """A mask where its parameter is, cut up as the parameter is between devices."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter.data, DTensor):
        here = mask.to(parameter.data.device)
        return distribute_tensor(here, parameter.data.device_mesh, parameter.data.placements)
    return mask.to(parameter.device)
