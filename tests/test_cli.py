"""The command line: its verbs and options, its exit codes, and what goes to stdout and what to stderr."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import toy_components, toy_manifest

import dtmsearch
from dtmsearch.analysis.summary import RunSummary, ValidationRow
from dtmsearch.cli import cli, main
from dtmsearch.console.run_text import PLAN_QUERY, run_text
from dtmsearch.core.metrics import PairedDifference, Summary
from dtmsearch.core.plan import Plan, plan_size
from dtmsearch.core.records import RunRecord, StepRecord
from dtmsearch.errors import (
    ClusterUnreachable,
    DtmError,
    ReplicasFailed,
    RunLocked,
    SearchFailed,
    SearchStopped,
    StoreError,
    StoreFull,
    StoreReadOnly,
    UserError,
)
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.doctor import Finding, Status
from dtmsearch.workflows.run import PlanMeasurement, Where

GOLDEN = Path(__file__).parent / "golden" / "cli.json"
PLAN = Plan.of({c.name: "int8-channel" for c in toy_components()[:4]})
VALUES = Summary(64, 27.5, 20.0, 31.0, 32.0, 0.25, 2.1, 26.4, 0.0003)
SEARCH_FILE = """
run: mine
model: {path: some/model}
prompts: {files: [text.txt]}
search: {schemes: [int8-channel]}
"""


def a_summary(**changes: Any) -> RunSummary:
    fields: dict[str, Any] = {
        "run": "mine",
        "status": "finished",
        "interrupted": False,
        "message": None,
        "continue_command": None,
        "model": "some/model",
        "manifest_id": "toy",
        "reference_id": "search",
        "validation_reference_id": "held-out",
        "num_evaluations": 120,
        "failures": {"nonfinite": 3},
        "num_steps": 4,
        "last_step": StepRecord(3, PLAN.id, "layers.0.q=int8-channel", 27.9, 4, 0.5, 12.0, 0.0, 120, 65.0),
        "final_plan_id": PLAN.id,
        "final_plan": PLAN,
        "num_compressed": 4,
        "share": 0.5,
        "bits_per_weight": 12.0,
        "wall_seconds": 65.0,
        "created_at": 1e9,
        "finished_at": 1e9 + 70,
        "validation": (
            ValidationRow("plan", PLAN.id, 4, 12.0, 0.5, VALUES, None),
            ValidationRow("uniform:w8a8", "u", 8, 8.1, 1.0, VALUES, None, PairedDifference(0.5, -0.25, 1.0, 0.95)),
            ValidationRow("uniform:nf4", "n", 8, 4.5, 1.0, None, "nonfinite: layer 3"),
        ),
        "verdict": "The plan is as good as the other.",
    }
    return RunSummary(**(fields | changes))


@pytest.fixture
def replace_run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Put fakes in the place of functions of `dtmsearch.workflows.run`; gives the list of what they are called with."""

    def replace(**answers: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        fake = ModuleType("dtmsearch.workflows.run")
        fake.Where = Where  # type: ignore[attr-defined]
        for name, answer in answers.items():
            setattr(fake, name, _recording(calls, answer))
        monkeypatch.setitem(sys.modules, "dtmsearch.workflows.run", fake)
        return calls

    return replace


def _recording(calls: list[tuple[Any, ...]], answer: Any) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        calls.append(arguments)
        if isinstance(answer, BaseException):
            raise answer
        return answer(*arguments) if callable(answer) else answer

    return called


@pytest.fixture
def search_file(tmp_path: Path) -> str:
    path = tmp_path / "search.yaml"
    path.write_text(SEARCH_FILE)
    return str(path)


def store_with_a_run(place: Path) -> str:
    record = RunRecord("mine", "finished", "", "/", "toy", "search", None, PLAN.id, 1e9, 1e9 + 70, "0.1.0")
    with ResultStore(place).writer("mine") as writer:
        writer.put_run(record)
        writer.put_components(toy_manifest(), toy_components())
        writer.decide([StepRecord(0, PLAN.id, "layers.0.q=int8-channel", 27.9, 4, 0.5, 12.0, 0.0, 8, 2.0)])
    return str(place)


# The command line as a whole


def described() -> dict[str, Any]:
    """Every verb with its arguments and options, as a user types them."""
    return {name: _described(verb) for name, verb in sorted(cli.commands.items())}


def _described(verb: click.Command) -> list[str]:
    arguments = [p.make_metavar(click.Context(verb)) for p in verb.params if isinstance(p, click.Argument)]
    return arguments + sorted(_option(p) for p in verb.params if isinstance(p, click.Option))


def _option(option: click.Option) -> str:
    value = "" if option.is_flag else " " + option.make_metavar(click.Context(cli))
    return "/".join(option.opts) + value + (" ..." if option.multiple else "")


def test_verbs_and_options_are_those_that_are_promised() -> None:
    assert described() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("verb", sorted(cli.commands))
def test_the_help_of_every_verb_ends_with_examples_of_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([verb, "--help"])
    assert f"  dtmsearch {verb}" in capsys.readouterr().out.partition("Examples:")[2]


@pytest.fixture(scope="module")
def loaded_by_help() -> dict[str, list[str]]:
    """What a fresh interpreter has loaded of heavy libraries once it has given a verb's help, and those before it."""
    code = (
        "import json, sys; from dtmsearch.cli import main\n"
        "heavy = {'torch', 'ray', 'duckdb', 'pyarrow', 'numpy', 'pydantic', 'rich', 'yaml'}\n"
        f"for verb in {['', *sorted(cli.commands)]}:\n"
        "    assert main([verb, '--help'] if verb else ['--help']) == 0\n"
        "    print('LOADED', verb, json.dumps(sorted(heavy & set(sys.modules))), sep='\\t')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = (line.split("\t") for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return {verb: json.loads(loaded) for _, verb, loaded in lines}


@pytest.mark.parametrize("verb", ["", *sorted(cli.commands)])
def test_help_is_answered_without_heavy_libraries(verb: str, loaded_by_help: dict[str, list[str]]) -> None:
    assert loaded_by_help[verb] == []


def test_schemes_are_listed_with_bits_needs_and_who_writes_them(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["schemes", "nf4", "gptq-int3-g64-asym", "--format", "json"])
    nf4, gptq = json.loads(capsys.readouterr().out)
    at_size = [held["holder"] for held in nf4["held"] if held["at_size"]]
    assert (code, nf4["bits_per_weight"], at_size) == (0, 4.5, ["bitsandbytes (transformers)"])
    assert gptq["needs"] == "calibration text (Hessians)"
    assert [held["holder"] for held in gptq["held"] if held["at_size"]] == ["compressed-tensors (vllm)"]


def test_schemes_without_names_lists_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["schemes"])
    out = capsys.readouterr().out
    assert code == 0 and all(family in out for family in ("rounding", "gptq", "bitsandbytes", "pruning", "pair"))


@pytest.mark.parametrize("arguments", [["schemes", "nf5"], ["schemes", "--shape", "64"], ["schemes", "--shape", "0x8"]])
def test_what_schemes_does_not_know_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(arguments)
    assert (code, capsys.readouterr().out) == (2, "")


def test_an_unknown_verb_is_a_usage_error_that_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["qery"])
    assert code == 2 and "query" in capsys.readouterr().err


def test_an_unknown_option_is_a_usage_error_that_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "--replica", "2", "x.yaml"])
    assert code == 2 and "--replicas" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"{dtmsearch.__version__}\n"


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError, 2),
        (StoreError, 4),
        (StoreReadOnly, 4),
        (StoreFull, 3),
        (RunLocked, 1),
        (ClusterUnreachable, 5),
        (ReplicasFailed, 1),
        (SearchFailed, 1),
    ],
)
def test_what_went_wrong_is_said_in_a_line_and_told_by_the_exit_code(
    error: type[DtmError], code: int, replace_run: Any, search_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(run=error("what happened"))
    assert (main(["run", search_file]), *capsys.readouterr()) == (code, "", "error: what happened\n")


def test_what_failed_below_us_is_said_and_its_traceback_is_a_file(
    replace_run: Any, search_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = ReplicasFailed("no replica started")
    failure.__cause__ = KeyError("what a replica raised")
    replace_run(run=failure)
    main(["run", search_file])
    first, second = capsys.readouterr().err.splitlines()
    log = Path(second.rpartition(" ")[2])
    traceback = log.read_text()
    log.unlink()
    assert first == "error: no replica started" and "KeyError: 'what a replica raised'" in traceback


def test_a_fault_of_ours_is_one_line_and_its_traceback_a_file(
    replace_run: Any, search_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(run=RuntimeError("boom"))
    main(["run", search_file])
    first, second = capsys.readouterr().err.splitlines()
    log = Path(second.rpartition(" ")[2])
    traceback = log.read_text()
    log.unlink()
    assert first == "error: RuntimeError: boom" and "Traceback" in traceback


def test_a_fault_of_ours_exits_1(replace_run: Any, search_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(Path(search_file).parent))
    replace_run(run=KeyError("boom"))
    assert main(["run", search_file]) == 1


def test_a_bare_value_error_is_a_fault_of_ours(
    replace_run: Any, search_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(Path(search_file).parent))
    replace_run(run=ValueError("boom"))
    assert main(["run", search_file]) == 1


@pytest.mark.parametrize("stop", [SearchStopped(), KeyboardInterrupt()])
def test_a_stopped_search_exits_3_and_says_how_to_go_on(
    stop: BaseException, replace_run: Any, search_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(run=stop)
    code = main(["run", search_file, "--store", "my store"])
    assert code == 3 and "dtmsearch resume mine --store 'my store'\n" in capsys.readouterr().err


def test_a_kill_stops_a_search_as_ctrl_c_does(replace_run: Any, search_file: str) -> None:
    replace_run(run=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["run", search_file]) == 3


def test_a_search_leaves_the_signals_as_they_were(replace_run: Any, search_file: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    replace_run(run=a_summary())
    main(["run", search_file])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_missing_search_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "nowhere.yaml"])
    assert code == 2 and "nowhere.yaml" in capsys.readouterr().err


# run, resume, demo


def test_run_gives_the_search_file_with_overrides_the_store_and_the_place(replace_run: Any, search_file: str) -> None:
    calls = replace_run(run=a_summary())
    options = ["--replicas", "3", "--gpus-per-replica", "0.5", "--batch-tokens", "800", "--address", "auto"]
    main(["run", search_file, "--set", "search.width=4", "--set", "run=wide", "--store", "s3://b/s", *options])
    [(file, store, where, _)] = calls
    assert (file.run, file.search.width, store, where) == ("wide", 4, "s3://b/s", Where("auto", 3, 0.5, 800))


def test_without_options_the_place_is_chosen_by_the_machine(replace_run: Any, search_file: str) -> None:
    calls = replace_run(run=a_summary())
    main(["run", search_file])
    assert calls[0][1:3] == ("dtm-store", Where())


def test_the_store_can_be_named_by_the_environment(
    replace_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTMSEARCH_STORE", str(tmp_path))
    calls = replace_run(resume=a_summary())
    main(["resume", "mine"])
    assert calls[0][:2] == ("mine", str(tmp_path))


def test_the_summary_holds_size_validation_failures_verdict_and_plan(
    replace_run: Any, search_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(run=a_summary())
    main(["run", search_file])
    said = capsys.readouterr().out
    wanted = ["50.0%", "12.00 bits", "3 nonfinite", "+0.50 [-0.25, +1.00]", "nonfinite: layer 3", "as good as", PLAN.id]
    assert [words for words in wanted if words not in said] == []


def test_the_summary_in_json_is_all_that_stdout_holds(
    replace_run: Any, search_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(run=a_summary())
    main(["run", search_file, "--format", "json"])
    assert json.loads(capsys.readouterr().out)["final_plan"] == PLAN.schemes


def test_a_finished_demo_says_that_it_is_complete_and_exits_0(
    replace_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(demo=a_summary(already_complete=True))
    code = main(["demo"])
    assert code == 0 and "already complete" in capsys.readouterr().out


def test_the_demo_ends_with_three_commands_to_go_on_with(
    replace_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(demo=a_summary())
    main(["demo", "--store", str(tmp_path)])
    following = capsys.readouterr().out.partition("Next:")[2].split()
    assert [following[at + 1] for at, word in enumerate(following) if word == "dtmsearch"] == [
        "report",
        "init",
        "export",
    ]
    assert following.count(str(tmp_path)) == 3  # the report's, the export's, and where the store is


@pytest.mark.parametrize(
    ("options", "in_process"), [([], True), (["--replicas", "2"], False), (["--cpus-per-replica", "1"], False)]
)
def test_the_demo_needs_no_ray_unless_asked(options: list[str], in_process: bool, replace_run: Any) -> None:
    seen: list[Where] = []

    def demo(_store: str, where: Where, _observer: object) -> RunSummary:
        seen.append(where)
        return a_summary()

    replace_run(demo=demo)
    main(["demo", *options])
    assert [where.in_process for where in seen] == [in_process]


def test_progress_goes_to_stderr_alone(replace_run: Any, search_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_file: object, _store: str, _where: Where, observer: Any) -> RunSummary:
        observer.on_note("a replica was replaced")
        return a_summary()

    replace_run(run=run)
    main(["run", search_file])
    out, err = capsys.readouterr()
    assert "replaced" not in out and err == "a replica was replaced\n"


# ls, status, stop, query


def test_ls_lists_the_runs_of_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ls", "--store", store_with_a_run(tmp_path), "--format", "json"])
    [run] = json.loads(capsys.readouterr().out)
    assert (run["run"], run["status"], run["share"]) == ("mine", "finished", 0.5)


def test_ls_of_no_store_is_an_empty_list_and_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["ls", "--format", "json"])
    assert json.loads(capsys.readouterr().out) == [] and not list(tmp_path.iterdir())


def test_status_shows_a_run_as_a_person_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", "mine", "--store", store_with_a_run(tmp_path)])
    assert capsys.readouterr().out.startswith("run mine: finished\n")


def test_status_of_an_unknown_run_names_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["status", "yours", "--store", store_with_a_run(tmp_path)])
    assert code == 2 and "mine" in capsys.readouterr().err


def test_stop_says_how_to_go_on(replace_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = replace_run(stop=None)
    main(["stop", "mine"])
    assert calls == [("mine", "dtm-store")] and "dtmsearch resume mine" in capsys.readouterr().err


def test_stop_says_where_a_submitted_search_goes_on(replace_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    replace_run(stop="dtmsearch submit /searches/mine.yaml --address http://there:8265")
    main(["stop", "mine"])
    assert "where it was submitted: dtmsearch submit /searches/mine.yaml" in capsys.readouterr().err


def test_status_of_a_stopped_search_says_where_it_was_submitted() -> None:
    summary = a_summary(status="stopped", continue_command="dtmsearch submit /searches/mine.yaml")
    assert "stopped; where it was submitted, `dtmsearch submit /searches/mine.yaml` continues it" in run_text(summary)


def store_of_a_run_begun_elsewhere(folder: Path, continue_command: str | None) -> str:
    text = "run: mine\nmodel: {path: hub/model}\nprompts: {files: [text.txt]}\nsearch: {schemes: [int8-channel]}\n"
    with ResultStore(folder / "store").writer("mine") as writer:
        there = str(folder / "elsewhere")
        record = RunRecord("mine", "stopped", text, there, "toy", "search", None, None, 1e9, 1e9 + 70, "0.1.0")
        writer.put_run(replace(record, continue_command=continue_command))
    return str(folder / "store")


def test_resume_of_a_submitted_search_says_how_it_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of_a_run_begun_elsewhere(tmp_path, "dtmsearch submit /searches/mine.yaml --address http://there:8265")
    code = main(["resume", "mine", "--store", store])
    assert (code, "dtmsearch submit /searches/mine.yaml" in capsys.readouterr().err) == (2, True)


def test_resume_without_the_search_s_texts_leaves_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of_a_run_begun_elsewhere(tmp_path, None)
    code = main(["resume", "mine", "--store", store])
    record = ResultStore(store).run("mine")
    said = capsys.readouterr().err
    assert (code, record is not None and record.status) == (2, "stopped")
    assert f"a search file in {tmp_path / 'elsewhere'}, which is not here" in said and "dtmsearch run FILE" in said


def test_query_prints_json_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["query", "SELECT run, step, share FROM steps", "--format", "json", "--store", store_with_a_run(tmp_path)])
    assert json.loads(capsys.readouterr().out) == [{"run": "mine", "step": 0, "share": 0.5}]


def test_query_prints_csv_with_lists_as_json_and_null_as_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["query", "SELECT [1, 2] AS l, NULL AS n, 'a,b' AS t", "--format", "csv", "--store", str(tmp_path)])
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == [["l", "n", "t"], ["[1, 2]", "", "a,b"]]


def test_query_keeps_columns_of_one_name_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["query", "SELECT 1 AS a, 2 AS a", "--format", "csv", "--store", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1] == "1,2"


def test_query_prints_numbers_that_json_lacks_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["query", "SELECT 'inf'::DOUBLE AS a, sum(2::BIGINT) AS b", "--format", "json", "--store", str(tmp_path)])
    assert json.loads(capsys.readouterr().out) == [{"a": "inf", "b": 2}]


def test_query_writes_parquet_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    main(["query", "SELECT 1 AS a", "--format", "parquet", "--out", str(out), "--store", str(tmp_path)])
    assert pq.read_table(out) == pa.table({"a": pa.array([1], pa.int32())})


def test_query_writes_any_form_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    main(["query", "SELECT 1 AS a", "--format", "csv", "--out", str(out), "--store", str(tmp_path)])
    assert (out.read_text(), capsys.readouterr().out) == ("a\n1\n", "")


def test_parquet_for_a_terminal_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["query", "SELECT 1", "--format", "parquet", "--store", str(tmp_path)]) == 2


def test_parquet_goes_into_a_pipe(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    main(["query", "SELECT 1 AS a", "--format", "parquet", "--store", str(tmp_path)])
    assert pq.read_table(io.BytesIO(capsysbinary.readouterr().out)).to_pylist() == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "options", "start"),
    [("a.csv", [], b"a\n1"), ("a.json", [], b"["), ("a.parquet", [], b"PAR1"), ("a.csv", ["--format", "json"], b"[")],
)
def test_the_extension_says_the_form_unless_it_is_asked_for(
    name: str, options: list[str], start: bytes, tmp_path: Path
) -> None:
    main(["query", "SELECT 1 AS a", "--out", str(tmp_path / name), "--store", str(tmp_path), *options])
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("verb", [["ls"], ["status", "a"], ["query", "SELECT 1"], ["pareto"], ["report", "a"]])
def test_a_store_that_was_named_and_is_not_there_is_an_error(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "--store", str(tmp_path / "mistyped")]) == 2
    assert "there is no store" in capsys.readouterr().err


def test_a_store_that_cannot_be_looked_at_is_a_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--store", "x" * 5_000]) == 2
    assert "raceback" not in capsys.readouterr().err


def test_anything_but_a_select_is_a_usage_error(tmp_path: Path) -> None:
    assert main(["query", "DROP TABLE runs", "--store", str(tmp_path)]) == 2


@pytest.mark.parametrize("sql", [PLAN_QUERY])
def test_the_queries_that_are_offered_can_be_asked(sql: str, tmp_path: Path) -> None:
    assert main(["query", sql.format(run="mine", plan_id=PLAN.id), "--store", store_with_a_run(tmp_path)]) == 0


@pytest.mark.parametrize("sql", [PLAN_QUERY])
def test_the_queries_that_are_offered_survive_a_shells_double_quotes(sql: str) -> None:
    assert set(sql) & set('"$`!\\') == set()


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path: Path) -> None:
    sql = "SELECT range AS a FROM range(100000)"
    command = f"{sys.executable} -c 'from dtmsearch.cli import main; main()' query '{sql}' --store {tmp_path} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


# evaluate, doctor


def a_measurement(summary: Summary | None, failure: str | None = None) -> PlanMeasurement:
    return PlanMeasurement("uniform:w8a8", PLAN, plan_size(PLAN, toy_components(), 16), 64, summary, failure)


def test_evaluate_prints_metrics_size_and_plan(
    replace_run: Any, search_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = replace_run(evaluate=a_measurement(VALUES))
    main(["evaluate", search_file, "--plan", "uniform:w8a8", "--format", "json"])
    said = json.loads(capsys.readouterr().out)
    assert calls[0][1] == "uniform:w8a8"
    assert (said["summary"]["fdt_mean"], said["plan"], said["size"]["num_compressed"]) == (27.5, PLAN.schemes, 4)


def test_evaluate_says_why_a_plan_could_not_be_measured_and_exits_1(
    replace_run: Any, search_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(evaluate=a_measurement(None, "nonfinite: layer 3"))
    code = main(["evaluate", search_file, "--plan", "uniform:w8a8"])
    assert code == 1 and "nonfinite: layer 3" in capsys.readouterr().out


def test_evaluate_needs_a_plan(search_file: str) -> None:
    assert main(["evaluate", search_file]) == 2


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("missing", 1)])
def test_doctor_exits_1_when_something_needed_is_missing(
    status: Status, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("store", status, "a file", "choose another")
    monkeypatch.setattr(importlib.import_module("dtmsearch.workflows.doctor"), "examine", lambda _store: [finding])
    assert main(["doctor", "--format", "json"]) == code
    assert json.loads(capsys.readouterr().out) == [
        {"name": "store", "status": status, "found": "a file", "remedy": "choose another"}
    ]


# The Python API


@pytest.mark.parametrize("verb", ["demo", "doctor", "evaluate", "ls", "query", "resume", "run", "status", "stop"])
def test_every_verb_is_a_function_of_the_package_also_once_its_module_is_loaded(verb: str) -> None:
    importlib.import_module("dtmsearch.workflows.run")
    importlib.import_module("dtmsearch.workflows.doctor")
    assert callable(getattr(dtmsearch, verb))


def test_the_package_has_no_other_verbs_than_it_says() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rnu'"):
        dtmsearch.rnu  # noqa: B018 - asking is the test


def test_the_package_reads_a_search_file(search_file: str) -> None:
    assert dtmsearch.load(Path(search_file)).run == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["query", "SELECT 1", "--out", "missing/answer.csv"],
        ["report", "run", "--out", "missing/report.html"],
        ["init", "model", "--out", "missing/search.yaml"],
        ["export", "run", "--to", "json", "--out", "file.txt/folder"],
        ["solve", "run", "--bits", "4", "--out", "file.txt/folder"],
    ],
)
def test_an_output_that_cannot_be_written_is_said_before_any_work(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    assert main(arguments) == 2
    assert "cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "run", "--to", "ggufs", "--out", "new"], ["there are json, dense,", "did you mean gguf?"]),
        (["statsu", "run"], ["No such command 'statsu'", "'status'", "`dtmsearch --help`"]),
        (["run"], ["Missing argument 'FILE'", "`dtmsearch run --help`"]),
        (["run", "a.yaml", "--replicas", "many"], ["'--replicas'", "many", "`dtmsearch run --help`"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_says_what_there_is(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "run", "--to", "json", "--out", "new"],
        ["score", "run", "--tasks", "arc_easy"],
        ["recover", "run"],
        ["resume", "run"],
    ],
)
def test_a_mistyped_store_is_said_before_anything_is_loaded(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--store", str(tmp_path / "dtm-stroe")]) == 2
    assert "there is no store" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_an_infinite_time_is_text(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT 'infinity'::TIMESTAMP AS late, '-infinity'::DATE AS early"
    assert main(["query", sql, "--store", str(tmp_path), "--format", form]) == 0
    said = capsys.readouterr().out
    assert "infinity" in said and "-infinity" in said
