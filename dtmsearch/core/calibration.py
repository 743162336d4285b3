"""What calibrated schemes are made from, and what comes of them: text, statistics of inputs, packed matrices, errors.

Values that cross process borders; arrays are numpy's. How they are computed stands in `dtmsearch.model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.identity import identity
from dtmsearch.core.numeric_mode import NumericMode

# Raise it when the same text would yield other statistics, or other matrices from them.
CALIBRATION_VERSION = 2

Through = Literal["base", "compressed"]
ByteArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Human text that the model reads, `tokens` [rows, length]: its components' inputs are what pruning and
    quantization are calibrated by. `through` says what the text has passed where a matrix is solved for: the layers
    below as they are in the `base` model, or `compressed` by the same scheme. `id` follows all of these, the model, and
    its numeric mode."""

    id: str
    manifest_id: str
    tokens: NDArray[np.int32]
    through: Through = "base"


def calibration_id(
    manifest_id: str, mode: NumericMode, tokens: NDArray[np.int32], through: Through = Calibration.through
) -> str:
    """Identity of a calibration: what determines every statistic gathered over it, and every matrix solved by it."""
    own = {"manifest": manifest_id, "mode": str(mode), "tokens": tokens.tolist(), "calibration": CALIBRATION_VERSION}
    return identity(own if through == "base" else own | {"through": through})


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Mean squares of every component's inputs over a calibration: component -> [cols]."""

    calibration_id: str
    mean_squares: Mapping[str, FloatArray]


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A component under a scheme that took solving for, as small as it is stored.

    Quantized: `codes` at `bits` each, bit by bit without gaps, rows first; `scales` and `zeros` as in
    `dtmsearch.model.compress.rounding.Codes`, `block` inputs to a scale. Pruned only: `mask`, one bit a weight, set
    where it is kept, and the kept weights' bytes as `codes` (`bits` of the model's own numbers). Arrays that a matrix
    does not have are empty. `scales` are 16-bit floats in `scale_dtype`, as raw bytes.
    """

    component: str
    scheme: str
    shape: tuple[int, int]
    bits: int
    block: int
    scale_dtype: str
    codes: ByteArray
    scales: ByteArray
    zeros: ByteArray
    mask: ByteArray

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes + self.mask.nbytes


@dataclass(frozen=True)
class ExpertUse:
    """How a text uses an expert of a mixture, and what a scheme does there.

    Of `num_tokens` it is given `tokens`; `routing_weight` is the mean over all of them, 0 for one that it is not given.
    `error` is the Frobenius norm of the change of the mixture's output over the text when this expert alone is under
    the scheme.
    """

    mixture: str
    expert: int
    scheme: str
    tokens: int
    num_tokens: int
    routing_weight: float
    error: float


@dataclass(frozen=True)
class WeightError:
    """How far a scheme moves a component's weights W by D, relative and squared: `plain` |D|^2 / |W|^2, `weighted_by
    inputs` the same with every column times the mean square of its input, `weighted_by_hessian` tr(D H D^T) /
    tr(W H W^T) with H = X^T X, which is the relative squared error of the component's outputs.

    The weighted ones are None without calibration; so is the last unless it was asked for.
    """

    component: str
    scheme: str
    plain: float
    weighted_by_inputs: float | None = None
    weighted_by_hessian: float | None = None
