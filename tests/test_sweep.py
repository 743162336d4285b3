"""Sweeps: which searches a file makes, when one dominates another, and a small sweep from start to front."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from processes import PATIENCE_SECONDS, Ended, dtmsearch, num_recorded, tiny_search, without_ray

from dtmsearch.cli import main
from dtmsearch.config.sweep_file import SweepFile, load_sweep, run_names
from dtmsearch.core.pareto import Point, Race, front
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.run import DOMINATED, is_left_out

# Fronts.

points = st.lists(st.builds(Point, st.integers(0, 5).map(float), st.integers(0, 5).map(float)), max_size=12)


@given(points)
def test_the_front_is_what_nothing_dominates(points: list[Point]) -> None:
    assert front(points) == [not any(other.dominates(point) for other in points) for point in points]


def race_of(*steps: tuple[str, float, float], group: str = "same") -> list[str | None]:
    """What a race of margin 1 and patience 2 says to each (search, size, quality)."""
    race = Race(margin=1.0, patience=2)
    return [race.add(group, name, Point(size, quality)) for name, size, quality in steps]


def test_a_search_behind_for_long_enough_is_dominated() -> None:
    assert race_of(("good", 8, 30), ("good", 6, 29), ("bad", 8, 20), ("bad", 6, 15)) == [None, None, None, "good"]


def test_a_search_that_catches_up_is_not_dominated() -> None:
    said = race_of(("good", 8, 30), ("other", 8, 20), ("other", 7, 30), ("other", 6, 20), ("good", 5, 29))
    assert said == [None] * 5


def test_a_search_within_the_margin_is_not_dominated() -> None:
    assert race_of(("good", 6, 30), ("other", 8, 29.5), ("other", 7, 29.5)) == [None] * 3


def test_a_larger_plan_dominates_nothing() -> None:
    assert race_of(("good", 8, 30), ("small", 4, 20), ("small", 3, 10)) == [None] * 3


def test_searches_of_different_groups_are_not_compared() -> None:
    race = Race(margin=1.0, patience=1)
    race.add("one model", "good", Point(6, 30))
    assert race.add("another model", "bad", Point(8, 10)) is None


# Stopping through Tune's scheduler.


def test_a_dominated_search_is_asked_to_stop_once_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from dtmsearch.workflows import sweep as sweep_module  # loads Ray Tune: only where this runs

    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(sweep_module, "stop", lambda *request: asked.append(request))
    scheduler = sweep_module.StopDominated(Race(1.0, 1), {"good": "g", "bad": "g"}, "store", lambda note: None)
    for name, fdt in (("good", 30.0), ("bad", 20.0), ("bad", 19.0)):
        trial: Any = SimpleNamespace(config={"run": name})
        scheduler.on_trial_result(None, trial, {"bits_per_weight": 8.0, "fdt": fdt})
    assert asked == [("bad", "store", f"{DOMINATED}good")]


# Sweep files.


def sweep_file(folder: Path, grid: dict[str, list[Any]], **changes: Any) -> Path:
    tiny_search(folder)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"sweep": "many", "base": "tiny.yaml", "grid": grid} | changes))
    return path


def test_every_combination_is_a_search(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, {"search.rank_by": ["kl", "fdt"], "seed": [0, 1], "search.width": [3]})
    _, files = load_sweep(path)
    assert [(f.run, f.search.rank_by, f.seed, f.search.width) for f in files] == [
        ("many.rank_by-kl.seed-0", "kl", 0, 3),
        ("many.rank_by-kl.seed-1", "kl", 1, 3),
        ("many.rank_by-fdt.seed-0", "fdt", 0, 3),
        ("many.rank_by-fdt.seed-1", "fdt", 1, 3),
    ]


def test_each_strategy_of_a_sweep_takes_of_the_base_file_what_it_uses(tmp_path: Path) -> None:
    _, files = load_sweep(sweep_file(tmp_path, {"search.strategy": ["beam", "greedy"]}))
    assert [f.search.strategy for f in files] == ["beam", "greedy"]


@pytest.mark.parametrize(
    "grid",
    [
        {"model.path": ["a/b", "a_b", "a b"]},
        {"search.schemes": [["int8-channel", "nf4"], ["int8-channel_nf4"]]},
        {"prompts.seed": [1, 2], "validation.seed": [1, 2]},
        {"model.revision": [1, "1"]},
    ],
)
def test_no_two_combinations_share_a_run(grid: dict[str, list[Any]]) -> None:
    sweep = SweepFile(sweep="s", base="base.yaml", grid=grid)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = run_names(sweep, combinations)
    assert len(set(names)) == len(combinations) and names == run_names(sweep, combinations)


def test_searches_with_long_names_keep_names_of_their_own(tmp_path: Path) -> None:
    schemes = [[f"int{bits}-g{group}" for group in range(1, 30)] for bits in (4, 8)]
    _, files = load_sweep(sweep_file(tmp_path, {"search.schemes": schemes}))
    assert len({f.run for f in files}) == 2


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({"seed": []}, r"grid\.seed: give other keys, with at least one value"),
        ({"run": ["a", "b"]}, r"grid\.run"),
        ({"search.wdith": [1]}, r"unknown key 'search\.wdith'; did you mean 'search\.width'"),
    ],
)
def test_a_mistake_in_a_grid_is_named(tmp_path: Path, grid: dict[str, list[Any]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_sweep(sweep_file(tmp_path, grid))


def test_an_unknown_key_of_a_sweep_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop_domniated"):
        load_sweep(sweep_file(tmp_path, {"seed": [0]}, stop_domniated={}))


# A sweep, in processes of its own.


@dataclass(frozen=True)
class Swept:
    folder: Path
    first: Ended
    again: Ended

    @property
    def store(self) -> Path:
        return self.folder / "store"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two small searches, a budget each, and the same sweep once more without a Ray."""
    folder = tmp_path_factory.mktemp("sweep")
    path = sweep_file(folder, {"search.stop.share": [0.1, 0.2]}, stop_dominated={"margin": 50})
    command = ["sweep", str(path), "--store", str(folder / "store"), "--format", "json"]
    first = dtmsearch(*command, "--log-to", f"tensorboard:{folder / 'logs'}")
    return Swept(folder, first, without_ray(*command))


RUNS = ("many.share-0.1", "many.share-0.2")


@pytest.mark.timeout(3 * PATIENCE_SECONDS)
def test_a_sweep_finishes_all_its_searches(swept: Swept) -> None:
    assert json.loads(swept.first.out)["statuses"] == dict.fromkeys(RUNS, "finished"), swept.first


def test_every_search_of_a_sweep_is_logged(swept: Swept) -> None:
    assert sorted(path.parent.name for path in (swept.folder / "logs").glob("*/events*")) == sorted(RUNS)


def test_a_finished_sweep_runs_nothing_again(swept: Swept) -> None:
    assert (swept.again.code, swept.again.out) == (0, swept.first.out), swept.again


def test_searches_of_a_sweep_have_run_in_one_store(swept: Swept) -> None:
    assert all(num_recorded(swept.store, run) > 0 for run in RUNS)


def test_the_front_names_plans_of_the_sweep_and_uniform_ones(swept: Swept, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pareto", "many*", "--all", "--store", str(swept.store), "--format", "json"]) == 0
    said = capsys.readouterr()
    candidates = [(c["run"], c["label"]) for c in json.loads(said.out)]
    uniform = [label for _, label in candidates if label.startswith("uniform")]
    # A plan that another run of the sweep has found too stands there once, and so does a uniform one.
    assert uniform and {run for run, _ in candidates} <= {"many.share-0.1", "many.share-0.2"}, said


def test_the_front_of_runs_that_are_not_there_is_empty(swept: Swept, capsys: pytest.CaptureFixture[str]) -> None:
    main(["pareto", "nothing*", "--store", str(swept.store), "--format", "json"])
    said = capsys.readouterr()
    assert (said.out.strip(), "no run nothing*" in said.err) == ("[]", True), said


def test_a_run_that_was_stopped_as_dominated_is_left_out(swept: Swept) -> None:
    store = ResultStore(swept.store)
    record = store.run(RUNS[0])
    assert record is not None
    with store.writer(RUNS[0]) as writer:
        writer.put_run(replace(record, status="stopped", message=f"{DOMINATED}{RUNS[1]}"))
    assert is_left_out(store, RUNS[0])
