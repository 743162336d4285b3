"""The verb `components`: what of a model a search would choose among, what not, and why. Needs no weights: the
configuration says the shapes, and the model's own code what it does with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.errors import UserError

# Bytes of a weight in the width that sizes are told in.
_BYTES = 2


_ROUTES = "chooses among experts, or weighs one: 16 bits in every published checkpoint"
_OUTSIDE = "outside the layers: searched where it is named"
_VECTORS = "vectors: norms, biases and the like"


@dataclass(frozen=True)
class Kind:
    """The components of one kind and shape: how many there are, [outputs, inputs], their weights together, and their
    share of all weights."""

    kind: str
    number: int
    shape: tuple[int, int]
    num_weights: int
    share: float


@dataclass(frozen=True)
class LeftOut:
    """Weights that no search chooses among unless they are named: why, how many tensors, and the name of one."""

    reason: str
    number: int
    example: str
    num_weights: int
    share: float


@dataclass(frozen=True)
class ModelComponents:
    """What a model consists of. `untried` is empty, or says why the model's code did not run without values: then
    components are told by the classes of their modules."""

    model: str
    architecture: str
    num_layers: int
    num_weights: int
    bytes_16_bits: int
    num_components: int
    share: float
    kinds: tuple[Kind, ...]
    left_out: tuple[LeftOut, ...]
    untried: str


def list_components(model: str, trust_remote_code: bool = ModelSpec.trust_remote_code) -> ModelComponents:
    """The components of a model: a folder, its config.json alone, or a hub id. Raises `UserError`."""
    from dtmsearch.model.modules.discovery import components_of, find_layers
    from dtmsearch.model.modules.loading import described_model
    from dtmsearch.model.modules.matrices import found_in, known_usage

    empty: Any = described_model(model, trust_remote_code)
    usage = known_usage(empty)
    found = found_in(empty, usage)
    components = components_of(empty)
    total = sum(parameter.numel() for parameter in empty.parameters())
    if not total:
        raise UserError(f"{model} has no weights")
    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    for component in components:
        kinds[component.kind, component.shape] = kinds.get((component.kind, component.shape), 0) + 1
    names = {component.name for component in components}
    reasons = {out.name: out.reason for out in found.left_out}
    for matrix in found.matrices:
        place = matrix.slice.parameter if matrix.slice is not None else f"{matrix.name}.weight"
        reasons[place] = "" if matrix.name in names else _ROUTES if matrix.routes else _OUTSIDE
    left = _left_out(empty, reasons)
    searched = sum(component.num_weights for component in components)
    return ModelComponents(
        model=model,
        architecture=type(empty).__name__,
        num_layers=len(find_layers(empty)[1]),
        num_weights=total,
        bytes_16_bits=_BYTES * total,
        num_components=len(components),
        share=searched / total,
        kinds=tuple(
            Kind(kind, n, (r, c), n * r * c, n * r * c / total)
            for (kind, (r, c)), n in sorted(kinds.items(), key=lambda e: -e[1] * e[0][1][0] * e[0][1][1])
        ),
        left_out=tuple(
            LeftOut(reason, number, example, weights, weights / total)
            for reason, (number, example, weights) in sorted(left.items(), key=lambda entry: -entry[1][2])
        ),
        untried=usage.failed,
    )


def _left_out(model: Any, reasons: Mapping[str, str]) -> dict[str, tuple[int, str, int]]:
    """Reason -> (tensors, the name of one, weights) of all parameters but those with an empty reason."""
    found: dict[str, tuple[int, str, int]] = {}
    for name, parameter in model.named_parameters():
        reason = reasons.get(name, _VECTORS if parameter.ndim < 2 else _OUTSIDE)
        if reason:
            number, example, weights = found.get(reason, (0, name, 0))
            found[reason] = number + 1, example, weights + parameter.numel()
    return found
