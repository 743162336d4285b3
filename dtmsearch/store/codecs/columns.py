"""Values as Arrow columns and back: times, names that repeat, lists, without a Python object a number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtmsearch.store.schemas import CODED

_MICROSECONDS = 1_000_000


def to_time(seconds: float | None) -> int | None:
    """Microseconds since the epoch, as tables hold times."""
    return None if seconds is None else round(seconds * _MICROSECONDS)


def from_time(column: pa.ChunkedArray) -> list[float | None]:
    """Seconds since the epoch."""
    return [None if us is None else us / _MICROSECONDS for us in column.cast(pa.int64()).to_pylist()]


def from_columns(schema: pa.Schema, columns: dict[str, Any]) -> pa.Table:
    """A table of just the columns of a schema."""
    assert columns.keys() == set(schema.names), columns.keys() ^ set(schema.names)
    arrays = []
    for field in schema:
        values = columns[field.name]
        arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def coded_constant(value: str | None, length: int) -> pa.Array:
    """A column that repeats one value."""
    if value is None:
        return pa.nulls(length, CODED)
    return pa.DictionaryArray.from_arrays(np.zeros(length, np.int32), pa.array([value]))


def coded(codes: NDArray[np.integer[Any]], names: list[str]) -> pa.Array:
    """A column of a few names, held as codes."""
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(names, pa.string()))


def values_of(column: pa.Array) -> list[Any]:
    """A column's values; of a coded one each name is made once, not once for each row."""
    if not pa.types.is_dictionary(column.type):
        return list(column.to_pylist())
    names = [*column.dictionary.to_pylist(), None]
    return [names[code] for code in column.indices.fill_null(len(names) - 1).to_pylist()]


def lists(rows: Sequence[NDArray[np.generic] | None], values: pa.DataType) -> pa.Array:
    """A list column from an array per row, null where there is none."""
    present = [row for row in rows if row is not None]
    lengths = np.array([0 if row is None else len(row) for row in rows], np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32)), dtype=np.int32)
    dtype = values.to_pandas_dtype()
    flat = np.concatenate(present).astype(dtype, copy=False) if present else np.empty(0, dtype)
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, values), mask=missing)


def arrays(column: pa.ListArray) -> list[NDArray[Any] | None]:
    """A view into the column's memory for each row of a list column, None where it is null."""
    values = column.values.to_numpy(zero_copy_only=True)
    offsets = column.offsets.to_numpy(zero_copy_only=True).tolist()
    rows: list[NDArray[Any] | None] = [values[start:stop] for start, stop in pairwise(offsets)]
    if column.null_count:
        for at in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            rows[at] = None
    return rows


def matrix(column: pa.ChunkedArray) -> NDArray[np.int32]:
    """[rows, length of each list] of a list column whose lists are of one length."""
    values: NDArray[np.int32] = column.combine_chunks().flatten().to_numpy().reshape(len(column), -1).copy()
    return values
