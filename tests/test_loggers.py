"""Logs beside the store: what each library is told, and what becomes of a search when one of them fails."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import fakes
import pytest
from fakes import FakeEvaluator, toy_components
from reported import NUM_LAYERS, SCHEMES, make_run, reference, request

from dtmsearch.analysis.summary import summarize_run
from dtmsearch.config import parse
from dtmsearch.core.plan import Budget
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.errors import SearchStopped, UserError
from dtmsearch.search.loop import search
from dtmsearch.search.protocols import Observer, Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows import loggers
from dtmsearch.workflows.loggers import in_any_folder, logged_to

FILE = parse(
    "run: toy\nmodel: {path: m}\nprompts: {files: [t.txt]}\n"
    "search: {strategy: beam, rank_by: kl, schemes: [int8-channel], stop: {share: 0.3}}\n",
    "toy.yaml",
    Path("/"),
)


class Recorder:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[Mapping[str, float], int]] = []
        self.ended: list[tuple[Mapping[str, float], str]] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self, values: Mapping[str, float], status: str) -> None:
        self.ended.append((values, status))


class Opening:
    library = "json"

    def __init__(self, logger: Recorder) -> None:
        self.logger = logger

    def __call__(self, run: str, keys: Mapping[str, str], where: str) -> Recorder:
        return self.logger


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(loggers, "LOGGERS", {"recorder": Opening(found)})
    return found


def searched(folder: Path, observer: Observer) -> None:
    """A beam over the toy model."""
    components, one = toy_components(NUM_LAYERS), reference("search", NUM_LAYERS)
    space = SearchSpace(components, SCHEMES, budget=Budget(share=0.3))
    beam = Beam(Task(space, lambda plan, parent: request(plan, one, parent), "kl"), TreeSettings(width=1))
    with ResultStore(folder).writer("toy") as writer:
        writer.put_components(fakes.toy_manifest(NUM_LAYERS), components)
        search(beam, FakeEvaluator(fakes.evaluate, per_poll=8), writer, observer)


def test_every_decision_is_logged_with_its_values_and_size(tmp_path: Path, recorder: Recorder) -> None:
    with logged_to(["recorder"], FILE, Silent()) as (observer, _):
        searched(tmp_path, observer)
    steps = [(values, step) for values, step in recorder.logged if "decisions/kl" in values]
    assert [step for _, step in steps] == list(range(len(steps))) and len(steps) > 1
    bits = [values["decisions/bits_per_weight"] for values, _ in steps]
    assert bits == sorted(bits, reverse=True) and {"decisions/fdt", "decisions/share"} <= steps[0][0].keys()


def test_the_end_has_the_plans_held_out_values(tmp_path: Path, recorder: Recorder) -> None:
    summary = summarize_run(make_run(tmp_path), "toy")
    with logged_to(["recorder"], FILE, Silent()) as (observer, ended):
        searched(tmp_path / "other", observer)
        ended(summary)
    ((values, status),) = recorder.ended
    plan = summary.validation[0].summary
    assert plan is not None
    assert (status, values["held_out/kl"]) == ("finished", plan.kl)
    assert values["held_out/bits_per_weight"] == summary.bits_per_weight


@pytest.mark.parametrize(
    ("error", "status"), [(SearchStopped, "stopped"), (KeyboardInterrupt, "stopped"), (UserError, "failed")]
)
def test_how_a_run_ends_is_logged(tmp_path: Path, recorder: Recorder, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), logged_to(["recorder"], FILE, Silent()) as (observer, _):
        searched(tmp_path, observer)
        raise error("so")
    assert recorder.ended == [({}, status)]


def test_of_a_run_that_was_finished_before_nothing_is_logged(tmp_path: Path, recorder: Recorder) -> None:
    with logged_to(["recorder"], FILE, Silent()) as (_, ended):
        ended(summarize_run(make_run(tmp_path), "toy"))
    assert (recorder.logged, recorder.ended) == ([], [])


def test_a_search_goes_on_without_a_log_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    silent = Silent()
    monkeypatch.setattr(silent, "on_note", notes.append)
    (tmp_path / "taken").write_text("no folder")
    with logged_to([f"tensorboard:{tmp_path / 'taken'}"], FILE, silent) as (observer, _):
        searched(tmp_path / "store", observer)
    (note,) = notes
    assert note.startswith(f"nothing more is logged to tensorboard:{tmp_path / 'taken'}: ")


def test_a_search_goes_on_without_a_log_that_fails(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    silent = Silent()
    monkeypatch.setattr(silent, "on_note", notes.append)
    monkeypatch.setattr(recorder, "log", lambda values, step: 1 / 0)
    with logged_to(["recorder"], FILE, silent) as (observer, _):
        searched(tmp_path, observer)
    assert notes == ["nothing more is logged to recorder: ZeroDivisionError: division by zero"]
    assert recorder.ended == [] and ResultStore(tmp_path).table("steps", run="toy").num_rows > 1


def test_without_a_name_nothing_stands_between() -> None:
    silent = Silent()
    with logged_to([], FILE, silent) as (observer, _):
        assert observer is silent


def test_an_unknown_log_is_said() -> None:
    known = "got 'nosuch:x'; tensorboard, mlflow, wandb are known"
    with pytest.raises(UserError, match=known), logged_to(["nosuch:x"], FILE, Silent()):
        pass


@pytest.mark.parametrize(
    ("name", "module", "package"), [("mlflow", "mlflow.tracking", "mlflow"), ("wandb", "wandb", "wandb")]
)
def test_a_missing_library_is_said_with_the_command_that_installs_it(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}$"), logged_to([name], FILE, Silent()):
        pass


def test_logs_for_another_folder_have_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("tensorboard", "tensorboard:logs", "tensorboard:gs://bucket/logs")
    wanted = (f"tensorboard:{tmp_path}/tensorboard", f"tensorboard:{tmp_path}/logs", "tensorboard:gs://bucket/logs")
    assert in_any_folder(names) == wanted


def test_logs_of_another_kind_are_passed_on_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "_library", lambda _: None)
    assert in_any_folder(("mlflow:http://host:5000", "wandb:team")) == ("mlflow:http://host:5000", "wandb:team")


def test_tensorboard_has_event_files_in_the_runs_folder(tmp_path: Path) -> None:
    with logged_to([f"tensorboard:{tmp_path / 'events'}"], FILE, Silent()) as (observer, _):
        searched(tmp_path / "store", observer)
    (events,) = (tmp_path / "events" / "toy").iterdir()
    assert b"decisions/kl" in events.read_bytes() and b"search.stop.share" in events.read_bytes()


def told(*path: str) -> tuple[ModuleType, list[tuple[str, tuple[Any, ...], dict[str, Any]]]]:
    """A module whose functions, and those of what they return, keep how they were called."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Told:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return Told(f"{self._name}.{name}".lstrip("."))

        def __call__(self, *arguments: Any, **named: Any) -> Any:
            calls.append((self._name, arguments, named))
            return Told("")

    module = ModuleType(path[0])
    for name in path[1:]:
        setattr(module, name, Told(name))
    return module, calls


def test_mlflow_has_a_run_with_parameters_metrics_and_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = told("mlflow.tracking", "MlflowClient")
    monkeypatch.setitem(sys.modules, "mlflow.tracking", module)
    with logged_to(["mlflow:http://somewhere:5000"], FILE, Silent()) as (observer, _):
        searched(tmp_path, observer)
    names = [name for name, _, _ in calls]
    assert calls[0] == ("MlflowClient", (), {"tracking_uri": "http://somewhere:5000"})
    assert {"create_run", "log_param", "log_metric", "set_terminated"} <= set(names)
    assert ("search.strategy", "beam") in [arguments[1:] for name, arguments, _ in calls if name == "log_param"]
    assert calls[-1][1][1] == "FINISHED"


def test_wandb_has_a_run_with_steps_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = told("wandb", "init")
    monkeypatch.setitem(sys.modules, "wandb", module)
    with logged_to(["wandb:mine"], FILE, Silent()) as (observer, _):
        searched(tmp_path, observer)
    assert calls[0][2]["project"] == "mine" and calls[0][2]["config"]["search.rank_by"] == "kl"
    logged = [arguments[0] for name, arguments, _ in calls if name == "log" and "decisions/kl" in arguments[0]]
    assert [values["decisions/step"] for values in logged] == list(range(len(logged)))
    assert calls[-1][::2] == ("finish", {"exit_code": 0})
