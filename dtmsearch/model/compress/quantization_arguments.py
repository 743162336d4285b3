"""What a configuration of compressed-tensors says of how numbers are rounded, from our words and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtmsearch.core.number_formats import WIDTHS, Grain, Number, Rounding, ScaleNumber
from dtmsearch.core.schemes import Scheme

_SCALE_DTYPES: dict[ScaleNumber, str | None] = {"float": None, "e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
_FLOATS: dict[int, Number] = {8: "e4m3", 6: "e2m3", 4: "e2m1"}
_INTEGERS: dict[int, Number] = {8: "int8", 4: "int4"}


# A configuration's `kv_cache_scheme`, of `kv-fp8`: vLLM takes a scale of 1 where the files hold none.
CACHE_ARGUMENTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}


def arguments_of(rounding: Rounding, of_inputs: bool) -> dict[str, Any]:
    """A group's `weights` or, for what components read, its `input_activations`."""
    dynamic: bool | str = of_inputs and not rounding.static
    if of_inputs and rounding.has_tensor_scale:  # groups follow from the token, the scale of the tensor stands
        dynamic = "local"
    found: dict[str, Any] = {
        "num_bits": WIDTHS[rounding.number],
        "type": "int" if rounding.number.startswith("int") else "float",
        "symmetric": True,
        "strategy": "tensor_group" if rounding.has_tensor_scale else rounding.grain,
        "dynamic": dynamic,
    }
    found |= {"group_size": rounding.size} if rounding.grain == "group" else {}
    found |= {"block_structure": [rounding.size, rounding.size]} if rounding.grain == "block" else {}
    dtype = _SCALE_DTYPES[rounding.scale]
    return found | ({} if dtype is None else {"scale_dtype": dtype, "zp_dtype": dtype})


def weights_arguments(scheme: Scheme) -> dict[str, Any]:
    """What a group says of the weights of its modules, under a scheme that compressed-tensors has."""
    if scheme.weights is not None:
        return arguments_of(scheme.weights, False)
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": not scheme.asymmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size or (-1 if scheme.granularity == "channel" else None),
        "dynamic": False,
    }


def inputs_arguments(scheme: Scheme) -> dict[str, Any] | None:
    """What a group says of what its modules read; None where they read it as it is."""
    return None if scheme.activations is None else arguments_of(scheme.activations, True)


def rounding_of(arguments: Mapping[str, Any]) -> Rounding:
    """The rounding that a group's arguments name. Raises `KeyError` for numbers that are none of ours."""
    strategy, bits = arguments["strategy"], arguments["num_bits"]
    number = (_INTEGERS if arguments["type"] == "int" else _FLOATS)[bits]
    scales = {dtype: scale for scale, dtype in _SCALE_DTYPES.items()}
    grain: Grain = "group" if strategy == "tensor_group" else strategy
    block = arguments.get("block_structure") or [0]
    size = arguments.get("group_size") or block[0]
    static = arguments.get("dynamic") in (False, "local")
    return Rounding(number, grain, size, scales[arguments.get("scale_dtype")], static)
