"""Every command and every Python block of README.md and docs/: run by a test, or marked with the machine it is for; and
each command is one that the command line knows."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from tiny import TEXT, TRAINING, llama_config, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dtmsearch as dtm
from dtmsearch.cli import cli, main
from dtmsearch.config import parse

pytestmark = pytest.mark.process  # commands, of which some start a process that answers SQL

ROOT = Path(__file__).parents[1]
# What is written by docs/generate.py from the code.
MADE = ("api.md", "cli.md", "search-file.md", "tables.md")
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in MADE)]
PROGRAMS = ("dtmsearch", "python", "pip", "pytest", "ray", "for")
# The first line of a block that is for a machine which the tests may not have.
ON = "# on "
# Nothing is running that could be stopped.
_EXIT_CODES = {"stop": 2}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Its commands as they are typed, without what is said about them."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line.removeprefix("$ ").strip() for line in joined if line.strip() and not line.startswith("#")]

    @property
    def is_command(self) -> bool:
        return self.language in ("", "sh") and any(_program(line) in PROGRAMS for line in self.lines)

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    def typed(self, replaced: Mapping[str, str], added: Mapping[str, list[str]] = {}) -> str:
        """Run its `dtmsearch` commands one after another, each with what is added to its verb; all that they said."""
        said = ""
        for line in self.lines:
            for old, new in replaced.items():
                line = line.replace(old, new)
            words = shlex.split(line, comments=True)
            words, target = (words[:-2], words[-1]) if ">" in words else (words, None)
            assert words[0] == "dtmsearch", line
            with contextlib.redirect_stdout(io.StringIO()) as out:
                code = main([*words[1:], *added.get(words[1], [])])
            assert code == _EXIT_CODES.get(words[1], 0), f"{line}: exit {code}"
            said += out.getvalue()
            if target:
                Path(target).write_text(out.getvalue(), encoding="utf-8")
        return said


def _program(line: str) -> str:
    words = [word for word in line.split() if "=" not in word]
    return words[0] if words else ""


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page.name, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def block(page: str, start: str) -> Block:
    """The block of a page that starts so."""
    (found,) = [each for each in BLOCKS if each.page == page and each.text.startswith(start)]
    return found


# (page, how a block starts) -> the test that runs it: of this file, or of another that has the same commands.
RUN_BY: dict[tuple[str, str], str] = {
    ("README.md", "pip install -c constraints.txt '.[report"): "test_end_to_end.py::test_the_demo_finishes",
    (
        "README.md",
        "pip install -c constraints.txt -e",
    ): "test_documented_commands.py::test_ci_runs_the_test_command",
    ("quickstart.md", "pip install"): "test_end_to_end.py::test_the_demo_finishes",
    ("README.md", "dtmsearch init"): "test_documented_commands.py::test_a_model_of_one_s_own",
    ("quickstart.md", "dtmsearch init"): "test_documented_commands.py::test_a_model_of_one_s_own",
    ("README.md", "dtmsearch status"): "test_documented_commands.py::test_what_comes_out",
    ("quickstart.md", "dtmsearch report"): "test_documented_commands.py::test_what_comes_out",
    ("export.md", "dtmsearch export"): "test_documented_commands.py::test_what_comes_out",
    ("store.md", "dtmsearch ls"): "test_documented_commands.py::test_what_comes_out",
    ("cookbook.md", "dtmsearch query"): "test_documented_commands.py::test_what_comes_out",
    ("README.md", "import dtmsearch"): "test_documented_commands.py::test_python",
    ("quickstart.md", "import dtmsearch"): "test_documented_commands.py::test_python",
    ("quickstart.md", "found ="): "test_documented_commands.py::test_python",
    ("extending.md", "import dtmsearch"): "test_documented_commands.py::test_python",
    ("extending.md", '"""Ternary'): "test_docs.py::test_the_examples_of_extending_are_the_packages_that_are_tested",
    ("extending.md", '"""Random'): "test_docs.py::test_the_examples_of_extending_are_the_packages_that_are_tested",
    ("extending.md", '"""Top-5'): "test_docs.py::test_the_examples_of_extending_are_the_packages_that_are_tested",
    ("extending.md", '"""An export'): "test_docs.py::test_the_examples_of_extending_are_the_packages_that_are_tested",
    ("families.md", "$ dtmsearch components"): "test_list_components.py::test_json_has_every_field",
    ("ui.md", "pip install"): "test_ui.py::test_the_list_names_every_run_and_holds_nothing_of_them_as_markup",
    ("cookbook.md", ""): "test_cookbook.py::test_sql_and_pyarrow_give_the_same_rows",
}


def test_the_tests_that_run_blocks_are_there() -> None:
    missing = []
    for name in set(RUN_BY.values()):
        file, _, test = name.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        missing += [name] if test not in {getattr(node, "name", "") for node in tree.body} else []
    assert missing == []


@pytest.mark.parametrize(
    "each", [each for each in BLOCKS if each.is_command or each.language == "python"], ids=lambda each: each.name
)
def test_a_block_is_run_by_a_test_or_says_what_machine_it_is_for(each: Block) -> None:
    run = any(each.page == page and each.text.startswith(start) for page, start in RUN_BY)
    assert run or each.text.startswith(ON), f"{each.name}: run it in a test, or let it begin with {ON}..."


def test_ci_runs_the_test_command() -> None:
    (command,) = block("README.md", "pip install -c constraints.txt -e").lines
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def _known(command: str) -> str:
    """What the command line would say against a command's verb and options; empty: nothing."""
    words = shlex.split(re.sub(r"[\[\]]", " ", re.sub(r"'[^']*'", "x", command)), comments=True)[1:]
    words = [word for word in words if word not in ("&", "...", "|") and not word.startswith(">")]
    if not words or words[0].startswith("-"):
        return ""
    verb = cli.commands.get(words[0])
    if verb is None:
        return f"no verb {words[0]}"
    try:
        verb.make_parser(click.Context(verb)).parse_args(words[1:])
    except click.UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_ones_that_the_command_line_knows(page: Path) -> None:
    """In blocks, and within lines."""
    typed = [line for each in blocks_of(page) if each.is_command for line in each.lines]
    typed += re.findall(r"(?<!`)`(dtmsearch [^`\n]+)`(?!`)", page.read_text(encoding="utf-8"))
    commands = [line.strip().removesuffix("&") for line in typed if _program(line) == "dtmsearch"]
    assert {command: said for command in commands if (said := _known(command))} == {}


@pytest.mark.parametrize("each", [each for each in BLOCKS if "benchmarks/" in each.text], ids=lambda each: each.name)
def test_benchmarks_that_pages_name_are_there(each: Block) -> None:
    named = re.findall(r"benchmarks/\w+\.py", each.text)
    assert named and all((ROOT / path).is_file() for path in named)


# A stranger's way: a model of one's own, what comes out, the same from Python.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model in it, named as pages name it."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "path" / "to" / "model", llama_config(max_position_embeddings=256))
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def _search_own_model() -> str:
    """Type the README's commands over the model, with texts that are there once a search file is written."""
    first, *others = block("README.md", "dtmsearch init").text.splitlines(keepends=True)
    replaced = {"MODEL": "path/to/model"}
    Block("README.md", 0, "", first).typed(replaced)
    Path("calibration.txt").write_text(TEXT, encoding="utf-8")
    Path("validation.txt").write_text(TRAINING, encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(Path("search.yaml").read_text(encoding="utf-8"))
    content["prompts"] |= {"count": 8, "prompt_tokens": 10, "continuation_tokens": 12}
    content["validation"] |= {"count": 6}
    content["search"] |= {"auto": {"samples": 8, "slopes": 4, "rounds": 1}}
    Path("search.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return Block("README.md", 0, "", "".join(others)).typed(replaced, {"run": ["--in-process"]})


def test_a_model_of_one_s_own(here: Path) -> None:
    assert "run model: finished" in _search_own_model()
    commands = [line.partition("#")[0].split() for line in block("README.md", "dtmsearch init").lines]
    again = [line.partition("#")[0].split() for line in block("quickstart.md", "dtmsearch init").lines]
    assert [["path/to/model" if word == "MODEL" else word for word in words] for words in commands] == again


@pytest.fixture
def searched(here: Path) -> Path:
    if not (here / "dtm-store").is_dir():
        _search_own_model()
    return here


def test_what_comes_out(searched: Path) -> None:
    names = {"llama-mixed": "model", "demo.html": "model.html", " demo": " model", "my-run": "model", "RUN": "model"}
    added = {"export": ["--no-check"]}
    said = block("README.md", "dtmsearch status").typed(names | {"--runtime vllm": ""}, added)
    said += block("quickstart.md", "dtmsearch report").typed(names)
    said += block("store.md", "dtmsearch ls").typed(names)
    said += block("cookbook.md", "dtmsearch query").typed(names)
    block("export.md", "dtmsearch export").typed(names | {"DIR": "again", "[--runtime vllm]": ""}, added)
    assert "run model: finished" in said and "uniform:" in said and (searched / "model.html").is_file()
    assert (searched / "DIR" / "config.json").is_file() and (searched / "again" / "config.json").is_file()


def test_python(searched: Path) -> None:
    folder = searched / "path" / "to" / "model"
    scope: dict[str, Any] = {"model": AutoModelForCausalLM.from_pretrained(folder).eval(), "texts": [TEXT, TRAINING]}
    scope["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    for page, start in (key for key, test in RUN_BY.items() if test.endswith("::test_python")):
        # Groups of 128 are more than the model is wide.
        code = block(page, start).text.replace('texts, "uniform:int4-g128"', 'texts, "uniform:int4-channel", count=4')
        exec(compile(code.replace("int4-g128", "int4-channel"), page, "exec"), scope)
    assert isinstance(scope["run"], dtm.Run) and scope["found"].summary.fdt_mean >= 0


@pytest.mark.parametrize("each", [each for each in BLOCKS if each.language == "yaml"], ids=lambda each: each.name)
def test_search_files_of_pages_are_valid(each: Block) -> None:
    content = yaml.safe_load(each.text)
    whole = {"run": "a", "model": {"path": "m"}, "prompts": {"files": ["text.txt"]}} | content
    assert parse(yaml.safe_dump(whole), each.name, Path()).search.strategy
