"""Tables of a terminal: no number ever breaks across lines, however narrow the window.

Where a table is wider than the window, its text wraps between words, then its last columns are left out and named
below, and where more than half would have to go and next to none would stay, each row becomes a short list.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.cells import cell_len

from dtmsearch.analysis.format import number
from dtmsearch.console.printing import shown_in_line

_GAP = 2
# A label before its text, as `status` shows them.
_LABEL_WIDTH = 11
# Text wraps to columns of this width at least; a longer word is cut there.
_NARROWEST = 12
# So many columns say enough for the others to be left out, however many these are.
_ENOUGH = 5
_UNMEASURED = "-"
_NUMBER = re.compile(r"[-+]?\d")


def labelled(label: str, text: str) -> str:
    """A line that says what it is about."""
    return f"  {label:<{_LABEL_WIDTH}}{text}"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], stream: TextIO | None = None, width: int | None = None
) -> str:
    """A table as text for `stream` (stdout).

    In a terminal it is ruled and fits the window, which is `width` characters wide (default: that of the terminal).
    Columns stand in the order of their importance, since the last ones go first; cells that a row lacks at its end are
    unmeasured. Elsewhere it is as wide as it is,
    for other programs to read.
    """
    stream = stream or sys.stdout
    names = [shown_in_line(name) for name in columns]
    cells = [[cell(value) for value in (*row, *[None] * (len(names) - len(row)))] for row in rows]
    if not stream.isatty():
        return _aligned([names, *cells], _right(cells, len(names)))
    return _fitted(names, cells, width or _window())


def _window() -> int:
    return shutil.get_terminal_size().columns


def cell(value: object) -> str:
    """A value as a table shows it; what is unmeasured is a dash."""
    if value is None:
        return _UNMEASURED
    if isinstance(value, float):
        return number(value)
    return shown_in_line(str(value))


def _right(cells: Sequence[Sequence[str]], num_columns: int) -> list[bool]:
    """Whether each column holds plain numbers only, which are aligned at their right."""
    return [bool(cells) and all(_is_plain_number(row[at]) for row in cells) for at in range(num_columns)]


def _is_plain_number(text: str) -> bool:
    try:
        float(text.removesuffix("%"))
    except ValueError:
        return text == _UNMEASURED
    return True


def _fitted(names: Sequence[str], cells: Sequence[Sequence[str]], window: int) -> str:
    kept = len(names)
    while kept > 1 and _width([_narrowest(names, cells, at) for at in range(kept)]) > window:
        kept -= 1
    if kept * 2 < len(names) and kept < _ENOUGH:
        return _list(names, cells, window)
    widths = _shared(names, cells, kept, window)
    right = _right(cells, kept)
    lines = [_line(_wrapped(names[:kept], widths), widths, right), "-" * _width(widths)]
    lines += [_line(_wrapped(row[:kept], widths), widths, right) for row in cells]
    if kept < len(names):
        lines += _lines(f"(not shown in this width: {', '.join(names[kept:])})", window)
    return "\n".join(lines)


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _natural(names: Sequence[str], cells: Sequence[Sequence[str]], at: int) -> int:
    return max(cell_len(text) for text in (names[at], *(row[at] for row in cells)))


def _narrowest(names: Sequence[str], cells: Sequence[Sequence[str]], at: int) -> int:
    """The least width of a column: cells that begin with a number stay whole, words too where they are short."""
    whole = [cell_len(row[at]) for row in cells if _NUMBER.match(row[at])]
    words = [cell_len(word) for text in (names[at], *(row[at] for row in cells)) for word in text.split()]
    return max([*whole, min(max(words, default=0), _NARROWEST)])


def _shared(names: Sequence[str], cells: Sequence[Sequence[str]], kept: int, window: int) -> list[int]:
    """Widths of the kept columns: what the window leaves goes to the narrowest that want more, evenly."""
    wanted = [_natural(names, cells, at) for at in range(kept)]
    widths = [_narrowest(names, cells, at) for at in range(kept)]
    for _ in range(max(0, window - _width(widths))):
        short = [at for at in range(kept) if widths[at] < wanted[at]]
        if not short:
            break
        widths[min(short, key=lambda at: widths[at])] += 1
    return widths


def _wrapped(row: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """The lines of each cell, broken between words, within one only where it is wider than the column."""
    return [_lines(text, width) for text, width in zip(row, widths, strict=True)]


def _lines(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= width:
            lines[-1] = joined
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while cell_len(lines[-1]) > width:
            cut = _cut(lines[-1], width)
            lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    return lines


def _cut(word: str, width: int) -> int:
    """How many characters of a word fit: up to a joint such as `/` or `=` where the second half has one."""
    fits = max(1, next((n for n in range(len(word), 0, -1) if cell_len(word[:n]) <= width), 1))
    joint = max(word.rfind(mark, 0, fits) for mark in "/.=:,_")
    return joint + 1 if joint >= fits // 2 else fits


def _line(cells: Sequence[Sequence[str]], widths: Sequence[int], right: Sequence[bool]) -> str:
    lines = []
    for number_of in range(max(map(len, cells))):
        parts = [texts[number_of] if number_of < len(texts) else "" for texts in cells]
        lines.append((" " * _GAP).join(map(_padded, parts, widths, right)).rstrip())
    return "\n".join(lines)


def _padded(text: str, width: int, is_right: bool) -> str:
    gap = " " * max(0, width - cell_len(text))
    return gap + text if is_right else text + gap


def _list(names: Sequence[str], cells: Sequence[Sequence[str]], window: int) -> str:
    """Each row as its first cell and a line for each other one that is known."""
    label = max(map(cell_len, names[1:])) + _GAP
    lines: list[str] = []
    for row in cells:
        lines += _lines(row[0], window)
        for name, text in zip(names[1:], row[1:], strict=True):
            if text not in ("", _UNMEASURED):
                first, *rest = _lines(text, max(_NARROWEST, window - label - _GAP))
                lines.append(f"{'':<{_GAP}}{_padded(name, label, False)}{first}")
                lines += [f"{'':<{_GAP + label}}{line}" for line in rest]
    return "\n".join(lines) if lines else " ".join(names)


def _aligned(lines: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Never wrapped, and quick also for a hundred thousand lines."""
    widths = [max(cell_len(line[at]) for line in lines) for at in range(len(right))]
    return "\n".join((" " * _GAP).join(map(_padded, line, widths, right)).rstrip() for line in lines)
