"""Models without values: what is spared of making them and of running them changes nothing of what is found."""

from __future__ import annotations

from typing import Any

import families_of_models
import pytest
import torch
from torch import Tensor, nn

from dtmsearch.model.modules import usage
from dtmsearch.model.modules.empty import made_like_first, without_values
from dtmsearch.model.modules.usage import usage_of

FIRST = torch.empty(2, 3, 4, device="meta")
CASES = {
    "of one shape": ("mul", FIRST, torch.empty(2, 3, 4, device="meta")),
    "by a row": ("add", FIRST, torch.empty(4, device="meta")),
    "by a number": ("pow", FIRST, 2),
    "by a column": ("div", FIRST, torch.empty(3, 1, device="meta")),
    "alone": ("silu", FIRST.bfloat16()),
    "products": ("mm", FIRST[0], torch.empty(4, 5, device="meta")),
    "softmax": ("_safe_softmax", FIRST, -1),
    "a triangle of truths": ("tril", FIRST.bool()),
}
# What another operand decides too, or what is no number of that kind.
OTHERS = {
    "a larger second": ("mul", torch.empty(1, 4, device="meta"), FIRST),
    "another dtype": ("add", FIRST.bfloat16(), FIRST),
    "whole numbers": ("div", FIRST.long(), 2),
    "a number without sides": ("mul", torch.empty((), device="meta"), FIRST),
    "turned": ("mul", FIRST.transpose(0, 2), 2.0),
    "values": ("mul", torch.ones(2), 2.0),
    "other products": ("mm", FIRST[0], torch.empty(5, 5, device="meta")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_the_first_operand_decides_is_what_torch_makes(case: tuple[Any, ...]) -> None:
    name, *arguments = case
    found, own = made_like_first(name, arguments, {}), getattr(torch.ops.aten, name)(*arguments)
    assert found is not None
    assert (found.shape, found.dtype, found.stride()) == (own.shape, own.dtype, own.stride())


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_all_else_is_left_to_torch(case: tuple[Any, ...]) -> None:
    name, *arguments = case
    assert made_like_first(name, arguments, {}) is None


def test_named_operands_are_left_to_torch() -> None:
    assert made_like_first("div", (FIRST, 2.0), {"rounding_mode": "floor"}) is None


# Experts in a stack, gated delta nets, a state space, tied heads.
@pytest.mark.parametrize("family", ["mixtral", "qwen3_5", "mamba", "gpt2"])
def test_a_tree_without_values_and_its_use_are_those_of_torch_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        made = families_of_models.empty_tiny_model(family)
    with without_values():
        spared = type(made)(made.config)
    assert described(spared) == described(made)
    quick = usage_of(spared)
    monkeypatch.setattr(usage, "made_like_first", lambda *given: None)
    assert quick == usage_of(made)


def described(model: nn.Module) -> dict[str, Any]:
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors}


def test_what_has_values_is_filled_as_ever() -> None:
    with without_values():
        values = nn.init.ones_(torch.zeros(3, device="cpu"))
    assert values.tolist() == [1.0, 1.0, 1.0]
