"""A plan as a picture of characters."""

from __future__ import annotations

from fakes import toy_components

from dtmsearch.console.plan_picture import plan_picture
from dtmsearch.core.components import Component
from dtmsearch.core.plan import Plan

KINDS = ("q", "down")


def components(num_layers: int) -> list[Component]:
    return [Component(f"layers.{n}.{kind}", n, kind, (4, 4)) for n in range(num_layers) for kind in KINDS]


def test_a_row_for_each_kind_a_column_for_each_layer_and_the_digit_of_a_schemes_bits() -> None:
    plan = Plan.of({"layers.0.q": "int4-g32", "layers.1.q": "int8-channel", "layers.1.down": "int4-g32"})
    assert plan_picture(plan, components(2), 80).splitlines() == [
        "layer  0",
        "q      48",
        "down   .4",
        "       4 = 2 x int4-g32; 8 = 1 x int8-channel; . = 1 x unquantized",
    ]


def test_schemes_of_the_same_bits_have_letters() -> None:
    plan = Plan.of({"layers.0.q": "int4-g32", "layers.1.q": "nf4", "layers.0.down": "magnitude-0.5"})
    rows = plan_picture(plan, components(2), 80).splitlines()
    symbols = {part.split(" = ")[1].split(" x ")[1]: part[0] for part in " ".join(rows[3:]).strip().split("; ")}
    assert len(set(symbols.values())) == 4 and rows[1] == f"q      {symbols['int4-g32']}{symbols['nf4']}"


def test_a_scheme_of_a_package_that_is_not_here_has_a_letter() -> None:
    plan = Plan.of({"layers.0.q": "ternary-g64"})
    assert plan_picture(plan, components(2), 80).splitlines()[1] == "q      a."


def test_more_layers_than_the_window_are_cut_into_parts() -> None:
    lines = plan_picture(Plan.of({"layers.0.q": "int4-g32"}), components(30), 24).splitlines()
    assert [line for line in lines if line.startswith("layer")] == ["layer  0         10", "layer  17 20"]
    assert max(map(len, lines)) <= 27  # a legend is given at least 20 characters


def test_no_picture_without_layers_or_of_too_many_kinds() -> None:
    one_layer = toy_components(1)
    many = [Component(f"layers.{n}.experts.{e}", n, f"expert{e}", (4, 4)) for n in range(2) for e in range(17)]
    assert plan_picture(Plan.of({one_layer[0].name: "int4-g32"}), one_layer) == ""
    assert plan_picture(Plan.of({many[0].name: "int4-g32"}), many) == ""
