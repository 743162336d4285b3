"""How text uses the experts of a mixture: how many tokens each is given, with what weight, and how far the mixture's
output moves when one expert alone is compressed.

Works on the unquantized model, layer by layer, over the calls of the modules that hold the experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.calibration import ExpertUse
from dtmsearch.core.components import Component
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import Scheme
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.input_statistics import Gatherer
from dtmsearch.model.calibration.routed_call import RoutedCall, owner_of
from dtmsearch.model.weights.applied import Weights


def expert_uses(
    gatherer: Gatherer, weights: Weights, components: Iterable[Component], schemes: Sequence[Scheme]
) -> list[ExpertUse]:
    """The use of every expert among the components by a text, a row for every scheme, in order of the model.

    The error is the Frobenius norm of the change of the mixture's output over the text when all of the expert's
    matrices among the components are under the scheme; tokens that the expert is not given to change nothing. Raises
    `UserError` for experts that are modules of their own, of whose calls none holds all experts of a layer.
    """
    of_layers: dict[int, dict[tuple[str, str], dict[int, list[str]]]] = {}
    for component in components:
        if component.mixture and not component.stacked:
            raise UserError(
                f"how text uses the experts of {component.mixture} is not told: each is a module of its own"
            )
        if component.mixture:
            owner, expert = owner_of(component)
            of_layer = of_layers.setdefault(component.layer, {})
            of_layer.setdefault((component.mixture, owner), {}).setdefault(expert, []).append(component.name)
    found: list[ExpertUse] = []
    for layer in sorted(of_layers):
        owners = of_layers[layer]
        calls = gatherer.calls(layer, [owner for _, owner in owners])
        for (mixture, owner), experts in owners.items():
            routed = [RoutedCall.of(arguments) for arguments in calls[owner]]
            told = [call for call in routed if call is not None]
            if not told or len(told) < len(routed):
                raise UserError(f"{owner} is not told by its arguments which experts a token is given to")
            for expert, names in experts.items():
                found += _uses(gatherer.module(owner), told, weights, mixture, expert, names, schemes)
    return found


def _uses(
    module: nn.Module,
    calls: Sequence[RoutedCall],
    weights: Weights,
    mixture: str,
    expert: int,
    names: Sequence[str],
    schemes: Sequence[Scheme],
) -> Iterator[ExpertUse]:
    tokens, weight, inputs = 0, 0.0, []
    for call in calls:
        given, arguments = call.of_expert(expert)
        tokens += int(given.sum())
        weight += float(call.weights[call.chosen == expert].sum(dtype=torch.float64))
        inputs += [arguments] if len(arguments[0]) else []
    num_tokens = sum(len(call.chosen) for call in calls)
    weights.need(names[0])
    before = [output_of(module, arguments) for arguments in inputs]
    for scheme in schemes:
        with weights.perturbed(Plan.of(dict.fromkeys(names, scheme.name))):
            after = [output_of(module, arguments) for arguments in inputs]
        moved = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
        yield ExpertUse(mixture, expert, scheme.name, tokens, num_tokens, weight / max(num_tokens, 1), moved**0.5)


def output_of(module: nn.Module, arguments: Sequence[Tensor]) -> Tensor:
    """What a module that holds experts gives for some arguments, in 64 bits."""
    made: Any = module(*arguments)
    found: Tensor = made[0] if isinstance(made, tuple) else made
    return found.double()
