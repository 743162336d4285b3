"""GPTQ and SparseGPT against their papers' algorithms, written out column by column; and what is packed of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtmsearch.core.calibration import PackedMatrix
from dtmsearch.core.schemes import Pruning, Scheme, parse_scheme
from dtmsearch.model.compress import gptq
from dtmsearch.model.compress.gptq import Job, Solved, inverse_factor, solve
from dtmsearch.model.compress.packing import pack, packed_codes, unpack
from dtmsearch.model.compress.rounding import round_weight


def world(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix, and the Hessian of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mixing = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * cols, cols, generator=generator, dtype=torch.float64) @ mixing
    return weight, inputs.T @ inputs / len(inputs)


def literal(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme | None,
    kept: Tensor | None = None,
    pruning: Pruning | None = None,
    block: int = 128,
) -> Tensor:
    """arXiv 2210.17323, algorithm 1, without lazy batches: H^-1 is taken afresh over the columns that are left, as
    equation 3 has it. Pruned as by arXiv 2301.00774, algorithm 1."""
    rows, cols = weight.shape
    left = weight.clone()
    keep = torch.ones(rows, cols, dtype=torch.bool) if kept is None else kept.clone()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    out = torch.zeros_like(left)
    conditional = torch.tensor([torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(cols)], dtype=torch.float64)
    grid = None
    whole = scheme is not None and scheme.group_size == 0
    if whole:
        grid = fit(left * keep, scheme)
    for j in range(cols):
        if pruning is not None and pruning.pattern is None and j % block == 0:
            stop = min(j + block, cols)
            saliency = (left[:, j:stop] ** 2 / conditional[j:stop]).reshape(-1)
            count = pruning.pruned_weights((rows, stop)) - pruning.pruned_weights((rows, j))
            chosen = torch.ones(saliency.numel(), dtype=torch.bool)
            chosen[saliency.argsort(stable=True)[:count]] = False
            keep[:, j:stop] = chosen.reshape(rows, -1)
        if pruning is not None and pruning.pattern is not None and j % pruning.pattern[1] == 0:
            n, m = pruning.pattern
            stop = min(j + m, cols)
            for r in range(rows):
                saliency = left[r, j:stop] ** 2 / conditional[j:stop]
                for at in saliency.argsort(stable=True)[: max(0, stop - j - n)].tolist():
                    keep[r, j + at] = False
        if scheme is not None and not whole and j % scheme.group_size == 0:
            span = slice(j, j + scheme.group_size)
            grid = fit(left[:, span] * keep[:, span], scheme)
        inverse = torch.linalg.inv(damped[j:, j:])
        for r in range(rows):
            value = left[r, j] if grid is None else nearest(left[r, j], grid, r)
            value = value if keep[r, j] else torch.tensor(0.0, dtype=torch.float64)
            loss = (left[r, j] - value) / inverse[0, 0]
            left[r, j:] -= loss * inverse[0]
            out[r, j] = value
    return out


def fit(block: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, int, int]:
    """Scale and zero point of each row, and the first and last code."""
    low, high = block.amin(dim=1).clamp(max=0.0), block.amax(dim=1).clamp(min=0.0)
    if scheme.granularity == "tensor":
        low, high = low.min().expand(len(block)), high.max().expand(len(block))
    if scheme.asymmetric:
        last = 2**scheme.bits - 1
        scale = ((high - low) / last).to(torch.float16).double()
        return scale, (-low / scale).round().clamp(0, last), 0, last
    first, last = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    scale = (torch.maximum(high, -low) / ((last - first) / 2)).to(torch.float16).double()
    return scale, torch.zeros_like(scale), first, last


def nearest(value: Tensor, grid: tuple[Tensor, Tensor, int, int], row: int) -> Tensor:
    scale, zero, first, last = grid
    return ((value / scale[row]).round() + zero[row]).clamp(first, last).sub(zero[row]) * scale[row]


def job(weight: Tensor, name: str, kept: Tensor | None = None) -> Job:
    scheme = parse_scheme(name)
    quantizer = scheme if scheme.bits else None
    own = scheme.pruning is not None and scheme.pruning.saliency == "sparsegpt"
    return Job(weight, quantizer, kept, scheme.pruning if own else None)


def dense(solved: Solved) -> Tensor:
    if solved.codes is not None:
        return solved.codes.dense(torch.float64)
    assert solved.weight is not None
    return solved.weight


NAMES = [
    *("gptq-int3-g8", "gptq-int4-g8-asym", "gptq-int2-channel", "gptq-int4-channel-asym", "gptq-int3-tensor"),
    *("gptq-int4-g20", "sparsegpt-0.5", "sparsegpt-2:4", "gptq-int4-g8+sparsegpt-0.5", "gptq-int4-g20+sparsegpt-2:4"),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_blocked_sweep_is_the_paper_s_algorithm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BLOCK", 16)
    weight, hessian = world(5, 44)
    scheme = parse_scheme(name)
    block = 16 if scheme.group_size != 20 else 20
    found = dense(solve([job(weight, name)], inverse_factor(hessian))[0])
    own = scheme.pruning if scheme.pruning and scheme.pruning.saliency == "sparsegpt" else None
    expected = literal(weight, hessian, scheme if scheme.bits else None, None, own, block)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_pruned_weights_stay_zero_through_gptq() -> None:
    weight, hessian = world(6, 40)
    kept = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    found = dense(solve([job(weight, "gptq-int4-g8-asym", kept)], inverse_factor(hessian))[0])
    expected = literal(weight, hessian, parse_scheme("gptq-int4-g8-asym"), kept)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert (found[~kept] == 0).all()


@pytest.mark.parametrize("name", ["gptq-int4-g8", "gptq-int4-channel", "gptq-int3-g8-asym"])
def test_what_pruning_loses_is_made_up_for_by_what_is_kept(name: str) -> None:
    weight, hessian = world(16, 64)
    kept = weight.abs() > weight.abs().median()
    carried = dense(solve([job(weight, name, kept)], inverse_factor(hessian))[0])
    lost = dense(solve([job(weight * kept, name, kept)], inverse_factor(hessian))[0])
    assert output_error(weight, carried, hessian) < output_error(weight, lost, hessian)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1e-5, 1e-6, 1e-9])
def test_small_weights_lose_no_more_than_large_ones(size: float, dtype: torch.dtype) -> None:
    weight, hessian = world(24, 64)
    factor, scheme = inverse_factor(hessian.float()), "gptq-int8-channel"
    errors = []
    for factor_of_size in (1.0, size):
        own = (weight * factor_of_size).to(dtype)
        found = dense(solve([job(own, scheme)], factor)[0])
        errors.append(output_error(own.double(), found, hessian) / output_error(own.double(), 0 * found, hessian))
    assert errors[1] < 1.2 * errors[0]


def test_small_weights_of_a_float16_model_are_not_lost() -> None:
    weight, hessian = world(24, 64)
    own = (weight * 1e-6).half()
    found = dense(solve([job(own, "gptq-int8-channel")], inverse_factor(hessian.float()))[0])
    # Codes are as many as float16 has numbers there: rounding to them is not beaten, nor is more lost.
    assert output_error(own.double(), found, hessian) < 0.01 * output_error(own.double(), 0 * found, hessian)


def test_scales_of_small_weights_come_back_as_they_were_packed() -> None:
    weight, hessian = world(5, 32)
    solved = solve([job((weight * 1e-7).float(), "gptq-int4-g8")], inverse_factor(hessian.float()))[0]
    packed = pack("c", "gptq-int4-g8", solved, torch.float32)
    assert solved.codes is not None
    assert packed_codes(packed, torch.device("cpu")).dense(torch.float32).tolist() == dense(solved).float().tolist()


def test_a_matrix_packed_when_the_lowest_code_was_not_used_reads_the_same() -> None:
    before = np.array([0, 7, 14], np.uint8)  # 0 was -7 then
    packed = PackedMatrix(
        "c",
        "gptq-int4-channel",
        (1, 3),
        4,
        3,
        "float16",
        codes=np.array([before[0] | before[1] << 4, before[2]], np.uint8),
        scales=np.array([1.0], np.float16).view(np.uint8),
        zeros=np.empty(0, np.uint8),
        mask=np.empty(0, np.uint8),
    )
    assert unpack(packed, torch.float32, torch.device("cpu")).tolist() == [[-7.0, 0.0, 7.0]]


def test_jobs_beside_each_other_are_solved_as_alone() -> None:
    first, hessian = world(5, 300)
    second = world(7, 300, seed=1)[0]
    factor = inverse_factor(hessian.float())
    first, second = first.float(), second.float()
    names = [*NAMES, "gptq-int8-g8", "sparsegpt-0.25"]
    jobs = [job(weight, name) for weight in (first, second) for name in names]
    together = [dense(s) for s in solve(jobs, factor)]
    alone = [dense(solve([one], factor)[0]) for one in jobs]
    assert [found.tolist() for found in together] == [expected.tolist() for expected in alone]


@pytest.mark.parametrize("name", ["int4-g8", "int3-g8-asym", "int5-channel", "int4-tensor-asym"])
def test_independent_inputs_make_gptq_rounding(name: str) -> None:
    weight = world(6, 32)[0].float()
    found = solve([job(weight, f"gptq-{name}")], inverse_factor(torch.eye(32)))[0].codes
    assert found is not None
    assert found.dense(torch.float32).tolist() == round_weight(weight, parse_scheme(name), torch.float16).tolist()


def output_error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    change = weight - other
    return float(((change @ hessian) * change).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_errs_less_than_rounding_where_it_counts(bits: int) -> None:
    weight, hessian = world(16, 64)
    found = dense(solve([job(weight, f"gptq-int{bits}-g16")], inverse_factor(hessian))[0])
    rounded = round_weight(weight.float(), parse_scheme(f"int{bits}-g16")).double()
    assert output_error(weight, found, hessian) < output_error(weight, rounded, hessian)


@given(rows=st.integers(1, 9), cols=st.integers(1, 50), amount=st.sampled_from(["0.1", "0.5", "0.75", "2:4", "1:3"]))
@settings(max_examples=30, deadline=None)
def test_sparsegpt_prunes_exactly_as_many_as_it_says(rows: int, cols: int, amount: str) -> None:
    weight, hessian = world(rows, cols)
    kept = solve([job(weight, f"sparsegpt-{amount}")], inverse_factor(hessian))[0].kept
    assert kept is not None
    assert int((~kept).sum()) == parse_scheme(f"sparsegpt-{amount}").pruned_weights((rows, cols))


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    weight, hessian = world(4, 16)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    found = dense(solve([job(weight, "gptq-int8-channel")], inverse_factor(hessian))[0])
    assert (found - weight).abs().max() < 0.1


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.nan))


# Packed.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_is_what_was_solved(name: str, dtype: torch.dtype) -> None:
    weight, hessian = world(5, 43)
    solved = solve([job(weight.to(dtype), name)], inverse_factor(hessian.float()))[0]
    packed = pack("c", name, solved, dtype)
    expected = solved.weight if solved.codes is None else solved.codes.dense(dtype)
    assert expected is not None
    assert unpack(packed, dtype, torch.device("cpu")).tolist() == expected.to(dtype).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_matrix_is_as_large_as_its_size_says(name: str) -> None:
    weight, hessian = world(16, 48)
    scheme = parse_scheme(name)
    packed = pack("c", name, solve([job(weight.bfloat16(), name)], inverse_factor(hessian.float()))[0], torch.bfloat16)
    if scheme.bits:  # every weight has a code here; zeros are codes like others; a zero point takes a byte
        quantizer = parse_scheme(scheme.quantizer or name)
        zeros = quantizer.num_scales((16, 48)) * (8 - scheme.bits) if scheme.asymmetric else 0
        assert packed.num_bytes * 8 == quantizer.stored_bits((16, 48), 16) + zeros
    else:
        kept = 16 * 48 - scheme.pruned_weights((16, 48))
        assert packed.num_bytes * 8 == kept * 16 + 16 * 48


@given(bits=st.integers(2, 8), shape=st.tuples(st.integers(1, 7), st.integers(1, 33)), data=st.data())
def test_codes_come_back_bit_by_bit(bits: int, shape: tuple[int, int], data: st.DataObject) -> None:
    from dtmsearch.model.compress.rounding import Codes

    values = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2**bits, shape)
    codes = Codes(
        torch.from_numpy(values).to(torch.uint8),
        torch.ones(shape[0], 1),
        torch.zeros(shape[0], 1, dtype=torch.uint8),
        shape[1],
        bits,
    )
    packed = pack("c", f"gptq-int{bits}-channel-asym", Solved(codes, None, None), torch.float32)
    assert packed_codes(packed, torch.device("cpu")).codes.tolist() == values.tolist()
