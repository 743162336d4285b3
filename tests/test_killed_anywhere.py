"""A driver that is killed before any one of all the changes that it makes to its store: the same command goes on, to
the same plan, and measures nothing twice. tests/test_kill_and_resume.py kills real processes over a real model."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import CIRCUMSTANCES, PATIENCE_SECONDS, Rows, forked, rows
from toy import ToyModel, run_killed_at, run_toy, run_with_snapshots, toy_search

pytestmark = pytest.mark.timeout(4 * PATIENCE_SECONDS)

# So many tests share the points.
_PARTS = 8


@dataclass(frozen=True)
class Points:
    """A search, and its store before each of `number` changes that it made to it. Of stores that differ in leftovers
    alone, files under temporary names and empty folders, `different` has the one with the most."""

    file: Path
    undisturbed: Path
    number: int
    different: list[Path]


@dataclass(frozen=True)
class Found:
    """What a search comes to, without the circumstances."""

    plan: str | None
    steps: Rows
    evaluations: dict[str, dict[str, object]]
    num_evaluations: int


def found(store: Path) -> Found:
    evaluations = rows(store, "evaluations", without=CIRCUMSTANCES)
    steps = rows(store, "steps", without=("wall_seconds",))
    plan = rows(store, "runs")[-1]["final_plan_id"]
    return Found(plan, steps, {row["evaluation_id"]: row for row in evaluations}, len(evaluations))


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Points:
    folder = tmp_path_factory.mktemp("points")
    file = toy_search(folder, stop={"components": 2})
    ended = forked(run_with_snapshots, str(file), str(folder))
    assert ended.code == 0, ended
    stores = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    different: dict[object, Path] = {}
    for store in stores:
        known = different.get(content := content_of(store))
        if known is None or leftovers(known) <= leftovers(store):
            different[content] = store
    return Points(file, folder / "undisturbed", len(stores), list(different.values()))


def content_of(store: Path) -> frozenset[tuple[str, bytes]]:
    paths = (path for path in store.rglob("*") if path.is_file() and not path.name.startswith(".tmp-"))
    return frozenset((str(path.relative_to(store)), path.read_bytes()) for path in paths)


def leftovers(store: Path) -> int:
    return sum(path.is_dir() or path.name.startswith(".tmp-") for path in store.rglob("*"))


def test_there_are_more_than_a_hundred_points(points: Points) -> None:
    assert points.number > 100


@pytest.mark.parametrize("part", range(_PARTS))
def test_killed_before_any_change_it_ends_as_if_undisturbed_and_measures_nothing_twice(
    points: Points, part: int
) -> None:
    expected = found(points.undisturbed)
    for store in points.different[part::_PARTS]:
        recorded = {row["evaluation_id"] for row in rows(store, "evaluations")} if any(store.iterdir()) else set()
        model = ToyModel()
        run_toy(points.file, store, model)
        assert (found(store), recorded & set(model.evaluated)) == (expected, set()), store.name


@pytest.mark.parametrize("part", range(_PARTS))
def test_what_a_kill_leaves_is_what_was_looked_at(points: Points, part: int, tmp_path: Path) -> None:
    """Real kills of the driver at some of the points."""
    number = part * points.number // _PARTS
    killed = forked(run_killed_at, str(points.file), str(tmp_path / "store"), str(number))
    run_toy(points.file, tmp_path / "store")
    assert (killed.code, found(tmp_path / "store")) == (-signal.SIGKILL, found(points.undisturbed))
