"""Rounding against the formula, written as a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dtmsearch.core.schemes import parse_scheme
from dtmsearch.model.compress.rounding import round_codes, round_weight

SCHEMES = [f"int{b}-{g}{a}" for b in (2, 3, 4, 8) for g in ("tensor", "channel", "g8", "g5") for a in ("", "-asym")]


# Bits -> the first and the last code, and how many scales the largest weight is.
SYMMETRIC = {2: (-2, 1, 1.5), 3: (-4, 3, 3.5), 4: (-8, 7, 7.5)}


def literal(weight: np.ndarray, name: str) -> np.ndarray:
    scheme, out = parse_scheme(name), np.empty_like(weight)
    rows, cols = weight.shape
    width = {"tensor": cols, "channel": cols, "group": scheme.group_size}[scheme.granularity]
    blocks = [np.s_[:, :]] if scheme.granularity == "tensor" else []
    blocks = blocks or [np.s_[r : r + 1, c : c + width] for r in range(rows) for c in range(0, cols, width)]
    for block in blocks:
        w = weight[block]
        if scheme.asymmetric:
            low, high, steps = min(w.min(), 0), max(w.max(), 0), 2**scheme.bits - 1
            scale = np.float32((high - low) / np.float32(steps))
            zero = np.round(-low / scale)
            out[block] = (np.clip(np.round(w / scale) + zero, 0, steps) - zero) * scale
        else:
            low, high, steps = (-127, 127, 127.0) if scheme.bits == 8 else SYMMETRIC[scheme.bits]
            scale = np.float32(np.abs(w).max() / np.float32(steps))
            out[block] = np.clip(np.round(w / scale), low, high) * scale
    return out


@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_is_the_formula_to_the_last_bit(name: str) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)
    rounded = round_weight(torch.from_numpy(weight), parse_scheme(name))
    assert rounded.numpy().tolist() == literal(weight, name).tolist()


@pytest.mark.parametrize("name", ["int4-channel", "int4-g8-asym"])
def test_a_row_of_zeros_stays_zero(name: str) -> None:
    weight = torch.randn(3, 16)
    weight[1] = 0.0
    assert round_weight(weight, parse_scheme(name))[1].tolist() == [0.0] * 16


def test_halves_go_to_the_even_code() -> None:
    weight = torch.tensor([[7.5, 0.5, 1.5, 2.5, -0.5]])
    assert round_weight(weight, parse_scheme("int4-channel")).tolist() == [[7.0, 0.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize("bits", range(2, 8))
def test_below_8_bits_every_code_is_used(bits: int) -> None:
    weight = torch.arange(1 - 2**bits, 2**bits).reshape(1, -1) / 2  # the scale is one
    codes = round_codes(weight, parse_scheme(f"int{bits}-channel")).codes
    assert sorted(codes.unique().tolist()) == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def test_in_8_bits_codes_are_symmetric() -> None:
    weight = torch.linspace(-1.0, 1.0, 4_096).reshape(1, -1)
    codes = round_codes(weight, parse_scheme("int8-channel")).codes
    assert sorted(codes.unique().tolist()) == list(range(-127, 128))


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-6, 1e-7])
def test_scales_too_small_for_float16_leave_an_error_of_half_a_stored_scale_at_most(size: float) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * size
    scheme = parse_scheme("int8-channel")
    error = (round_weight(weight, scheme, torch.float16) - weight).abs().amax(dim=1)
    scale = weight.abs().amax(dim=1) / 127
    assert (error <= (scale * 1.001 + 2.0**-24) / 2).all()


def test_rounding_keeps_the_dtype() -> None:
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    assert round_weight(weight, parse_scheme("int3-g4")).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["int2-g8", "int3-channel", "int5-tensor"])
def test_rounding_leaves_no_more_values_than_codes(name: str) -> None:
    weight = torch.randn(1, 64)
    per_scale = round_weight(weight, parse_scheme(name)).reshape(-1, 8 if "g8" in name else 64)
    assert max(len(group.unique()) for group in per_scale) <= 2 ** parse_scheme(name).bits


def test_a_coarser_code_errs_more() -> None:
    weight = torch.randn(16, 64)
    errors = [(round_weight(weight, parse_scheme(f"int{b}-g16")) - weight).norm().item() for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_same_rounding_before_it_is_dense_again(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 24).to(dtype)
    restored = round_codes(weight, parse_scheme(name)).dense(dtype)
    assert torch.equal(restored, round_weight(weight, parse_scheme(name)))


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_fit_their_bits(name: str) -> None:
    scheme = parse_scheme(name)
    codes = round_codes(torch.randn(6, 24), scheme)
    low, high = (
        (0, 2**scheme.bits - 1) if scheme.asymmetric else (-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
    )
    values = torch.cat([t.flatten().int() for t in (codes.codes, codes.zeros) if t is not None])
    assert low <= int(values.min()) and int(values.max()) <= high


@pytest.mark.parametrize("name", SCHEMES)
def test_there_is_a_scale_for_each_that_the_size_counts(name: str) -> None:
    scheme = parse_scheme(name)
    assert round_codes(torch.randn(6, 24), scheme).scales.numel() == scheme.num_scales((6, 24))


@pytest.mark.parametrize("name", SCHEMES)
def test_scales_can_be_of_16_bits(name: str) -> None:
    scales = round_codes(torch.randn(6, 24), parse_scheme(name), torch.bfloat16).scales
    assert torch.equal(scales.bfloat16().float(), scales)
