"""Prices: what compressing components costs, from backward passes of the base model. Values that cross process borders.

A sample is a prompt of a reference with a label drawn at each predicted position from the model's own distribution. Its
product with an option (a component under a scheme) is the inner product of the gradient of the labels' summed log loss
at the component's output with what the option changes there. To second order the KL of a plan, in nats per predicted
token, is the mean over samples of (the sum of its options' products)^2 / (2 x predicted tokens): the Fisher form, of
which no part is assumed (Amari, Natural Gradient Works Efficiently in Learning, 1998).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.identity import identity
from dtmsearch.core.plan import Plan, check_versions, versions_of
from dtmsearch.core.schemes import DENSE

# Raise it when the same samples would give other products.
PRICES_VERSION = 1

FloatArray = NDArray[np.float32]
# `fisher`: labels drawn from the model; `slope`: the gradient of KL(base || model) itself, which vanishes at the base.
# The others are scores of the research group, of the log loss of a sample's own tokens, and no inner products:
# `squared`, the sum of (gradient x change of the output)^2 over a component's outputs; `changes`, the sum of
# |gradient x change| over its weights (of what rounds activations, over its outputs).
PriceKind = Literal["fisher", "slope", "squared", "changes"]
# What is taken, in words.
TAKEN: dict[PriceKind, str] = {
    "fisher": "prices of all options",
    "slope": "slopes around the leading plan",
    "squared": "scores by squared gradients",
    "changes": "scores by gradients and changes",
}
# Forward passes that a sample costs, a backward one counted as two; a slope needs the base model's distribution too.
PASSES: dict[PriceKind, int] = {"fisher": 3, "slope": 4, "squared": 3, "changes": 3}


def priced_schemes(kind: PriceKind, schemes: tuple[str, ...]) -> tuple[str, ...]:
    """The schemes whose products a search with `schemes` takes: of a slope dense first, for what a plan holds stands
    in its place there; of `changes` dense alone, for a component is scored by what its own scheme has changed."""
    return {"slope": (DENSE, *schemes), "changes": (DENSE,)}.get(kind, schemes)


@dataclass(frozen=True)
class PriceRequest:
    """Products to take: of every component under every scheme, over samples from `samples[0]` up to `samples[1]`.

    Sample i is prompt i modulo the reference's number of prompts, its labels follow from `seed` and i. Gradients are
    those of the model under `around`; what an option changes is the difference to what stands there.
    """

    reference_id: str
    samples: tuple[int, int]
    components: tuple[str, ...]
    schemes: tuple[str, ...]
    seed: int = 0
    kind: PriceKind = "fisher"
    around: Plan = field(default=Plan())
    calibration_id: str = ""

    @cached_property
    def scheme_versions(self) -> dict[str, int | str]:
        """See `versions_of`."""
        return versions_of(self._all_schemes)

    @property
    def _all_schemes(self) -> tuple[str, ...]:
        return (*self.schemes, *self.around.schemes.values())

    def __getstate__(self) -> dict[str, object]:
        """What crosses a process border: versions, too, that who asks knows."""
        return self.__dict__ | {"scheme_versions": self.scheme_versions}

    def check_versions(self) -> None:
        """See `dtmsearch.core.plan.check_versions`."""
        check_versions(self.scheme_versions, self._all_schemes)

    @property
    def id(self) -> str:
        """Identity of what determines the products of a sample: all but `samples`, the components and the schemes.
        Versions of the schemes' arithmetic are part of it (`versions_of`)."""
        versions = self.scheme_versions
        return identity(
            {
                "reference": self.reference_id,
                "seed": self.seed,
                "kind": self.kind,
                "around": self.around.id,
                "calibration": self.calibration_id,
                "prices": PRICES_VERSION,
            }
            | ({"schemes": versions} if versions else {})
        )


@dataclass(frozen=True, eq=False)
class PriceBlock:
    """The answer to a request: `products` [samples, components, schemes], the tokens forwarded (see `PASSES`), and the
    seconds that it took."""

    request: PriceRequest
    products: FloatArray
    tokens: int
    wall_seconds: float
