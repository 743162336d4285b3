"""Data as text: JSON and CSV of plain values, numbers and durations as a person reads them. Knows no type of ours."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import decimal
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def plain(value: Any) -> Any:
    """A value as JSON can hold it: dataclasses become mappings, numbers that JSON lacks (`inf`) text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    if isinstance(value, decimal.Decimal):
        return plain(int(value) if value == value.to_integral_value() else float(value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def values_of(column: Any) -> list[Any]:
    """The values of an Arrow column as Python's own; text for those that Python lacks, as an infinite timestamp."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (OverflowError, ValueError):
        return [_value_of(scalar) for scalar in column]


def _value_of(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (OverflowError, ValueError):
        number = getattr(scalar, "value", None)
        if not isinstance(number, int):
            return str(scalar)
        largest = 2 ** (scalar.type.bit_width - 1) - 1
        return "infinity" if number == largest else "-infinity" if number == -largest else f"{number} ({scalar.type})"


def json_text(value: Any) -> str:
    """JSON for programs that a person can still read: a list has an element a line."""
    value = plain(value)
    if isinstance(value, list):
        lines = ",\n".join(f"  {json.dumps(element, ensure_ascii=False)}" for element in value)
        return f"[\n{lines}\n]" if value else "[]"
    return json.dumps(value, indent=2, ensure_ascii=False)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated values with a header line; null is an empty field, a list is JSON."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = [plain(value) for value in row]
        writer.writerow([json.dumps(v) if isinstance(v, list | dict) else v for v in values])
    return out.getvalue().rstrip("\n")


def duration(seconds: float) -> str:
    """Seconds as a person reads them: `8 s`, `2:05 min`, `3:20 h`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def number(value: float) -> str:
    """Four significant digits, and no fewer digits than stand before the point."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def counted(num: int | None, noun: str) -> str:
    """1 prompt, 2 prompts."""
    return f"{num} {noun}{'' if num == 1 else 's'}"


def components(num: int | None) -> str:
    return counted(num, "component")
