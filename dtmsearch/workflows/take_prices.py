"""A run's prices: blocks of samples found in the store, or taken by whichever replicas are free and recorded.

The driver's side: replicas take products, only here is anything written.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.evaluation import Reference
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import TAKEN, PriceKind, PriceRequest, priced_schemes
from dtmsearch.errors import SearchStopped, UserError
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.strategy_registry import STRATEGIES
from dtmsearch.workflows.build import WITHOUT_ERRORS
from dtmsearch.workflows.session import Session

# Samples of a block: what a device takes well at once. They are the same however many replicas share them.
_BLOCK_SAMPLES = {"cpu": 32, "cuda": 192}


def missing_prices(strategy: str, space: SearchSpace, pool: ModelEvaluator) -> str:
    """Why a strategy that takes prices goes without them; empty where they can be had. Raises `UserError` for one that
    cannot go without."""
    problem = pool.unpriceable([component.name for component in space.components])
    if not STRATEGIES[strategy].needs_errors:
        if problem:
            raise UserError(
                f"strategy: {strategy} needs prices, which cannot be had: {problem}. Use auto or sensitivity"
            )
        return ""
    if not problem and any(component.mixture for component in space.components):
        # What it finds of mixtures by probes was measured (docs/search-quality.md), by prices not yet.
        problem = "those of experts see no token that goes to other experts (fisher takes them all the same)"
    if not problem and space.shapes_blocks:
        problem = "blocks that are dropped or cut are beyond the second order that prices are"
    if problem and any(component.is_cache for component in space.components):
        raise UserError(
            f"search.strategy: {strategy} goes by errors of weights where prices cannot be had ({problem}), and "
            f"{WITHOUT_ERRORS}"
        )
    return problem


class TakingPrices:
    """Takes prices of all options of a search's space, with products as a `priced.TakePrices` gives them."""

    def __init__(self, session: Session, space: SearchSpace, reference: Reference, calibration_id: str) -> None:
        self._session, self._space = session, space
        self._reference, self._calibration_id = reference, calibration_id
        self._block = _BLOCK_SAMPLES[reference.mode.device]

    def __call__(self, kind: PriceKind, around: Plan, samples: tuple[int, int]) -> NDArray[np.float32]:
        """Products [samples, components, schemes]. Raises `SearchStopped` where the user asked for that meanwhile."""
        if around.entries:
            self._session.writer.put_plan(around)
        requests = [self._request(kind, around, part) for part in self._parts(samples)]
        found = {request: self._session.writer.price_block(request) for request in requests}
        missing = [request for request, products in found.items() if products is None]
        text, priced = (
            f"{TAKEN[kind]} from backward passes",
            sum(request.samples[1] - request.samples[0] for request in found),
        )
        done = priced - sum(request.samples[1] - request.samples[0] for request in missing)
        self._session.stage(text)
        for block in self._session.pool.price_blocks(missing):
            self._session.writer.add([block])
            found[block.request] = block.products
            done += block.request.samples[1] - block.request.samples[0]
            self._session.stage(text, f"{done} of {priced} samples")
            if self._session.stop_requested():
                raise SearchStopped("stopped as asked; what was priced is recorded")
        return np.concatenate([products for products in found.values() if products is not None])

    def _parts(self, samples: tuple[int, int]) -> list[tuple[int, int]]:
        first, end = samples
        return [(at, min(at + self._block, end)) for at in range(first, end, self._block)]

    def _request(self, kind: PriceKind, around: Plan, samples: tuple[int, int]) -> PriceRequest:
        components = tuple(component.name for component in self._space.components)
        return PriceRequest(
            self._reference.id, samples, components, priced_schemes(kind, self._space.schemes),
            self._session.file.seed, kind, around, self._calibration_id,
        )  # fmt: skip
