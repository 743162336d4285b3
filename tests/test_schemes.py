from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtmsearch.plans.schemes import DENSE, parse_scheme, siblings

shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))
bit_widths = st.integers(2, 8)


@given(
    bits=bit_widths,
    grain=st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 4096).map(lambda n: f"g{n}")),
    asymmetric=st.booleans(),
)
def test_a_rounding_scheme_means_what_its_name_says(bits: int, grain: str, asymmetric: bool) -> None:
    scheme = parse_scheme(f"int{bits}-{grain}{'-asym' if asymmetric else ''}")
    rebuilt = f"g{scheme.group_size}" if scheme.granularity == "group" else scheme.granularity
    assert (scheme.bits, rebuilt, scheme.asymmetric) == (bits, grain, asymmetric)


@pytest.mark.parametrize("name", [DENSE, "w8a8", "llm-int8", "nf4", "fp4", "int8-channel", "int2-g1-asym"])
def test_a_scheme_keeps_its_name(name: str) -> None:
    assert parse_scheme(name).name == name


@pytest.mark.parametrize(
    "name",
    ["", "int1-tensor", "int9-channel", "int4-g0", "int4-g032", "int4", "int8-channel-asym-asym", " nf4", "nf4\n"],
)
def test_what_the_grammar_does_not_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown scheme"):
        parse_scheme(name)


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("int8-chanel", "int8-channel"),
        ("int9-tensor", "int8-tensor"),
        ("w8a9", "w8a8"),
        ("nf3", "nf4"),
        ("INT8-channel", "int8-channel"),
        ("int4-g128-sym", "int4-g128-asym"),
        ("llm.int8", "llm-int8"),
    ],
)
def test_an_unknown_scheme_names_the_nearest(misspelt: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown scheme '{misspelt}'; the nearest is '{nearest}'"):
        parse_scheme(misspelt)


@given(shape=shapes, dense_bits=st.sampled_from([16, 32]))
def test_dense_weights_take_the_bits_of_the_checkpoint(shape: tuple[int, int], dense_bits: int) -> None:
    assert parse_scheme(DENSE).stored_bits(shape, dense_bits) == shape[0] * shape[1] * dense_bits


@given(shape=shapes, bits=bit_widths)
def test_per_tensor_schemes_store_one_scale(shape: tuple[int, int], bits: int) -> None:
    assert parse_scheme(f"int{bits}-tensor").stored_bits(shape, 16) == shape[0] * shape[1] * bits + 16


@given(shape=shapes, bits=bit_widths)
def test_per_channel_schemes_store_a_scale_for_each_row(shape: tuple[int, int], bits: int) -> None:
    assert parse_scheme(f"int{bits}-channel").stored_bits(shape, 16) == shape[0] * (shape[1] * bits + 16)


@given(shape=shapes, bits=bit_widths, group=st.integers(1, 400))
def test_groups_run_along_the_inputs_and_the_last_may_be_shorter(shape: tuple[int, int], bits: int, group: int) -> None:
    rows, cols = shape
    counted = 0
    for _ in range(rows):
        for start in range(0, cols, group):
            counted += 16 + bits * len(range(start, min(start + group, cols)))
    assert parse_scheme(f"int{bits}-g{group}").stored_bits(shape, 16) == counted


@given(shape=shapes, bits=bit_widths, grain=st.sampled_from(["tensor", "channel", "g32", "g7"]))
def test_asymmetric_schemes_store_a_zero_point_with_each_scale(shape: tuple[int, int], bits: int, grain: str) -> None:
    rows, cols = shape
    num_scales = {"tensor": 1, "channel": rows, "g32": rows * math.ceil(cols / 32), "g7": rows * math.ceil(cols / 7)}
    symmetric, asymmetric = parse_scheme(f"int{bits}-{grain}"), parse_scheme(f"int{bits}-{grain}-asym")
    extra = asymmetric.stored_bits(shape, 16) - symmetric.stored_bits(shape, 16)
    assert extra == num_scales[grain] * bits


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@given(shape=shapes)
def test_four_bit_blocks_run_over_the_flattened_matrix(name: str, shape: tuple[int, int]) -> None:
    num_weights = shape[0] * shape[1]
    assert parse_scheme(name).stored_bits(shape, 16) == 4 * num_weights + 16 * -(-num_weights // 64)


@pytest.mark.parametrize("name", ["w8a8", "llm-int8"])
@given(shape=shapes)
def test_eight_bit_modules_store_a_scale_for_each_row(name: str, shape: tuple[int, int]) -> None:
    assert parse_scheme(name).stored_bits(shape, 16) == shape[0] * (8 * shape[1] + 16)


def test_siblings_share_everything_but_the_bits() -> None:
    assert siblings("int4-g32-asym") == tuple(f"int{bits}-g32-asym" for bits in range(2, 9))


def test_a_scheme_of_one_bit_width_is_its_only_sibling() -> None:
    assert siblings("nf4") == ("nf4",)
