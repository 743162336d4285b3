"""Pruning: exactly as many weights as the scheme says, the right ones, at sizes counted to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtmsearch.core.schemes import Pruning, parse_scheme
from dtmsearch.model.compress.pruning import Pruner, row_cuts, wanda_keys
from dtmsearch.model.compress.rounding import round_weight

shares = st.sampled_from(["0.001", "0.05", "0.25", "0.5", "0.55", "0.85", "0.999"])
patterns = st.integers(2, 9).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))
shapes = st.tuples(st.integers(1, 12), st.integers(1, 40))


def pruning(name: str) -> Pruning:
    found = parse_scheme(name).pruning
    assert found is not None
    return found


def weights(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random weights of few values, so that there are ties, none of them zero."""
    values = np.random.default_rng(seed).integers(1, 9, size=shape) * np.random.default_rng(seed).choice([-1, 1], shape)
    return torch.from_numpy(values / 8).to(dtype)


def prune(weight: Tensor, name: str, component: str = "c") -> Tensor:
    return Pruner().prune(component, weight, pruning(name))


def literal_magnitude(weight: Tensor, count: int) -> list[int]:
    """Positions of the pruned weights: smallest first, ties by position."""
    values = weight.float().abs().reshape(-1).tolist()
    return sorted(sorted(range(len(values)), key=lambda at: (values[at], at))[:count])


def zeros(weight: Tensor) -> list[int]:
    positions: list[int] = (weight.reshape(-1) == 0).nonzero().squeeze(1).tolist()
    return positions


@given(shape=shapes, share=shares, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_magnitude_prunes_the_smallest_and_ties_by_position(
    shape: tuple[int, int], share: str, seed: int, dtype: torch.dtype
) -> None:
    weight = weights(shape, seed, dtype)
    count = round(float(share) * weight.numel())
    assert zeros(prune(weight, f"magnitude-{share}")) == literal_magnitude(weight, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_magnitude_keeps_is_kept_bit_by_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(31, 57, generator=torch.Generator().manual_seed(0)).to(dtype)
    pruned = prune(weight, "magnitude-0.35")
    assert pruned[pruned != 0].tolist() == weight[pruned != 0].tolist()


def test_close_weights_of_one_bin_are_told_apart() -> None:
    weight = 1.0 + torch.arange(64, dtype=torch.float32).flip(0).reshape(8, 8) * 2**-23
    assert zeros(prune(weight, "magnitude-0.25")) == list(range(48, 64))


def test_all_shares_of_a_component_follow_from_one_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtmsearch.model.compress import pruning as module

    made, make = [], module.histogram
    monkeypatch.setattr(module, "histogram", lambda keys: made.append(1) or make(keys))
    pruner, weight = Pruner(), torch.randn(16, 16)
    for share in ("0.1", "0.5", "0.9"):
        pruner.prune("c", weight, pruning(f"magnitude-{share}"))
    assert len(made) == 1


@given(shape=shapes, pattern=patterns, seed=st.integers(0, 99))
def test_a_pattern_keeps_the_largest_of_every_group(
    shape: tuple[int, int], pattern: tuple[int, int], seed: int
) -> None:
    weight, (kept, of) = weights(shape, seed), pattern
    expected = [
        row * shape[1] + start + at
        for row in range(shape[0])
        for start in range(0, shape[1], of)
        for group in [weight[row : row + 1, start : start + of]]
        for at in literal_magnitude(group, max(0, group.numel() - kept))
    ]
    assert zeros(prune(weight, f"magnitude-{kept}:{of}")) == sorted(expected)


@given(shape=shapes, amount=st.one_of(shares, patterns.map(lambda p: f"{p[0]}:{p[1]}")), seed=st.integers(0, 99))
@pytest.mark.parametrize("saliency", ["magnitude", "random"])
def test_as_many_weights_are_zero_as_the_scheme_says(
    saliency: str, shape: tuple[int, int], amount: str, seed: int
) -> None:
    name = f"{saliency}-{amount}"
    assert len(zeros(prune(weights(shape, seed), name))) == parse_scheme(name).pruned_weights(shape)


def test_chance_is_the_same_again() -> None:
    weight = torch.ones(20, 30)
    assert zeros(prune(weight, "random-0.1")) == zeros(prune(weight, "random-0.1"))


def test_chance_differs_between_components() -> None:
    weight = torch.ones(20, 30)
    assert zeros(prune(weight, "random-0.1", "a")) != zeros(prune(weight, "random-0.1", "b"))


def test_chance_differs_between_schemes() -> None:
    weight = torch.ones(20, 30)
    assert not set(zeros(prune(weight, "random-0.1"))) <= set(zeros(prune(weight, "random-0.2")))


def test_chance_is_drawn_anew_by_another_seed() -> None:
    masks = [zeros(prune(torch.ones(20, 30), name)) for name in ("random-0.1", "random-0.1-s0", "random-0.1-s1")]
    assert len({frozenset(mask) for mask in masks}) == 3 and {len(mask) for mask in masks} == {60}


def test_chance_spreads_evenly() -> None:
    pruned = prune(torch.ones(100, 1000), "random-0.1") == 0
    per_row = pruned.sum(dim=1).double()
    assert (abs(per_row.mean().item() - 100), per_row.std().item() < 15) == (0, True)


@given(shape=shapes, seed=st.integers(0, 99), data=st.data())
def test_rows_are_pruned_alike(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    weight = weights(shape, seed)
    count = data.draw(st.integers(0, shape[1]))
    keys = weight.abs().view(torch.int32)
    mask = row_cuts(keys, count).mask(keys)
    assert [r.nonzero().squeeze(1).tolist() for r in mask] == [literal_magnitude(r, count) for r in weight]


@pytest.mark.parametrize("quantizer", ["int2-g8", "int4-g7-asym", "int3-channel-asym", "int8-tensor"])
def test_a_quantizer_keeps_zeros_exactly(quantizer: str) -> None:
    pruned = prune(torch.randn(9, 40) + 0.3, "magnitude-0.5")
    rounded = round_weight(pruned, parse_scheme(quantizer))
    assert set(zeros(pruned)) <= set(zeros(rounded))


def test_wanda_prunes_by_weight_times_input_norm_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, mean_squares = torch.randn(7, 30, generator=generator), torch.rand(30, generator=generator)
    pruned = Pruner().prune("c", weight, pruning("wanda-0.4"), mean_squares)
    expected = [
        sorted(sorted(range(30), key=lambda j: abs(float(row[j])) * float(mean_squares[j]) ** 0.5)[:12])
        for row in weight
    ]
    assert [(row == 0).nonzero().squeeze(1).tolist() for row in pruned] == expected


def test_wanda_s_patterns_weigh_inputs() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pruned = Pruner().prune("c", weight, pruning("wanda-2:4"), torch.tensor([100.0, 1.0, 100.0, 1.0]))
    assert pruned.tolist() == [[1.0, 0.0, 3.0, 0.0]]


def test_wanda_again_is_the_same() -> None:
    pruner, weight, mean_squares = Pruner(), weights((9, 40)), torch.ones(40)
    first = pruner.prune("c", weight, pruning("wanda-0.35"), mean_squares).tolist()
    assert pruner.prune("c", weight, pruning("wanda-0.35"), mean_squares).tolist() == first


def test_keys_order_as_saliencies_do() -> None:
    weight = torch.randn(4, 50)
    saliency = weight.abs() * 3.0
    keys = wanda_keys(weight, torch.full((50,), 9.0))
    assert keys.argsort(dim=1, stable=True).tolist() == saliency.argsort(dim=1, stable=True).tolist()
