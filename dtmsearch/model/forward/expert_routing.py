"""How many tokens of some text each expert of a mixture was given: what few tokens reach, few tokens can judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.model.forward.partial import Body
from dtmsearch.model.modules.matrices import sliced_matrices


def routed_tokens(body: Body, batches: Iterable[Tensor]) -> dict[str, int]:
    """Component -> tokens that were routed to its expert, for every matrix of an expert, over batches [rows, tokens].

    Must run under `torch.inference_mode`, on the unquantized model.
    """
    with counting(body.model) as found:
        for batch in batches:
            body.finish(batch, None, 0)
    return found


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, int]]:
    """The same of whatever runs within; it is there at the end."""
    stacked = list(sliced_matrices(model).values())
    modules = dict.fromkeys(matrix.name.rsplit(".", 2)[0] for matrix in stacked)
    counts: dict[str, Tensor] = {}

    def count(name: str, arguments: Iterable[Any]) -> None:
        chosen = [a for a in arguments if isinstance(a, Tensor) and not a.is_floating_point() and a.dtype != torch.bool]
        for indices in chosen[:1]:
            found = torch.bincount(indices.reshape(-1).cpu(), minlength=0)
            before = counts.get(name, found.new_zeros(0))
            length = max(len(before), len(found))
            counts[name] = _padded(before, length) + _padded(found, length)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: count(name, [*args, *kwargs.values()]), with_kwargs=True
        )
        for name in modules
    ]
    found: dict[str, int] = {}
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    places = {matrix.name: matrix.name.rsplit(".", 2)[:2] for matrix in stacked}
    found |= {name: _count_of(counts, module, expert) for name, (module, expert) in places.items() if module in counts}


def _count_of(counts: dict[str, Tensor], module: str, expert: str) -> int:
    return int(counts[module][int(expert)]) if int(expert) < len(counts[module]) else 0


def _padded(counts: Tensor, length: int) -> Tensor:
    return nn.functional.pad(counts, (0, length - len(counts)))
