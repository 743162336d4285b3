"""Trained weights in files: where they lie, and what a training starts from. Knows nothing of training itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dtmsearch.core.plan import Plan
from dtmsearch.core.plan_file import check_weights_id
from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import Conv1D
from dtmsearch.model.weights.applied import Weights

START_FILE, MASKS_FILE = "start.safetensors", "masks.safetensors"


def trained_file(folder: str, weights_id: str) -> Path:
    """The file of trained weights. Raises `UserError` when this machine does not see it."""
    check_weights_id(weights_id)
    path = Path(folder) / f"{weights_id}.safetensors"
    if not path.is_file():
        raise UserError(
            f"there are no trained weights at {path}: the store must lie in a folder that every node sees, and its "
            "weights must not be removed while evaluations need them"
        )
    return path


def check_only_pruned(plan: Plan) -> None:
    """Raise `UserError` for a plan that does more to its components than prune them."""
    for component, scheme in plan.parsed.items():
        if not scheme.kind.only_prunes:
            raise UserError(
                f"{component} is under {scheme.name}, but only pruned components can be trained under a mask: train "
                "the pruned plan first, and quantize what comes out"
            )


def write_pruned(weights: Weights, names: Iterable[str], dropped: Collection[str], folder: Path) -> None:
    """Write components as the plan that stands has made them, what was cut of them at zero, and masks of their weights
    that are not zero; as the model's parameters lie. What lies in `dropped` blocks loses its biases as well, for these
    blocks add nothing."""
    own: dict[str, Tensor] = {}
    for name in names:
        module, whole = weights.module(name), weights.standing_whole(name).cpu()
        own[f"{name}.weight"] = (whole.t() if isinstance(module, Conv1D) else whole).contiguous()
        bias = getattr(module, "bias", None)
        if bias is not None and name.startswith(tuple(f"{block}." for block in dropped)):
            own[f"{name}.bias"] = torch.zeros_like(bias.detach(), device="cpu")
    write_whole(folder / START_FILE, lambda path: save_file(own, path))
    pack_masks({name.removesuffix(".weight"): tensor != 0 for name, tensor in own.items()}, folder / MASKS_FILE)


def pack_masks(kept: Mapping[str, Tensor], path: Path) -> None:
    """Write masks of kept weights, one bit each; shapes stand in the file's metadata."""
    packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=None)) for name, mask in kept.items()}
    shapes = {name: json.dumps(list(mask.shape)) for name, mask in kept.items()}
    write_whole(path, lambda temporary: save_file(packed, temporary, shapes))


def masks_of_parameters(path: Path) -> dict[str, Tensor]:
    """The masks of a file by the names of parameters: those of weights stand there by their components' names."""
    found = unpack_masks(path)
    return {name if name.endswith(".bias") else f"{name}.weight": mask for name, mask in found.items()}


def unpack_masks(path: Path) -> dict[str, Tensor]:
    """Masks that `pack_masks` wrote: True where a weight is kept."""
    masks = {}
    with safe_open(path, framework="np") as file:
        for name, text in sorted((file.metadata() or {}).items()):
            shape = tuple(json.loads(text))
            bits = np.unpackbits(file.get_tensor(name), count=math.prod(shape))
            masks[name] = torch.from_numpy(bits.reshape(shape).astype(np.bool_))
    return masks


def overlay(model: nn.Module, path: Path) -> None:
    """Put the weights of a file over a model's own. Raises `UserError` for what is no parameter of the model."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(path).items():
            if name not in named:
                raise UserError(
                    f"{name} is no parameter of its own, as matrices of stacked experts are none: what such mixtures "
                    "lose is not held at zero, so plans that drop or prune them are neither repaired nor trained"
                )
            named[name].copy_(tensor)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under a temporary name, then rename it, so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    write(temporary)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
