"""A model on trial before anything is spent on it: what is said of one that runs, of one that does not, and of one that
is not run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import tiny_search
from quantized import fp8_model
from safetensors.torch import load_file, save_file
from tiny import write_model

from dtmsearch.cli import main
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.errors import UserError
from dtmsearch.model.replica import trial
from dtmsearch.model.replica.trial import obstacle, try_model
from dtmsearch.workflows.check_search import trial_line


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(str(folder), dtype="float32")


def test_validate_runs_the_model_and_says_so_first(tmp_path: Path, capsys: Any) -> None:
    path = tiny_search(tmp_path)
    assert main(["validate", str(path)]) == 0
    said = capsys.readouterr()
    assert "--quick leaves this out" in said.err
    assert "it ran over 16 tokens here (cpu" in said.out and "passes can start from every layer" in said.out


def test_validate_runs_no_model_where_that_is_not_wished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(trial, "try_model", None)
    assert main(["validate", str(tiny_search(tmp_path)), "--quick"]) == 0
    assert "16 tokens" not in capsys.readouterr().out


def test_a_model_whose_logits_are_not_finite_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("inf"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="logits that are not finite in float32, over 16 tokens"):
        try_model(spec_of(folder))


def test_a_model_that_does_not_fit_is_not_run_and_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path)
    monkeypatch.setattr(trial, "_place", lambda: ("cpu", 1000))
    said: list[str] = []
    assert "the model was not run: it would take" in trial_line(spec_of(folder), said.append)
    assert said == []


def test_a_model_elsewhere_is_not_run_and_it_says_so() -> None:
    assert "not on this machine" in trial_line(ModelSpec("nobody/nothing"), print)


def test_no_source_is_unquantized_for_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTMSEARCH_CACHE", str(tmp_path / "cache"))
    assert "comes quantized" in obstacle(spec_of(fp8_model(tmp_path / "model")))
    assert not (tmp_path / "cache").exists()


def test_of_a_large_model_on_a_cpu_one_pass_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_MOST_PROVED_BYTES", {"cpu": 0})
    found = try_model(spec_of(write_model(tmp_path)))
    assert found.starts is None and "found out when a search loads it" in found.line
