from __future__ import annotations

from itertools import pairwise

import pytest
from fakes import toy_components
from hypothesis import given
from hypothesis import strategies as st

from dtmsearch.core.components import Component
from dtmsearch.core.plan import Budget, Perturbation, Plan, plan_size
from dtmsearch.search.space import SearchSpace


def attention(layer: int) -> tuple[Component, ...]:
    return tuple(Component(f"layers.{layer}.attn.{kind}", layer, kind, (8, 8)) for kind in "qkvo")


def test_perturbations_come_in_model_order_then_in_order_of_the_schemes() -> None:
    space = SearchSpace(attention(0)[:2], ("nf4", "int8-channel"))
    assert space.perturbations(Plan()) == [
        Perturbation("layers.0.attn.q", "nf4"),
        Perturbation("layers.0.attn.q", "int8-channel"),
        Perturbation("layers.0.attn.k", "nf4"),
        Perturbation("layers.0.attn.k", "int8-channel"),
    ]


def test_without_a_budget_of_bits_a_component_is_compressed_at_most_once() -> None:
    space = SearchSpace(attention(0)[:2], ("int8-channel", "int4-channel"))
    legal = space.perturbations(Plan.of({"layers.0.attn.q": "int8-channel"}))
    assert {edge.component for edge in legal} == {"layers.0.attn.k"}


def test_with_a_budget_of_bits_a_component_goes_on_to_fewer_bits_only() -> None:
    space = SearchSpace(
        attention(0)[:1], ("int8-channel", "int4-channel", "int2-channel"), budget=Budget(bits_per_weight=5)
    )
    legal = space.perturbations(Plan.of({"layers.0.attn.q": "int4-channel"}))
    assert [edge.scheme for edge in legal] == ["int2-channel"]


def test_with_a_budget_of_bits_schemes_of_equal_size_do_not_follow_each_other() -> None:
    space = SearchSpace(attention(0)[:1], ("nf4", "fp4"), budget=Budget(size_mb=1e-9 + 8 * 8 * 5 / 8e6))
    assert space.perturbations(Plan.of({"layers.0.attn.q": "nf4"})) == []


def test_with_a_budget_of_bits_a_scheme_larger_than_dense_is_never_legal() -> None:
    space = SearchSpace(attention(0)[:1], ("int8-g1", "int4-channel"), budget=Budget(bits_per_weight=8))
    assert [edge.scheme for edge in space.perturbations(Plan())] == ["int4-channel"]


def test_tied_kinds_change_together_within_their_parent_module() -> None:
    space = SearchSpace((*attention(0), *attention(1)), ("nf4",), tied=(("q", "k", "v"),))
    assert space.perturbations(Plan()) == [
        Perturbation("layers.0.attn.q", "nf4", ("layers.0.attn.k", "layers.0.attn.v")),
        Perturbation("layers.0.attn.o", "nf4"),
        Perturbation("layers.1.attn.q", "nf4", ("layers.1.attn.k", "layers.1.attn.v")),
        Perturbation("layers.1.attn.o", "nf4"),
    ]


def test_tied_names_change_together_wherever_they_lie() -> None:
    space = SearchSpace((*attention(0), *attention(1)), ("nf4",), tied=(("layers.1.attn.q", "layers.0.attn.k"),))
    assert Perturbation("layers.0.attn.k", "nf4", ("layers.1.attn.q",)) in space.perturbations(Plan())


def test_tied_components_once_compressed_are_not_offered_again() -> None:
    space = SearchSpace(attention(0), ("nf4",), tied=(("q", "k", "v"),))
    plan = Plan().with_(space.perturbations(Plan())[0])
    assert [edge.component for edge in space.perturbations(plan)] == ["layers.0.attn.o"]


def test_a_tied_kind_that_no_component_has_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'up_proj' is neither .* the nearest is 'up'"):
        SearchSpace(toy_components(), ("nf4",), tied=(("up_proj", "q"),))


def test_a_tied_name_that_no_component_has_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"the nearest is 'layers\.0\.attn\.q'"):
        SearchSpace(attention(0), ("nf4",), tied=(("layers.0.atn.q", "layers.0.attn.k"),))


def test_a_component_in_two_tied_groups_is_an_error_that_shows_both() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q is in two groups, \[q, k\] and \[q, v\]"):
        SearchSpace(attention(0), ("nf4",), tied=(("q", "k"), ("q", "v")))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(components=5), "stop.components: 5 .* the most that they can come to is 4"),
        (Budget(bits_per_weight=3.0), "stop.bits_per_weight: 3.0 .* the least that they can come to is 6.0"),
        (Budget(size_mb=1e-4), "stop.size_mb: 0.0001 .* the least that they can come to is 0.000192"),
        (Budget(sparsity=0.5), "stop.sparsity: 0.5 .* the most that they can come to is 0.0"),
    ],
)
def test_a_budget_out_of_reach_is_an_error_that_says_what_is_within(budget: Budget, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace(attention(0), ("int4-channel",), budget=budget)


def test_a_budget_at_the_very_edge_of_reach_is_accepted() -> None:
    space = SearchSpace(attention(0), ("int4-channel",), budget=Budget(bits_per_weight=6.0, size_mb=0.000192))
    assert space.budget.reached(space.size(space.uniform("int4-channel")))


def test_a_sparsity_budget_is_within_reach_of_pruning() -> None:
    space = SearchSpace(attention(0), ("magnitude-0.5",), budget=Budget(sparsity=0.5))
    assert space.budget.reached(space.size(space.uniform("magnitude-0.5")))


def test_a_dropped_component_is_all_zeros() -> None:
    wide, tall = Component("wide", 0, "wide", (1, 64)), Component("tall", 0, "tall", (64, 3))
    space = SearchSpace((wide, tall), ("drop",), budget=Budget(sparsity=0.75))
    assert space.size(Plan.of({"tall": "drop"})).sparsity == 0.75


def test_the_least_bits_within_reach_mix_schemes() -> None:
    wide, tall = Component("wide", 0, "wide", (1, 64)), Component("tall", 0, "tall", (64, 1))
    space = SearchSpace((wide, tall), ("int4-channel", "int4-tensor"), budget=Budget(bits_per_weight=4.25))
    assert space.budget.reached(space.size(Plan.of({"wide": "int4-channel", "tall": "int4-tensor"})))


def test_progress_is_the_way_to_the_nearest_stop_rule() -> None:
    space = SearchSpace(attention(0), ("nf4",), budget=Budget(share=1.0, components=2))
    assert space.progress(Plan.of({"layers.0.attn.q": "nf4"})) == 0.5


@given(
    schemes=st.permutations(["int8-channel", "int4-g32", "nf4", "int3-tensor"]).flatmap(
        lambda names: st.integers(1, 4).map(lambda n: tuple(names[:n]))
    ),
    choices=st.lists(st.integers(0, 1000), max_size=12),
    tied=st.sampled_from([(), (("q", "k"),)]),
    bits=st.booleans(),
)
def test_every_walk_over_legal_perturbations_keeps_ties_and_ends(
    schemes: tuple[str, ...], choices: list[int], tied: tuple[tuple[str, ...], ...], bits: bool
) -> None:
    components = toy_components()
    space = SearchSpace(components, schemes, tied, budget=Budget(size_mb=1.0) if bits else Budget())
    plan, sizes = Plan(), [space.size(Plan()).stored_bits]
    for choice in choices:
        legal = space.perturbations(plan)
        if not legal:
            break
        plan = plan.with_(legal[choice % len(legal)])
        sizes.append(plan_size(plan, components, 16).stored_bits)
    split = [
        layer
        for layer in (0, 1)
        if tied
        and plan.scheme_of(f"model.layers.{layer}.self_attn.q_proj")
        != plan.scheme_of(f"model.layers.{layer}.self_attn.k_proj")
    ]
    assert split == []
    assert all(later < earlier for earlier, later in pairwise(sizes))
