"""Which units of a block stay (channels of an MLP, groups of heads of an attention), and the fit of the last matrix to
them.

Matrices are [outputs, inputs]. The units are rows of all but the last matrix and columns of that one, as many of each
unit. Knows nothing of models or plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dtmsearch.core.calibration import PackedMatrix
from dtmsearch.core.widths import Cuttable, Width, is_stacked, side_of
from dtmsearch.errors import UserError
from dtmsearch.model.compress.gptq import Solved
from dtmsearch.model.compress.packing import pack, unpack
from dtmsearch.model.compress.pruning import random_keys

# Added to the diagonal of a Hessian, as a part of its mean, in whose direction fitted weights stay as they were.
_DAMPING = 1e-3
# ZipLM takes so many parts of the units out one after the other.
_PARTS = 192


@dataclass(frozen=True)
class Cut:
    """The units that stay, in their order, and the last matrix [outputs, inputs that stay] where it was repaired."""

    kept: Tensor
    last: Tensor | None = None


def packed_cut(block: str, scheme: str, columns: Tensor, shape: tuple[int, int], last: Tensor | None) -> PackedMatrix:
    """What stays of a block under a width, as it is stored: the last matrix of `shape` with zeros where it is cut or,
    where it was not repaired, one row that says which columns stay."""
    whole = torch.zeros(shape if last is not None else (1, shape[1]), device=columns.device)
    whole = whole if last is None else whole.to(last.dtype)
    kept = torch.zeros(whole.shape, dtype=torch.bool, device=columns.device)
    kept[:, columns] = True
    if last is not None:
        whole[:, columns] = last
    packed = pack(block, scheme, Solved(None, whole, kept), whole.dtype)
    return replace(packed, scale_dtype=str(whole.dtype).removeprefix("torch."))


def unpacked_cut(packed: PackedMatrix, units: int, device: torch.device) -> Cut:
    """The cut of `packed_cut`, of a block of so many units."""
    dtype: torch.dtype = getattr(torch, packed.scale_dtype)
    kept = columns_kept(packed, device)
    each = packed.shape[1] // units
    whole = unpack(packed, dtype, device) if packed.shape[0] > 1 else None
    return Cut(kept[::each] // each, None if whole is None else whole[:, kept].contiguous())


def columns_kept(packed: PackedMatrix, device: torch.device) -> Tensor:
    """The columns of the last matrix that stay."""
    row = np.unpackbits(packed.mask, count=packed.shape[1], bitorder="little")
    return torch.from_numpy(np.flatnonzero(row)).to(device)


def indices(matrix: Cuttable, kept: Tensor, units: int) -> Tensor:
    """The rows, or columns, of a matrix that belong to units that stay."""
    size = matrix.shape[0] if side_of(matrix) == "rows" else matrix.shape[1]
    if is_stacked(matrix):
        return torch.cat([kept, kept + size // 2])
    each = size // units
    return (kept[:, None] * each + torch.arange(each, device=kept.device)).reshape(-1)


def by_unit(values: Tensor, matrix: Cuttable, units: int) -> Tensor:
    """Sums [units] over a matrix's values [rows, cols] that belong to each."""
    return summed(values.sum(dim=1 if side_of(matrix) == "rows" else 0), matrix, units)


def summed(sums: Tensor, matrix: Cuttable, units: int) -> Tensor:
    """Sums [units] over the rows, or columns, of a matrix that belong to each."""
    return sums.reshape(2, units).sum(0) if is_stacked(matrix) else sums.reshape(units, -1).sum(1)


def magnitudes(weights: Sequence[tuple[Cuttable, Tensor]], units: int) -> Tensor:
    """Summed squares [units] of all weights of each unit."""
    return torch.stack([by_unit(weight.double().square(), matrix, units) for matrix, weight in weights]).sum(0)


def leverages(weights: Sequence[tuple[Cuttable, Tensor]], units: int) -> Tensor:
    """By how much [units] the spectra of a block's matrices move without each unit, to first order: the sum of w G^-1
    w' over its rows w (columns of the last matrix), where G is the sum of all w' w, its least directions damped. That
    is what the logarithms of the squared singular values lose in all. PruneNet (arXiv 2501.15296) judges what goes by
    spectra, too, without calibration; there a learnt policy chooses, by the distance of their distributions."""
    found = []
    for matrix, weight in weights:
        rows = weight.double() if side_of(matrix) == "rows" else weight.double().T
        solved = torch.cholesky_solve(rows.T, _factor(rows.T @ rows))
        found.append(summed((rows * solved.T).sum(1), matrix, units))
    return torch.stack(found).sum(0)


def activities(last: Tensor, mean_squares: Tensor, units: int) -> Tensor:
    """What each unit [units] adds to the block's output by itself, squared: the norm of its columns times that of their
    inputs, as Wanda weighs (arXiv 2306.11695)."""
    return (last.double().square().sum(0) * mean_squares.double()).reshape(units, -1).sum(1)


def first_by_inverse(last: Tensor, hessian: Tensor, units: int) -> Tensor:
    """All units in the order in which they go by ZipLM (arXiv 2302.04089, section 3.1): each time those that move the
    block's output least, once what stays has made up for them as well as it can."""
    each = last.shape[1] // units
    weight = last.double().clone()
    inverse = _inverse(hessian)
    there = torch.ones(units, dtype=torch.bool, device=last.device)
    gone: list[Tensor] = []
    at_once = max(1, units // _PARTS)
    while bool(there.any()):
        left = there.nonzero().squeeze(1)
        moved = _moved(weight, inverse, left, each)
        out = left[moved.argsort(stable=True)[:at_once]]
        gone.append(out)
        there[out] = False
        columns = (out[:, None] * each + torch.arange(each, device=last.device)).reshape(-1)
        rows = inverse[columns]
        solved = torch.linalg.solve(rows[:, columns], rows)
        weight -= weight[:, columns] @ solved
        inverse -= rows.T @ solved
    return torch.cat(gone)


def _moved(weight: Tensor, inverse: Tensor, left: Tensor, each: int) -> Tensor:
    """By how much [units left] the block's output moves without each unit, once what stays has made up for it: w
    (H^-1)_uu^-1 w', over the rows w of the unit's columns."""
    if each == 1:  # many units, of whose 1 x 1 blocks a batch of inverses takes most of the time
        return weight[:, left].square().sum(0) / inverse.diagonal()[left]
    columns = (left[:, None] * each + torch.arange(each, device=left.device)).reshape(-1)
    units = len(inverse) // each
    blocks = inverse.reshape(units, each, units, each)[left, :, left, :]
    own = weight[:, columns].reshape(len(weight), len(left), each)
    return torch.einsum("rue,uef,ruf->u", own, torch.linalg.inv(blocks), own)


def refitted(last: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """The last matrix over the columns that stay, whose outputs over the calibration text are nearest to those of the
    whole one: W' = (W H[:, kept] + d W[:, kept]) (H[kept, kept] + d)^-1, the least squares fit that a small d keeps
    near the weights as they were."""
    wide = hessian.double()
    damping = _DAMPING * float(wide.diagonal().mean())
    weight = last.double()
    inner = wide[columns][:, columns]
    inner.diagonal().add_(damping)
    target = weight @ wide[:, columns] + damping * weight[:, columns]
    factor, failed = torch.linalg.cholesky_ex(inner)
    if bool(failed):
        raise UserError("the inputs of the matrix over the calibration text are singular: is the text too short?")
    return torch.cholesky_solve(target.T, factor).T.to(last.dtype).contiguous()


def _inverse(hessian: Tensor) -> Tensor:
    if not bool(torch.isfinite(hessian).all()):
        raise UserError("the inputs of the matrix over the calibration text are not finite")
    return torch.cholesky_inverse(_factor(hessian))


def _factor(hessian: Tensor) -> Tensor:
    """The Cholesky factor of a damped sum of outer products."""
    damped = hessian.double().clone()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp_(min=torch.finfo(torch.float64).tiny))
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise UserError("the inputs of the matrix over the calibration text are singular: is the text too short?")
    return factor


def chosen(
    block: str,
    width: Width,
    weights: Mapping[str, tuple[Cuttable, Tensor]],
    mean_squares: Tensor | None = None,
    salience: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """The units of a block that stay, in their order: of `weights` (name -> matrix and values, in model order) by
    the width's rule; `salience` [units] is that of gradients, `order` [units] that of ZipLM. Of alike ones the later
    stay; those that are zero in the last matrix, as training leaves what was cut, go first."""
    every = list(weights.values())
    matrix, last = every[-1]
    units = width.units(matrix)
    count = width.left(units)
    if order is not None:
        return order[units - count :].sort().values
    if width.rule == "magnitude":
        scores = magnitudes(every, units)
    elif width.rule == "spectral":
        scores = leverages(every, units)
    elif width.rule == "random":
        scores = random_keys((units,), block, last.device).double() + 1.0
    elif width.rule == "wanda":
        assert mean_squares is not None
        scores = activities(last, mean_squares, units)
    else:
        assert salience is not None
        scores = salience.double()
    scores = scores * (by_unit(last.abs().double(), matrix, units) > 0.0)
    return scores.argsort(stable=True)[units - count :].sort().values
