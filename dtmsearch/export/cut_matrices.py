"""Matrices of blocks that a plan cuts, as a smaller checkpoint has them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dtmsearch.core.components import Component
from dtmsearch.core.widths import side_of
from dtmsearch.errors import UserError
from dtmsearch.export.job import Job
from dtmsearch.model.compress.width import indices


@dataclass(frozen=True)
class CutMatrix:
    """A matrix of a block that is cut: the rows or columns that stay, and what it is then where it was repaired."""

    matrix: Component
    at: Tensor
    repaired: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.matrix.shape
        return (len(self.at), cols) if side_of(self.matrix) == "rows" else (rows, len(self.at))

    def shape_of(self, parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one of its parameters."""
        if parameter == "weight":
            return self.shape[::-1] if self.matrix.transposed else self.shape
        return (len(self.at),) if side_of(self.matrix) == "rows" else shape

    def of(self, tensor: str, values: Tensor) -> Tensor:
        """One of its tensors."""
        rows, at = side_of(self.matrix) == "rows", self.at.to(values.device)
        if values.ndim < 2:
            return values[at] if rows else values
        if rows:
            return (values[:, at] if self.matrix.transposed else values[at]).contiguous()
        if self.repaired is not None:
            made = self.repaired.to(values)
            return made.t().contiguous() if self.matrix.transposed else made
        return (values[at] if self.matrix.transposed else values[:, at]).contiguous()


def what_stays(job: Job, matrix: Component) -> tuple[Tensor, Tensor | None]:
    """The rows or columns of a matrix that stay, and what it is where it was repaired."""
    scheme = job.plan.widths[matrix.block]
    assert scheme.width is not None
    units = scheme.width.units(matrix)
    if job.trained is not None:
        return indices(matrix, _held_at_zero(job, matrix.block, scheme.width.left(units), units), units), None
    try:
        cut = job.compressor.cut(matrix.block, scheme, units, job.device)
    except ValueError as error:
        raise UserError(f"{error}: the store does not hold it") from error
    return indices(matrix, cut.kept, units), cut.last if side_of(matrix) == "cols" else None


def _held_at_zero(job: Job, block: str, left: int, units: int) -> Tensor:
    """The units that stay of a block whose others training has held at zero: by the columns of its last matrix."""
    last = [c for c in job.manifest.components if c.block == block][-1]
    there = (job.matrix(last) != 0).any(0).reshape(units, -1).any(1)
    if int(there.sum()) > left:
        raise UserError(f"the trained weights {job.weights_id} have {int(there.sum())} units in {block}, wanted {left}")
    return there.int().argsort(stable=True)[units - left :].sort().values


def tensors_of_cut(job: Job, matrix: Component) -> list[str]:
    """The tensors in the files of a matrix that is cut: its weights and its bias."""
    found = job.tensors_of(matrix.name)
    if len(found) != 1:
        raise UserError(
            f"{matrix.name} cannot be cut in files: they hold it in {len(found)} tensors, and the model in one. Export "
            "--to json keeps the plan"
        )
    bias = found[0].removesuffix("weight") + "bias"
    return [found[0], *([bias] if bias in job.shapes else [])]
