"""How a model's components are shaped: outliers among their weights and what they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dtmsearch.core.evaluation import IntArray, ModelSpec
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.model.modules.loading import checkpoint_folder, load_model

# An input feature whose absolute value passes this anywhere is an outlier (LLM.int8(), arXiv 2208.07339, section 4).
OUTLIER_FEATURE = 6.0


@dataclass(frozen=True)
class WeightShape:
    """Outliers of a component. `kurtosis`: excess, of its weights; `weights_over_median` and `inputs_over_median`: the
    largest absolute value over the median one, of weights and of inputs (0: not known); `outlier_features`: the share
    of its input features that reach `OUTLIER_FEATURE` anywhere."""

    kurtosis: float
    weights_over_median: float
    inputs_over_median: float
    outlier_features: float


@torch.inference_mode()
def weight_shapes(spec: ModelSpec, rows: IntArray) -> dict[str, WeightShape]:
    """Component -> its outliers, inputs over the tokens `rows` [rows, tokens]. Of stacked experts inputs are not known.
    Loads the model into this process. Raises `UserError` where it cannot be loaded."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(checkpoint_folder(spec), spec, device)
    names = [component.name for component in read_manifest(spec).components]
    modules = dict(model.named_modules())
    largest: dict[str, torch.Tensor] = {}
    medians: dict[str, list[float]] = {}
    found = [name for name in names if getattr(modules.get(name), "weight", None) is not None]
    hooks = [modules[name].register_forward_pre_hook(partial(_note, name, largest, medians)) for name in found]
    try:
        for row in rows:
            model(torch.from_numpy(np.asarray(row, np.int64))[None].to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _shape(modules[name].weight, largest.get(name), medians.get(name, ())) for name in found}


def _note(
    name: str, largest: dict[str, torch.Tensor], medians: dict[str, list[float]], _: object, arguments: tuple[Any, ...]
) -> None:
    sizes = arguments[0].detach().float().abs().reshape(-1, arguments[0].shape[-1])
    most = sizes.amax(dim=0)
    largest[name] = most if name not in largest else torch.maximum(largest[name], most)
    medians.setdefault(name, []).append(float(sizes.median()))


def _shape(weight: torch.Tensor, largest: torch.Tensor | None, medians: Sequence[float]) -> WeightShape:
    values = weight.detach().float().flatten()
    moved = values - values.mean()
    variance = float(moved.square().mean())
    kurtosis = float(moved.square().square().mean()) / max(variance, 1e-30) ** 2 - 3.0
    over = float(values.abs().max()) / max(float(values.abs().median()), 1e-30)
    if largest is None:
        return WeightShape(kurtosis, over, 0.0, 0.0)
    inputs = float(largest.max()) / max(float(np.mean(medians)), 1e-30)
    return WeightShape(kurtosis, over, inputs, float((largest >= OUTLIER_FEATURE).float().mean()))
