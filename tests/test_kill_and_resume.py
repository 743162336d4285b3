"""One search, killed and stopped in every way there is, each time continued; beside it the same search undisturbed.

Where it matters what becomes of Ray's processes the sessions have replicas on Ray, otherwise one in the driver's own
process: what a search finds must be the same. The replicas answer by the toy formula. What they measure on Ray with a
model, after a kill too, is that of one process by tests/test_nodes.py and tests/test_calibrating.py.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from gate import Gate
from processes import (
    CIRCUMSTANCES,
    PATIENCE_SECONDS,
    Driver,
    Rows,
    last_status,
    num_recorded,
    process_ends,
    rows,
    tiny_search,
)
from toy import TOY_LAYERS

from dtmsearch.store.store import ResultStore

pytestmark = pytest.mark.timeout(4 * PATIENCE_SECONDS)


ON_RAY = ("--replicas", "1")
HERE = ("--in-process",)
# Signals to all processes of a terminal, one soon after the other.
IMPATIENT = {
    "SIGHUP": (ON_RAY, [signal.SIGHUP]),
    "Ctrl-C": (HERE, [signal.SIGINT]),
    "Ctrl-C twice": (HERE, [signal.SIGINT, signal.SIGINT]),
    "Ctrl-C and no end": (HERE, [signal.SIGINT, signal.SIGINT, signal.SIGINT]),
}
STOPPED_ON_RAY = "replica, then Ctrl-C and SIGHUP"
# Components of the toy model.
_COMPONENTS = 3 * TOY_LAYERS


@dataclass(frozen=True)
class Session:
    """One driver's time: how it ended, and what was recorded then."""

    code: int
    output: str
    status: str
    recorded: Rows


@dataclass(frozen=True)
class History:
    """A search through all its sessions, and the same search undisturbed. `left` are the processes below impatiently
    stopped ones that did not end."""

    store: Path
    undisturbed: Path
    sessions: dict[str, Session]
    replica_of_killed_driver: int
    resumed: tuple[int, str]
    left: dict[str, list[int]]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    folder = tmp_path_factory.mktemp("killed")
    store, undisturbed = folder / "store", folder / "undisturbed"
    file, gate = tiny_search(folder, search__stop={"share": 0.7}), Gate(folder / "gate")
    sessions: dict[str, Session] = {}
    left: dict[str, list[int]] = {}
    depths = itertools.count(1)
    gate.bound("components", 0)

    def session(name: str, where: tuple[str, ...] = ON_RAY) -> Driver:
        return Driver(folder / f"{name}.log", "run", file, "--store", store, *where, gate=gate, toy=True)

    def over(name: str, process: Driver) -> None:
        code = process.wait()
        sessions[name] = Session(code, process.output, last_status(store), rows(store, "evaluations"))

    def until_more(process: Driver) -> None:
        """One round more is allowed, and some of it is recorded; then the search waits, whatever becomes of it."""
        before, depth = num_recorded(store), next(depths)
        gate.bound("components", depth)
        process.until(lambda: num_recorded(store) > before)

    def impatiently(name: str, process: Driver, numbers: list[signal.Signals]) -> None:
        below = process.below("")
        for number in numbers:
            if process.is_running:
                process.signal_group(number)
            time.sleep(0.2)
        over(name, process)
        left[name] = [pid for pid in below if not process_ends(pid)]

    calm_gate = Gate(folder / "open")
    calmly = ("run", file, "--store", undisturbed, *HERE)
    with Driver(folder / "undisturbed.log", *calmly, gate=calm_gate, toy=True) as calm:
        with session("all at once") as process:
            process.until(lambda: process.starts("raylet"))
            process.signal_group(signal.SIGKILL)
            over("all at once", process)
        with session("driver") as process:
            until_more(process)
            replica = process.below("ray::_Host")[0]
            process.signal(signal.SIGKILL)
            over("driver", process)
        calm.wait()
        with session("raylet") as process:
            until_more(process)
            process.kill("raylet/raylet")
            over("raylet", process)
        with session(STOPPED_ON_RAY) as process:
            until_more(process)
            process.kill("ray::_Host")
            process.until(lambda: process.says("was lost and is replaced"))
            until_more(process)
            impatiently(STOPPED_ON_RAY, process, [signal.SIGINT, signal.SIGHUP])
        with session("SIGTERM", HERE) as process:
            until_more(process)
            process.signal(signal.SIGTERM)
            over("SIGTERM", process)
        for name, (where, numbers) in IMPATIENT.items():
            with session(name, where) as process:
                until_more(process)
                impatiently(name, process, numbers)
        with session("driver while validating", HERE) as process:
            gate.bound("components", _COMPONENTS - 1)  # the found plan, but no uniform one
            process.until(lambda: process.says("held-out"))
            process.signal(signal.SIGKILL)
            over("driver while validating", process)
    gate.open()
    with Driver(folder / "resumed.log", "resume", "tiny", "--store", store, *HERE, gate=gate, toy=True) as process:
        resumed = process.wait(), process.output
    yield History(store, undisturbed, sessions, replica, resumed, left)


def final_plan(store: Path) -> Rows:
    record = ResultStore(store).run("tiny")
    assert record is not None
    return [row for row in rows(store, "plans") if row["plan_id"] == record.final_plan_id]


def by_id(evaluations: Rows) -> dict[str, dict[str, object]]:
    return {row["evaluation_id"]: row for row in evaluations}


def test_a_search_that_was_killed_and_stopped_ends(history: History) -> None:
    assert (history.resumed[0], last_status(history.store)) == (0, "finished"), history.resumed


def test_it_ends_with_the_plan_of_an_undisturbed_search(history: History) -> None:
    assert final_plan(history.store) == final_plan(history.undisturbed) != []


def test_its_steps_are_those_of_an_undisturbed_search(history: History) -> None:
    steps = rows(history.store, "steps", without=("wall_seconds",))
    assert steps == rows(history.undisturbed, "steps", without=("wall_seconds",))


def test_its_evaluations_are_those_of_an_undisturbed_search_bit_by_bit(history: History) -> None:
    evaluations = rows(history.store, "evaluations", without=CIRCUMSTANCES)
    assert by_id(evaluations) == by_id(rows(history.undisturbed, "evaluations", without=CIRCUMSTANCES))


def test_no_evaluation_is_recorded_twice(history: History) -> None:
    ids = [row["evaluation_id"] for row in rows(history.store, "evaluations")]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("fault", ["driver", "raylet", STOPPED_ON_RAY, "SIGTERM", "driver while validating"])
def test_what_was_recorded_before_a_fault_is_not_measured_again(history: History, fault: str) -> None:
    recorded = by_id(history.sessions[fault].recorded)
    at_the_end = by_id(rows(history.store, "evaluations"))
    assert recorded and {i: at_the_end.get(i) for i in recorded} == recorded


@pytest.mark.parametrize("fault", ["raylet", STOPPED_ON_RAY, "SIGTERM", "Ctrl-C"])
def test_a_driver_that_can_still_act_leaves_its_run_stopped(history: History, fault: str) -> None:
    session = history.sessions[fault]
    assert (session.code, session.status) == (3, "stopped"), session.output


@pytest.mark.parametrize("fault", [STOPPED_ON_RAY, "SIGTERM"])
def test_a_stopped_driver_says_how_to_go_on(history: History, fault: str) -> None:
    assert f"To continue: dtmsearch resume tiny --store {history.store}" in history.sessions[fault].output


@pytest.mark.parametrize("fault", ["SIGHUP", "Ctrl-C twice"])
def test_a_closed_terminal_and_a_second_ctrl_c_stop_as_the_first_does(history: History, fault: str) -> None:
    session = history.sessions[fault]
    assert (session.code, session.status) == (3, "stopped"), session.output


def test_a_third_ctrl_c_ends_at_once_or_finds_the_end(history: History) -> None:
    assert history.sessions["Ctrl-C and no end"].code == 3, history.sessions["Ctrl-C and no end"].output


@pytest.mark.parametrize("fault", [STOPPED_ON_RAY, "SIGHUP"])
def test_a_driver_that_is_stopped_leaves_no_process(history: History, fault: str) -> None:
    assert history.left[fault] == []


def test_a_driver_whose_ray_dies_says_how_to_go_on(history: History) -> None:
    assert "raylet process on this machine was killed" in history.sessions["raylet"].output


def test_no_fault_shows_a_traceback(history: History) -> None:
    assert [name for name, session in history.sessions.items() if "Traceback" in session.output] == []


def test_a_killed_driver_takes_its_replica_along(history: History) -> None:
    assert process_ends(history.replica_of_killed_driver)


def test_a_search_is_on_record_before_ray_has_started(history: History) -> None:
    assert history.sessions["all at once"].status == "running"
