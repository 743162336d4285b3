"""A replica around a model object that is in memory already: what notebooks measure, without a folder or Ray."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dtmsearch.core.components import IN_MEMORY, ModelManifest, blocks_of
from dtmsearch.core.decoding import GREEDY, Decoding
from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.fusion import input_readers, scale_partners
from dtmsearch.core.variant import BASE
from dtmsearch.model.modules.compat import attention_of, path_of
from dtmsearch.model.modules.discovery import components_of, find_layers, other_components, routers_of
from dtmsearch.model.modules.slots import Places
from dtmsearch.model.replica.replica import LoadedModel, Replica
from dtmsearch.model.weights.applied import Weights
from dtmsearch.model.weights.checkpoint import Checkpoint


def manifest_of(model: Any) -> ModelManifest:
    """The components of a model object, found as in a checkpoint. Raises `ValueError` for a model without layers."""
    _, layers = find_layers(model)
    return ModelManifest(
        model=path_of(model) or type(model).__name__,
        revision=None,
        dtype=_dtype_name(model),
        num_layers=len(layers),
        content_hash=IN_MEMORY,
        components=components_of(model),
        others=other_components(model),
        routers=routers_of(model),
    )


def weights_of(model: nn.Module) -> Weights:
    """The weights of a model object, to be put under a plan. Originals are kept in memory while they are replaced."""
    components = components_of(model)
    weights = Weights(model, Checkpoint(()), Places(model, {}), blocks=blocks_of(components), matrices=components)
    weights.share_scales(scale_partners(components))
    weights.share_inputs(input_readers(components))
    return weights


class InMemoryReplica(Replica):
    """Evaluates plans on `model`, where it lies; between evaluations and at the end (`restore`) its weights are its
    own. The model must be in evaluation mode and on one device."""

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int = 0, decoding: Decoding = GREEDY) -> None:
        self._given = model, tokenizer
        attention = attention_of(model)
        path, dtype = manifest_of(model).model, _dtype_name(model)
        spec = ModelSpec(path, dtype=dtype, attention=attention, compile="never", decoding=decoding)
        super().__init__(spec, ReplicaSettings(batch_tokens=batch_tokens))

    def _choose_device(self) -> torch.device:
        device: torch.device = next(self._given[0].parameters()).device
        return device

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        model, tokenizer = self._given
        return LoadedModel(model, tokenizer, manifest_of(model), Checkpoint(()), "")

    @torch.inference_mode()
    def restore(self) -> None:
        """Give the model its own weights back."""
        self._bench.become(BASE)


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
