"""`serve-check`: an engine is started, asked and ended, and what it serves is held against what is recorded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from completions import Behaviour, serving
from exports import in_process, measured_plan
from tiny import TEXT, write_model

import dtmsearch as dtm
from dtmsearch.analysis.serve_comparison import ServeComparison, ServedPositions, served_values
from dtmsearch.cli import main
from dtmsearch.console.comparison_text import serve_check_text
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import EvaluationRecord
from dtmsearch.errors import UserError
from dtmsearch.export.formats import gguf_base
from dtmsearch.model.modules.discovery import read_manifest
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows import engine_process
from dtmsearch.workflows.described_folder import read_card
from dtmsearch.workflows.serve_check import _recorded

ENGINE = Path(__file__).parent / "fake_engine"
LENGTHS = {"count": 10, "prompt_tokens": 12, "continuation_tokens": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A store, a base model, and an export of a plan that the store has measured."""
    root = tmp_path_factory.mktemp("served")
    base = write_model(root / "base")
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        measured_plan(base, root / "store", "int4-channel").export("dense", root / "out")
    return root / "store", base, root / "out"


@pytest.fixture(scope="module")
def servers(folders: tuple[Path, Path, Path]) -> Iterator[dict[str, str]]:
    """Folder -> a server of it in this process."""
    _, base, out = folders
    with serving(base) as one, serving(out) as two:
        yield {str(base): one, str(out): two}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Says what the engine does on each folder; gives the file in which it leaves its process id and its arguments."""

    def behaves(behaviour: dict[str, str]) -> Path:
        monkeypatch.setenv("PYTHONPATH", str(ENGINE))
        monkeypatch.setenv("FAKE_ENGINE", json.dumps(behaviour))
        monkeypatch.setenv("FAKE_ENGINE_STARTED", str(tmp_path / "started"))
        return tmp_path / "started"

    return behaves


def check_ended(started: Path) -> None:
    assert not psutil.pid_exists(int(started.read_text().splitlines()[0]))


def check(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["serve-check", *map(str, arguments), "--quiet"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_what_is_served_is_held_against_what_is_recorded(
    folders: tuple[Path, Path, Path], servers: dict[str, str], engine: Callable[[dict[str, str]], Path]
) -> None:
    store, _, out = folders
    started = engine(servers)
    found = dtm.serve_check(out, store)
    assert serve_check_text(found).startswith("Too few prompts to say whether vLLM serves it as measured (6 prompts of")
    assert {name: value.difference.mean for name, value in found.values.items()} == dict.fromkeys(found.values, 0.0)
    assert list(found.values) == ["fdt_text", "fdt", "sdt"] and found.equal_prompts == found.num_prompts == 6
    assert found.values["sdt"].floor == 0.0 and found.values["sdt"].served.mean > 0.0
    assert found.outcome == "too few prompts" and found.expected.startswith("recorded by run mine")
    assert "--enforce-eager" in started.read_text() and "--dtype bfloat16" in started.read_text()
    check_ended(started)


def test_of_a_text_both_models_are_measured_here(
    folders: tuple[Path, Path, Path], servers: dict[str, str], engine: Callable[[dict[str, str]], Path]
) -> None:
    engine(servers)
    found = dtm.serve_check(folders[2], texts=[TEXT], dtype="float32", **LENGTHS)
    assert found.outcome == "served as measured" and found.verdict.startswith("Served as measured by vLLM on 10 ")
    assert not found.examples and found.expected == "measured here by transformers in float32"


def test_another_model_in_the_folders_place_is_told(
    folders: tuple[Path, Path, Path],
    servers: dict[str, str],
    engine: Callable[[dict[str, str]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As of an engine that reads scales or zero points otherwise."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with serving(write_model(tmp_path / "other", seed=5)) as url:
        started = engine(servers | {str(folders[2]): url})
        lengths = [f"--{name.replace('_', '-')}={value}" for name, value in LENGTHS.items()]
        code, out, _ = check(capsys, folders[2], "--text", text, "--dtype", "float32", "--format", "json", *lengths)
    values = json.loads(out)
    assert code == 1 and values["outcome"] == "not served as measured"
    assert values["values"]["sdt"]["difference"]["low"] > values["values"]["sdt"]["floor"] == 0.0
    assert values["examples"][0]["base_text"] != values["examples"][0]["served_text"]
    check_ended(started)


@pytest.mark.parametrize(
    ("behaviour", "of", "code", "said"),
    [
        ("dies", "out", 1, "Failed to find a kernel that can implement this. It serves the base model, and not"),
        ("dies", "base", 5, "Failed to find a kernel that can implement this. It does not serve the base model"),
        ("ends", "base", 5, "vLLM ended with exit code 9 while answering about the base model"),
        ("sleeps", "base", 5, "vLLM did not answer within 1 s of its start on {folder} (loading weights): give it"),
    ],
)
def test_an_engine_that_fails_is_told_in_one_line_and_ended(
    folders: tuple[Path, Path, Path],
    servers: dict[str, str],
    engine: Callable[[dict[str, str]], Path],
    capsys: pytest.CaptureFixture[str],
    behaviour: str,
    of: str,
    code: int,
    said: str,
) -> None:
    store, base, out = folders
    folder = str({"base": base, "out": out}[of])
    started = engine(servers | {folder: behaviour})
    patience = "1" if behaviour == "sleeps" else "60"
    found, shown, errors = check(capsys, out, "--store", store, "--start-timeout", patience)
    (line,) = errors.splitlines()
    assert found == code and shown == "" and said.format(folder=folder) in line
    check_ended(started)


def test_a_stop_ends_the_engine(
    folders: tuple[Path, Path, Path], engine: Callable[[dict[str, str]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store, base, out = folders
    started = engine({str(base): "sleeps"})

    def interrupt() -> None:
        while not (started.is_file() and started.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    code, _, errors = check(capsys, out, "--store", store)
    assert code == 3 and errors == "stopped; the engine was ended\n"
    check_ended(started)


def test_an_engine_that_is_not_installed(folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = check(capsys, folders[2], "--store", folders[0])
    assert code == 2 and errors.startswith(f"error: vLLM is not installed for {sys.executable}: pip install vllm")


@pytest.mark.parametrize(("python", "said"), [("nowhere/python", "cannot be run"), ("/bin/true", None)])
def test_a_python_that_is_none(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], python: str, said: str | None
) -> None:
    code, _, errors = check(capsys, folders[2], "--store", folders[0], "--python", python)
    assert code == 2 and (said or "is no Python") in errors


def test_a_port_that_is_taken(
    folders: tuple[Path, Path, Path], engine: Callable[[dict[str, str]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    engine({})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = check(capsys, folders[2], "--store", folders[0], "--port", str(port))
    assert code == 2 and f"port {port} cannot be had" in errors


def test_a_folder_that_was_never_measured_wants_a_text(
    folders: tuple[Path, Path, Path],
    engine: Callable[[dict[str, str]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine({})
    store, base, out = folders
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    code, _, errors = check(capsys, copy, "--store", tmp_path)
    assert code in (2, 4)
    (copy / "README.md").unlink()
    code, _, errors = check(capsys, copy, "--store", store)
    assert code == 2 and "say with --base what it is" in errors
    code, _, errors = check(capsys, copy, "--store", store, "--base", base)
    assert code == 2 and "give --text" in errors


def test_the_recorded_values_are_of_the_calibration_that_the_folder_was_made_with(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    store = ResultStore(shutil.copytree(folders[0], tmp_path / "store"))
    reference = store.reference(read_card(folders[2])["dtmsearch"]["reference"])
    assert reference is not None
    manifest = read_manifest(ModelSpec(str(folders[1]), dtype="float32"))
    plan, few = Plan.of({"model.layers.0.mlp.up_proj": "gptq-int4-channel"}), np.zeros(6, np.int32)
    for run, fdt in (("one", 1), ("two", 2)):
        request = EvalRequest(plan, reference.id, (0, 6), calibration_id=f"by-{run}")
        outcome = EvalResult(request.id, few + fdt, few, np.ones(6, np.float32))
        with store.writer(run) as writer:
            writer.put_components(manifest, manifest.components)
            writer.append([EvaluationRecord(request, outcome, "search")])
    named = {"plan": plan.id, "reference": reference.id}
    for card in ({"run": "two"}, {"run": "other", "calibration": "by-two"}):
        assert (_recorded(tmp_path, {"dtmsearch": named | card}, store, 0).values["fdt"] == 2).all()
    with pytest.raises(UserError, match="holds no measurement of plan"):
        _recorded(tmp_path, {"dtmsearch": named | {"calibration": "by-three"}}, store, 0)


def llama_server(tmp_path: Path) -> Path:
    """A program that starts, answers and ends as the fake engine does; models go by their files' names. As llama.cpp's
    it lists a model that it still loads, and says at /health that it does."""
    program = tmp_path / "llama-server"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "if sys.argv[1:] == ['--version']:\n"
        "    sys.exit('version: 7 (abc)')\n"
        "sys.argv[2] = os.path.basename(sys.argv[2])\n"
        "from vllm.entrypoints.openai import api_server\n"
        "api_server.LOADS_UNTIL_ASKED = 2\n"
        "api_server.main()\n"
    )
    program.chmod(0o755)
    return program


def with_file(out: Path, tmp_path: Path) -> Path:
    """An exported folder as `--to gguf` writes it: a file and a card."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    shutil.copy(out / "README.md", folder)
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder


def test_llama_cpp_is_asked_about_its_own_files(
    folders: tuple[Path, Path, Path],
    servers: dict[str, str],
    engine: Callable[[dict[str, str]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, base, out = folders
    converted = []

    def convert(folder: Path, made: Path, outtype: str) -> None:
        converted.append((folder, outtype))
        made.write_bytes(b"GGUF")

    monkeypatch.setattr(gguf_base, "convert", convert)
    monkeypatch.setattr(gguf_base, "check_converter", lambda *words: None)
    started = engine({"base.gguf": servers[str(base)], "model.gguf": servers[str(out)]})
    folder = with_file(out, tmp_path)
    found = dtm.serve_check(folder, store, engine="llama.cpp", program=str(llama_server(tmp_path)))
    assert converted == [(base, "f32")] and found.engine == "llama.cpp 7 (abc)"
    assert {name: value.difference.mean for name, value in found.values.items()} == dict.fromkeys(found.values, 0.0)
    assert "--ctx-size 24 --parallel 1" in started.read_text()
    check_ended(started)


def test_a_program_beside_the_quantizer_is_found_and_none_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = llama_server(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DTMSEARCH_GGML", raising=False)
    with pytest.raises(UserError, match="there is no llama-server on the search path"):
        engine_process.find_engine("llama.cpp", engine_process.EngineSettings())
    for named in (tmp_path, tmp_path / "libggml-base.so"):
        monkeypatch.setenv("DTMSEARCH_GGML", str(named))
        assert engine_process.find_engine("llama.cpp", engine_process.EngineSettings()) == "llama.cpp 7 (abc)"
        server = engine_process.SERVERS["llama.cpp"]
        assert engine_process.EngineSettings().command(server) == [str(program)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "error: llama.cpp is not installed: there is no llama-server on the search path. build llama.cpp, or"),
        (("--program", "nowhere/llama-server"), "nowhere/llama-server cannot be run"),
        (("--program", "/bin/true"), "/bin/true is no llama-server of llama.cpp: it does not say its version"),
        (("--python", "other/python"), "llama.cpp is no package of a Python: name its llama-server with --program"),
        (("--engine", "vllm", "--program", "/bin/true"), "vLLM is a package of a Python, no program: name that Python"),
    ],
)
def test_a_program_that_is_not_there(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.delenv("DTMSEARCH_GGML", raising=False)
    folder = with_file(folders[2], tmp_path) if "vllm" not in options else folders[2]
    code, _, errors = check(capsys, folder, "--store", folders[0], "--engine", "llama.cpp", *options)
    assert code == 2 and said in errors and len(errors.splitlines()) == 1


def test_a_folder_without_a_file_is_none_for_llama_cpp(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = check(capsys, folders[2], "--store", folders[0], "--engine", "llama.cpp")
    assert code == 2 and "holds no model.gguf, which llama.cpp serves: export with --to gguf" in errors


def test_an_end_that_is_broken_off_leaves_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a second Ctrl-C, while the engine that was asked to end takes its time."""

    def impatient(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_process, "_TERM_SECONDS", 0.01)
    monkeypatch.setattr("psutil.wait_procs", impatient)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        with pytest.raises(KeyboardInterrupt):
            engine_process._end(process)
        assert process.poll() == -signal.SIGKILL


def values(length: int, *, served: Any, expected: Any, base: Any) -> ServeComparison:
    """Of greedy texts that leave after so many tokens."""
    text = lambda firsts: np.arange(length)[None] >= np.asarray(firsts)[:, None]  # noqa: E731
    agrees = np.ones((len(served), length), np.bool_)
    expected = {"fdt_text": np.asarray(expected)}
    found = served_values(expected, ServedPositions(text(served)), ServedPositions(text(base)), agrees)
    return ServeComparison("f", "b", "E", "bfloat16", "", len(served), length, found, 0, 0)


def test_what_the_engine_does_to_the_base_model_is_no_fault_of_the_folder() -> None:
    random = np.random.default_rng(0)
    recorded = random.integers(10, 50, 32)
    noise = random.integers(-6, 3, 32)
    floor = np.clip(50 - random.integers(0, 12, 32), 0, 50)
    assert values(50, served=recorded + noise, expected=recorded, base=floor).outcome == "served as measured"
    ruined = values(50, served=recorded // 5, expected=recorded, base=floor)
    assert ruined.outcome == "not served as measured" and "Not served as measured by E on 32 prompts" in ruined.verdict


def test_an_engine_that_moves_the_base_model_as_far_as_the_plan_tells_nothing() -> None:
    random = np.random.default_rng(0)
    recorded, floor = random.integers(5, 15, 32), random.integers(20, 40, 32)
    found = values(50, served=recorded // 5, expected=recorded, base=floor)
    assert found.outcome == "cannot be told" and "Cannot be told whether E serves it as measured" in found.verdict
    unquantized = values(50, served=np.full(32, 50), expected=recorded, base=floor)
    assert unquantized.outcome == "not served as measured"


def test_text_alone_gives_its_fdt(folders: tuple[Path, Path, Path], engine: Callable[[dict[str, str]], Path]) -> None:
    store, base, out = folders
    with serving(base, Behaviour("text", tokenize=None)) as one, serving(out, Behaviour("text", tokenize=None)) as two:
        engine({str(base): one, str(out): two})
        found = dtm.serve_check(out, store)
    assert list(found.values) == ["fdt_text"]
