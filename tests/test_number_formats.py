"""Schemes as engines serve them: floating-point codes, and what components read."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp
from exports import in_process, measured_plan
from safetensors.torch import load_file
from tiny import llama_config, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import dtmsearch as dtm
from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.number_formats import LARGEST, Number, Rounding
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.number_rounding import calibrated_scale, largest_of, round_inputs, to_number, weight_codes
from dtmsearch.model.replica.replica import Replica

# Our names, and compressed-tensors' presets.
PRESETS = {
    "fp8-channel": "FP8_DYNAMIC",
    "fp8-block128": "FP8_BLOCK",
    "fp8-tensor": "FP8",
    "nvfp4": "NVFP4",
    "nvfp4a16": "NVFP4A16",
    "mxfp4": "MXFP4",
    "mxfp4a16": "MXFP4A16",
    "mxfp6": "MXFP6A8",
    "mxfp6a16": "MXFP6A16",
    "mxfp8": "MXFP8",
    "mxfp8a16": "MXFP8A16",
    "w4a8-g128": "W4A8",
    "w4afp8": "W4AFP8",
    "w8a8-channel": "W8A8",
}
# compressed-tensors has 127.5 steps to the largest value in 8 bits, vLLM's kernels 127.
OTHER_STEPS = "w8a8-channel"
WITHOUT_INPUTS = ("nvfp4a16", "mxfp4a16", "mxfp6a16", "mxfp8a16", "w4a8-g128", OTHER_STEPS)
GRIDS: dict[Number, list[float]] = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e2m3": [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)],
}


def matrix(rows: int = 96, cols: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator)
    values[0], values[1, :32] = 0.0, 0.0
    return values


def inputs() -> Tensor:
    values = matrix(14).reshape(2, 7, 256) * 40
    values[1, 2, 5] = 300.0
    return values


def their_parameters(weight: Tensor, rounding: Rounding, args: Any) -> tuple[Tensor, Tensor | None]:
    """Scales by compressed-tensors, and the scale of the tensor."""
    size = rounding.size
    if rounding.grain == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif rounding.grain == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    elif rounding.grain == "group":
        low, high = weight.unflatten(1, (-1, size)).amin(2), weight.unflatten(1, (-1, size)).amax(2)
    else:
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % size))
        blocks = padded.unflatten(0, (-1, size)).unflatten(2, (-1, size))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    whole = generate_gparam(weight.amin(), weight.amax()) if rounding.has_tensor_scale else None
    return calculate_qparams(low, high, args, global_scale=whole)[0], whole


@pytest.mark.parametrize("name", [name for name in PRESETS if name != OTHER_STEPS])
def test_weights_are_what_compressed_tensors_makes_of_them(name: str) -> None:
    weight, rounding = matrix(), parse_scheme(name).weights
    assert rounding is not None
    theirs = preset_name_to_scheme(PRESETS[name], ["Linear"])
    scales, whole = their_parameters(weight, rounding, theirs.weights)
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, theirs).value)
    parts = {"weight": weight, "weight_scale": scales} | ({} if whole is None else {"weight_global_scale": whole})
    expected = compressor.decompress(compressor.compress(parts, theirs), theirs)["weight"]
    found = weight_codes(weight, rounding, largest_of(weight)).dense(torch.float32)
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize(
    "name", [n for n in PRESETS if "int8" not in str(parse_scheme(n).activations) and parse_scheme(n).activations]
)
def test_inputs_are_what_compressed_tensors_makes_of_them(name: str) -> None:
    values, rounding = inputs(), parse_scheme(name).activations
    assert rounding is not None
    theirs = preset_name_to_scheme(PRESETS[name], ["Linear"]).input_activations
    largest = values.abs().max()
    whole = generate_gparam(-largest, largest) if rounding.has_tensor_scale else None
    if theirs.dynamic is False:
        scale, zero = calculate_qparams(-largest.reshape(1), largest.reshape(1), theirs)
    else:
        scale, zero = compute_dynamic_scales_and_zp(values, theirs, None, global_scale=whole)
    expected = fake_quantize(values, scale, zero, theirs, global_scale=whole)
    assert torch.equal(round_inputs(values, rounding, calibrated_scale(largest, rounding)), expected)


def test_integer_inputs_are_rounded_by_token_as_vllm_does() -> None:
    found = round_inputs(inputs(), Rounding("int8", "token"))
    for row, rounded in zip(inputs().reshape(-1, 256), found.reshape(-1, 256), strict=True):
        scale = row.abs().max() / 127
        expected = torch.round(row / scale) * scale if scale > 0 else row
        assert torch.equal(rounded, expected)


@pytest.mark.parametrize("number", list(GRIDS))
def test_numbers_go_to_the_nearest_and_half_way_to_the_even_code(number: Number) -> None:
    grid = GRIDS[number]
    middles = [(low + high) / 2 for low, high in pairwise(grid)]
    even = [grid[at + at % 2] for at in range(len(middles))]
    near = torch.tensor([*middles, *(m * 0.999 for m in middles), *(m * 1.001 for m in middles), 1e9])
    expected = torch.tensor([*even, *grid[:-1], *grid[1:], LARGEST[number]])
    assert to_number(near, number).tolist() == expected.tolist()
    assert to_number(-near, number).tolist() == (-expected).tolist()


def test_parts_that_run_as_one_matrix_share_the_scale_of_the_tensor() -> None:
    weight, rounding = matrix(), parse_scheme("nvfp4a16").weights
    assert rounding is not None
    whole, half = (weight_codes(w, rounding, largest_of(weight)) for w in (weight, weight[:48]))
    assert torch.equal(whole.dense(torch.float32)[:48], half.dense(torch.float32))
    assert float(whole.tensor_scale) == pytest.approx(448 * 6 / float(weight.abs().max()))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp8-channel", 96 * 256 * 8 + 96 * 16),
        ("fp8-block128", 96 * 256 * 8 + 2 * 16),
        ("fp8-tensor", 96 * 256 * 8 + 16 + 32),
        ("nvfp4", 96 * 256 * 4 + 96 * 16 * 8 + 32 + 32),
        ("nvfp4a16", 96 * 256 * 4 + 96 * 16 * 8 + 32),
        ("mxfp4", 96 * 256 * 4 + 96 * 8 * 8),
        ("mxfp6", 96 * 256 * 6 + 96 * 8 * 8),
        ("mxfp8", 96 * 256 * 8 + 96 * 8 * 8),
        ("w8a8-channel", 96 * 256 * 8 + 96 * 16),
        ("w4a8-g128", 96 * 256 * 4 + 96 * 2 * 16),
    ],
)
def test_stored_bits(name: str, bits: int) -> None:
    assert parse_scheme(name).stored_bits((96, 256), 16) == bits


def test_a_shape_that_a_format_does_not_have_is_said_in_words() -> None:
    assert parse_scheme("nvfp4").misfit((8, 24)) == "its groups of 16 want inputs in a multiple of 16, and 24 is none"
    assert parse_scheme("mxfp8").misfit((8, 48)) is not None
    assert parse_scheme("mxfp8").misfit((8, 64)) is None
    assert parse_scheme("fp8-channel").misfit((8, 17)) is None
    with pytest.raises(UserError, match="w4a8-g128"):
        parse_scheme("w4a8-x128")


def test_the_other_name_of_a_scheme_is_that_scheme() -> None:
    assert parse_scheme("bnb-w8a8") == parse_scheme("w8a8")
    assert Plan.of({"a": "bnb-w8a8"}) == Plan.of({"a": "w8a8"})


# Every scheme once, in one model.
ALL = tuple(PRESETS)
MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in range(2)
    for module in (*(f"self_attn.{part}_proj" for part in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]
MIXED = dict(zip(MODULES, ALL, strict=True))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    return write_model(tmp_path_factory.mktemp("wide"), config)


def decompressed_weights(folder: Path) -> dict[str, Tensor]:
    """A folder's quantized modules, by compressed-tensors' own decompression."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in settings.items() if k != "quant_method"})
    state = load_file(folder / "model.safetensors")
    found = {}
    for scheme in config.config_groups.values():
        for name in scheme.targets:
            parts = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.weight")}
            found[name] = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_all_of_them_is_exported_as_it_was_measured(
    dtype: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    measured = measured_plan(wide, tmp_path / "store", MIXED, dtype)
    exported = measured.export("compressed-tensors", tmp_path / "out")
    assert exported.check is not None and exported.check.equal
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "mixed-precision"
    found = decompressed_weights(tmp_path / "out")
    dynamic = {name: scheme for name, scheme in MIXED.items() if not parse_scheme(scheme).needs_calibration}
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=getattr(torch, dtype))
    ours = dtm.apply(Plan.of(dynamic), model)
    for component in dynamic:
        assert torch.equal(found[component].to(getattr(torch, dtype)), ours.get_submodule(component).weight), component


def test_transformers_alone_rounds_fp8_inputs_of_a_model_in_32_bits_the_same(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    measured = measured_plan(wide, tmp_path / "store", dict.fromkeys(MODULES, "fp8-channel"))
    measured.export("compressed-tensors", tmp_path / "out", check=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = dtm.apply(measured.plan, AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32))
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=tokens).logits, ours(input_ids=tokens).logits)


def test_a_dense_checkpoint_cannot_say_that_inputs_are_rounded(wide: Path, tmp_path: Path) -> None:
    measured = measured_plan(wide, tmp_path / "store", {MODULES[0]: "mxfp8", MODULES[1]: "mxfp8a16"})
    with pytest.raises(UserError, match="`compressed-tensors` holds it"):
        measured.export("dense", tmp_path / "out")


def test_parts_share_a_scale_whatever_was_replaced_before(wide: Path) -> None:
    """In the order in which components are replaced, the partner of one is already rounded."""
    replica = Replica(ModelSpec(str(wide), dtype="float32"), ReplicaSettings(num_threads=1))
    weights = replica._weights
    gate, up = MODULES[4:6]
    alone = Plan.of({up: "nvfp4a16"})
    with weights.perturbed(alone):
        expected = weights.standing(up).clone()
    weights.compressor.forget_weights()
    with weights.perturbed(Plan.of({gate: "int2-channel", up: "nvfp4a16"})):
        assert torch.equal(weights.standing(up), expected)
