"""The verb `components`: what of a model a search would choose among, what not, and why. Needs no weights: the
configuration says the shapes, and the model's own code what it does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import MOST_TOGETHER, ModelSpec
from dtmsearch.core.strategy_settings import AutoSettings
from dtmsearch.errors import UserError
from dtmsearch.search.space import SearchSpace

# Bytes of a weight in the width that sizes are told in.
_BYTES = 2


# What prices of a Llama-2-7B shape reached on one H200 (docs/search-quality.md), in operations a second.
TFLOPS = 240.0
# What forward passes alone reach of that in dense models: a probe of this shape, and one of 34 billion weights,
# 600 x 10^12 (docs/performance.md). Of mixtures it was not measured.
_FORWARD_RATE = 2.5
GPU_GB = 80.0
# GPUs by name: GB, and peak of dense bfloat16 products in 10^12 operations a second, by their makers. Of an H200's peak
# `TFLOPS` were reached; of the others the same part is assumed.
GPUS = {
    "L4": (24.0, 121.0), "L40S": (48.0, 362.0), "A100": (80.0, 312.0), "H100": (80.0, 989.0), "H200": (141.0, 989.0),
    "B200": (180.0, 2250.0),
}  # fmt: skip
_MEASURED_PEAK = GPUS["H200"][1]
# What a GPU of a replica over several does of what one alone does, at least: of two 0.79 (34B) and 0.96 (7B), of four
# 0.78 were measured (docs/performance.md).
_SPREAD_RATE = 0.75
# Bytes a second from the page cache into a GPU (docs/performance.md), shared by the GPUs of a machine.
_READ_RATE = 20e9
# How often all weights are read for prices: up and down. For a probe it is once for so many candidates as go up the
# layers together.
_PRICE_READS = 2
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
class Way:
    """A way to run a search on a machine: the options that choose it, how many replicas there are, and seconds as in
    `Cost`, by all of them."""

    means: str
    options: str
    replicas: int
    price_seconds: float
    probe_seconds: float


@dataclass(frozen=True)
class Machine:
    """A machine that is not here: its GPUs, each of `gpu_gb` GB that runs `tflops` x 10^12 operations a second."""

    gpus: int = 1
    gpu_gb: float = GPU_GB
    tflops: float = TFLOPS

    @staticmethod
    def named(name: str) -> Machine:
        """Of a name such as 8xH100. Raises `UserError`."""
        count, _, gpu = name.rpartition("x")
        if gpu.upper() not in GPUS or not (count or "1").isdigit() or count == "0":
            raise UserError(
                f"no machine {name!r}: give one like 8xH100, of {', '.join(GPUS)}; or --gpu-gb and --tflops"
            )
        memory, peak = GPUS[gpu.upper()]
        return Machine(int(count or 1), memory, round(TFLOPS * peak / _MEASURED_PEAK))


@dataclass(frozen=True)
class Cost:
    """What a search of a model would take, by arithmetic: `num_units` are what gets a scheme of its own where all
    experts of a layer share one, `active_weights` what a token is multiplied with. A replica takes `replica_bytes` in
    16 bits, on at least `num_gpus` of `gpu_gb` GB. At `tflops` x 10^12 operations a second `price_seconds` are those of
    prices of every option by backward passes (`samples` of `row_tokens` tokens, three passes each); at
    `forward_tflops`, `probe_seconds` those of measuring every unit alone under one scheme, on `prompts` prompts, from
    its layer on. Loading, references and validation are not in them. `ways` are those of the whole machine."""

    num_units: int
    active_weights: int
    replica_bytes: int
    num_gpus: int
    gpu_gb: float
    tflops: float
    forward_tflops: float
    samples: int
    prompts: int
    row_tokens: int
    price_seconds: float
    probe_seconds: float
    ways: tuple[Way, ...] = ()


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
    machine: Machine = Machine(),
) -> ModelComponents:
    """The components of a model: a folder, its config.json alone, or a hub id; and what a search costs on a machine.
    Raises `UserError`."""
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
        cost=_cost(components, total, _head_weights(empty), num_layers, machine),
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


def _cost(components: Sequence[Component], num_weights: int, head: int, num_layers: int, machine: Machine) -> Cost:
    """See `Cost`. A token takes two operations for each weight that it is multiplied with, in a backward pass four."""
    units = SearchSpace(tuple(components), ("int8-channel",)).units
    layers = float(sum(component.num_weights * component.read_share for component in components))
    rate = machine.tflops * 1e12
    forward_rate = rate * (1.0 if any(component.mixture for component in components) else _FORWARD_RATE)
    suffixes = sum(layers * (num_layers - unit.components[0].layer) / num_layers + head for unit in units)
    replica_bytes = round(_REPLICA_FACTOR * _BYTES * num_weights)
    price_seconds = 6 * (layers + head) * _SAMPLES * _ROW_TOKENS / rate
    probe_seconds = 2 * suffixes * _PROBE_PROMPTS * _ROW_TOKENS / forward_rate
    return Cost(
        num_units=len(units),
        active_weights=round(layers) + head,
        replica_bytes=replica_bytes,
        num_gpus=ceil(replica_bytes / (machine.gpu_gb * 1e9)),
        gpu_gb=machine.gpu_gb,
        tflops=machine.tflops,
        forward_tflops=forward_rate / 1e12,
        samples=_SAMPLES,
        prompts=_PROBE_PROMPTS,
        row_tokens=_ROW_TOKENS,
        price_seconds=price_seconds,
        probe_seconds=probe_seconds,
        ways=_ways(machine, replica_bytes, _BYTES * num_weights, price_seconds, probe_seconds, len(units)),
    )


def _ways(
    machine: Machine, replica_bytes: int, weight_bytes: int, price_seconds: float, probe_seconds: float, num_units: int
) -> tuple[Way, ...]:
    """The ways of a search on a machine, of which one GPU alone would take such seconds if it held the model."""
    gpus, each = machine.gpus, ceil(replica_bytes / (machine.gpu_gb * 1e9))
    ways = []
    if each == 1:
        ways.append(Way("a replica on each GPU", "", gpus, price_seconds / gpus, probe_seconds / gpus))
    elif each <= gpus:
        replicas = gpus // each
        rate = replicas * each * _SPREAD_RATE
        means = f"a replica over {each} GPUs"
        ways.append(Way(means, f"--gpus-per-replica {each}", replicas, price_seconds / rate, probe_seconds / rate))
    else:
        nodes = ceil(each / gpus)
        rate = nodes * gpus * _SPREAD_RATE
        means = f"a replica over {nodes} such machines"
        ways.append(Way(means, f"--nodes-per-replica {nodes}", 1, price_seconds / rate, probe_seconds / rate))
    if each > 1:
        reading = weight_bytes / _READ_RATE
        probe_reads = max(ceil(num_units / MOST_TOGETHER), gpus)
        price = max(price_seconds / gpus, _PRICE_READS * gpus * reading)
        probe = max(probe_seconds / gpus, probe_reads * reading)
        means = f"weights pass through each GPU, {weight_bytes / 1e9:,.0f} GB of them in the host's memory"
        ways.append(Way(means, "--weights streamed", gpus, price, probe))
    return tuple(ways)


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
