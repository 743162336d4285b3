"""A model over several GPUs of one process: which layers lie where, and how they are connected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.model.forward.gpu_hops import connect
from dtmsearch.model.modules.discovery import find_layers
from dtmsearch.model.modules.loading import empty_model, load_model

# The part of a GPU's free memory that weights may take, beside states and activations.
_WEIGHTS_SHARE = 0.85


def load_spread_model(folder: Path, spec: ModelSpec, num_devices: int) -> nn.Module:
    """The model in evaluation mode, over the first `num_devices` GPUs."""
    free = [torch.cuda.mem_get_info(device)[0] for device in range(num_devices)]
    model: Any = load_model(
        folder, spec, cut(empty_model(folder, spec), getattr(torch, spec.dtype), free) or "balanced"
    )
    devices = {name: torch.device("cuda", at) for name, at in model.hf_device_map.items() if isinstance(at, int)}
    if len(devices) == len(model.hf_device_map):  # none of it in the host's memory
        connect(model, model.get_submodule(find_layers(model)[0].rpartition(".")[0]), devices)
    whole: nn.Module = model
    return whole


def cut(model: Any, dtype: torch.dtype, free: Sequence[int]) -> dict[str, int] | None:
    """Where the parts of a model (a module tree, with or without weights) lie: name of a module -> GPU, of which `free`
    bytes are. None where they do not fit so. A head whose weights are those of the embedding lies where it does: on the
    first GPU, to which the last layer's states for it return.

    Candidates run from the first layer in which they differ, so layer i of L runs for (i + 1) / L of those that differ
    in one layer, and the head for all: the layers are cut where each GPU has as much to do, not as much to hold.
    """
    num_devices = len(free)
    name, layers = find_layers(model)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    ends = _ends(len(layers), num_devices, 0.0 if tied else head_in_layers(model))
    found = {f"{name}.{i}": next(at for at, end in enumerate(ends) if i < end) for i in range(len(layers))}
    path = name.split(".")
    for depth, part in enumerate(path):
        parent = ".".join(path[:depth])
        beside = [child for child, _ in model.get_submodule(parent).named_children()]
        for at, child in enumerate(beside):
            if child != part:
                found[f"{parent}.{child}" if parent else child] = num_devices - 1 if at > beside.index(part) else 0
    if tied:
        head = model.get_output_embeddings()
        found |= {own: 0 for own in found if model.get_submodule(own) is head}
    needed = [0] * num_devices
    for parameter, values in model.named_parameters():
        holder = next((own for own in found if parameter.startswith(f"{own}.")), None)
        if holder is None:
            return None
        needed[found[holder]] += values.numel() * dtype.itemsize
    return found if all(need <= _WEIGHTS_SHARE * own for need, own in zip(needed, free, strict=True)) else None


def _ends(num_layers: int, num_devices: int, head: float) -> list[int]:
    """For each device the layer above its last. Of the work of all candidates, L^2 / 2 layers and L heads, a device's
    layers from a to b are (b^2 - a^2) / 2."""
    work = num_layers**2 + 2 * num_layers * head
    ends = [round((work * (at + 1) / num_devices) ** 0.5) for at in range(num_devices - 1)]
    return [*(min(end, num_layers - num_devices + 1 + at) for at, end in enumerate(ends)), num_layers]


def head_in_layers(model: Any) -> float:
    """How many layers take as long as the head of a candidate, by their weights: it gives the candidate's logits and
    the base model's, at the half of the positions that is predicted. In quarters, so that sums of it are exact."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    _, layers = find_layers(model)
    weights = sum(parameter.numel() for parameter in layers.parameters())
    return 0.0 if head is None or not weights else round(4 * head.numel() * len(layers) / weights) / 4
