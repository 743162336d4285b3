"""Models without values: what is spared of making them and of running them changes nothing of what is found."""

from __future__ import annotations

from typing import Any

import families_of_models
import pytest
import torch
from torch import Tensor, nn

from dtmsearch.model.modules import usage
from dtmsearch.model.modules.compat import leaves_of
from dtmsearch.model.modules.empty import made_again, made_like_first, without_values
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


def test_what_was_made_before_is_made_again_with_memory_of_its_own() -> None:
    rows, table = torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta").bfloat16()
    cases: list[tuple[Any, ...]] = [
        ("sum", rows),
        ("sum", rows.t()),
        ("sum", rows.bfloat16()),
        ("topk", rows, 2),
        ("topk", rows, 1),
        ("cat", [rows, rows.t().contiguous().t()]),
        ("index", table, [torch.empty(5, dtype=torch.long, device="meta")]),
        ("split_with_sizes", rows, [1, 2], 1),
        ("t", rows),
    ]
    for name, *given in cases:
        func = getattr(torch.ops.aten, name)
        twice = [made_again(name, func, given, {}) for _ in range(2)]
        for found in twice:
            assert shapes_of(found) == shapes_of(func(*given)), name
        memory = [{t.untyped_storage()._cdata for t in leaves_of([found])} for found in twice]
        assert (memory[0] == memory[1]) == (name in ("split_with_sizes", "t")), name  # views of what was given
    assert made_again("zero_", torch.ops.aten.zero_, [rows], {}) is made_again(
        "zero_", torch.ops.aten.zero_, [rows], {}
    )


def shapes_of(made: Any) -> list[tuple[Any, ...]]:
    return [(type(made) in (list, tuple), t.shape, t.stride(), t.dtype) for t in leaves_of([made])]


def test_values_are_computed_each_time() -> None:
    assert [made_again("neg", torch.ops.aten.neg, [torch.tensor(x)], {}).item() for x in (1, 2)] == [-1, -2]


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
    again = usage_of(spared)
    monkeypatch.setattr(usage, "made_again", lambda name, func, args, named: func(*args, **named))
    assert quick == again == usage_of(made)


def described(model: nn.Module) -> dict[str, Any]:
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors}


def test_what_has_values_is_filled_as_ever() -> None:
    with without_values():
        values = nn.init.ones_(torch.zeros(3, device="cpu"))
    assert values.tolist() == [1.0, 1.0, 1.0]
