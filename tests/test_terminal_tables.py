"""Tables in a terminal: what they say at four widths, and that no number ever breaks."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from dtmsearch.analysis.summary import RunOverview
from dtmsearch.analysis.verdict import ValidationRow
from dtmsearch.console import terminal_tables as tables
from dtmsearch.console.run_text import overview_text, validation_table
from dtmsearch.console.terminal_tables import table
from dtmsearch.core.metrics import Summary
from dtmsearch.core.statistics import PairedDifference

SCREENS = Path(__file__).parent / "golden" / "screens.txt"
WIDTHS = (60, 80, 120, 200)


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_screen(names: list[str], rows: list[list[object]], width: int) -> str:
    return table(names, rows, Screen(), width)


def screens(monkeypatch: pytest.MonkeyPatch) -> str:
    """What `ls` and the table of a run's held-out values look like at every width."""
    runs = [
        RunOverview(
            *("llama2-7b-4bit", "finished", False, "meta-llama/Llama-2-7b-hf", 1834, 11, 1.0, 4.5, 0.021, 36.41, 0),
            rank_by="kl",
            held_out=0.0213,
        ),
        RunOverview(
            "smollm2-nightly-2026-11-27", "running", False, "models/smollm2", 96, None, None, None, None, None, 0
        ),
    ]
    rows = [
        ValidationRow("plan", "a", 224, 4.4987, 1.0, Summary(512, 36.41, 20, 33, 51, 7.53, 1.212, 10.41, 0.0213), None),
        ValidationRow(
            *("uniform:int4-g64", "b", 224, 4.5, 1.0, Summary(512, 31.2, 17, 29, 44, 9.1, 1.3, 10.9, 0.0398), None),
            fdt_vs_plan=PairedDifference(5.21, 3.9, 6.5, 512),
            kl_vs_plan=PairedDifference(-0.0185, -0.0201, -0.0169, 512),
        ),
        ValidationRow("uniform:int5-g64", "c", 224, 5.5, 1.0, None, "out_of_memory: 3 attempts"),
    ]
    monkeypatch.setattr("sys.stdout", Screen())
    monkeypatch.setenv("TZ", "UTC")
    shown = []
    for width in WIDTHS:
        monkeypatch.setattr(tables, "_window", lambda width=width: width)
        shown += [f"{width} columns", overview_text(runs), "", validation_table(rows, "kl"), ""]
    return "\n".join(shown)


def test_screens_at_four_widths_are_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert screens(monkeypatch) == SCREENS.read_text(encoding="utf-8")


def test_recorded_screens_keep_to_their_widths() -> None:
    width = 0
    for line in SCREENS.read_text(encoding="utf-8").splitlines():
        head = re.fullmatch(r"(\d+) columns", line)
        width = int(head[1]) if head else width
        assert len(line) <= width


CELLS = st.one_of(st.none(), st.floats(-1e9, 1e9), st.integers(-(10**9), 10**9), st.text("ab/ -=", max_size=40))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(30, 120))
def test_numbers_stay_whole_and_lines_within_the_window(data: st.DataObject, num_columns: int, width: int) -> None:
    names = [f"c{n}" for n in range(num_columns)]
    rows = data.draw(st.lists(st.lists(CELLS, min_size=num_columns, max_size=num_columns), min_size=1, max_size=4))
    text = on_screen(names, rows, width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    words = set(text.split())
    left_out = re.search(r"\(not shown in this width: ([^)]*)\)", text)
    hidden = set(re.findall(r"c\d", left_out[1])) if left_out else set()
    for row in rows:
        for name, value in zip(names, row, strict=True):
            if isinstance(value, int | float) and name not in hidden:
                assert tables.cell(value) in words


def test_text_wraps_before_columns_go() -> None:
    text = on_screen(["name", "what it is", "kl"], [["a", "several words that are long", 0.5]], 30)
    assert text.splitlines()[2:] == ["a     several words that   0.5", "      are long"]


def test_the_last_columns_go_first_and_are_named() -> None:
    text = on_screen(["run", "first", "second", "third"], [["a", 1.25, 123456, 654321]], 24)
    assert "654321" not in text and "123456" in text
    assert text.splitlines()[-2:] == ["(not shown in this", "width: third)"]


def test_a_window_too_narrow_for_half_of_the_columns_gets_a_list() -> None:
    text = on_screen(["run", *"abcdef"], [["mine", 111111, 222222, 333333, None, 555555, 666666]], 22)
    assert text.splitlines() == ["mine", "  a  111111", "  b  222222", "  c  333333", "  e  555555", "  f  666666"]


def test_cells_that_a_row_lacks_are_unmeasured() -> None:
    assert table(["run", "kl"], [["a"]], io.StringIO()) == "run  kl\na     -"
