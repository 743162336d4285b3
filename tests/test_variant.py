"""Variants of a model: what tells two of them apart, and from which layer on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import toy_manifest
from tiny import replica, with_reference, write_model

from dtmsearch.core.evaluation import EvalRequest
from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import BASE, Variant
from dtmsearch.errors import UserError
from dtmsearch.model.replica.replica import Replica

MANIFEST = toy_manifest(num_layers=4)
LAYER_2 = "model.layers.2.mlp.up_proj"
ROUNDED, SOLVED = Plan.of({LAYER_2: "int4-g32"}), Plan.of({LAYER_2: "gptq-int4-g32"})


def test_only_calibrated_schemes_follow_from_a_calibration() -> None:
    assert (Variant(ROUNDED, "", "text").calibrated_by, Variant(SOLVED, "", "text").calibrated_by) == ("", "text")


@pytest.mark.parametrize(
    ("one", "other", "layer"),
    [
        (BASE, BASE, None),
        (Variant(ROUNDED), BASE, 2),
        (BASE, Variant(ROUNDED), 2),
        (Variant(ROUNDED), Variant(SOLVED, "", "text"), 2),
        (Variant(ROUNDED, "", "text"), Variant(ROUNDED, "", "other"), None),
        (Variant(SOLVED, "", "text"), Variant(SOLVED, "", "other"), 0),
        (Variant(ROUNDED, "trained"), Variant(ROUNDED), 0),
    ],
)
def test_below_the_first_difference_two_variants_have_the_same_states(
    one: Variant, other: Variant, layer: int | None
) -> None:
    assert one.first_difference(other, MANIFEST) == layer


def test_a_component_above_the_layers_leaves_their_states_but_the_last_one_s() -> None:
    assert Variant(Plan.of({"lm_head": "nf4"})).first_difference(BASE, MANIFEST) == 3


def test_a_request_says_which_variant_it_measures() -> None:
    request = EvalRequest(SOLVED, "reference", (0, 8), calibration_id="text", weights_id="trained")
    assert request.variant == Variant(SOLVED, "trained", "text")
    assert request.variant.under(Plan()) == Variant(Plan(), "trained", "text")


@pytest.fixture
def model(tmp_path: Path) -> Replica:
    return replica(write_model(tmp_path / "model"))


def test_on_base_gives_the_unquantized_model_and_leaves_it_so(model: Replica) -> None:
    name = model.manifest().components[0].name
    own = model._weights.original(name).clone()
    with torch.inference_mode():
        model._bench.become(Variant(Plan.of({name: "int2-channel"})))
        with model._standing.on_base():
            assert torch.equal(model._weights.standing(name), own)
    assert model._weights.plan == Plan()


def test_under_a_variant_the_model_is_as_its_plan_leaves_it_and_afterwards_as_it_was(model: Replica) -> None:
    name = model.manifest().components[0].name
    own = model.model.get_parameter(f"{name}.weight").clone()
    with model.under(Variant(Plan.of({name: "drop"}))) as changed:
        assert not changed.get_parameter(f"{name}.weight").any()
    assert torch.equal(model.model.get_parameter(f"{name}.weight"), own)


def test_trained_weights_that_are_not_there_leave_the_model_as_it_stands(model: Replica) -> None:
    plan = Plan.of({model.manifest().components[0].name: "int2-channel"})
    with torch.inference_mode():
        model._bench.become(Variant(plan))
        with pytest.raises(UserError, match="there are no trained weights at"):
            model._standing.rest_on("nowhere")
    assert (model._weights.plan, model._standing.weights_id) == (plan, "")


def test_states_of_a_parent_outlast_what_others_do_with_the_model_meanwhile(model: Replica) -> None:
    reference = with_reference(model)
    first, last = model.manifest().components[0].name, model.manifest().components[-1].name
    request = EvalRequest(Plan.of({first: "int4-g16", last: "int4-g16"}), reference.id, (0, 6))
    near = EvalRequest(request.plan, reference.id, (0, 6), parent=Plan.of({first: "int4-g16"}))
    (before,) = model.evaluate([near])
    model.generate(Plan(), reference.prompts)
    (again,) = model.evaluate([near])
    assert [getattr(before, name).tolist() == getattr(again, name).tolist() for name in ("fdt", "sdt", "dppl")] == [
        True,
        True,
        True,
    ]
