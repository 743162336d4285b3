"""What a study has found, as data: sentences, tables, and pictures that the report draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]


@dataclass(frozen=True)
class FoundTable:
    """A table: the titles of its columns, and rows of texts. `note` says how to read it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis of a picture: the field of its rows, and what it is, with its unit."""

    field: str
    title: str
    logarithmic: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture of rows: `dots` or `lines` over two axes, told apart by the field `series`, with intervals from the
    field `low` to `high` of y; or `heat`, a map of the fields `layer` and `kind` coloured by y. `marks` are further
    lines (`x`, `y`) to hold the rows against. Pictures that share `place` are shown one at a time, by `choice`."""

    name: str
    kind: Literal["dots", "lines", "heat"]
    rows: Sequence[Row]
    x: Axis
    y: Axis
    description: str
    series: str = ""
    low: str = ""
    high: str = ""
    marks: Sequence[Row] = ()
    place: str = "found"
    choice: str = ""


@dataclass(frozen=True)
class Findings:
    """What a study says, and what it shows for it."""

    said: tuple[str, ...]
    tables: tuple[FoundTable, ...]
    pictures: tuple[Picture, ...] = ()


def spanned(value: float, low: float, high: float, digits: int = 3) -> str:
    """A value with its interval, each with so many digits after the point; alone where the interval says nothing."""
    if math.isnan(value):
        return "-"
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
