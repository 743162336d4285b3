"""Numeric modes: their text, and what two of them differ in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtmsearch.core.numeric_mode import NumericMode

DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])
ATTENTION = st.sampled_from(["sdpa", "eager", "flash_attention_2", "someone/kernels"])
MODES = st.builds(NumericMode, DTYPES, st.sampled_from(["cpu", "cuda"]), ATTENTION, st.booleans(), DTYPES)


@given(MODES)
def test_a_mode_comes_back_from_its_text(mode: NumericMode) -> None:
    assert NumericMode.parse(str(mode)) == mode


def test_the_text_of_a_mode_is_the_one_that_identities_have_held_so_far() -> None:
    assert str(NumericMode("float32", "cpu", "sdpa")) == "float32/cpu/sdpa/eager"
    assert (
        str(NumericMode("bfloat16", "cuda", "eager", True, "float16")) == "bfloat16/cuda/eager/compiled/float16-scales"
    )


@pytest.mark.parametrize("text", ["", "toy", "float32/cpu/sdpa", "float32/cpu/sdpa/fast"])
def test_another_text_is_no_mode(text: str) -> None:
    with pytest.raises(ValueError, match="is no numeric mode"):
        NumericMode.parse(text)


def test_what_two_modes_differ_in_is_said_part_by_part() -> None:
    here, there = NumericMode("float32", "cpu", "sdpa"), NumericMode("bfloat16", "cuda", "sdpa")
    assert here.differences(there) == ["dtype bfloat16, not float32", "device cuda, not cpu"]
