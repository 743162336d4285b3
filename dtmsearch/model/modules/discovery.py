"""Which modules of a model are components: from the module tree and the safetensors headers, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dtmsearch.core.components import (
    Component,
    ModelManifest,
    checkpoint_dtype,
    content_hash,
    read_model_config,
    weight_files,
)
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.errors import UserError
from dtmsearch.model.modules.fingerprints import custom_code
from dtmsearch.model.modules.loading import check_tensors, checkpoint_folder, empty_model
from dtmsearch.model.modules.matrices import is_matrix, matrices_of

_KIND_ENDINGS = ("_proj", "_weight", "_layer")
# Without its ending it would say nothing.
_WHOLE_KINDS = {"c_proj"}


@dataclass(frozen=True)
class Survey:
    """What can be told of a model without its weights: the manifest, whose `content_hash` is left empty; the tokens
    that the model reads at most, if it says; the rows of its input embedding; and its own Python code, if it runs any
    (see `fingerprints.custom_code`)."""

    manifest: ModelManifest
    context: int | None
    num_embeddings: int
    code: Mapping[str, str]


def read_manifest(spec: ModelSpec) -> ModelManifest:
    """The manifest of a model. Raises `UserError` when it is missing, pickled, quantized already, or has no layers."""
    found = survey(spec)
    folder = checkpoint_folder(spec)
    return replace(found.manifest, content_hash=content_hash(folder, weight_files(folder), found.code))


def survey(spec: ModelSpec) -> Survey:
    """What the headers of the weights and the configuration say of a model. Raises `UserError` as `read_manifest`."""
    folder = checkpoint_folder(spec)
    if "quantization_config" in read_model_config(folder):
        raise UserError(f"{spec.path} is quantized already: a search starts from 16- or 32-bit weights")
    model = empty_model(folder, spec)
    layers_name, layers = find_layers(model)
    components = components_of(layers_name, layers)
    if not components:
        raise UserError(
            f"{spec.path} has no components: no weight matrix lies inside {layers_name} ({type(layers[0]).__name__})"
        )
    check_tensors(folder, model)
    files = weight_files(folder)
    manifest = ModelManifest(
        model=spec.path,
        revision=spec.revision,
        dtype=checkpoint_dtype(files),
        num_layers=len(layers),
        content_hash="",
        components=components,
        others=other_components(model, layers_name, len(layers)),
        routers=routers_of(layers_name, layers),
    )
    config: Any = model.config
    inside: Any = model
    code = custom_code(folder, type(model))
    num_embeddings = int(inside.get_input_embeddings().weight.shape[0])
    return Survey(manifest, getattr(config, "max_position_embeddings", None), num_embeddings, code)


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers: the `nn.ModuleList` of the configured length with the most weights."""
    config: Any = model.config
    expected = config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == expected]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of {expected} layers, so it has no components to search")
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def components_of(layers_name: str, layers: nn.ModuleList) -> tuple[Component, ...]:
    """The weight matrices inside the layers of the list of that name, in model order, but for those that route."""
    return tuple(
        Component(f"{layers_name}.{index}.{matrix.name}", index, kind_of(matrix.name), matrix.shape, matrix.transposed)
        for index, layer in enumerate(layers)
        for matrix in matrices_of(layer)
        if not matrix.routes
    )


def routers_of(layers_name: str, layers: nn.ModuleList) -> tuple[str, ...]:
    """Names of the linear layers that choose among experts, or weigh one."""
    return tuple(
        f"{layers_name}.{index}.{matrix.name}"
        for index, layer in enumerate(layers)
        for matrix in matrices_of(layer)
        if matrix.routes
    )


def kind_of(name: str) -> str:
    """The role of a module inside its layer: `self_attn.q_proj` is `q`, `mlp.fc1` is `fc1`."""
    last = name.rpartition(".")[2]
    for ending in () if last in _WHOLE_KINDS else _KIND_ENDINGS:
        last = last.removesuffix(ending) or last
    return last


def other_components(model: nn.Module, layers_name: str, num_layers: int) -> tuple[Component, ...]:
    """Embeddings, norms, routers and the head; of tied weights the first owner only."""
    others: list[Component] = []
    layers: Any = model.get_submodule(layers_name)
    routers = set(routers_of(layers_name, layers))
    seen: set[int] = set()
    layers_reached = False
    for name, module in model.named_modules():
        layers_reached |= name == layers_name
        own = dict(module.named_parameters(recurse=False)).get("weight")
        if own is None or id(own) in seen or own.ndim > 2:
            continue
        seen.add(id(own))
        inside = name.startswith(f"{layers_name}.")
        if inside and is_matrix(module) and name not in routers:
            continue
        layer = int(name[len(layers_name) + 1 :].split(".")[0]) if inside else num_layers if layers_reached else -1
        rows, cols = own.shape if own.ndim == 2 else (1, own.shape[0])
        others.append(Component(name, layer, kind_of(name), (rows, cols)))
    return tuple(others)
