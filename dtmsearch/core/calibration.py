"""What calibrated schemes are made from, and what comes of them: text, statistics of inputs, packed matrices, errors.

Values that cross process borders; arrays are numpy's. How they are computed stands in `dtmsearch.model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.components import Component
from dtmsearch.core.identity import identity
from dtmsearch.core.numeric_mode import NumericMode

# Raise it when the same text would yield other statistics, or other matrices from them.
CALIBRATION_VERSION = 2

Through = Literal["base", "compressed"]
# The tokens that an expert is calibrated by: those that the router gives it, or all.
Routing = Literal["routed", "all"]
# An expert's matrix that fewer tokens reach than so many for each of its inputs is not solved for: over fewer, GPTQ
# does worse than rounding on other text (docs/families.md). One that fewer reach than these is not pruned by them.
TOKENS_PER_INPUT, LEAST_TOKENS = 4, 32
ByteArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Human text that the model reads, `tokens` [rows, length]: its components' inputs are what pruning and
    quantization are calibrated by. `through` says what the text has passed where a matrix is solved for: the layers
    below as they are in the `base` model, or `compressed` by the same scheme. `experts` of a mixture are calibrated by
    the tokens that the router gives them, or by all. `id` follows all of these, the model, and its numeric mode."""

    id: str
    manifest_id: str
    tokens: NDArray[np.int32]
    through: Through = "base"
    experts: Routing = "routed"


def calibration_id(
    manifest_id: str,
    mode: NumericMode,
    tokens: NDArray[np.int32],
    through: Through = Calibration.through,
    experts: Routing | None = None,
) -> str:
    """Identity of a calibration: what determines every statistic gathered over it, and every matrix solved by it.
    `experts` is None for a model that has none."""
    own = {"manifest": manifest_id, "mode": str(mode), "tokens": tokens.tolist(), "calibration": CALIBRATION_VERSION}
    own |= {} if through == "base" else {"through": through}
    return identity(own if experts is None else own | {"experts": experts})


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Mean squares of every component's inputs over a calibration: component -> [cols], and of how many tokens these
    are; of an expert that too few tokens reach they are all 1. `largest` are the largest absolute inputs; none are
    known of statistics that earlier versions have stored."""

    calibration_id: str
    mean_squares: Mapping[str, FloatArray]
    num_tokens: Mapping[str, int] = field(default_factory=dict)
    largest: Mapping[str, float] = field(default_factory=dict)


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


def too_few_to_solve(component: Component, num_tokens: int) -> bool:
    """Whether an expert's matrix is reached by too few tokens to be solved for: GPTQ and SparseGPT then do what they do
    without a Hessian, which is plain rounding and pruning by magnitude."""
    return bool(component.mixture) and num_tokens < TOKENS_PER_INPUT * component.shape[1]


def too_few_to_weigh(component: Component, num_tokens: int) -> bool:
    """Whether they are too few to prune by: Wanda then prunes by magnitude."""
    return bool(component.mixture) and num_tokens < LEAST_TOKENS


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
class ExpertTokens:
    """How many tokens of a reference's prompts and continuations an expert of a mixture is given."""

    reference_id: str
    mixture: str
    expert: int
    tokens: int


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
