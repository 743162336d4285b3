"""The documentation: made pages are fresh, the notebook runs, the site builds without a warning."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_name_nothing_of_the_machine_that_made_them() -> None:
    made = (DOCS / "api.md").read_text() + (DOCS / "cli.md").read_text()
    assert [part for part in (sys.executable, str(ROOT)) if part in made] == []


def test_pages_that_are_made_from_the_code_are_fresh(generate: ModuleType) -> None:
    """`python docs/generate.py` writes them."""
    made = generate.pages()
    assert [name for name, text in made.items() if (DOCS / name).read_text(encoding="utf-8") != text] == []


# What makes the notebook's search one of a few seconds.
_SMALLER = (('"count": 16', '"count": 3'), ('"count": 32', '"count": 4'))


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("altair")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}
    namespace: dict[str, object] = {}
    for old, new in _SMALLER:
        assert sum(source.count(old) for source in code.values()) == 1, old
        code = {name: source.replace(old, new) for name, source in code.items()}
    for name, source in code.items():
        exec(compile(ast.parse(source), name, "exec"), namespace)
    assert namespace["run"].summary.status == "finished"  # type: ignore[attr-defined]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "plugins").glob("*/*.py")), ids=lambda path: path.stem)
def test_the_examples_of_extending_are_the_packages_that_are_tested(path: Path) -> None:
    assert path.read_text(encoding="utf-8").rstrip() in (DOCS / "extending.md").read_text(encoding="utf-8")


def test_the_walk_of_a_scheme_s_name_has_under_ten_steps_each_a_link_to_its_line() -> None:
    _, _, rest = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## Where does my scheme name go?")
    steps = re.findall(r"^\d+\. .*$", rest.partition("\n## ")[0], re.MULTILINE)
    links = [re.findall(r"\.(\w+)`\]\(\.\./([\w/.]+)#L(\d+)\)|`(\w+)`\]\(\.\./([\w/.]+)#L(\d+)\)", s) for s in steps]
    assert 0 < len(steps) < 10 and all(links)
    for method, *at_method, function, path, line in (link for step in links for link in step):
        path, line = at_method if method else (path, line)
        assert (method or function) in (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_a_link_to_a_name_that_is_gone_is_an_error(generate: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"core/schemes.py has no parse_no_scheme"):
        generate.with_lines("[`core/schemes.py` `parse_no_scheme`](../dtmsearch/core/schemes.py#L1)")
