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
    in one layer: the layers are cut where each GPU has as much to do, not as much to hold.
    """
    num_devices = len(free)
    name, layers = find_layers(model)
    ends = [round(len(layers) * ((at + 1) / num_devices) ** 0.5) for at in range(num_devices)]
    found = {f"{name}.{i}": next(at for at, end in enumerate(ends) if i < end) for i in range(len(layers))}
    path = name.split(".")
    for depth, part in enumerate(path):
        parent = ".".join(path[:depth])
        beside = [child for child, _ in model.get_submodule(parent).named_children()]
        for at, child in enumerate(beside):
            if child != part:
                found[f"{parent}.{child}" if parent else child] = num_devices - 1 if at > beside.index(part) else 0
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        head = model.get_output_embeddings()
        found |= {own: 0 for own in found if model.get_submodule(own) is head}
    needed = [0] * num_devices
    for parameter, values in model.named_parameters():
        holder = next((own for own in found if parameter.startswith(f"{own}.")), None)
        if holder is None:
            return None
        needed[found[holder]] += values.numel() * dtype.itemsize
    return found if all(need <= _WEIGHTS_SHARE * own for need, own in zip(needed, free, strict=True)) else None
