"""What a run may be called, and that nothing else reaches the store, whatever verb it is given to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contracts import ids, make_records
from stores import opened, replayed, run_record

from dtmsearch.cli import main
from dtmsearch.core.records import check_run_name, is_run_name
from dtmsearch.store.files import StoreError
from dtmsearch.store.store import ResultStore

NO_NAMES = (
    *("", ".", "..", "../run", "../../other/evaluations/run", "/etc/passwd", "a/b", "run/", "run/../run", "a\\b"),
    *("a" * 101, "a" * 5000, "run\n", "run\x00", "\x1b[31mrun", "run~evaluate", "-run", ".run", "ru n", "rün", "*"),
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two healthy stores, each with a finished run."""
    folder = tmp_path_factory.mktemp("stores")
    for name in ("store", "other"):
        with opened(ResultStore(folder / name)) as writer:
            writer.put_run(run_record(status="finished"))
            writer.append(make_records(1, 2, 3))
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path) -> Path:
    """One of the two, beside the other."""
    shutil.copytree(template, tmp_path / "both")
    return tmp_path / "both" / "store"


def files(place: Path) -> dict[str, tuple[int, int]]:
    """Every file of a store and of what lies beside it: name -> inode and time of writing."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in place.parent.rglob("*")}


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_cannot_be_a_name_is_refused(name: str) -> None:
    assert not is_run_name(name)
    with pytest.raises(ValueError, match="cannot be the name of a run"):
        check_run_name(name)


@pytest.mark.parametrize("name", ["a", "7", "llama2-7b-int8", "a..b", "A_1.2-3", "a" * 100])
def test_what_can_be_a_name_is_one(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_cannot_be_a_name_is_no_run_of_a_store(place: Path, name: str) -> None:
    assert ResultStore(place).run(name) is None


READERS: tuple[Callable[[ResultStore, str], Any], ...] = (
    lambda store, name: store.table("evaluations", run=name),
    lambda store, name: store.plan("0" * 32, name),
    lambda store, name: store.weights_id(name),
    lambda store, name: store.is_running(name),
    lambda store, name: store.stop_requested(name),
    lambda store, name: store.stop_reason(name),
    lambda store, name: store.request_stop(name),
    lambda store, name: store.writer(name),
    lambda store, name: store.evaluate_writer(name),
)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["..", "../../other/evaluations/run", "/etc/passwd", "run\x00"])
def test_every_method_of_a_store_refuses_it_and_touches_nothing(
    place: Path, read: Callable[[ResultStore, str], Any], name: str
) -> None:
    before = files(place)
    with pytest.raises(ValueError, match="cannot be the name of a run"):
        read(ResultStore(place), name)
    assert files(place) == before


@pytest.mark.parametrize("path", ["..", "runs/..", "/etc/passwd", "runs//x", "./runs", "runs/a\x00b"])
def test_a_path_that_leads_out_of_a_store_is_refused_below_all_names(place: Path, path: str) -> None:
    with pytest.raises(StoreError, match="no path inside the store"):
        ResultStore(place).folder.read(path)


VERBS = (
    ["status"],
    ["watch"],
    ["stop"],
    ["resume"],
    ["recover", "--set", "files=[text.txt]"],
    ["report"],
    ["report", "run"],
    ["solve", "--bits", "4"],
    ["score", "--tasks", "none"],
    ["export", "--to", "json", "--out", "exported"],
    ["query", "course"],
)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("name", ["..", "../../other/evaluations/run", "a/b", "", "a" * 5000, "\x1b[31mrun", "ru\nn"])
def test_every_verb_refuses_it_and_touches_nothing(
    place: Path, verb: list[str], name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.parent)
    before = files(place)
    code = main([*verb, name, "--store", str(place)])
    assert (code, files(place)) == (2, before)
    assert "Traceback" not in capsys.readouterr().err


def test_a_healthy_store_stays_whole_under_such_names(place: Path) -> None:
    for name in NO_NAMES:
        main(["status", name, "--store", str(place)])
    assert replayed(place) == ids(make_records(1, 2, 3))
