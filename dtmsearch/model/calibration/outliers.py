"""How many weights of a layer stand out, by their own size and that of what they read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtmsearch.core.components import Component
from dtmsearch.model.weights.applied import Weights


def outlier_shares(weights: Weights, components: Sequence[Component], multiple: float) -> dict[int, float]:
    """Layer -> part of its weights whose |w| times the norm of their input is over `multiple` times the layer's mean
    (OWL, arXiv 2310.05175, section 3). The weights must stand dense, and be calibrated."""
    layers: dict[int, list[Tensor]] = {}
    for component in components:
        weight = weights.original(component.name).float().abs()
        norms = weights.compressor.mean_squares(component.name).sqrt().to(weight.device)
        layers.setdefault(component.layer, []).append(weight * norms)
    shares = {}
    for layer, scores in layers.items():
        flat = torch.cat([score.flatten() for score in scores])
        shares[layer] = float((flat > multiple * flat.mean()).double().mean())
    return shares
