"""Masks over the parameters of a model that trains. Knows nothing of plans, or of how the model learns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import multiply_each


class Masks:
    """Which weights stay zero, of parameters by name. Gradients there are taken away before the optimiser sees them:
    its moments stay zero, so do its steps, and decay of a zero is zero."""

    def __init__(self, named: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        self._pairs = [(name, named[name], _placed(mask, named[name])) for name, mask in kept.items()]

    def hold(self) -> None:
        gradients = [p.grad for _, p, _ in self._pairs if p.grad is not None]
        multiply_each(gradients, [mask for _, p, mask in self._pairs if p.grad is not None])

    def check(self, what: str) -> None:
        """Raise `UserError` where a weight is not zero that ought to be, in all processes alike."""
        for name, parameter, mask in self._pairs:
            found = ((parameter.detach() != 0) & ~mask).sum()
            wrong = int(found.full_tensor() if isinstance(found, DTensor) else found)
            if wrong:
                raise UserError(
                    f"{what} violates its mask: {wrong} weights of {name} are not zero though they were pruned. It was "
                    "written by something else, or damaged: remove it, and the training starts from the one before"
                )


def _placed(mask: Tensor, parameter: nn.Parameter) -> Tensor:
    """A mask where its parameter is, cut up as the parameter is between devices."""
    if isinstance(parameter.data, DTensor):
        here = mask.to(parameter.data.device)
        return distribute_tensor(here, parameter.data.device_mesh, parameter.data.placements)
    return mask.to(parameter.device)
