"""Numbers as a person reads them: to the decimals that their intervals bear."""

from __future__ import annotations

import pytest

from dtmsearch.analysis.format import decimals, with_error, with_interval


@pytest.mark.parametrize(
    ("half_width", "expected"), [(0.0001, 5), (0.005, 4), (1.0, 1), (12.0, 0), (1e-30, 8), (0.0, None)]
)
def test_a_half_width_is_shown_to_two_digits(half_width: float, expected: int | None) -> None:
    assert decimals(half_width) == expected


def test_a_small_mean_has_more_than_one_digit() -> None:
    assert with_interval(0.0003, 0.0002, 0.0004, 4) == "0.00030 [0.00020, 0.00040]"


def test_a_wide_interval_takes_decimals_away() -> None:
    assert with_interval(-23.04, -35.4, -9.9, 2, sign="+") == "-23 [-35, -10]"


def test_an_end_beside_zero_is_not_written_as_zero() -> None:
    assert with_interval(-0.013, -0.026, -0.0002, 4).endswith("-0.0002]")


def test_an_interval_without_width_takes_the_digits_that_are_given() -> None:
    assert with_interval(2.0, 2.0, 2.0, 1) == "2.0 [2.0, 2.0]"


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (0.0123, 0.004, "0.0123 \N{PLUS-MINUS SIGN} 0.0040"),
        (3.2e-7, 4e-8, "(3.20 \N{PLUS-MINUS SIGN} 0.40)e-07"),
        (0.5, 0.0, "0.5"),
    ],
)
def test_an_error_decides_the_decimals_of_its_mean(mean: float, error: float, expected: str) -> None:
    assert with_error(mean, error) == expected
