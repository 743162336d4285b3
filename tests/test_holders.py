"""Who can write a scheme, and a plan, at its counted size."""

from __future__ import annotations

import pytest
from fakes import toy_components

from dtmsearch.core.components import Component
from dtmsearch.core.holders import examples, holders_of, scheme_facts, size_sentence
from dtmsearch.core.plan import Plan

COMPONENTS = [Component(f"layers.0.{kind}", 0, kind, (256, 512)) for kind in ("q", "k", "v", "o", "gate", "up")]


def at_size(scheme: str) -> set[str]:
    return set(scheme_facts(scheme).at_size)


@pytest.mark.parametrize(
    ("scheme", "holders"),
    [
        ("nf4", {"bitsandbytes (transformers)"}),
        ("llm-int8", {"bitsandbytes (transformers)"}),
        ("int4-g128", {"compressed-tensors (vllm)", "compressed-tensors (transformers)"}),
        ("gptq-int4-g128-asym", {"compressed-tensors (vllm)"}),
        ("int3-g64", {"compressed-tensors (vllm)", "compressed-tensors (transformers)"}),
        ("int3-g8", {"compressed-tensors (transformers)"}),
        ("int3-g64-asym", {"compressed-tensors (vllm)"}),
        ("int3-tensor-asym", set()),
        ("nvfp4", {"compressed-tensors (vllm)", "compressed-tensors (transformers)"}),
        ("mxfp6", {"compressed-tensors (transformers)"}),
        ("wanda-2:4", set()),
        ("int4-g128+wanda-0.5", set()),
        ("drop", set()),
    ],
)
def test_a_scheme_says_who_writes_it_at_its_size(scheme: str, holders: set[str]) -> None:
    assert at_size(scheme) == holders


@pytest.mark.parametrize(("scheme", "bits"), [("nf4", 4.5), ("fp4", 4.5), ("int4-g32", 4.5), ("dense", 16.0)])
def test_counted_bits_hold_scales_as_they_are_stored(scheme: str, bits: float) -> None:
    assert scheme_facts(scheme).bits_per_weight == bits


def test_zero_points_that_are_not_packed_take_whole_bytes() -> None:
    bits = {held.holder: held.bits_per_weight for held in scheme_facts("int3-g64-asym").held}
    assert bits["compressed-tensors (transformers)"] == 8 + (16 + 8) / 64


def test_every_kind_of_name_has_an_example() -> None:
    assert {scheme_facts(name).family for name in examples()} == {
        *("dense", "drop", "rounding", "gptq", "bitsandbytes", "pruning", "pair", "source"),
        *("fp8", "nvfp4", "microscaling", "integers", "awq", "smoothquant", "autoround"),
        *("gguf", "gguf-plain", "kv_cache", "width"),
    }


def test_scales_of_32_bits_make_files_larger_than_was_counted() -> None:
    plan = Plan.uniform(COMPONENTS, "int4-g32")
    by_scale = [{h.holder for h in holders_of(plan, COMPONENTS, 32, bits) if h.at_size} for bits in (16, 32)]
    assert by_scale[1] == set() and "compressed-tensors (transformers)" in by_scale[0]


def test_vllm_holds_no_plan_that_splits_what_it_fuses() -> None:
    plan = Plan.of({"layers.0.q": "int4-g128", "layers.0.o": "int4-g128"})
    held = {h.holder: h for h in holders_of(plan, COMPONENTS, 16, 16)}
    assert "as one matrix" in str(held["compressed-tensors (vllm)"].obstacle)


def test_bitsandbytes_holds_no_plan_of_8_and_4_bits() -> None:
    plan = Plan.of({"layers.0.q": "nf4", "layers.0.o": "w8a8"})
    held = {h.holder: h for h in holders_of(plan, COMPONENTS, 16, 16)}
    assert "in 8 bits or in 4 bits" in str(held["bitsandbytes (transformers)"].obstacle)


@pytest.mark.parametrize(
    ("scheme", "scale_bits", "said"),
    [
        ("int4-g128", 16, "written at its size by compressed-tensors (vllm), compressed-tensors (transformers)"),
        ("int3-tensor-asym", 16, "no export writes it at its size, 3.00 bits per weight where it is compressed: "),
        ("magnitude-0.5", 16, "dense (any) takes 16.00"),
        ("int3-g8", 32, "with `model.scale_dtype: bfloat16` it could be"),
    ],
)
def test_a_plan_says_whether_it_can_be_written_at_its_size(scheme: str, scale_bits: int, said: str) -> None:
    assert said in size_sentence(Plan.uniform(COMPONENTS, scheme), COMPONENTS, 16, scale_bits)


def test_a_plan_that_compresses_nothing_is_not_judged() -> None:
    assert size_sentence(Plan(), toy_components(), 16, 16) == "nothing is compressed"
