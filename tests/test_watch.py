"""Watching a run from its store alone."""

from __future__ import annotations

import io
from typing import Any

import pytest
from fakes import toy_components, toy_manifest
from reported import NUM_LAYERS, make_run
from rich.console import Console

from dtmsearch.cli import main
from dtmsearch.console.watch import _reached, _unquantized, glance, render, watch
from dtmsearch.core.records import RunRecord, StepRecord
from dtmsearch.store.store import ResultStore


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    return make_run(tmp_path_factory.mktemp("begun"), status="running")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_finished_run_is_one_line_where_there_is_no_terminal(finished: ResultStore, capsys: Any) -> None:
    assert main(["watch", "toy", "--store", finished.url]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("toy: finished, step ") and "% of weights" in line


def test_lines_come_only_with_news(begun: ResultStore) -> None:
    out = io.StringIO()
    with begun.writer("toy"):  # a driver at work, which gives up at the third glance
        glances: list[float] = []

        def sleep(seconds: float) -> None:
            glances.append(seconds)
            if len(glances) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            watch(begun, "toy", 1.5, out, sleep)
    assert len(out.getvalue().splitlines()) == 1 and glances == [1.5] * 3


def test_a_run_without_a_driver_is_interrupted_and_no_longer_watched(begun: ResultStore) -> None:
    found = watch(begun, "toy", stream=io.StringIO())
    assert (found.status, found.is_over) == ("interrupted", True)


def test_the_way_is_measured_towards_the_stop_rule(finished: ResultStore) -> None:
    found = glance(finished, "toy")
    assert found.reached == pytest.approx(1.0)


def test_a_terminal_shows_the_latest_decisions(finished: ResultStore) -> None:
    found = glance(finished, "toy")
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as shown:
        console.print(render(found))
    assert found.steps[-1].perturbation in shown.get() and "of the way" in shown.get()


def test_a_terminal_is_redrawn_until_the_run_is_over(finished: ResultStore) -> None:
    terminal = Terminal()
    watch(finished, "toy", stream=terminal)
    assert "finished" in terminal.getvalue()


def test_an_unknown_run_is_said(finished: ResultStore, capsys: Any) -> None:
    assert main(["watch", "nosuch", "--store", finished.url]) == 2
    assert "it holds: toy" in capsys.readouterr().err


def step(bits_per_weight: float) -> StepRecord:
    return StepRecord(0, "plan", None, 1.0, 1, 0.5, bits_per_weight, 0.0, 1, 1.0)


@pytest.mark.parametrize(
    ("rule", "value"), [("bits_per_weight", 8.0), ("size_mb", 1_000_000 * 8.0 / 8e6)], ids=["bits", "size"]
)
def test_the_way_to_a_size_starts_at_the_unquantized_model(rule: str, value: float) -> None:
    record = RunRecord(
        "toy", "running", f"search: {{stop: {{{rule}: {value}}}}}", "/", None, None, None, None, 1.0, None, "0"
    )
    assert _reached(record, (step(12.0),), (1_000_000, 16_000_000)) == pytest.approx(0.5)


def test_the_unquantized_size_is_that_of_the_searched_components(finished: ResultStore) -> None:
    weights = sum(component.num_weights for component in toy_components(NUM_LAYERS))
    record = finished.run("toy")
    assert record is not None
    assert _unquantized(finished, record) == (weights, weights * toy_manifest(NUM_LAYERS).dense_bits)
