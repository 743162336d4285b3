"""compressed-tensors and bitsandbytes: by their own libraries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import decompressed, restored_4bit
from dtmsearch.model.sources.stored import Headers, Read, StoredFormat, StoredWeight, register

_SCALE = ".weight_scale"


def group_of(module: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The group of a compressed-tensors configuration that a quantized module is in: one that names it, or a pattern of
    its name, before one that names its class."""
    from compressed_tensors.utils.match import match_name

    groups = [dict(group) for group in settings.get("config_groups", {}).values()]
    named = (group for group in groups if any(match_name(module, target) for target in group["targets"]))
    classes = (group for group in groups if any(_is_class(target) for target in group["targets"]))
    found = next(named, None) or next(classes, None)
    return None if found is None else found | {"format": found.get("format") or settings.get("format")}


def _compressed_weights(headers: Headers, settings: Mapping[str, Any], read: Read) -> Iterable[StoredWeight]:
    from compressed_tensors.quantization import QuantizationScheme

    for module in dict.fromkeys(name.removesuffix(_SCALE) for name in headers if name.endswith(_SCALE)):
        group = group_of(module, settings)
        if group is None or group.get("weights") is None:
            raise UserError(f"config.json names no quantization of {module}, which has scales")
        scheme = QuantizationScheme.model_validate(group)
        parts = tuple(name for name in headers if name.rpartition(".")[0] == module and _is_of_weight(name))
        yield StoredWeight(f"{module}.weight", _shape(module, headers, read), parts, partial(_decompressed, scheme))


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def _is_of_weight(name: str) -> bool:
    return name.rpartition(".")[2].startswith("weight")


def _shape(module: str, headers: Headers, read: Read) -> tuple[int, ...]:
    if f"{module}.weight_shape" in headers:
        return tuple(int(size) for size in read(f"{module}.weight_shape").tolist())
    if f"{module}.weight" in headers:
        return headers[f"{module}.weight"][1]
    rows, packed = headers[f"{module}.weight_packed"][1]  # of 4-bit floats, two a byte
    return rows, 2 * packed


def _decompressed(scheme: Any, parts: Mapping[str, Tensor]) -> Tensor:
    own = {name.rpartition(".")[2]: tensor for name, tensor in parts.items()}
    scale = own["weight_scale"]
    if scale.dtype.is_floating_point and scale.dtype.itemsize > 1:  # codes are multiplied in its dtype
        own["weight_scale"] = scale.float()
    return decompressed(own, scheme)


def _says_compressed(settings: Mapping[str, Any]) -> str:
    kinds = []
    for group in settings.get("config_groups", {}).values():
        weights = group.get("weights") or {}
        size = weights.get("group_size")
        grain = f"groups of {size}" if size and size > 0 else {"channel": "rows"}.get(str(weights.get("strategy")), "")
        kind = {"int": "INT", "float": "FP"}.get(weights.get("type", "int"), "")
        kinds.append(" ".join(part for part in (f"{kind}{weights.get('num_bits')}", grain and f"in {grain}") if part))
    return f"compressed-tensors {', '.join(dict.fromkeys(kinds))}".strip()


_STATE = ".quant_state.bitsandbytes__"


def _bitsandbytes_weights(headers: Headers, settings: Mapping[str, Any], read: Read) -> Iterable[StoredWeight]:
    for name in headers:
        weight, found, _ = name.partition(_STATE)
        if found:
            state = json.loads(bytes(read(name).tolist()))
            parts = tuple(other for other in headers if other == weight or other.startswith(f"{weight}."))
            yield StoredWeight(weight, tuple(state["shape"]), parts, partial(_restored, weight))
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            further = tuple(part for part in (f"{weight}_format",) if part in headers)
            yield StoredWeight(weight, headers[weight][1], (weight, name, *further), partial(_rows, weight, name))


def _restored(weight: str, parts: Mapping[str, Tensor]) -> Tensor:
    return restored_4bit(parts[weight], {name: part for name, part in parts.items() if name != weight})


def _rows(weight: str, scales: str, parts: Mapping[str, Tensor]) -> Tensor:
    """code x largest value of its row / 127, as bitsandbytes dequantizes rows of 8 bits."""
    return parts[weight].float() * parts[scales].float().reshape(-1, 1) * (1 / 127)


def _says_bitsandbytes(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_8bit"):
        return "bitsandbytes LLM.int8()"
    return f"bitsandbytes {settings.get('bnb_4bit_quant_type', '4 bits')}"


register(
    StoredFormat(
        *("compressed-tensors", _compressed_weights, _says_compressed),
        needs={"compressed_tensors": "compressed-tensors"},
        dropped=(".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".k_scale", ".v_scale"),
    )
)
register(StoredFormat("bitsandbytes", _bitsandbytes_weights, _says_bitsandbytes, {"bitsandbytes": "bitsandbytes"}))
