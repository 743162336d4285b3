"""What a user, a disk or a model gets wrong is said clearly, without a traceback, and loses nothing that was recorded.

What is known before Ray starts is asked of the command in this process, what a model's files are of a replica here. The
rest are processes of their own, which run side by side before the first test that looks at one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE_SECONDS, Ended, Rows, dtmsearch, remount, rows, tiny_search, tmpfs
from safetensors.torch import load_file, save_file
from tiny import llama_config, replica, write_model
from transformers import AutoTokenizer

import dtmsearch as dtm
from dtmsearch.cli import main
from dtmsearch.config import load
from dtmsearch.core.records import RunRecord
from dtmsearch.model.modules import discovery
from dtmsearch.store.store import ResultStore

pytestmark = pytest.mark.timeout(4 * PATIENCE_SECONDS)

# More than CPUs, for a process that reads and writes waits too.
_AT_ONCE = 3

Command = Callable[[Path], list[str | Path]]


@dataclass(frozen=True)
class Case:
    """A mistake: how its command is made in a folder of its own, with what code it ends, and what it says."""

    command: Command
    code: int
    says: tuple[str, ...]


def run(*options: str, **changes: Any) -> Command:
    """`dtmsearch run` of the tiny search with some keys changed."""
    return lambda folder: ["run", tiny_search(folder, **changes), *options]


def with_model(write: Callable[[Path], None]) -> Command:
    """`dtmsearch run` of a model that `write` makes."""

    def command(folder: Path) -> list[str | Path]:
        file = tiny_search(folder, model__path="other")
        write(folder / "other")
        return ["run", file]

    return command


def evaluate(plan: str, **content: Any) -> Command:
    """`dtmsearch evaluate` of a plan file with this content, or of what is no file."""

    def command(folder: Path) -> list[str | Path]:
        if content:
            (folder / plan).write_text(json.dumps({"model": "elsewhere"} | content))
        return ["evaluate", tiny_search(folder), "--plan", str(folder / plan) if content else plan]

    return command


def in_a_newer_store(folder: Path) -> list[str | Path]:
    (folder / "store").mkdir()
    (folder / "store" / "store.json").write_text('{"format": 99}')
    return ["run", tiny_search(folder)]


def pickled_only(folder: Path) -> None:
    shutil.copytree(folder.parent / "model", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damaged_configuration(folder: Path) -> None:
    shutil.copytree(folder.parent / "model", folder)
    (folder / "config.json").write_text('{"model_type": "lla')


def word_without_embedding(folder: Path) -> None:
    shutil.copytree(folder.parent / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["return"])
    tokenizer.save_pretrained(folder)


def another_file(name: str, make: Callable[[Path], object]) -> Command:
    """`dtmsearch run` of a model in whose folder one file is something else."""

    def write(folder: Path) -> None:
        shutil.copytree(folder.parent / "model", folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return with_model(write)


def index_of(file: str) -> Callable[[Path], object]:
    """An index by which a tensor lies in a file."""
    return lambda path: path.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))


def with_text(name: str, content: bytes) -> Command:
    """`dtmsearch run` over a text of its own."""

    def command(folder: Path) -> list[str | Path]:
        file = tiny_search(folder, prompts__files=[name])
        (folder / name).write_bytes(content)
        return ["run", file]

    return command


def with_line(line: str) -> Command:
    """`dtmsearch run` of a search file with a line more."""

    def command(folder: Path) -> list[str | Path]:
        file = tiny_search(folder)
        file.write_text(f"{file.read_text()}{line}\n")
        return ["run", file]

    return command


# What is known before Ray starts.
AT_ONCE_KNOWN = {
    "a key with a typo": Case(run(search__widht=3), 2, ("unknown key 'search.widht'", "did you mean 'search.width'?")),
    "a scheme with a typo": Case(
        run(search__schemes=["int8-chanel"]), 2, ("unknown scheme 'int8-chanel'", "the nearest is 'int8-channel'")
    ),
    "a model that is not there": Case(run(model__path="./nowhere"), 2, ("no model at", "does not exist")),
    "a pickled model": Case(with_model(pickled_only), 2, ("pickled weights only (pytorch_model.bin)", "safetensors")),
    "a damaged config.json": Case(with_model(damaged_configuration), 2, ("has a config.json that is no JSON",)),
    "a tokenizer larger than the embedding": Case(
        with_model(word_without_embedding), 2, ("258 ('return')", "the model has 258 rows", "resize_token_embeddings")
    ),
    "a config.json that is a pipe": Case(another_file("config.json", os.mkfifo), 2, ("config.json",)),
    "a config.json without an end": Case(
        another_file("config.json", lambda path: path.symlink_to("/dev/zero")), 2, ("config.json",)
    ),
    "an index of files elsewhere": Case(
        another_file("model.safetensors.index.json", index_of("../../other.safetensors")),
        2,
        ("must name files in the folder, and names", "../../other.safetensors"),
    ),
    "a value that is none of its type": Case(with_line("seed: !!bool maybe"), 2, ("tiny.yaml",)),
    "a size that is as good as none": Case(
        run(search__stop={"bits_per_weight": 40}), 2, ("stop.bits_per_weight: 40 asks for nothing",)
    ),
    "a size that no scheme reaches": Case(
        run(search__stop={"bits_per_weight": 2}), 2, ("stop.bits_per_weight: 2", "out of reach", "the least")
    ),
    "a damaged text": Case(with_text("text.zst", b"(\xb5/\xfd nothing of the kind"), 2, ("text.zst",)),
    "an empty text": Case(with_text("none.txt", b" \n\n"), 2, ("none.txt is empty", "give one that")),
    "a binary file": Case(
        with_text("b.txt", b"\x7fELF\x02\x01\x01\0\0"), 2, ("b.txt is no text: it holds zero bytes",)
    ),
    "UTF-16 without a mark": Case(
        with_text("u.txt", ("def f(): pass\n" * 400).encode("utf-16-le")), 2, ("UTF-16 without a byte order mark",)
    ),
    "rows of JSON under another name": Case(
        with_text("rows.txt", b'{"text": "def f(): return 1"}\n' * 400), 2, ("an object of JSON on each line", ".jsonl")
    ),
    "a table that is none": Case(with_text("rows.parquet", b"PAR1"), 2, ("it is no Parquet file, or a damaged one",)),
    "a text that is too short": Case(
        run(prompts__count=5000), 2, ("asks for 5000 prompts of 10 + 12 tokens", "is too short: give more text")
    ),
    "prompts that are not there": Case(run(prompts__files=["none.txt"]), 2, ("no prompt file 'none.txt'",)),
    "a newer store": Case(in_a_newer_store, 4, ("format version 99", "reads up to version")),
    "a plan that is nothing": Case(evaluate("nothing"), 2, ("'nothing' is no file, no run of this store",)),
    "a scheme that is none": Case(evaluate("uniform:int8"), 2, ("unknown scheme 'int8'", "the nearest is")),
    "a store that is not there": Case(lambda folder: ["resume", "nobody"], 2, ("there is no store",)),
    "code that came with the model": Case(
        run(model={"path": "./nowhere", "trust_remote_code": True}), 2, ("WARNING: TRUST_REMOTE_CODE IS ON",)
    ),
    "a cluster that is not there": Case(run("--address", "127.0.0.1:1"), 5, ("no Ray cluster at 127.0.0.1:1",)),
}


@pytest.mark.parametrize("name", AT_ONCE_KNOWN)
def test_a_mistake_is_said_before_ray_starts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    case = AT_ONCE_KNOWN[name]
    code = main([*map(str, case.command(tmp_path)), "--store", str(tmp_path / "store")])
    said = capsys.readouterr().err
    assert (code, [text for text in case.says if text not in said], "raceback" in said) == (case.code, [], False), said


# What is a matter of the search file, its texts and its model's folder alone.
OF_THE_FILE = [
    name
    for name in AT_ONCE_KNOWN
    if name not in ("a newer store", "a plan that is nothing", "a scheme that is none", "a store that is not there")
    if name not in ("code that came with the model", "a cluster that is not there")
]


def test_a_text_that_is_none_leaves_nothing_in_the_store(tmp_path: Path) -> None:
    file = with_text("none.txt", b"")(tmp_path)[1]
    assert main(["run", str(file), "--store", str(tmp_path / "store")]) == 2
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", OF_THE_FILE)
def test_validate_finds_what_run_would_refuse(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = AT_ONCE_KNOWN[name]
    _, file = case.command(tmp_path)
    code = main(["validate", str(file)])
    said = capsys.readouterr().err
    assert (code, [text for text in case.says if text not in said], "raceback" in said) == (2, [], False), said


def test_a_mistake_that_is_mended_may_keep_the_run_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("not-here.txt", "nor-here.txt"):
        main(["run", str(tiny_search(tmp_path, prompts__files=[name])), "--store", str(tmp_path / "store")])
    assert "no prompt file 'nor-here.txt'" in capsys.readouterr().err


def test_a_search_file_from_before_a_key_existed_is_the_same_search(tmp_path: Path) -> None:
    file = load(tiny_search(tmp_path))
    old = "".join(line for line in file.to_yaml().splitlines(keepends=True) if not line.startswith("seed:"))
    with ResultStore(tmp_path / "store").writer("tiny") as writer:
        writer.put_run(RunRecord("tiny", "finished", old, str(tmp_path), None, "reference", None, None, 1.0, 2.0, "0"))
    assert dtm.run(file, str(tmp_path / "store")).already_complete


# What is wrong with a model's files.


def test_layers_without_weight_matrices_have_no_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, llama_config(max_position_embeddings=77))  # no other test's: what is known of one is kept
    monkeypatch.setattr(discovery, "matrices_of", lambda layer: [])
    with pytest.raises(ValueError, match=r"has no components: no weight matrix lies inside model\.layers"):
        replica(tmp_path).manifest()


def test_weights_that_are_cut_short_are_said(tmp_path: Path) -> None:
    weights = write_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])
    with pytest.raises(ValueError, match="a cut one: it has 20000 bytes"):
        replica(tmp_path)


def test_a_model_without_tokenizer_is_said(tmp_path: Path) -> None:
    for file in write_model(tmp_path).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=f"cannot load the tokenizer in {tmp_path}"):
        replica(tmp_path)


@pytest.fixture
def model_with_code(tmp_path: Path) -> Path:
    """A model that needs Python code of its own, which leaves the file `it-ran` wherever it is imported."""
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.Strange"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange", "auto_map": auto_map}))
    (folder / "strange.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'it-ran')!r}).touch()\n")
    return folder


def test_code_that_is_not_trusted_is_asked_for(model_with_code: Path) -> None:
    with pytest.raises(ValueError, match=r"If you trust its author: model\.trust_remote_code: true"):
        replica(model_with_code)


def test_code_that_is_not_trusted_does_not_run(model_with_code: Path) -> None:
    with pytest.raises(ValueError, match="trust"):
        replica(model_with_code)
    assert not (model_with_code.parent / "it-ran").exists()


# What is known only once the model is there. Of GPUs that are not there tests/test_pool.py knows.


def overflowing(folder: Path) -> None:
    """In float16 one channel comes near the largest number there is, and rounding to two bits carries it over."""
    path = write_model(folder) / "model.safetensors"
    tensors = load_file(path)
    row = tensors["model.layers.0.mlp.down_proj.weight"][0]
    row[:] = 0.51 * 8000.0  # which two bits make 8000, the scale being the largest over 1.5
    row[0] = 12000.0
    save_file(tensors, path, metadata={"format": "pt"})


def search_of_an_overflowing_model(folder: Path) -> list[str | Path]:
    overflowing(folder / "overflowing")
    model = {"path": "overflowing", "dtype": "float16"}
    search = {"strategy": "greedy", "schemes": ["int2-tensor", "int8-channel"], "stop": {"components": 1}}
    return ["run", tiny_search(folder, model=model, search=search, validation=None)]


PROCESSES = {
    "too little text": Case(run(prompts__count=240), 2, ("asks for 240 prompts of 10 + 12 tokens", "holds 234")),
    "another model's plan": Case(
        evaluate("plan.json", manifest_id="foreign", schemes={}), 2, ("made for another model", "foreign ('elsewhere')")
    ),
    "candidates that overflow": Case(search_of_an_overflowing_model, 0, ()),
}


@dataclass(frozen=True)
class FullDisk:
    """A search on a disk that filled up, and again when there was room."""

    full: Ended
    recorded: Rows
    resumed: Ended
    recorded_in_the_end: Rows


def search_on_a_full_disk(folder: Path, file: Path) -> FullDisk:
    with tmpfs(folder / "disk", "100k") as disk:
        store = disk / "store"
        full = dtmsearch("run", file, "--store", store, "--in-process")
        recorded = rows(store, "evaluations")
        remount(disk, "size=64m")
        resumed = dtmsearch("resume", "tiny", "--store", store, "--in-process")
        return FullDisk(full, recorded, resumed, rows(store, "evaluations"))


@dataclass(frozen=True)
class World:
    """Where the processes ran, and what they said, as soon as it is known."""

    folders: dict[str, Path]
    said: dict[str, Future[Ended]]
    full_disk: Future[FullDisk]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("bad")
    folders, said = {}, {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        file = tiny_search(root, validation=None, search__stop={"components": 3})
        full_disk = pool.submit(search_on_a_full_disk, root, file)
        for name, case in PROCESSES.items():
            folders[name] = root / name.replace(" ", "-")
            folders[name].mkdir()
            command = [*case.command(folders[name]), "--store", folders[name] / "store", "--in-process"]
            said[name] = pool.submit(dtmsearch, *command)
        yield World(folders, said, full_disk)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_mistake_that_a_process_finds_is_said(world: World, name: str) -> None:
    case, said = PROCESSES[name], world.said[name].result()
    silent = [text for text in case.says if text not in said.err]
    assert (said.code, silent, "raceback" in said.err) == (case.code, [], False), said


def test_a_candidate_that_overflows_is_recorded_as_nonfinite(world: World) -> None:
    name = "candidates that overflow"
    world.said[name].result()
    statuses = {
        (row["component"], row["scheme"]): row["status"] for row in rows(world.folders[name] / "store", "evaluations")
    }
    assert statuses["model.layers.0.mlp.down_proj", "int2-tensor"] == "nonfinite"


# Disks.


def test_a_read_only_store_answers_but_takes_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tmpfs(tmp_path / "disk", "4m") as disk:
        file = tiny_search(tmp_path, search__width=1, search__stop={"components": 1})
        assert main(["run", str(file), "--in-process", "--store", str(disk / "store")]) == 0
        remount(disk, "ro")
        listed = main(["ls", "--store", str(disk / "store")])
        refused = main(["run", str(tiny_search(tmp_path, run="other")), "--store", str(disk / "store")])
    assert (listed, refused, "The store is read-only" in capsys.readouterr().err) == (0, 4, True)


def test_a_full_disk_stops_the_search(world: World) -> None:
    found = world.full_disk.result()
    says = "no room left in the store" in found.full.err and "run again to resume" in found.full.err
    assert (found.full.code, says) == (3, True), found.full


def test_with_room_again_the_search_goes_on(world: World) -> None:
    found = world.full_disk.result()
    assert found.resumed.code == 0, found.resumed


def test_a_full_disk_loses_nothing(world: World) -> None:
    found = world.full_disk.result()
    assert found.recorded and found.recorded_in_the_end[: len(found.recorded)] == found.recorded
