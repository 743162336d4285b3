"""GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774): columns are quantized or pruned one after the other, and
what each loses is made up for by those that follow, as the inverse Hessian of the component's outputs says.

Rows do not depend on each other, so all matrices that read one input are solved in one sweep over its columns, every
bit width and share of theirs beside each other. The working matrix is transposed: [inputs, rows of all jobs].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtmsearch.core.schemes import Pruning, Scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.rounding import Codes, code_range, row_scales, scale_steps, stored_scales

# Columns that are solved before what they lost is carried to all others at once; SparseGPT chooses what it prunes
# for as many at a time (arXiv 2301.00774, section 3.3).
BLOCK = 128
# Below it float16 holds a scale in seven bits or fewer, where bfloat16 still has eight.
_LEAST_FLOAT16_SCALE = 2.0**-17
# Added to the diagonal, as a part of its mean (arXiv 2210.17323, section 3.3); ten times as much where that is too
# little.
_DAMPING = 0.01


@dataclass(frozen=True)
class Job:
    """A matrix `weight` [rows, cols] to be quantized by `quantizer` (None: not quantized) and pruned: where `kept`
    [rows, cols] is False or, where `pruning` is given, by SparseGPT's saliency. What pruning loses is made up for by
    the columns that follow either way, as what rounding loses is (arXiv 2301.00774, section 3.5)."""

    weight: Tensor
    quantizer: Scheme | None
    kept: Tensor | None = None
    pruning: Pruning | None = None

    @property
    def sweep(self) -> tuple[int, bool, bool]:
        """What jobs of one sweep have in common: inputs to a scale (0: a row's), whether they are quantized, whether
        anything of them is pruned."""
        group = 0 if self.quantizer is None else self.quantizer.group_size
        return group, self.quantizer is not None, self.kept is not None or self.pruning is not None


@dataclass(frozen=True)
class Solved:
    """What became of a job: its codes, or the pruned matrix [rows, cols]; `kept` where anything was pruned."""

    codes: Codes | None
    weight: Tensor | None
    kept: Tensor | None


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse, U^T U = (H + damping)^-1.

    Raises `UserError` for a Hessian that is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise UserError("the inputs of the component over the calibration text are not finite")
    mean = hessian.diagonal().mean().clamp_(min=torch.finfo(hessian.dtype).tiny)
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING, 1000 * _DAMPING):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not bool(failed):
                result: Tensor = upper
                return result
    raise UserError("the Hessian of the component's inputs is singular even with damping: is the text too short?")


def solve(jobs: Sequence[Job], factor: Tensor) -> list[Solved]:
    """Solve jobs over matrices that read one input; `factor` [cols, cols] is the `inverse_factor` of its Hessian.

    Each comes out as it would alone, to the last bit.
    """
    solved: dict[int, Solved] = {}
    for shared in dict.fromkeys(job.sweep for job in jobs):
        numbers = [number for number, job in enumerate(jobs) if job.sweep == shared]
        together = _Sweep([jobs[number] for number in numbers], factor)
        solved |= zip(numbers, together.run(), strict=True)
    return [solved[number] for number in range(len(jobs))]


class _Sweep:
    """Jobs beside each other on their way over the columns."""

    def __init__(self, jobs: Sequence[Job], factor: Tensor) -> None:
        self._jobs, self._factor = jobs, factor
        self._group, quantizes, prunes = jobs[0].sweep
        self._cols = factor.shape[0]
        ends = torch.tensor([job.weight.shape[0] for job in jobs]).cumsum(0).tolist()
        self._rows = [slice(end - job.weight.shape[0], end) for end, job in zip(ends, jobs, strict=True)]
        self._work = torch.cat([job.weight.to(factor.dtype) for job in jobs]).T.contiguous()
        self._kept = torch.cat([_kept_at_first(job) for job in jobs]).T.contiguous() if prunes else None
        self._grid = _Grid(jobs, self._rows, self._work, self._kept) if quantizes else None

    def run(self) -> list[Solved]:
        for start, stop in _blocks(self._cols, self._group):
            losses = self._solve_block(start, stop)
            carried = self._factor[start:stop, stop:].T.contiguous()
            for rows in self._rows:  # one by one: what a product comes to must not depend on who is solved beside it
                self._work[stop:, rows] -= carried @ losses[:, rows].contiguous()
        return [self._result(number) for number in range(len(self._jobs))]

    def _solve_block(self, start: int, stop: int) -> Tensor:
        """Settle the columns of a block; their losses [columns, rows], each over its factor's diagonal."""
        losses = torch.empty_like(self._work[start:stop])
        self._choose_shares(start, stop)
        for at in range(start, stop):
            self._choose_patterns(at)
            if self._group and at % self._group == 0 and self._grid is not None:
                self._grid.fit(self._work[at : at + self._group], self._kept_in(at, at + self._group))
            column, diagonal = self._work[at], self._factor[at, at]
            kept = None if self._kept is None else self._kept[at]
            settled = column if self._grid is None else self._grid.settle(column, at, kept)
            if self._grid is None and kept is not None:
                settled = column * kept
            torch.div(column - settled, diagonal, out=losses[at - start])
            self._work[at] = settled
            # In two steps: fused, some rows would be rounded once and others twice, by where they happen to lie.
            self._work[at + 1 : stop] -= self._factor[at, at + 1 : stop].unsqueeze(1) * losses[at - start]
        return losses

    def _kept_in(self, start: int, stop: int) -> Tensor | None:
        return None if self._kept is None else self._kept[start:stop]

    def _choose_shares(self, start: int, stop: int) -> None:
        """What SparseGPT prunes of a block, by w^2 over the inverse Hessian's diagonal: exactly as many over all blocks
        as the share of the whole matrix says."""
        for job, rows in self._by_saliency():
            if job.pruning is not None and job.pruning.pattern is None:
                height = rows.stop - rows.start
                upto = [job.pruning.pruned_weights((height, cols)) for cols in (start, stop)]
                saliency = self._saliency(start, stop, rows).reshape(-1)
                least = saliency.sort(stable=True).indices[: upto[1] - upto[0]]
                kept = torch.ones_like(saliency, dtype=torch.bool)
                kept[least] = False
                self._set_kept(start, stop, rows, kept.reshape(height, -1).T)

    def _choose_patterns(self, at: int) -> None:
        for job, rows in self._by_saliency():
            assert job.pruning is not None
            if job.pruning.pattern is not None and at % job.pruning.pattern[1] == 0:
                kept, of = job.pruning.pattern
                stop = min(at + of, self._cols)
                saliency = self._saliency(at, stop, rows)
                order = saliency.sort(dim=1, stable=True).indices
                mask = torch.ones_like(saliency, dtype=torch.bool)
                mask.scatter_(1, order[:, : max(0, stop - at - kept)], False)
                self._set_kept(at, stop, rows, mask.T)

    def _by_saliency(self) -> Iterator[tuple[Job, slice]]:
        return (pair for pair in zip(self._jobs, self._rows, strict=True) if pair[0].pruning is not None)

    def _saliency(self, start: int, stop: int, rows: slice) -> Tensor:
        """[rows, columns]"""
        scaled = self._work[start:stop, rows] / self._factor.diagonal()[start:stop, None]
        return scaled.square_().T.contiguous()

    def _set_kept(self, start: int, stop: int, rows: slice, kept: Tensor) -> None:
        assert self._kept is not None
        self._kept[start:stop, rows] = kept

    def _result(self, number: int) -> Solved:
        job, rows = self._jobs[number], self._rows[number]
        kept = None if self._kept is None else self._kept[:, rows].T
        if job.quantizer is None:
            return Solved(None, self._work[:, rows].T.to(job.weight.dtype), kept)
        assert self._grid is not None
        return Solved(self._grid.codes(number), None, kept)


def _kept_at_first(job: Job) -> Tensor:
    return torch.ones_like(job.weight, dtype=torch.bool) if job.kept is None else job.kept


def _blocks(cols: int, group: int) -> Iterator[tuple[int, int]]:
    """Blocks of columns: at most `BLOCK` of them, and a group of scales never begins inside one unless it also ends
    there, so that scales are found over columns that all earlier losses have reached."""
    if 0 < group < BLOCK:
        step = group * (BLOCK // group)
        yield from ((at, min(at + step, cols)) for at in range(0, cols, step))
        return
    for begin in range(0, cols, group or cols):
        end = min(begin + (group or cols), cols)
        yield from ((at, min(at + BLOCK, end)) for at in range(begin, end, BLOCK))


class _Grid:
    """The values that weights may take, of every row of every job; jobs may differ in bits and in having zero points.

    Codes lie between `bottom` and `top`; a weight is (code - zero) * scale, with scales of 16 bits.
    """

    def __init__(self, jobs: Sequence[Job], rows: Sequence[slice], work: Tensor, kept: Tensor | None) -> None:
        self._cols = work.shape[0]
        self._scale_dtypes = [scale_dtype(job) for job in jobs]
        schemes = [job.quantizer for job in jobs]
        assert all(scheme is not None for scheme in schemes), "jobs of a sweep quantize, or none does"
        self._schemes = [scheme for scheme in schemes if scheme is not None]
        self._rows = rows
        self._bottom = self._of_rows(work, lambda s: code_range(s)[0])
        self._top = self._of_rows(work, lambda s: code_range(s)[1])
        self._steps = self._of_rows(work, scale_steps)
        self._asymmetric = self._of_rows(work, lambda s: float(s.asymmetric)).bool()
        self._scales: list[Tensor] = []
        self._zeros: list[Tensor] = []
        self._codes = torch.empty(work.shape, dtype=torch.int16, device=work.device)
        if not any(scheme.group_size for scheme in self._schemes):
            self.fit(work, kept)

    def _of_rows(self, like: Tensor, value: Callable[[Scheme], float]) -> Tensor:
        filled = torch.empty_like(like[0])
        for scheme, rows in zip(self._schemes, self._rows, strict=True):
            filled[rows] = value(scheme)
        return filled

    def fit(self, columns: Tensor, kept: Tensor | None) -> None:
        """Scales and zero points for `columns` [columns, rows] as they are now, `kept` of them not yet to be zero."""
        if kept is not None:
            columns = columns * kept
        low, high = columns.amin(dim=0).clamp_(max=0.0), columns.amax(dim=0).clamp_(min=0.0)
        for scheme, rows in zip(self._schemes, self._rows, strict=True):
            if scheme.granularity == "tensor":
                low[rows], high[rows] = low[rows].min(), high[rows].max()
        span = torch.where(self._asymmetric, high - low, torch.maximum(high, -low))
        scale = span / self._steps
        for dtype, rows in zip(self._scale_dtypes, self._rows, strict=True):
            scale[rows] = stored_scales(scale[rows], dtype)
        zero = (-low / scale).round_().clamp_(min=torch.zeros_like(low), max=self._top)
        self._scales.append(scale)
        self._zeros.append(torch.where(self._asymmetric, zero, torch.zeros_like(zero)))

    def settle(self, column: Tensor, at: int, kept: Tensor | None) -> Tensor:
        """The nearest value on the grid to each weight of a column; zero where it is not kept."""
        scale, zero = self._scales[-1], self._zeros[-1]
        codes = (column / scale).round_().add_(zero).clamp_(min=self._bottom, max=self._top)
        codes = codes if kept is None else torch.where(kept, codes, zero)
        self._codes[at] = codes
        return codes.sub_(zero).mul_(scale)

    def codes(self, number: int) -> Codes:
        """The codes of a job's rows."""
        scheme, rows = self._schemes[number], self._rows[number]
        scales = torch.stack([scale[rows] for scale in self._scales], dim=1).float()
        zeros = torch.stack([zero[rows] for zero in self._zeros], dim=1).to(torch.uint8)
        if scheme.granularity == "tensor":
            scales, zeros = scales[:1], zeros[:1]
        return Codes(
            codes=self._codes[:, rows].T.to(torch.uint8 if scheme.asymmetric else torch.int8).contiguous(),
            scales=scales,
            zeros=zeros if scheme.asymmetric else None,
            block=scheme.group_size or self._cols,
            bits=scheme.bits,
            scale_dtype=self._scale_dtypes[number],
        )


def scale_dtype(job: Job) -> torch.dtype:
    """What a job's scales are stored in: 16 bits, as their size is counted. The model's own dtype where it has 16 bits;
    else float16, or bfloat16 where some scale of the weights is too small for float16."""
    if job.weight.dtype in (torch.float16, torch.bfloat16):
        return job.weight.dtype
    assert job.quantizer is not None
    scales = row_scales(job.weight if job.kept is None else job.weight * job.kept, job.quantizer)
    small = bool(((scales > 0) & (scales < _LEAST_FLOAT16_SCALE)).any())
    return torch.bfloat16 if small else torch.float16
