"""What a person sees while a search runs, and how tables read in and outside a terminal."""

from __future__ import annotations

import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dtmsearch.analysis.format import duration, json_text, number
from dtmsearch.cli import main
from dtmsearch.console.printing import shown
from dtmsearch.console.progress import (
    LiveProgress,
    PlainProgress,
    QuietProgress,
    decision_line,
    done_share,
    progress_line,
    watching,
)
from dtmsearch.console.terminal_tables import table
from dtmsearch.core.metrics import Summary
from dtmsearch.core.plan import Perturbation, Plan, PlanSize
from dtmsearch.logs import json_lines
from dtmsearch.search.protocols import AgainstUniform, Decision, Progress


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
        "step 0: layers.0.q=int8-channel  [FDT 41.2, 14.00 bits per weight, 25.0% of weights, 1 component]\n"
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
    assert (
        out.getvalue() == "step 3: 30 evaluations (10 from the store), 4 in flight, 2.0 per second, about 35 s left\n"
    )


@pytest.mark.parametrize(("rate", "said"), [(0.04, ", 25 s each"), (0.5, ", 2 s each"), (1.0, ", 1.0 per second")])
def test_a_slow_rate_is_told_by_what_one_evaluation_takes(rate: float, said: str) -> None:
    assert said in progress_line(some_progress(rate=rate))


def test_no_rate_is_told_where_nothing_was_measured() -> None:
    assert progress_line(some_progress(rate=0.0)) == (
        "step 3: 30 evaluations (10 from the store), 4 in flight, about 35 s left"
    )


def test_a_progress_line_tells_the_stage_and_the_best_against_uniform_in_the_metric_that_ranks() -> None:
    against = AgainstUniform("kl", 0.03351, "int4-g32", 0.0698)
    progress = replace(some_progress(), stage="round 2 of at most 6", against_uniform=against)
    assert progress_line(progress) == (
        "round 2 of at most 6: 30 evaluations (10 from the store), 4 in flight, 2.0 per second, about 35 s left; "
        "KL 0.03351 on the search's prompts, int4-g32 everywhere 0.0698"
    )


def test_a_decision_is_told_in_the_metric_that_ranks() -> None:
    decision = replace(a_decision(), metric="kl", score=0.03351)
    assert "[KL 0.03351, 14.00 bits per weight" in decision_line(decision)


def test_a_stage_is_told_once_and_how_far_it_is_every_five_seconds() -> None:
    out, now = io.StringIO(), [0.0]
    plain = PlainProgress(out, clock=lambda: now[0])
    for done in range(8):
        plain.on_stage("prices", f"{done} of 8 samples" if done else "")
        now[0] += 1.0
    assert out.getvalue() == "after 0 s: prices\nafter 5 s: prices, 5 of 8 samples\n"


def test_the_live_view_shows_a_stage_until_there_is_progress() -> None:
    live = LiveProgress()
    live.on_stage("loading the model", "1 of 2")
    assert "loading the model, 1 of 2, 0 s so far" in str(live.render())
    live.on_progress(some_progress())
    assert live.stage is None


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


# What would act on a terminal.

HOSTILE = "\x1b]0;renamed\x07\x1b[2J\x9b31m\x7f\u202eback\rover\x08\ud800"


def test_what_acts_on_a_terminal_is_shown() -> None:
    assert shown("a\x1b[2J\x07\r\x9b\x7f\u202e\ud800b") == r"a\x1b[2J\x07\x0d\u009b\u007f\u202e\ud800b"


def test_letters_of_all_languages_lines_and_tabs_stay() -> None:
    text = "läufe\tランモデル\n🙂 عربي"
    assert shown(text) == text


def test_shown_json_is_the_same_json() -> None:
    value = {"text": HOSTILE.replace("\ud800", "") + '"\\'}
    assert json.loads(shown(json_text(value))) == value


def harmless(text: str) -> bool:
    return shown(text) == text


def test_a_note_is_shown() -> None:
    out = io.StringIO()
    QuietProgress(out).on_note(HOSTILE)
    assert harmless(out.getvalue())


@pytest.mark.parametrize("stream", [io.StringIO(), Screen()])
def test_cells_and_names_of_columns_are_shown_in_a_line_of_their_own(stream: io.StringIO) -> None:
    text = table([HOSTILE], [["first\nsecond\x1b[2J"]], stream)
    assert harmless(text)
    assert r"first\nsecond\x1b[2J" in text


def test_a_table_in_a_terminal_has_no_escapes_of_its_own() -> None:
    assert "\x1b" not in table(["name"], [["x"]], Screen())


def test_the_live_view_shows_a_note_and_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = Screen()
    with watching(stream=out) as observer:
        observer.on_note("one " + HOSTILE + "\n[bold]two[/bold]")
    said = out.getvalue()
    assert "\x1b]0;" not in said and "\x1b[2J" not in said and "\x9b" not in said
    assert r"one \x1b]0;renamed\x07\x1b[2J" in said and "[bold]two[/bold]" in said


@pytest.mark.parametrize("arguments", [["run", HOSTILE[:-1]], ["status", HOSTILE[:-1]], ["query", "\x1b[2J", "x"]])
def test_an_error_is_shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert harmless(said.out) and harmless(said.err) and r"\x1b[2J" in said.err


def test_a_usage_error_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--" + HOSTILE]) == 2
    assert harmless(capsys.readouterr().err)


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_answers_of_sql_are_shown(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT chr(27) || '[2J' || chr(155) || chr(7) AS \"a\x1b[2Jb\""
    assert main(["query", sql, "--store", str(tmp_path), "--format", form]) == 0
    assert harmless(capsys.readouterr().out)


def test_a_file_of_answers_holds_them_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "answer.csv"
    main(["query", "SELECT chr(27) AS x", "--store", str(tmp_path), "--format", "csv", "--out", str(out)])
    assert out.read_text() == "x\n\x1b\n"


def test_a_line_of_the_log_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    with json_lines(out):
        logging.getLogger("dtmsearch").warning(HOSTILE)
    assert harmless(out.getvalue()) and json.loads(out.getvalue())["event"] == HOSTILE
