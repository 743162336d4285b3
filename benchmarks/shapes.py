"""Models of a given shape with random weights, made on the device: throughput needs no trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.model.modules.discovery import components_of, find_layers
from dtmsearch.model.replica import replica
from dtmsearch.model.weights.checkpoint import Checkpoint

SHAPES = {
    "llama2-7b": {
        "vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4_096,
    },
    "small": {
        "vocab_size": 8_192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1_024,
    },
}  # fmt: skip


class Wordless:
    """The tokenizer of a model without text: it puts nothing before a text or after it."""

    eos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, Sequence[int]]:
        return {"input_ids": []}


class ShapedReplica(replica.Replica):
    """A replica whose `spec.path` names a shape."""

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> replica.LoadedModel:
        config = LlamaConfig(**SHAPES[spec.path], eos_token_id=2, tie_word_embeddings=False)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, spec.dtype))
        try:
            with torch.device(self._device):
                model = AutoModelForCausalLM.from_config(config, attn_implementation=spec.attention).eval()
        finally:
            torch.set_default_dtype(before)
        model.requires_grad_(False)
        _, layers = find_layers(model)
        manifest = ModelManifest(spec.path, None, spec.dtype, len(layers), spec.path, components_of(model))
        return replica.LoadedModel(model, Wordless(), manifest, Checkpoint([]), "")
