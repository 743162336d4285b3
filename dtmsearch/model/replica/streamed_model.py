"""A model whose weights pass through a device: when it is one, and how it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import ModelSpec, WeightsKept
from dtmsearch.errors import UserError
from dtmsearch.model.forward.activation_cache import free_bytes, most_bytes
from dtmsearch.model.modules.discovery import find_layers
from dtmsearch.model.modules.loading import load_model
from dtmsearch.model.modules.slots import Places
from dtmsearch.model.modules.streamed_layers import StreamedLayers
from dtmsearch.model.modules.weight_reading import move_buffers
from dtmsearch.model.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)
_T = TypeVar("_T")

# The part of a GPU's memory that all weights may take, beside states and activations, if they are to stay there. Of all
# of it, not of what is free now: whether layers are compiled follows from it, and with that the bits of all values.
_MOST_WEIGHTS = 0.85
# The part that weights of layers take of which not all stay there.
_STREAMED_WEIGHTS = 0.4


def streams(weights: WeightsKept, manifest: ModelManifest, device: torch.device) -> bool:
    """Whether the weights of layers pass through a device, as settings say or, on a GPU, its memory."""
    if weights != "auto" or device.type != "cuda":
        return weights == "streamed"
    of_components = sum(component.num_weights for component in manifest.components) * manifest.dense_bits / 8
    return of_components > _MOST_WEIGHTS * most_bytes(device)


def load_streamed_model(
    folder: Path, spec: ModelSpec, checkpoint: Checkpoint, device: torch.device
) -> tuple[nn.Module, StreamedLayers]:
    """The model in evaluation mode, all but its layers on a device, and what brings these there."""
    model = load_model(folder, spec, torch.device("cpu"))
    name, layers = find_layers(model)
    start = f"{name}."
    located = {
        path.removeprefix(start): span for path, span in checkpoint.located(model).items() if path.startswith(start)
    }
    for path, parameter in model.named_parameters():
        if not path.startswith(start):
            parameter.data = parameter.data.to(device)
    move_buffers(model, lambda _: device)
    most = _STREAMED_WEIGHTS * free_bytes(device) if device.type == "cuda" else 0.0
    streamed = StreamedLayers(layers, device, located, most)
    log.info(
        "%s: %d of %d layers stay on the GPU, the others pass through it, %.1f GB each",
        folder, streamed.num_resident, len(layers), streamed.layer_bytes / 1e9,
    )  # fmt: skip
    return model, streamed


def rehearsed(streamed: StreamedLayers, prove: Callable[[], _T]) -> _T:
    """What `prove` finds out of a model's passes: in a rehearsal, and where it raises `UserError` there, with all of
    the model's own weights."""
    try:
        with streamed.rehearsing():
            return prove()
    except UserError as error:
        log.debug("once more with all weights: %s", error)
    return prove()


class PassingWeights:
    """See `Passing`: by the layers in which components lie."""

    def __init__(self, streamed: StreamedLayers, manifest: ModelManifest, places: Places) -> None:
        self._streamed, self._places = streamed, places
        inside = range(manifest.num_layers)
        self._layer_of = {name: c.layer for name, c in manifest.by_name.items() if c.layer in inside}

    def need(self, component: str) -> None:
        if component in self._layer_of:
            self._streamed.need(self._layer_of[component])

    def check_together(self, components: Iterable[str]) -> None:
        layers = {self._layer_of[component] for component in components if component in self._layer_of}
        assert len(layers) <= 1, f"weights of layers {sorted(layers)} pass through the device one layer at a time"

    def written(self, component: str) -> None:
        self._streamed.written(self._places.get(component))
