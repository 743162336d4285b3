"""Powers of two that the columns of a matrix are multiplied by before it is rounded, and what it reads divided by: so
that the inputs which matter most lose least (AWQ), or those that stand out weigh less on a token's scale (SmoothQuant).

A factor that is no power of two would be rounded once more wherever an export folds it into what stands before; these
are exact in every floating-point dtype, so that what is measured is what a folder holds. Pure functions of the weights
and of mean squares of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# AWQ's exponents of the inputs' sizes, and where between two powers of two a factor goes up.
_EXPONENTS, _OFFSETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0), (0.0, 0.25, 0.5, 0.75)
# SmoothQuant's share of what is moved from inputs to weights (arXiv 2211.10438, section 4: 0.5).
_MOVED = 0.5
# Binades up or down at most, which no dtype's range is left by.
_MOST = 8
# Rows of a matrix by which exponents are told apart: rounding treats each by itself.
_SAMPLED_ROWS = 256


def awq_scales(weights: Sequence[Tensor], mean_squares: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Factors [cols] of `weights` [rows, cols], which all read inputs of `mean_squares` [cols]: a power of the inputs'
    root mean squares, near powers of two (arXiv 2306.00978, section 3.2, has their mean sizes). Of a grid of exponents
    and offsets those with the least squared error of outputs, as if inputs were independent; 1 where none is better.
    `rounded` gives weights after rounding."""
    sampled = [_sample(weight.float()) for weight in weights]
    squares = mean_squares.to(sampled[0].device).double()

    def error(scales: Tensor) -> float:
        found = 0.0
        for weight in sampled:
            moved = rounded(weight * scales).float().div_(scales).sub_(weight)
            found += float(moved.square_().sum(dim=0, dtype=torch.float64) @ squares)
        return found

    best = torch.ones(len(mean_squares), device=sampled[0].device)
    least = error(best)
    for scales in _candidates(mean_squares):
        own = scales.to(best.device)
        if (found := error(own)) < least:
            best, least = own, found
    return best


def smooth_scales(weights: Sequence[Tensor], mean_squares: Tensor) -> Tensor:
    """Factors [cols] of `weights` [rows, cols], which all read inputs of `mean_squares` [cols]: the root of an input's
    root mean square over the largest weight that multiplies it, near powers of two (arXiv 2211.10438, equation 4, has
    the largest inputs)."""
    largest = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0).double().cpu()
    inputs = _sizes(mean_squares)
    known = (largest > 0) & (inputs > 0)
    logs = torch.where(known, _MOVED * inputs.log2() - (1 - _MOVED) * largest.log2(), torch.nan)
    return _powers(logs, 0.5).to(weights[0].device)


def _candidates(mean_squares: Tensor) -> Iterator[Tensor]:
    sizes = _sizes(mean_squares)
    logs = torch.where(sizes > 0, sizes.log2(), torch.nan)
    for exponent in _EXPONENTS:
        for offset in _OFFSETS:
            yield _powers(exponent * logs, offset)


def _sizes(mean_squares: Tensor) -> Tensor:
    """Root mean squares, on the CPU, where every machine has the same logarithms of them."""
    return mean_squares.double().cpu().sqrt()


def _powers(logs: Tensor, offset: float) -> Tensor:
    """Powers of two [cols], float32, whose exponents are `logs` around the middle one, rounded down from `offset` more;
    1 where a logarithm is not known."""
    middle = logs.nanmedian()
    exponents = torch.floor(logs - middle + offset).clamp_(-_MOST, _MOST).nan_to_num_(nan=0.0)
    return torch.exp2(exponents).float()


def _sample(weight: Tensor) -> Tensor:
    """Rows of a matrix, evenly spread."""
    step = -(-len(weight) // _SAMPLED_ROWS)
    return weight[::step]
