"""A replica that is cut into stages: nothing that it measures differs, bit for bit, from what one process measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import families_of_models
import numpy as np
import pytest
from tiny import TEXT, in_stages, llama_config, replica, values, with_reference, write_model
from transformers import AutoConfig

from dtmsearch.core.calibration import Calibration
from dtmsearch.core.evaluation import EvalRequest, Reference
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PriceKind, PriceRequest
from dtmsearch.errors import UserError
from dtmsearch.model.pipeline_parallel.stage import cut
from dtmsearch.model.replica.replica import Replica


@pytest.mark.parametrize(("layers", "stages"), [(3, 3), (5, 3), (7, 2), (80, 6)])
def test_a_cut_gives_every_layer_to_one_stage_and_the_first_no_more_than_others(layers: int, stages: int) -> None:
    parts = cut(layers, stages)
    sizes = [len(part) for part in parts]
    assert [index for part in parts for index in part] == list(range(layers))
    assert sizes[0] == min(sizes) >= max(sizes) - 1


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4 stages"):
        cut(3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), llama_config(num_hidden_layers=5))


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Replica, Reference]:
    made = replica(folder)
    return made, with_reference(made)


@pytest.fixture(scope="module")
def staged(folder: Path) -> tuple[Replica, Reference]:
    made = in_stages(folder, 3)
    return made, with_reference(made)


def test_the_base_model_goes_on_alike(whole: tuple[Replica, Reference], staged: tuple[Replica, Reference]) -> None:
    assert staged[1].continuation.tolist() == whole[1].continuation.tolist()
    assert (staged[1].agrees.tolist(), staged[1].id) == (whole[1].agrees.tolist(), whole[1].id)


def requests(reference: Reference, components: list[str], calibration_id: str = "") -> list[EvalRequest]:
    """Plans that leave their parents in every stage, in several ways."""
    base = Plan.of({components[0]: "int4-g16", components[-1]: "int3-g16"})
    schemes = ["int3-g16", "nf4", "drop"] + (["wanda-0.5", "gptq-int3-g16"] if calibration_id else [])
    extra = ("kl", "ppl")
    found = [
        EvalRequest(Plan.of({**base.schemes, name: scheme}), reference.id, (0, 6), extra, base, calibration_id)
        for name in components[1::5]
        for scheme in schemes
    ]
    everything = Plan.of({name: schemes[i % len(schemes)] for i, name in enumerate(components)})
    return [*found, EvalRequest(everything, reference.id, (1, 5), (), Plan(), calibration_id)]


def measured(made: tuple[Replica, Reference], calibration_id: str = "") -> list[Any]:
    replica, reference = made
    components = [component.name for component in replica.manifest().components]
    return [values(outcome) for outcome in replica.evaluate(requests(reference, components, calibration_id))]


def test_plans_measure_alike(whole: tuple[Replica, Reference], staged: tuple[Replica, Reference]) -> None:
    assert measured(staged) == measured(whole)


@pytest.fixture(scope="module")
def calibrated(folder: Path, staged: tuple[Replica, Reference]) -> list[tuple[Replica, Calibration]]:
    """One process, and a replica in stages, which have taken the same text."""
    found: list[tuple[Replica, Calibration]] = []
    for model in (replica(folder), staged[0]):
        calibration = model.cut_calibration([TEXT], 6, 24, 0)
        model.use_calibration(calibration)
        model.use(staged[1])
        found.append((model, calibration))
    return found


def test_calibrated_plans_measure_alike(
    calibrated: list[tuple[Replica, Calibration]], staged: tuple[Replica, Reference]
) -> None:
    one, other = [measured((model, staged[1]), calibration.id) for model, calibration in calibrated]
    assert one == other


def test_matrices_solved_through_compressed_layers_are_alike(folder: Path, staged: tuple[Replica, Reference]) -> None:
    found = []
    for model in (replica(folder), staged[0]):
        calibration = model.cut_calibration([TEXT], 6, 24, 0, "compressed")
        model.use_calibration(calibration)
        model.use(staged[1])
        values_of_plans = measured((model, staged[1]), calibration.id)
        pairs = [(component.name, "gptq-int4-g16") for component in model.manifest().components]
        solved = [(p.component, p.codes.tobytes(), p.scales.tobytes()) for p in model.solve(calibration.id, pairs)]
        found.append((values_of_plans, solved))
    assert found[0] == found[1]


def test_errors_of_weights_and_outliers_are_alike(calibrated: list[tuple[Replica, Calibration]]) -> None:
    found = []
    for model, calibration in calibrated:
        components = [component.name for component in model.manifest().components][::-3]
        errors = model.weight_errors(components, ["int3-g16", "gptq-int3-g16"], calibration.id, by_hessian=True)
        found.append((errors, model.outlier_shares(calibration.id)))
    assert found[0] == found[1]


def test_statistics_and_solved_matrices_are_alike(calibrated: list[tuple[Replica, Calibration]]) -> None:
    found = []
    for model, calibration in calibrated:
        squares = model.gather_statistics(calibration).mean_squares
        pairs = [(component.name, "gptq-int4-g16") for component in model.manifest().components[::4]]
        solved = [(p.component, p.num_bytes) for p in model.solve(calibration.id, pairs)]
        found.append(({name: values.tolist() for name, values in squares.items()}, solved))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", get_args(PriceKind))
def test_prices_are_alike(calibrated: list[tuple[Replica, Calibration]], kind: PriceKind) -> None:
    schemes = ("int3-g16", "gptq-int3-g16", "wanda-0.5", "w8a8", "drop")
    found = []
    for model, calibration in calibrated:
        reference = with_reference(model)
        names = [component.name for component in model.manifest().components]
        base = requests(reference, names)[-1].plan
        for components, around in ((names, Plan()), (names, base), (names[-3:], base)):
            asked = PriceRequest(
                reference.id, (1, 6), tuple(components), schemes, 3, kind, around, calibration.id
            )  # the last ones lie in the last stage alone
            assert model.unpriceable(components) == ""
            found.append(model.price(asked).products)
            held = [remote.peer.stage._risen for remote in getattr(model, "_remotes", ())]
            assert not any(held)  # of no stage, whether gradients came down to it or not
        with pytest.raises(UserError, match="lies outside the layers"):
            model.price(replace(asked, components=(model.manifest().others[0].name,)))
    one, other = found[:3], found[3:]
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(np.abs(products).max() > 0.0 for products in one[1:])


def test_memory_is_that_of_all_stages(whole: tuple[Replica, Reference], staged: tuple[Replica, Reference]) -> None:
    one, other = [model.measure_speed(2, 4, 4).memory_bytes for model, _ in (whole, staged)]
    assert other > one  # by what lies outside the layers, which every stage has


def deep(family: str, folder: Path) -> Path:
    """A tiny model of four layers."""
    default = AutoConfig.for_model(family)
    settings = families_of_models.tiny_settings(default, families_of_models.SPECIAL.get(family, {}))
    settings["num_hidden_layers"] = 4
    for key in ("layer_types", "mlp_layer_types"):
        if key in settings:
            settings[key] = (list(settings[key]) * 4)[:4]
    return write_model(folder, AutoConfig.for_model(family, **settings))


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("zaya", "a pass that starts at layer 1 is not the same"),
        ("hrm_text", "its layers run several times"),
        ("rwkv", "its layers do not take what stands for another"),
        ("jamba", "with a cache in each stage it does not generate its own tokens"),
    ],
)
def test_a_model_that_stages_would_change_is_refused_at_the_start(family: str, why: str, tmp_path: Path) -> None:
    attention = "eager" if family == "rwkv" else "sdpa"  # the only one that it has
    with pytest.raises(UserError, match=f"cannot be cut into stages: {why}"):
        in_stages(deep(family, tmp_path), 2, attention)
