"""What a person sees while a search runs, and how tables read in and outside a terminal."""

from __future__ import annotations

import io
import re

import pytest

from dtmsearch.analysis.format import duration, number
from dtmsearch.console.progress import LiveProgress, PlainProgress, done_share, progress_line, table, watching
from dtmsearch.core.metrics import Summary
from dtmsearch.core.plan import Perturbation, Plan, PlanSize
from dtmsearch.search.loop import Decision, Progress


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def a_decision(step: int = 0) -> Decision:
    summary = Summary(10, 41.25, 30.0, 40.0, 50.0, 3.0, 1.2, None, None)
    edge = Perturbation("layers.0.q", "int8-channel")
    return Decision(step, Plan.of({"layers.0.q": "int8-channel"}), edge, 41.25, PlanSize(1, 100, 25, 1400), summary)


def some_progress(evaluations: int = 30, rate: float = 2.0, seconds_left: float | None = 35.0) -> Progress:
    return Progress(3, a_decision(), evaluations, 10, 4, rate, seconds_left)


def test_a_new_decision_is_one_plain_line_with_edge_share_and_fdt() -> None:
    out = io.StringIO()
    PlainProgress(out).on_decision(a_decision(), replayed=False)
    assert out.getvalue() == (
        "step 0: layers.0.q=int8-channel  [1 component, 25.0% of weights, 14.00 bits a weight, FDT 41.2]\n"
    )


def test_replayed_decisions_are_said_together_in_one_line() -> None:
    out = io.StringIO()
    plain = PlainProgress(out)
    for step in range(50):
        plain.on_decision(a_decision(step), replayed=True)
    plain.on_progress(some_progress())
    assert out.getvalue().startswith("continued after step 49:") and out.getvalue().count("\n") == 1


def test_plain_progress_lines_come_at_most_every_five_seconds() -> None:
    out, now = io.StringIO(), [0.0]
    plain = PlainProgress(out, clock=lambda: now[0])
    for _ in range(100):
        now[0] += 0.25
        plain.on_progress(some_progress())
    assert out.getvalue().count("\n") == 5


def test_a_progress_line_tells_evaluations_rate_and_time_left() -> None:
    out, now = io.StringIO(), [0.0]
    plain = PlainProgress(out, clock=lambda: now[0])
    now[0] = 6.0
    plain.on_progress(some_progress())
    assert out.getvalue() == "step 3: 30 evaluations (10 from the store), 4 in flight, 2.0 a second, about 35 s left\n"


def test_before_the_first_outcome_a_progress_line_tells_no_rate() -> None:
    waiting = some_progress(evaluations=10)
    assert progress_line(waiting) == "step 3: 4 evaluations under way (10 from the store), none has arrived yet"


def test_outside_a_terminal_nothing_but_plain_text_is_written() -> None:
    out = io.StringIO()
    with watching(stream=out) as observer:
        observer.on_progress(some_progress())
        observer.on_decision(a_decision(), replayed=False)
        observer.on_note("a replica was replaced")
    assert "\x1b" not in out.getvalue() and out.getvalue().count("\n") == 2


def test_quiet_says_notes_only() -> None:
    out = io.StringIO()
    with watching(quiet=True, stream=out) as observer:
        observer.on_progress(some_progress())
        observer.on_decision(a_decision(), replayed=False)
        observer.on_note("a replica was replaced")
    assert out.getvalue() == "a replica was replaced\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Screen()
    with watching(stream=out) as observer:
        observer.on_decision(a_decision(), replayed=False)
    assert "\x1b" not in out.getvalue()


def test_the_live_view_shows_the_latest_decision_and_a_note_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Screen()
    with watching(stream=out) as observer:
        observer.on_decision(a_decision(7), replayed=False)
        observer.on_progress(some_progress())
        observer.on_note("a replica was replaced")
    shown = out.getvalue()
    assert "step 7: layers.0.q=int8-channel" in shown and "a replica was replaced" in shown


def test_no_color_leaves_the_live_view_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Screen()
    with watching(stream=out) as observer:
        observer.on_progress(some_progress())
    assert "\x1b[3" not in out.getvalue() and "\x1b[38" not in out.getvalue()


def test_the_live_view_has_something_to_show_before_the_first_progress() -> None:
    assert "starting" in str(LiveProgress().render())


def test_the_share_done_follows_rate_and_time_left() -> None:
    assert done_share(some_progress(evaluations=30, rate=2.0, seconds_left=35.0)) == 0.3


def test_the_share_done_is_unknown_while_the_time_left_is() -> None:
    assert done_share(some_progress(seconds_left=None)) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (125, "2:05 min"), (12000, "3:20 h")]
)
def test_durations_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (41.25, "41.25"), (123456.7, "123457"), (float("inf"), "inf")]
)
def test_numbers_keep_four_digits_and_never_lose_whole_ones(value: float, text: str) -> None:
    assert number(value) == text


def test_a_table_outside_a_terminal_is_aligned_text_without_rules() -> None:
    text = table(["name", "fdt"], [["first", 1.5], ["second one", None]], io.StringIO())
    assert text == "name        fdt\nfirst       1.5\nsecond one    -"


def test_a_table_outside_a_terminal_is_never_folded() -> None:
    long = "x" * 500
    assert table(["name"], [[long]], io.StringIO()).splitlines()[1] == long


def test_a_table_in_a_terminal_keeps_to_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = re.sub(r"\x1b\[[0-9;]*m", "", table(["name"], [["x" * 100]], Screen()))
    assert max(len(line) for line in text.splitlines()) <= 40 and text.count("x") == 100


def test_text_in_a_table_is_shown_as_it_is_and_never_read_as_markup() -> None:
    assert table(["name"], [["[bold]model[/bold]"]], io.StringIO()).splitlines()[1] == "[bold]model[/bold]"
