"""The cache of unquantized models: what it holds is told, goes when it is old or too much, and stays while in use."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from quantized import fp8_model

from dtmsearch.cli import main
from dtmsearch.errors import UserError
from dtmsearch.model.modules.loading import loader
from dtmsearch.model.sources.unquantized import unquantized_folder
from dtmsearch.model.sources.unquantized_cache import RECORD, hold, keep_within_limits, unquantized_models


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DTMSEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path, name: str, days: float, size: int = 1000) -> Path:
    """A model of the cache that nobody has used for some days."""
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * size)
    record = folder / RECORD
    record.write_text(json.dumps({"path": f"/models/{name}"}))
    then = time.time() - days * 86_400
    os.utime(record, (then, then))
    return folder


def names() -> list[str]:
    return sorted(Path(model.path).name for model in unquantized_models())


def test_what_is_kept_is_listed_and_removed(cache: Path, capsys: Any) -> None:
    kept(cache, "old", 20)
    kept(cache, "new", 1)
    assert main(["cache", "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {row["source"]: round(row["unused_days"]) for row in listed} == {"/models/old": 20, "/models/new": 1}
    assert main(["cache", "--remove", "--older-than", "7"]) == 0
    assert "removed 1 of 1" in capsys.readouterr().err
    assert names() == ["new"]


def test_a_model_in_use_stays(cache: Path, capsys: Any) -> None:
    folder = kept(cache, "used", 1)
    with folder.with_name("used.lock").open("w") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_SH)
        assert main(["cache", "--remove"]) == 0
    assert names() == ["used"]
    assert "in use" in capsys.readouterr().out or "removed 0 of 1" in capsys.readouterr().err


def test_what_nobody_has_used_for_long_goes_when_another_is_written(cache: Path) -> None:
    kept(cache, "old", 31)
    kept(cache, "new", 29)
    keep_within_limits()
    assert names() == ["new"]


def test_what_was_used_longest_ago_goes_first_where_there_is_a_limit(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, days in (("a", 3), ("b", 2), ("c", 1)):
        kept(cache, name, days, 100_000)
    monkeypatch.setenv("DTMSEARCH_CACHE_GB", "0.00025")
    keep_within_limits()
    assert names() == ["b", "c"]


def test_a_use_makes_a_model_new(cache: Path) -> None:
    folder = kept(cache, "mine", 29)
    hold(folder)
    (model,) = unquantized_models()
    assert model.unused_days < 1 and model.in_use


def test_a_limit_that_is_no_number_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTMSEARCH_CACHE_GB", "much")
    with pytest.raises(UserError, match="DTMSEARCH_CACHE_GB is 'much', and a number is wanted"):
        keep_within_limits()


def test_where_it_grows_it_says_by_how_much(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = unquantized_folder(fp8_model(tmp_path / "model"), "bfloat16", loader)
    assert f"kept unquantized in {made}, 0.0 GB; all that is kept so takes 0.0 GB" in caplog.text
    caplog.clear()
    unquantized_folder(tmp_path / "model", "bfloat16", loader)
    assert caplog.text == ""
