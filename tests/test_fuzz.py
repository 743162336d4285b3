"""A slice of `benchmarks/fuzz.py`: damaged inputs end in a line and exit code 2, or are right still."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "count"), [("search files", 20), ("plan files", 4), ("model folders", 4), ("texts", 6)]
)
def test_damaged_inputs_end_in_a_line_and_no_traceback(fuzz: Any, kind: str, count: int) -> None:
    tally = fuzz.fuzz(kind, count)
    assert [(number, found.code, found.said) for number, found in tally.wrong] == []


@pytest.mark.parametrize("at", range(18))
def test_whole_search_files_of_every_odd_kind_are_refused_in_words(fuzz: Any, at: int, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_bytes(fuzz.WHOLE[at](fuzz.dumped(fuzz.SEARCH)))
    fuzz.write_texts(tmp_path)
    found = fuzz.ended(["validate", str(tmp_path / "search.yaml")], tmp_path)
    assert not found.wrong, found


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", -1), ("num_hidden_layers", 1_000_000), ("head_dim", 10**12)]
)
def test_a_configuration_that_no_weights_fit_is_refused_in_words(
    fuzz: Any, key: str, value: int, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in fuzz.MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    config = fuzz.json.loads((folder / "config.json").read_text())
    fuzz.rewrite(folder / "config.json", fuzz.json.dumps(config | {key: value}).encode())
    fuzz.write_texts(tmp_path)
    content = fuzz.SEARCH | {"model": {"path": str(folder), "dtype": "float32"}}
    (tmp_path / "search.yaml").write_text(fuzz.dumped(content))
    assert fuzz.ended(["validate", str(tmp_path / "search.yaml")], tmp_path).code == 2
