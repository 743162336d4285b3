"""One search that trains, all its processes killed in the middle of a training and then of a probe between rounds.

All sessions have the replica in the driver's process, and trainings in forks of it, killed with it. A training in an
interpreter of its own is a matter of tests/test_recovering.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gate import Gate
from inprocess import run_here
from processes import CIRCUMSTANCES, PATIENCE_SECONDS, Driver, Rows, num_recorded, process_ends, rows, tiny_search

from dtmsearch.model.weights.trained import unpack_masks
from dtmsearch.store.store import ResultStore

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)

_STEPS = 40


@dataclass(frozen=True)
class History:
    """A search through its sessions, and the same search undisturbed."""

    store: Path
    undisturbed: Path
    killed_at_step: int
    trained_before_the_second_kill: Rows
    measured_before_the_second_kill: int
    code: int
    output: str

    def both(self, look: Callable[[Path], Any]) -> tuple[Any, Any]:
        return look(self.store), look(self.undisturbed)


def last_checkpoint(store: Path) -> int:
    return max((int(path.name.partition("-")[2]) for path in store.glob("trainings/*/checkpoint-*")), default=0)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("training")
    store, undisturbed = folder / "store", folder / "undisturbed"
    recovery = {"files": ["train.txt"], "masked_steps": _STEPS - 5, "unmasked_steps": 5, "checkpoint_steps": 5}
    recovery |= {"batch_tokens": 64, "sequence_tokens": 16}
    search = {"strategy": "sparsity", "rounds": [30, 20], "prune": "wanda", "probe_every": 20, "recovery": recovery}
    file = tiny_search(folder, search=search)
    gate = Gate(folder / "gate")

    def session(name: str) -> Driver:
        return Driver(folder / f"{name}.log", "run", file, "--store", store, "--in-process", gate=gate)

    def kill(process: Driver) -> None:
        below = process.below("")
        process.signal_group(signal.SIGKILL)
        process.wait()
        assert all(process_ends(pid) for pid in below)

    gate.bound("steps", 10)
    with session("training") as process:
        process.until(lambda: last_checkpoint(store) >= 10)
        kill(process)
    killed_at_step, before = last_checkpoint(store), num_recorded(store)
    gate.open()
    gate.bound("evaluations", 2)
    with session("probe") as process:
        process.until(lambda: bool(rows(store, "trainings")) and num_recorded(store) > before)
        kill(process)
    gate.open()
    trained, measured = rows(store, "trainings"), num_recorded(store)
    with session("last") as process:
        run_here(file, undisturbed)
        code, output = process.wait(), process.output
    return History(store, undisturbed, killed_at_step, trained, measured, code, output)


def test_the_kills_came_in_the_middle_of_a_training_and_of_a_probe(history: History) -> None:
    after = num_recorded(history.store) - history.measured_before_the_second_kill
    assert 0 < history.killed_at_step < _STEPS
    assert (len(history.trained_before_the_second_kill), after > 5) == (1, True)


def test_the_search_ends(history: History) -> None:
    assert (history.code, "Traceback" in history.output) == (0, False), history.output


def test_its_trained_weights_are_those_of_an_undisturbed_search_bit_by_bit(history: History) -> None:
    first, second = history.both(lambda store: {p.name: p.read_bytes() for p in store.glob("weights/*.safetensors")})
    assert len(first) == 2 and first == second


def test_its_masks_are_those_of_an_undisturbed_search(history: History) -> None:
    first, second = history.both(lambda s: {p.parent.name: unpack_masks(p) for p in s.glob("trainings/*/masks*")})
    assert len(first) == 2 and first.keys() == second.keys()
    assert all(torch.equal(mask, second[name][key]) for name, masks in first.items() for key, mask in masks.items())


def test_the_data_come_in_the_same_order(history: History) -> None:
    """Every step's loss, of every training: another row would show."""
    first, second = history.both(lambda store: rows(store, "trainings", without=("wall_seconds",)))
    assert [len(row["losses"]) for row in first] == [_STEPS] * 2 and first == second


def test_its_decisions_are_those_of_an_undisturbed_search(history: History) -> None:
    first, second = history.both(lambda store: rows(store, "steps", without=("wall_seconds",)))
    assert first == second != []


def test_its_plans_are_those_of_an_undisturbed_search(history: History) -> None:
    first, second = history.both(lambda store: {tuple(row.items()) for row in rows(store, "plans")})
    assert first == second != set()


def test_its_evaluations_are_those_of_an_undisturbed_search_each_once(history: History) -> None:
    first, second = history.both(lambda store: rows(store, "evaluations", without=CIRCUMSTANCES))
    by_id = {row["evaluation_id"]: row for row in first}
    assert len(by_id) == len(first) and by_id == {row["evaluation_id"]: row for row in second}


def test_its_plan_is_that_of_an_undisturbed_search(history: History) -> None:
    first, second = history.both(lambda store: ResultStore(store).run("tiny"))
    assert first.final_plan_id == second.final_plan_id is not None
