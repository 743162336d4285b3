"""Blocks of prices to rows and back: a row holds one option's products with the samples of a block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtmsearch.core.prices import PriceBlock, PriceRequest
from dtmsearch.store.codecs.columns import arrays, coded, coded_constant, from_columns, lists, values_of
from dtmsearch.store.schemas import PRICES

# (component, scheme) -> products [samples] of a block.
Products = dict[tuple[str, str], NDArray[np.float32]]


def prices_table(run: str, block: PriceBlock, version: str) -> pa.Table:
    """Rows of `prices`."""
    request = block.request
    components, schemes = list(request.components), list(request.schemes)
    number = len(components) * len(schemes)
    rows = block.products.transpose(1, 2, 0).reshape(number, -1)
    columns: dict[str, Any] = {
        "run": coded_constant(run, number),
        "price_id": coded_constant(request.id, number),
        "reference_id": coded_constant(request.reference_id, number),
        "kind": coded_constant(request.kind, number),
        "around_plan_id": coded_constant(request.around.id, number),
        "calibration_id": coded_constant(request.calibration_id or None, number),
        "seed": np.full(number, request.seed, np.int64),
        "component": coded(np.repeat(np.arange(len(components)), len(schemes)), components),
        "scheme": coded(np.tile(np.arange(len(schemes)), len(components)), schemes),
        "first_sample": np.full(number, request.samples[0], np.int32),
        "products": lists(list(rows), pa.float32()),
        "block_tokens": np.full(number, block.tokens, np.int64),
        "wall_seconds": np.full(number, block.wall_seconds),
        "version": coded_constant(version, number),
    }
    return from_columns(PRICES, columns)


def blocks_of(table: pa.Table) -> dict[int, Products]:
    """First sample -> products, of rows of one price id."""
    found: dict[int, Products] = {}
    for batch in table.to_batches():
        names = zip(values_of(batch["component"]), values_of(batch["scheme"]), strict=True)
        products = arrays(batch["products"])
        for name, first, own in zip(names, batch["first_sample"].to_pylist(), products, strict=True):
            assert own is not None
            found.setdefault(first, {})[name] = own
    return found


def recorded(products: Products, request: PriceRequest) -> NDArray[np.float32] | None:
    """The products [samples, components, schemes] of a request's block; None where some are not there."""
    wanted = [products.get((c, s)) for c in request.components for s in request.schemes]
    length = request.samples[1] - request.samples[0]
    present = [own for own in wanted if own is not None and len(own) == length]
    if len(present) < len(wanted):
        return None
    stacked = np.stack(present).reshape(len(request.components), len(request.schemes), length)
    return np.ascontiguousarray(stacked.transpose(2, 0, 1))
