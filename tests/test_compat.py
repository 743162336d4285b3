"""Names of other libraries that a release can take away: each is there. tests/test_architecture.py holds that none is
used but through the two modules that list them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dtmsearch.cluster import ray_compat
from dtmsearch.core.library_versions import ForeignName
from dtmsearch.model.modules import compat
from dtmsearch.model.modules.swapping import put, swapped


@pytest.mark.parametrize("name", [*compat.NAMES, *ray_compat.NAMES], ids=lambda name: name.name)
def test_the_installed_release_has_the_name(name: ForeignName) -> None:
    assert name.broken() == ""


def test_a_name_that_is_gone_is_told_with_its_release_and_its_use() -> None:
    gone = ForeignName("torch.nn.Module._no_such_name", "do a thing")
    assert re.fullmatch(
        r"torch \S+ has no torch.nn.Module._no_such_name \(.+\), which is used to do a thing", gone.broken()
    )


def test_a_library_that_is_not_there_is_told() -> None:
    assert "no_such_library of no known version has no" in ForeignName("no_such_library.name", "do a thing").broken()


def a_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_swapped_modules_stand_there_within_and_no_longer_after_it() -> None:
    model, other = a_model(), nn.Identity()
    before = model[1][0]
    with swapped(model, {"1.0": other, "0": other}):
        assert (model[0], model[1][0]) == (other, other)
    assert model[1][0] is before


def test_what_stood_there_comes_back_after_an_error_and_from_within_another_swap() -> None:
    model, first, second = a_model(), nn.Identity(), nn.Identity()
    before = list(model)
    with pytest.raises(ZeroDivisionError), swapped(model, {"0": first}), swapped(model, {"0": second, "1": second}):
        1 / 0  # noqa: B018
    assert list(model) == before


def test_a_place_that_is_not_there_is_an_error_that_leaves_all_as_it_was() -> None:
    model = a_model()
    before = list(model)
    with pytest.raises(KeyError), swapped(model, {"0": nn.Identity(), "7": nn.Identity()}):
        pass
    assert list(model) == before


def test_a_module_can_be_put_in_place_for_good() -> None:
    model, other = a_model(), nn.Identity()
    put(model, "1.1", other)
    assert model[1][1] is other


def test_compiled_layers_run_eagerly_for_a_while() -> None:
    layer = nn.Linear(2, 2)
    layer.compile(backend="eager")
    compiled = layer._compiled_call_impl
    with compat.uncompiled([layer]):
        assert layer._compiled_call_impl is None
    assert layer._compiled_call_impl is compiled is not None


def test_what_has_no_weights_is_not_moved() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    compat.move_loaded(model, torch.device("cpu"))
    assert model[1].weight.is_meta and not model[0].weight.is_meta


def test_each_tensor_is_multiplied_by_its_own_factor() -> None:
    tensors = [torch.tensor([2.0, 3.0]), torch.tensor([5.0])]
    compat.multiply_each(tensors, [torch.tensor([1.0, 0.0]), torch.tensor([2.0])])
    assert [tensor.tolist() for tensor in tensors] == [[2.0, 0.0], [10.0]]


def test_parameters_that_could_not_be_made_are_found_in_the_errors_frames() -> None:
    def load() -> None:
        loading_info = SimpleNamespace(conversion_errors={"b": "why", "a": "why"})
        raise RuntimeError(str(loading_info))

    with pytest.raises(RuntimeError) as caught:
        load()
    assert compat.unconverted_parameters(caught.value) == ["a", "b"]
