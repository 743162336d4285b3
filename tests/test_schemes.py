from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtmsearch.core.schemes import DENSE, families, parse_scheme, siblings, solved_pairs

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
        ("magnitude-0.5-s1", "magnitude-0.5"),
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
    assert parse_scheme(name).stored_bits(shape, 16) == 4 * num_weights + 32 * -(-num_weights // 64)


@pytest.mark.parametrize("name", ["w8a8", "llm-int8"])
@given(shape=shapes)
def test_eight_bit_modules_store_a_scale_for_each_row(name: str, shape: tuple[int, int]) -> None:
    assert parse_scheme(name).stored_bits(shape, 16) == shape[0] * (8 * shape[1] + 32)


def test_siblings_share_everything_but_the_bits() -> None:
    assert siblings("int4-g32-asym") == tuple(f"int{bits}-g32-asym" for bits in range(2, 9))


def test_a_scheme_of_one_bit_width_is_its_only_sibling() -> None:
    assert siblings("nf4") == ("nf4",)


# Pruning.

SALIENCIES = ("magnitude", "wanda", "sparsegpt", "random")
shares = st.integers(1, 9999).map(lambda n: f"0.{n:04}".rstrip("0"))


@given(saliency=st.sampled_from(SALIENCIES), share=shares)
def test_a_share_means_what_its_name_says(saliency: str, share: str) -> None:
    pruning = parse_scheme(f"{saliency}-{share}").pruning
    assert pruning is not None
    assert (pruning.saliency, pruning.share, pruning.pattern) == (saliency, float(share), None)


@given(saliency=st.sampled_from(SALIENCIES), of=st.integers(2, 64), data=st.data())
def test_a_pattern_means_what_its_name_says(saliency: str, of: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, of - 1))
    pruning = parse_scheme(f"{saliency}-{kept}:{of}").pruning
    assert pruning is not None
    assert (pruning.saliency, pruning.pattern) == (saliency, (kept, of))


def test_a_pair_is_its_quantizer_and_its_pruning() -> None:
    pair = parse_scheme("gptq-int3-g32-asym+wanda-0.5")
    assert (pair.quantizer, pair.pruning) == ("gptq-int3-g32-asym", parse_scheme("wanda-0.5").pruning)


@pytest.mark.parametrize(
    ("name", "calibration", "hessians"),
    [
        ("int4-g128", False, False),
        ("magnitude-2:4", False, False),
        ("int4-g128+random-0.5", False, False),
        ("drop", False, False),
        ("wanda-0.5", True, False),
        ("int4-g128+wanda-0.5", True, False),
        ("sparsegpt-0.5", True, True),
        ("gptq-int4-g128", True, True),
        ("gptq-int4-g128+magnitude-0.5", True, True),
    ],
)
def test_a_scheme_says_what_it_needs(name: str, calibration: bool, hessians: bool) -> None:
    assert (parse_scheme(name).needs_calibration, parse_scheme(name).needs_hessians) == (calibration, hessians)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("magnitude-0.50", "magnitude-0.5"),
        ("wanda-0.5%", "wanda-0.5"),
        ("magnitude-4:4", "magnitude-4:8"),
        ("gptq-int4-128", "gptq-int4-g128"),
        ("wanda-0.5+int4-g128", "int4-g128+wanda-0.5"),
        ("int4-g128+wnda-0.5", "int4-g128+wanda-0.5"),
        ("drpo", "drop"),
    ],
)
def test_what_is_no_pruning_scheme_names_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="the nearest is") as raised:
        parse_scheme(wrong)
    assert f"the nearest is {nearest!r}." in str(raised.value)


def index_bits(places: int) -> int:
    """Bits that number `places` places."""
    bits = 0
    while 2**bits < places:
        bits += 1
    return bits


@given(shape=shapes, share=shares, saliency=st.sampled_from(["magnitude", "sparsegpt", "random"]))
def test_a_share_is_of_all_weights(shape: tuple[int, int], share: str, saliency: str) -> None:
    pruned = parse_scheme(f"{saliency}-{share}").pruned_weights(shape)
    assert pruned == round(float(share) * (shape[0] * shape[1]))


@given(shape=shapes, share=shares)
def test_wandas_share_is_of_every_row(shape: tuple[int, int], share: str) -> None:
    assert parse_scheme(f"wanda-{share}").pruned_weights(shape) == shape[0] * round(float(share) * shape[1])


@given(shape=shapes, of=st.integers(2, 16), saliency=st.sampled_from(SALIENCIES), data=st.data())
def test_a_pattern_counts_every_group(shape: tuple[int, int], of: int, saliency: str, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, of - 1))
    counted = 0
    for _ in range(shape[0]):
        for start in range(0, shape[1], of):
            counted += max(0, len(range(start, min(start + of, shape[1]))) - kept)
    assert parse_scheme(f"{saliency}-{kept}:{of}").pruned_weights(shape) == counted


@given(shape=shapes, share=shares, dense_bits=st.sampled_from([16, 32]))
def test_a_pruned_matrix_stores_what_is_kept_and_the_cheaper_mask(
    shape: tuple[int, int], share: str, dense_bits: int
) -> None:
    num_weights = shape[0] * shape[1]
    pruned = round(float(share) * num_weights)
    bitmap = num_weights
    positions = [number * index_bits(num_weights) for number in (pruned, num_weights - pruned)]
    stored = parse_scheme(f"magnitude-{share}").stored_bits(shape, dense_bits)
    assert stored == (num_weights - pruned) * dense_bits + min(bitmap, *positions)


def test_two_of_four_takes_two_bits_for_each_kept_weight() -> None:
    assert parse_scheme("wanda-2:4").stored_bits((8, 64), 16) == 8 * 32 * (16 + 2)


def test_a_shorter_last_group_keeps_as_many() -> None:
    assert parse_scheme("magnitude-2:4").stored_bits((1, 7), 16) == 4 * (16 + 2)


@given(shape=shapes, share=shares)
def test_a_pair_stores_codes_of_what_is_kept(shape: tuple[int, int], share: str) -> None:
    pair, alone = parse_scheme(f"int4-g32-asym+magnitude-{share}"), parse_scheme("int4-g32-asym")
    pruning = parse_scheme(f"magnitude-{share}")
    pruned = pruning.pruned_weights(shape)
    mask = pruning.stored_bits(shape, 16) - 16 * (shape[0] * shape[1] - pruned)
    assert pair.stored_bits(shape, 16) == alone.stored_bits(shape, 16) - 4 * pruned + mask


def test_nothing_is_stored_of_a_dropped_component() -> None:
    assert (parse_scheme("drop").stored_bits((8, 8), 16), parse_scheme("drop").pruned_weights((8, 8))) == (0, 64)


@given(shape=shapes, bits=bit_widths)
def test_gptq_is_stored_as_rounding_is(shape: tuple[int, int], bits: int) -> None:
    gptq, rounding = parse_scheme(f"gptq-int{bits}-g32-asym"), parse_scheme(f"int{bits}-g32-asym")
    assert gptq.stored_bits(shape, 16) == rounding.stored_bits(shape, 16)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("gptq-int4-g32", {"gptq-int2-g32", "gptq-int8-g32"}),
        ("int4-g32+wanda-0.5", {"int2-g32+wanda-0.5", "int8-g32+wanda-0.5"}),
        ("wanda-0.333", {"wanda-0.05", "wanda-0.95", "wanda-0.333"}),
        ("magnitude-2:4", {"magnitude-1:4", "magnitude-3:4"}),
    ],
)
def test_siblings_compress_more_or_less_in_the_same_way(name: str, some: set[str]) -> None:
    assert some | {name} <= set(siblings(name))


@pytest.mark.parametrize(
    ("name", "solved", "rounded_by"),
    [
        ("int4-g128", None, "int4-g128"),
        ("gptq-int4-g128", "gptq-int4-g128", "gptq-int4-g128"),
        ("int4-g128+wanda-0.5", None, "int4-g128"),
        ("int4-g128+sparsegpt-0.5", "sparsegpt-0.5", "int4-g128"),
        ("gptq-int4-g128+magnitude-0.5", "gptq-int4-g128+magnitude-0.5", "gptq-int4-g128"),
        ("sparsegpt-0.5", "sparsegpt-0.5", None),
        ("drop", None, None),
        (DENSE, None, None),
    ],
)
def test_a_scheme_says_what_is_solved_for_it_and_what_rounds_it(
    name: str, solved: str | None, rounded_by: str | None
) -> None:
    scheme = parse_scheme(name)
    assert tuple(None if other is None else other.name for other in (scheme.solved, scheme.rounded_by)) == (
        solved,
        rounded_by,
    )


def test_what_has_to_be_solved_for_stands_there_once() -> None:
    pairs = [("a", "gptq-int4-g32"), ("a", "int4-g32"), ("b", "int4-g32+sparsegpt-0.5"), ("b", "sparsegpt-0.5")]
    found = solved_pairs((component, parse_scheme(name)) for component, name in pairs)
    assert [(component, scheme.name) for component, scheme in found] == [
        ("a", "gptq-int4-g32"),
        ("b", "sparsegpt-0.5"),
    ]


@pytest.mark.parametrize("name", [example for family in families() for example in family.examples])
def test_a_scheme_crosses_process_borders_as_its_name(name: str) -> None:
    scheme = parse_scheme(name)
    assert pickle.loads(pickle.dumps(scheme)) is scheme
    assert scheme.kind.name == scheme.family and name in scheme.kind.siblings(scheme)


@pytest.mark.parametrize(
    ("name", "share"), [("magnitude-0.25", 0.25), ("int4-g32+wanda-0.5", 0.5), ("wanda-2:4", 0.0), ("drop", 1.0)]
)
def test_a_scheme_says_which_share_its_name_prunes(name: str, share: float) -> None:
    assert parse_scheme(name).pruned_share == share
