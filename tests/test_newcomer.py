"""A newcomer's way from an empty folder to an export that plain transformers generates with; see `newcomer`."""

from __future__ import annotations

import contextlib
import io
import shlex
from pathlib import Path

import pytest
from exports import in_process
from newcomer import Newcomer, Said, play, write_texts
from tiny import llama_config, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtmsearch.cli import main

# What makes the search of a tiny model one of seconds.
SMALLER = (
    ("  count: 32 ", "  count: 8 "),
    ("  count: 128", "  count: 12"),
    ("  rank_by: kl ", "  auto: {samples: 8, slopes: 4, rounds: 1}\n  rank_by: kl "),
)


def type_in_here(command: str) -> Said:
    program, *arguments = shlex.split(command)
    assert program == "dtmsearch"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return Said(code, out.getvalue(), err.getvalue())


def test_a_newcomer_comes_from_a_model_of_his_own_to_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    model = write_model(folder / "own-model", llama_config(hidden_size=64, intermediate_size=128))
    write_texts(folder)
    newcomer = Newcomer(type_in_here, folder, model)
    export = play(newcomer, with_demo=False, smaller=SMALLER)
    loaded, tokenizer = (kind.from_pretrained(export) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("def main(", return_tensors="pt")["input_ids"]
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    assert len(newcomer.commands) == 7
