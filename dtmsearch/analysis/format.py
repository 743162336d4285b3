"""Data as text: JSON and CSV of plain values, numbers and durations as a person reads them. Knows no type of ours."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import decimal
import fractions
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
    if isinstance(value, fractions.Fraction):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


# So many tied components are named; of more, as of a mixture's experts, it is said how many there are.
_MOST_NAMED = 6


def edge_in_words(perturbation: str) -> str:
    """A perturbation, `component+others tied to it=scheme`, for a person."""
    names, equals, scheme = perturbation.partition("=")
    tied = names.split("+")
    if len(tied) <= _MOST_NAMED:
        return perturbation
    return f"{tied[0]} and {len(tied) - 1} tied to it{equals}{scheme}"


def size_in_words(bits_per_weight: float, active_bits_per_weight: float | None) -> str:
    """A plan's size for a person; of a mixture of experts also what a token reads."""
    active = "" if active_bits_per_weight is None else f", {active_bits_per_weight:.2f} of those that a token reads"
    return f"{bits_per_weight:.2f} bits per weight{active}"


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
    """1 component, 2 components."""
    return counted(num, "component")


# More decimals than this say nothing of any metric here.
_MOST_DECIMALS = 8


def decimals(half_width: float) -> int | None:
    """How many decimals a mean bears whose interval reaches this far to either side: as many as show the half width to
    two significant digits. None where it reaches nowhere, or without end."""
    if not math.isfinite(half_width) or half_width <= 0.0:
        return None
    return min(max(0, 1 - math.floor(math.log10(half_width))), _MOST_DECIMALS)


def interval_decimals(low: float, high: float) -> int | None:
    """The decimals that an interval and its mean bear; more where an end would else be written as zero and is not, for
    on which side of zero it lies is what is read first."""
    borne = decimals((high - low) / 2)
    while borne is not None and borne < _MOST_DECIMALS and any(e and not round(e, borne) for e in (low, high)):
        borne += 1
    return borne


def with_interval(mean: float, low: float, high: float, digits: int, sign: str = "") -> str:
    """A mean and its interval, `0.00031 [0.00020, 0.00042]`, to the decimals that the interval bears; to `digits` where
    it has no width. `sign` is `+` for differences."""
    borne = interval_decimals(low, high)
    spec = f"{sign}.{digits if borne is None else borne}f"
    return f"{mean:{spec}} [{low:{spec}}, {high:{spec}}]"


def with_error(mean: float, error: float) -> str:
    """A mean and its standard error to the decimals that the error bears: `0.0031 ± 0.0012`, `(3.1 ± 1.2)e-07`."""
    sign = "\N{PLUS-MINUS SIGN}"
    power = math.floor(math.log10(abs(mean))) if mean and math.isfinite(mean) else 0
    power = power if power < -3 else 0
    borne = decimals(error / 10.0**power)
    if borne is None:
        return number(mean)
    found = f"{mean / 10.0**power:.{borne}f} {sign} {error / 10.0**power:.{borne}f}"
    return f"({found})e{power:03d}" if power else found
