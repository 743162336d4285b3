"""The verb `components`: what of a model a search would choose among, what not, and why. Needs no weights: the
configuration says the shapes, and the model's own code what it does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.strategy_settings import AutoSettings
from dtmsearch.errors import UserError
from dtmsearch.search.space import SearchSpace

# Bytes of a weight in the width that sizes are told in.
_BYTES = 2


# What prices of a Llama-2-7B shape reached on one H200 (docs/search-quality.md), in operations a second; a probe of it
# reached 600 x 10^12 (docs/performance.md).
TFLOPS = 240.0
GPU_GB = 80.0
# Of a probe: tokens of a prompt and its continuation, and prompts; samples of prices as `auto` takes them.
_ROW_TOKENS, _PROBE_PROMPTS = 200, 128
_SAMPLES = AutoSettings.samples
# A replica takes activations beside its weights.
_REPLICA_FACTOR = 1.2

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
class Cost:
    """What a search of a model would take, by arithmetic: `num_units` are what gets a scheme of its own where all
    experts of a layer share one, `active_weights` what a token is multiplied with. A replica takes `replica_bytes` in
    16 bits, on at least `num_gpus` of `gpu_gb` GB. At `tflops` x 10^12 operations a second `price_seconds` are those of
    prices of every option by backward passes (`samples` of `row_tokens` tokens, three passes each), `probe_seconds`
    those of measuring every unit alone under one scheme, on `prompts` prompts, from its layer on. Loading, references
    and validation are not in them."""

    num_units: int
    active_weights: int
    replica_bytes: int
    num_gpus: int
    gpu_gb: float
    tflops: float
    samples: int
    prompts: int
    row_tokens: int
    price_seconds: float
    probe_seconds: float


@dataclass(frozen=True)
class ModelComponents:
    """What a model consists of. `experts` says of a mixture how many there are, and what a token reads. `untried` is
    empty, or says why the model's code did not run without values: then components are told by the classes of their
    modules. `source` is the format that a model comes quantized in."""

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
    cost: Cost
    source: str = ""
    experts: str = ""


def list_components(
    model: str,
    trust_remote_code: bool = ModelSpec.trust_remote_code,
    tflops: float = TFLOPS,
    gpu_gb: float = GPU_GB,
) -> ModelComponents:
    """The components of a model: a folder, its config.json alone, or a hub id; and what a search costs on GPUs of
    `gpu_gb` GB that run `tflops` x 10^12 operations a second. Raises `UserError`."""
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
    num_layers = len(find_layers(empty)[1])
    searched = sum(component.num_weights for component in components)
    return ModelComponents(
        model=model,
        architecture=type(empty).__name__,
        num_layers=num_layers,
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
        cost=_cost(components, total, _head_weights(empty), num_layers, tflops, gpu_gb),
        source=_source(model, empty),
        experts=_experts(components, total),
    )


def _source(path: str, model: Any) -> str:
    """The format that a model comes quantized in, by its configuration; empty for others."""
    from dtmsearch.model.sources.stored import format_of, settings_of

    settings = settings_of(model.config.to_dict())
    return "" if settings is None else format_of(settings, path).says(settings)


def _head_weights(model: Any) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())


def _cost(
    components: Sequence[Component], num_weights: int, head: int, num_layers: int, tflops: float, gpu_gb: float
) -> Cost:
    """See `Cost`. A token takes two operations for each weight that it is multiplied with, in a backward pass four."""
    units = SearchSpace(tuple(components), ("int8-channel",)).units
    layers = float(sum(component.num_weights * component.read_share for component in components))
    rate = tflops * 1e12
    suffixes = sum(layers * (num_layers - unit.components[0].layer) / num_layers + head for unit in units)
    replica_bytes = round(_REPLICA_FACTOR * _BYTES * num_weights)
    return Cost(
        num_units=len(units),
        active_weights=round(layers) + head,
        replica_bytes=replica_bytes,
        num_gpus=ceil(replica_bytes / (gpu_gb * 1e9)),
        gpu_gb=gpu_gb,
        tflops=tflops,
        samples=_SAMPLES,
        prompts=_PROBE_PROMPTS,
        row_tokens=_ROW_TOKENS,
        price_seconds=6 * (layers + head) * _SAMPLES * _ROW_TOKENS / rate,
        probe_seconds=2 * suffixes * _PROBE_PROMPTS * _ROW_TOKENS / rate,
    )


def _experts(components: Sequence[Component], total: int) -> str:
    """What a mixture of experts is, in words; empty for other models."""
    mixtures = {c.mixture: (c.num_experts, c.experts_per_token) for c in components if c.mixture}
    if not mixtures:
        return ""
    kinds = dict.fromkeys(mixtures.values())
    many = " or ".join(f"{number:,} experts, {chosen} for a token" for number, chosen in kinds)
    unread = sum(c.num_weights * (1 - c.read_share) for c in components)
    read = 1 - float(unread) / total
    return f"{len(mixtures):,} mixtures of {many}: a token reads {read:.2%} of all weights"


def _left_out(model: Any, reasons: Mapping[str, str]) -> dict[str, tuple[int, str, int]]:
    """Reason -> (tensors, the name of one, weights) of all parameters but those with an empty reason."""
    found: dict[str, tuple[int, str, int]] = {}
    for name, parameter in model.named_parameters():
        reason = reasons.get(name, _VECTORS if parameter.ndim < 2 else _OUTSIDE)
        if reason:
            number, example, weights = found.get(reason, (0, name, 0))
            found[reason] = number + 1, example, weights + parameter.numel()
    return found
