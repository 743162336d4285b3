from __future__ import annotations

import hashlib
import json

import pytest
from fakes import toy_components, toy_manifest
from hypothesis import given
from hypothesis import strategies as st

from dtmsearch.core.identity import identity
from dtmsearch.core.plan import Budget, Perturbation, Plan, plan_size
from dtmsearch.core.plan_file import plan_from_json, plan_to_json
from dtmsearch.core.schemes import DENSE, parse_scheme

SCHEMES = ("int8-channel", "int4-g32-asym", "int3-tensor", "nf4", "w8a8")
NAMES = tuple(component.name for component in toy_components())
mappings = st.dictionaries(st.sampled_from(NAMES), st.sampled_from((*SCHEMES, DENSE)))
plans = mappings.map(Plan.of)
perturbations = st.builds(
    lambda names, scheme: Perturbation(names[0], scheme, tuple(names[1:])),
    st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
    st.sampled_from((*SCHEMES, DENSE)),
)


def test_a_plan_holds_the_schemes_that_its_names_mean() -> None:
    plan = Plan.of({NAMES[0]: "nf4"})
    assert (plan.parsed, plan.scheme(NAMES[1])) == ({NAMES[0]: parse_scheme("nf4")}, parse_scheme(DENSE))


@given(one=plans, other=plans)
def test_changes_are_differences_with_schemes(one: Plan, other: Plan) -> None:
    assert {component: scheme.name for component, scheme in one.changes(other).items()} == one.diff(other)


# Of all that JSON writes in ways of its own: hypothesis' own alphabet, all of Unicode, takes seconds to be there.
names = st.text(st.sampled_from('aZ0_.-/ "\\\n\t\x00\x1f\x7f\u00e9\u2028\u4e2d\ufeff\U0001f600'), max_size=12)


@given(st.dictionaries(names, st.sampled_from(SCHEMES)))
def test_the_identity_of_a_plan_is_that_of_its_mapping(mapping: dict[str, str]) -> None:
    assert Plan.of(mapping).id == identity(mapping)


@given(st.dictionaries(names, st.sampled_from(SCHEMES)))
def test_an_identity_is_128_bits_of_sha256_over_canonical_json(mapping: dict[str, str]) -> None:
    text = json.dumps(mapping, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert Plan.of(mapping).id == hashlib.sha256(text.encode()).hexdigest()[:32]


@given(mapping=mappings, seed=st.randoms())
def test_the_order_of_writing_changes_no_identity(mapping: dict[str, str], seed: object) -> None:
    items = list(mapping.items())
    seed.shuffle(items)  # type: ignore[attr-defined]
    assert Plan.of(dict(items)) == Plan.of(mapping)


@given(mappings)
def test_dense_components_are_absent(mapping: dict[str, str]) -> None:
    assert DENSE not in Plan.of(mapping).schemes.values()


@given(plans, perturbations)
def test_with_gives_its_scheme_to_the_perturbed_components_and_leaves_the_rest(
    plan: Plan, perturbation: Perturbation
) -> None:
    expected = plan.schemes | dict.fromkeys(perturbation.components, perturbation.scheme)
    assert plan.with_(perturbation) == Plan.of(expected)


@given(plans, perturbations)
def test_perturbing_twice_is_perturbing_once(plan: Plan, perturbation: Perturbation) -> None:
    assert plan.with_(perturbation).with_(perturbation) == plan.with_(perturbation)


@given(plans, plans)
def test_the_difference_leads_from_one_plan_to_the_other(one: Plan, other: Plan) -> None:
    assert Plan.of(other.schemes | one.diff(other)) == one


@given(plans, plans)
def test_the_difference_names_only_what_changes(one: Plan, other: Plan) -> None:
    assert [c for c, scheme in one.diff(other).items() if other.scheme_of(c) == scheme] == []


@given(plans)
def test_a_plan_differs_from_itself_in_nothing(plan: Plan) -> None:
    assert plan.diff(plan) == {}


@given(plan=plans, dense_bits=st.sampled_from([16, 32]))
def test_the_size_of_a_plan_is_what_counting_gives(plan: Plan, dense_bits: int) -> None:
    weights = bits = compressed = components = 0
    for component in toy_components():
        rows, cols = component.shape
        scheme = plan.scheme_of(component.name)
        weights += rows * cols
        bits += parse_scheme(scheme).stored_bits(component.shape, dense_bits)
        compressed += rows * cols if scheme != DENSE else 0
        components += scheme != DENSE
    size = plan_size(plan, toy_components(), dense_bits)
    assert (size.num_weights, size.stored_bits, size.compressed_weights, size.num_compressed) == (
        weights,
        bits,
        compressed,
        components,
    )


def test_the_shares_of_a_plan_by_hand() -> None:
    # k of both layers, 2 x 16 x 64 of 22,528 weights, in 8 bits and a scale for each of 16 rows.
    plan = Plan.of({name: "int8-channel" for name in NAMES if "k_proj" in name})
    size = plan_size(plan, toy_components(), 16)
    bits = 20_480 * 16 + 2_048 * 8 + 32 * 16
    assert (size.share, size.bits_per_weight, size.size_mb) == (2_048 / 22_528, bits / 22_528, bits / 8e6)


def test_components_outside_the_search_count_in_no_size() -> None:
    plan = Plan.of({"lm_head": "nf4"})
    assert plan_size(plan, toy_components(), 16) == plan_size(Plan(), toy_components(), 16)


def test_a_uniform_plan_gives_every_component_the_scheme() -> None:
    assert Plan.uniform(toy_components(), "nf4").schemes == dict.fromkeys(NAMES, "nf4")


@pytest.mark.parametrize(
    ("budget", "reached"),
    [
        (Budget(), False),
        (Budget(share=1.0), True),
        (Budget(components=6), True),
        (Budget(components=7), False),
        (Budget(bits_per_weight=4.5), True),
        (Budget(bits_per_weight=4.49), False),
        (Budget(size_mb=22_528 * 4.5 / 8e6), True),
        (Budget(size_mb=22_528 * 4.49 / 8e6), False),
        (Budget(sparsity=0.1), False),
        (Budget(components=7, share=0.5), True),
    ],
)
def test_a_budget_is_reached_at_its_first_rule_that_is_met(budget: Budget, reached: bool) -> None:
    size = plan_size(Plan.uniform(toy_components(), "nf4"), toy_components(), 16)
    assert budget.reached(size) == reached


@given(plans)
def test_a_plan_file_reads_back_as_the_plan(plan: Plan) -> None:
    assert plan_from_json(plan_to_json(plan, toy_manifest()), toy_manifest(), "plan.json") == plan


def test_a_plan_file_holds_model_manifest_and_schemes() -> None:
    plan = Plan.of({NAMES[0]: "nf4"})
    assert json.loads(plan_to_json(plan, toy_manifest())) == {
        "model": "toy",
        "manifest_id": "toy",
        "schemes": {NAMES[0]: "nf4"},
    }


def test_a_plan_file_of_another_model_is_an_error_that_names_both() -> None:
    text = plan_to_json(Plan.of({NAMES[0]: "nf4"}), toy_manifest())
    with pytest.raises(ValueError, match=r"plan\.json was made for another model: its manifest is toy .* is other"):
        plan_from_json(text, toy_manifest(content_hash="other"), "plan.json")


def test_a_plan_file_with_a_component_that_the_model_lacks_names_it() -> None:
    text = plan_to_json(Plan.of({"model.layers.9.mlp.up_proj": "nf4"}), toy_manifest())
    with pytest.raises(ValueError, match=r"'model\.layers\.9\.mlp\.up_proj', which toy does not have"):
        plan_from_json(text, toy_manifest(), "plan.json")


def test_a_plan_file_with_an_unknown_scheme_names_the_nearest() -> None:
    text = plan_to_json(Plan.of({NAMES[0]: "nf4"}), toy_manifest()).replace("nf4", "nf5")
    with pytest.raises(ValueError, match="the nearest is 'nf4'"):
        plan_from_json(text, toy_manifest(), "plan.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifest_id": "toy"}', '{"manifest_id": "toy", "schemes": 3}'])
def test_a_text_that_is_no_plan_file_is_an_error_that_says_so(text: str) -> None:
    with pytest.raises(ValueError, match=r"plan\.json is no plan file"):
        plan_from_json(text, toy_manifest(), "plan.json")


def test_a_difference_is_in_order_of_name() -> None:
    names = [f"layer.{number}" for number in range(20)]
    one, other = Plan.of(dict.fromkeys(names[::2], "int8-channel")), Plan.of(dict.fromkeys(names[1::2], "nf4"))
    assert list(one.diff(other)) == sorted(names)
