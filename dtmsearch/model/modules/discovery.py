"""Which modules of a model are components: from the module tree and the safetensors headers, without weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from dtmsearch.core.checkpoint_files import checkpoint_dtype, content_hash, read_header, weight_files
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.identity import identity
from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import is_custom_code, loaded_by
from dtmsearch.model.modules.fingerprints import custom_code
from dtmsearch.model.modules.kv_caches import caches_of
from dtmsearch.model.modules.loading import (
    check_tensors,
    described_checkpoint,
    empty_model,
    loader,
    own_folder,
    read_config,
)
from dtmsearch.model.modules.matrices import (
    Matrix,
    Mixture,
    found_in,
    known_usage,
    matrices_of,
    mixtures_of,
    settings_of,
)
from dtmsearch.model.modules.tensor_names import tensors_of
from dtmsearch.model.sources.unquantized import SourceRecord, is_quantized, record_of, source_hash

_KIND_ENDINGS = ("_proj", "_weight", "_layer")
# Without its ending it would say nothing.
_WHOLE_KINDS = {"c_proj"}
# What is known of models, by what it follows from: a run asks for the same several times before it has weights.
_known: dict[Hashable, Survey] = {}
_MOST_KNOWN = 32


@dataclass(frozen=True)
class Survey:
    """What can be told of a model without its weights: the manifest, whose `content_hash` is left empty; the tokens
    that the model reads at most, if it says; the rows of its input embedding; its own Python code, if it runs any
    (see `fingerprints.custom_code`); and why its code does not run without values, if it does not."""

    manifest: ModelManifest
    context: int | None
    num_embeddings: int
    code: Mapping[str, str]
    untried: str = ""


def read_manifest(spec: ModelSpec) -> ModelManifest:
    """The manifest of a model. Raises `UserError` when it is missing, pickled, quantized in a way that is not known
    here, or has no layers."""
    return identified_manifest(spec, survey(spec))


def identified_manifest(spec: ModelSpec, found: Survey) -> ModelManifest:
    """The manifest of a model that was surveyed, with its `content_hash`, for which all of its files are read."""
    folder = own_folder(spec)
    if is_quantized(folder):
        content = source_hash(folder, found.code)
    else:
        content = content_hash(folder, weight_files(folder), found.code)
    if found.manifest.kv_cache is not None:
        content = identity({"model": content, "kv_cache": list(found.manifest.kv_cache)})
    return replace(found.manifest, content_hash=content)


def _with_caches(manifest: ModelManifest, spec: ModelSpec) -> ModelManifest:
    """The manifest with KV caches of the tokens that `spec` says."""
    if not spec.kv_context:
        return manifest
    model = empty_model(described_checkpoint(spec), spec)
    caches = caches_of(model, find_layers(model)[0], manifest.num_layers, spec.kv_context, spec.kv_batch)
    return replace(manifest, others=(*manifest.others, *caches), kv_cache=(spec.kv_context, spec.kv_batch))


def survey(spec: ModelSpec) -> Survey:
    """What the headers of the weights and the configuration say of a model. Raises `UserError` as `read_manifest`."""
    folder = described_checkpoint(spec)
    key = _described_by(folder, spec)
    found = None if key is None else _known.get(key)
    if found is None:
        found = _survey(folder, spec)
        if key is not None:
            while len(_known) >= _MOST_KNOWN:
                del _known[next(iter(_known))]
            _known[key] = found
    source = record_of(folder) if is_quantized(own_folder(spec)) else None
    manifest = replace(
        found.manifest,
        model=spec.path,
        revision=spec.revision,
        dtype=checkpoint_dtype(weight_files(folder)) if source is None else source.dtype,
        components=_as_in(source, folder, found.manifest.components),
        others=_as_in(source, folder, found.manifest.others),
        source="" if source is None else source.says,
    )
    return replace(found, manifest=_with_caches(manifest, spec))


def _described_by(folder: Path, spec: ModelSpec) -> Hashable | None:
    """All that a model's tree, and what is found in it, follow from; None where that is not told by the model's class,
    its configuration and the headers of its files."""
    config = read_config(folder, spec)
    kind = loaded_by(loader(config), config)
    if kind is None or is_custom_code(kind) or getattr(config, "auto_map", None):
        return None
    headers = tuple(tuple(read_header(file).items()) for file in weight_files(folder))
    return kind, spec.trust_remote_code, settings_of(config), headers


def _survey(folder: Path, spec: ModelSpec) -> Survey:
    """What the model's code and the headers in `folder` say, whatever source they were made from."""
    model = empty_model(folder, spec)
    layers_name, layers = find_layers(model)
    components = _apart_in(folder, components_of(model))
    if not components:
        raise UserError(
            f"{spec.path} has no components: no weight matrix lies inside {layers_name} ({type(layers[0]).__name__})"
        )
    check_tensors(folder, model)
    manifest = ModelManifest(
        model=spec.path,
        revision=spec.revision,
        dtype="",
        num_layers=len(layers),
        content_hash="",
        components=components,
        others=other_components(model),
        routers=routers_of(model),
    )
    config: Any = model.config
    inside: Any = model
    code = custom_code(folder, type(model))
    num_embeddings = int(inside.get_input_embeddings().weight.shape[0])
    untried = known_usage(model).failed
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Survey(manifest, context, num_embeddings, code, untried)


def _apart_in(folder: Path, components: tuple[Component, ...]) -> tuple[Component, ...]:
    """Components with what the files say of stacked ones: whether each is a tensor of its own there, or several."""
    if not any(component.stacked for component in components):
        return components
    shapes = {name: shape for file in weight_files(folder) for name, (_, shape) in read_header(file).items()}

    def is_apart(component: Component) -> bool:
        tensors = tensors_of(component.name, shapes) if component.stacked else ()
        return bool(tensors) and all(len(shapes[tensor]) == 2 for tensor in tensors)

    return tuple(replace(component, apart=is_apart(component)) for component in components)


def _as_in(source: SourceRecord | None, folder: Path, components: tuple[Component, ...]) -> tuple[Component, ...]:
    """Components with the bits that they take in a quantized source."""
    if source is None:
        return components
    shapes = {name: shape for file in weight_files(folder) for name, (_, shape) in read_header(file).items()}

    def bits(component: Component) -> int:
        tensors = tensors_of(component.name, shapes)
        if not tensors or any(tensor not in source.bits for tensor in tensors):
            return 0
        among = shapes[tensors[0]][0] if len(shapes[tensors[0]]) > 2 else 1
        return sum(source.bits[tensor] for tensor in tensors) // among

    return tuple(replace(component, source_bits=bits(component)) for component in components)


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers: of the part that reads text, the `nn.ModuleList` of the configured length
    with the most weights; of any length where there is none of that one."""
    config: Any = model.config
    text = config.get_text_config()
    expected = getattr(text, "num_hidden_layers", None)
    fitting = next((found for part in (_decoder(model), model) if (found := _lists(model, part, expected))), None)
    if not fitting:
        raise UserError(f"{type(model).__name__} has no list of layers, so it has no components to search")
    return max(fitting, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def _lists(model: nn.Module, part: nn.Module, expected: int | None) -> list[tuple[str, nn.ModuleList]]:
    """The lists of modules in a part of a model, by name: those of an expected length, else all."""
    prefix = next((f"{name}." for name, module in model.named_modules() if module is part and name), "")
    lists = [(prefix + name, m) for name, m in part.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    return [pair for pair in lists if len(pair[1]) == expected] or lists


def _decoder(model: Any) -> nn.Module:
    """The part of a model that reads text: all of it, but for wrappers."""
    get = getattr(model, "get_decoder", None)
    try:
        found = get() if get is not None else None
    except (AttributeError, NotImplementedError):
        found = None
    return found if isinstance(found, nn.Module) else model


def components_of(model: nn.Module) -> tuple[Component, ...]:
    """The weight matrices inside the layers, in model order, but for those that route."""
    mixtures = mixtures_of(model)

    def component(layer: int, matrix: Matrix) -> Component:
        own = mixtures.get(matrix.name, Mixture("", 0, 0))
        return Component(
            *(matrix.name, layer, kind_of(matrix.name), matrix.shape, matrix.transposed, matrix.slice is not None),
            *(own.name, own.num_experts, own.experts_per_token),
        )

    return tuple(component(layer, matrix) for layer, matrix in _in_layers(model) if not matrix.routes)


def routers_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers that choose among experts, or weigh one."""
    return tuple(matrix.name for _, matrix in _in_layers(model) if matrix.routes)


def _in_layers(model: nn.Module) -> Iterator[tuple[int, Matrix]]:
    """The matrices inside the layers, with the layer of each."""
    prefix = f"{find_layers(model)[0]}."
    for matrix in matrices_of(model):
        if matrix.name.startswith(prefix):
            yield int(matrix.name[len(prefix) :].partition(".")[0]), matrix


def kind_of(name: str) -> str:
    """The role of a module inside its layer: `self_attn.q_proj` is `q`, `mlp.fc1` is `fc1`."""
    parts = name.split(".")
    last = parts[-1]
    if last == "weight" and len(parts) > 2 and parts[-2].isdigit():  # of an expert in a module's only stack
        last = parts[-3]
    for ending in () if last in _WHOLE_KINDS else _KIND_ENDINGS:
        last = last.removesuffix(ending) or last
    return last


def other_components(model: nn.Module) -> tuple[Component, ...]:
    """Embeddings, norms, routers and the head, of what tokens of text reach; of tied weights the first owner only."""
    layers_name, layers = find_layers(model)
    found = found_in(model, known_usage(model))
    components = {matrix.name for matrix in found.matrices if not matrix.routes}
    others: list[Component] = []
    seen: set[int] = set()
    layers_reached = False
    for name, module in model.named_modules():
        layers_reached |= name == layers_name
        own = dict(module.named_parameters(recurse=False)).get("weight")
        if own is None or id(own) in seen or own.ndim > 2:
            continue
        seen.add(id(own))
        inside = name.startswith(f"{layers_name}.")
        if (inside and name in components) or not (found.reached is None or f"{name}.weight" in found.reached):
            continue
        layer = int(name[len(layers_name) + 1 :].split(".")[0]) if inside else len(layers) if layers_reached else -1
        rows, cols = own.shape if own.ndim == 2 else (1, own.shape[0])
        others.append(Component(name, layer, kind_of(name), (rows, cols)))
    return tuple(others)
