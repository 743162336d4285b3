"""What the experts of a mixture are worth, by which some of them go.

By weights alone, or by calibration text on the unquantized model: how many tokens each expert is given, and the norms
of what it adds for them, weighted as the router weights it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtmsearch.core.components import Component
from dtmsearch.core.widths import Width
from dtmsearch.errors import UserError
from dtmsearch.model.calibration.expert_use import output_of
from dtmsearch.model.calibration.input_statistics import Gatherer
from dtmsearch.model.calibration.routed_call import RoutedCall, owner_of
from dtmsearch.model.compress.pruning import random_keys
from dtmsearch.model.weights.applied import Weights

# Rules that calibration text decides.
_BY_TEXT = ("frequency", "reap", "routed")


@dataclass(frozen=True)
class Routed:
    """What text does with each expert of a mixture [experts]: `tokens` that it is given, and `norms`, the sum over them
    of the weight that the router gives it times the Euclidean norm of what it gives."""

    tokens: Tensor
    norms: Tensor


def needs_text(width: Width) -> bool:
    """Whether a width of experts goes by calibration text."""
    return width.rule in _BY_TEXT


def scores(
    width: Width, block: Component, experts: Sequence[Component], weights: Weights, routed: Routed | None
) -> Tensor:
    """A score [experts] of each expert, by a width's rule: `random`; `magnitude`, the sum of the squares of its
    weights; `frequency`, the tokens that it is given; `reap`, the mean over these of weight times norm (REAP, arXiv
    2510.13999); `routed`, the same summed and not averaged, as far as the mixture's output moves at most."""
    if width.rule == "random":
        return random_keys((block.num_experts,), block.name, torch.device("cpu")).double()
    if width.rule == "magnitude":
        found = torch.zeros(block.num_experts, dtype=torch.float64)
        for component in experts:
            found[component.expert] += weights.original(component.name).double().square().sum().cpu()
        return found
    assert routed is not None
    if width.rule == "frequency":
        return routed.tokens
    return routed.norms / routed.tokens.clamp(min=1) if width.rule == "reap" else routed.norms


def chosen_experts(width: Width, worth: Tensor) -> Tensor:
    """The experts that stay, in their order; of alike ones the later do."""
    number = len(worth)
    return worth.argsort(stable=True)[number - width.left(number) :].sort().values


def routed_by(
    gatherer: Gatherer, weights: Weights, block: Component, experts: Sequence[Component], say: Callable[[str], str]
) -> Routed:
    """What a text does with the experts of a block, some matrices of which are given. Raises `UserError` where the
    calls do not tell it; `say` makes its message."""
    if not all(component.stacked for component in experts):
        raise UserError(say("each of its experts is a module of its own"))
    owners = {owner_of(component)[0] for component in experts}
    if len(owners) != 1:
        raise UserError(say("its experts lie in several modules"))
    (owner,) = owners
    routed = [RoutedCall.of(arguments) for arguments in gatherer.calls(block.layer, [owner])[owner]]
    told = [call for call in routed if call is not None]
    if not told or len(told) < len(routed):
        raise UserError(say(f"{owner} is not told by its arguments which experts a token is given to"))
    weights.need(experts[0].name)
    module = gatherer.module(owner)
    tokens, norms = torch.zeros(2, block.num_experts, dtype=torch.float64)
    for call in told:
        for expert in range(block.num_experts):
            here, arguments = call.of_expert(expert)
            alone = RoutedCall.of(arguments)
            if not len(arguments[0]) or alone is None:
                continue
            given = output_of(module, alone.given_to(expert)).norm(dim=-1)
            weight = (call.weights.double() * (call.chosen == expert)).sum(1)[here]
            tokens[expert] += len(given)
            norms[expert] += (weight.abs() * given).sum().cpu()
    return Routed(tokens, norms)
