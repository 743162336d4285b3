"""How a plan differs from one scheme everywhere, in a sentence."""

from __future__ import annotations

from dtmsearch.analysis.plan_difference import Part, difference_from_uniform


def part(layer: int, kind: str, scheme: str, bits: float) -> Part:
    return Part(layer, kind, scheme, bits, 4.5)


def test_where_a_plan_has_more_and_fewer_bits_is_named() -> None:
    parts = [
        part(0, "q", "int3-g32", 3.5),
        part(0, "down", "int6-g32", 6.5),
        part(1, "q", "int4-g32", 4.5),
        part(1, "down", "int6-g32", 6.5),
    ]
    assert difference_from_uniform(parts, "int4-g32") == (
        "Beside int4-g32 everywhere, of its 4 components 2 have more bits (most in down; layers 0 and 1), 1 has fewer "
        "bits (most in q; layer 0) and 1 the same scheme."
    )


def test_a_zero_point_less_is_about_as_many_bits() -> None:
    parts = [part(0, "q", "int4-g32-asym", 4.62), part(0, "k", "int4-g32", 4.5)]
    said = difference_from_uniform(parts, "int4-g32")
    assert said.endswith("of its 2 components 1 about as many by another scheme and 1 the same scheme.")


def test_a_uniform_plan_is_said_to_be_one() -> None:
    assert difference_from_uniform([part(0, "q", "int4-g32", 4.5)], "int4-g32") == "It is int4-g32 everywhere."


def test_a_plan_of_weights_and_caches_is_held_against_one_scheme_of_each() -> None:
    parts = [
        part(0, "q", "int4-g32", 4.5),
        Part(0, "cached_keys", "kv-fp8", 8.0, 8.0),
        Part(0, "cached_values", "kv-int4", 5.0, 8.0),
    ]
    assert difference_from_uniform(parts, "int4-g32+kv-fp8") == (
        "Beside int4-g32+kv-fp8 everywhere, of its 3 components 1 has fewer bits (most in cached_values; layer 0) and "
        "2 the same scheme."
    )
    assert difference_from_uniform(parts[:2], "int4-g32+kv-fp8") == "It is int4-g32+kv-fp8 everywhere."
