"""The cookbook: each question's SQL is the one that the command asks, and its pyarrow gives the same rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from reported import make_run

import dtmsearch as dtm
from dtmsearch.analysis.named_queries import QUESTIONS, ask
from dtmsearch.cli import main
from dtmsearch.store.store import ResultStore

TEXT = (Path(__file__).parent.parent / "docs" / "cookbook.md").read_text(encoding="utf-8")
PREAMBLE, *SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)


# Those of studies are told by their own pages; tests/test_studies.py asks them.
ASKED = {name: question for name, question in QUESTIONS.items() if not name.startswith("study-")}


def code(text: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)\n```", text, re.DOTALL)
    assert found is not None, text
    return found[1]


RECIPES = {section.split("\n", 1)[0]: (code(section, "sql"), code(section, "python")) for section in SECTIONS}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    return make_run(tmp_path_factory.mktemp("store"), failing=True)


def rounded(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [tuple(float(f"{v:.9g}") if isinstance(v, int | float) else v for v in row) for row in rows]


def tuples(table: Any) -> list[tuple[Any, ...]]:
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def test_the_cookbook_asks_what_the_command_asks() -> None:
    assert {name: sql for name, (sql, _) in RECIPES.items()} == {name: question.sql for name, question in ASKED.items()}


@pytest.mark.parametrize("name", ASKED)
def test_sql_and_pyarrow_give_the_same_rows(name: str, store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtm, "open_store", lambda url: store)
    scope: dict[str, Any] = {}
    exec(code(PREAMBLE, "python").replace('"my-run"', '"toy"'), scope)
    exec(RECIPES[name][1], scope)
    answer = tuples(ask(store, name, "toy"))
    assert answer and rounded(answer) == rounded(tuples(scope["answer"]))


def test_the_command_answers_by_name(store: ResultStore, capsys: Any) -> None:
    assert main(["query", "course", "toy", "--store", store.url, "--format", "json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)][:2] == [0, 1]


def test_the_list_names_every_question(capsys: Any) -> None:
    assert main(["query", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in QUESTIONS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sensitivty", "toy"], "did you mean 'sensitivity'?"),
        (["sensitivity"], "give the run"),
        (["sensitivity", "nosuch"], "it holds: toy"),
        (["SELECT 1", "toy"], "a SELECT names its runs itself"),
        ([], "give a SELECT or the name of a question"),
    ],
)
def test_what_is_no_question_is_said(store: ResultStore, arguments: list[str], words: str, capsys: Any) -> None:
    assert main(["query", *arguments, "--store", store.url]) == 2
    assert words in capsys.readouterr().err
