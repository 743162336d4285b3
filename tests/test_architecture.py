"""What holds of all the package's code: who may import whom (docs/architecture.md has the picture), which names it may
use, what stands in one place."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import dtmsearch
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.strategy_settings import PruningSettings, TreeSettings
from dtmsearch.core.training_settings import RecoverySettings

PACKAGE = Path(dtmsearch.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}

# Folders (and loose modules) of the package from the ground up, each with the ones that it may import: only ones above
# its own line, so that no import runs upward and no circle can be. Every one has a line.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "logs": set(),
    "core": {"errors"},
    "config": {"errors", "core"},
    "search": {"errors", "core"},
    "store": {"errors", "core"},
    "analysis": {"errors", "core", "config", "store"},
    "model": {"errors", "core", "config"},
    "export": {"errors", "core", "model"},
    "cluster": {"errors", "core", "model"},  # of the model only names: torch and Ray never meet in one file
    "workflows": {"errors", "logs", "core", "config", "search", "store", "analysis", "model", "export", "cluster"},
    "report": {"errors", "core", "config", "store", "analysis", "workflows"},
    "studies": {"errors", "core", "config", "search", "store", "analysis", "cluster", "workflows"},
    "console": {"errors", "core", "config", "search", "store", "analysis", "workflows"},
    "ui": {"errors", "core", "store", "analysis", "report", "console"},
    "cli": {
        "errors",
        "logs",
        "core",
        "config",
        "search",
        "store",
        "analysis",
        "cluster",
        "workflows",
        "report",
        "studies",
        "console",
        "ui",
    },
    "__init__": {"errors", "core", "config", "search", "analysis", "cluster", "workflows", "report", "studies"},
    "__main__": {"cli"},
}

# folder -> what it may load that is neither ours nor Python's.
MAY_LOAD: dict[str, set[str]] = {
    "errors": set(),
    "logs": {"pythonjsonlogger"},
    "core": {"numpy"},
    "config": {"pydantic", "yaml", "pyarrow", "datasets", "tokenizers"},
    "search": {"numpy"},
    "store": {"pyarrow", "numpy"},
    "analysis": {"pyarrow", "duckdb", "numpy"},
    "model": {
        "torch",
        "triton",
        "auto_round",
        "transformers",
        "accelerate",
        "bitsandbytes",
        "compressed_tensors",
        "gguf",
        "safetensors",
        "huggingface_hub",
        "numpy",
        "psutil",
    },
    "export": {"torch", "safetensors", "compressed_tensors", "gguf", "conversion", "numpy", "yaml"},
    "cluster": {"ray", "numpy"},
    "workflows": {
        "psutil",
        "numpy",
        "pyarrow",
        "yaml",
        "packaging",
        "ray",
        "torch",
        "huggingface_hub",
        "bitsandbytes",
        "lm_eval",
    },
    "report": {"altair", "jinja2", "markupsafe", "vl_convert", "pyarrow", "numpy"},
    "studies": {"numpy", "pyarrow"},
    "console": {"rich", "pyarrow"},
    "ui": {"aiohttp"},
    "cli": {"click", "pyarrow"},
    "__init__": set(),
    "__main__": set(),
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a module's tree, gone over once for all that look at it."""
    return tuple(ast.walk(parsed(path)))


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, at its top or inside its functions, or names in a string to import it later."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out from the package's name"
            assert node.module is not None
            # `from dtmsearch.store import store` imports a module, `from dtmsearch.core.plan import Plan` a name.
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name.removeprefix("dtmsearch.") in MODULES else node.module for name in names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, _, rest = node.value.removeprefix("dtmsearch.").partition(":")
            if node.value.startswith("dtmsearch.") and module in MODULES and rest.isidentifier() | (not rest):
                yield f"dtmsearch.{module}"


def folder_of(module: str) -> str:
    return module.partition(".")[0]


def ours(module: str) -> set[str]:
    """The modules of the package that one of them imports, without the package's name."""
    names = {name.removeprefix("dtmsearch.") for name in imported(MODULES[module]) if name.startswith("dtmsearch.")}
    return {name for name in names if name != module}


def test_a_folder_imports_only_folders_above_it_in_the_list() -> None:
    allowed = {folder: {folder} | others for folder, others in MAY_IMPORT.items()}
    upward = {(module, name) for module in MODULES for name in ours(module)}
    assert {(m, name) for m, name in upward if folder_of(name) not in allowed[folder_of(m)]} == set()


def test_the_list_runs_one_way() -> None:
    lines = list(MAY_IMPORT)
    upward = {(line, other) for line in lines for other in MAY_IMPORT[line] if lines.index(other) >= lines.index(line)}
    assert upward == set()


def test_every_folder_has_its_line() -> None:
    assert {folder_of(module) for module in MODULES} - MAY_IMPORT.keys() == set()
    assert MAY_IMPORT.keys() == MAY_LOAD.keys()


def test_no_circle_of_modules() -> None:
    """Within folders too: modules can be put in an order in which each imports only earlier ones."""
    graph = {module: {resolved(name) for name in ours(module)} - {module, None} for module in MODULES if "." in module}
    while graph:
        ready = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert ready, f"a circle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in ready}


def resolved(name: str) -> str | None:
    """The module that an imported name stands for: itself, or a folder's `__init__`."""
    return next((module for module in (name, f"{name}.__init__") if module in MODULES), None)


def test_no_two_modules_have_one_name() -> None:
    names = Counter(module.rpartition(".")[2] for module in MODULES if not module.endswith("__init__"))
    assert {name for name, count in names.items() if count > 1} == set()


def test_no_weights_but_the_demo_s_are_kept() -> None:
    """What a test or a trial has written beside the code, and `git add` has taken."""
    listed = subprocess.run(["git", "ls-files"], cwd=PACKAGE.parent, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout")
    weights = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
    assert [name for name in listed.stdout.splitlines() if name.endswith(weights)] == [
        "dtmsearch/demo/model/model.safetensors"
    ]


def test_few_things_at_the_top() -> None:
    assert len({folder_of(module) for module in MODULES if not module.startswith("__")} - {"errors", "logs"}) <= 14


def libraries(module: str) -> set[str]:
    """What a module of the package imports that is neither ours nor Python's."""
    roots = {name.partition(".")[0] for name in imported(MODULES[module])}
    return roots - sys.stdlib_module_names - {"dtmsearch"}


def test_a_folder_loads_only_its_own_libraries() -> None:
    foreign = {module: libraries(module) - MAY_LOAD[folder_of(module)] for module in MODULES}
    assert {module: names for module, names in foreign.items() if names} == {}


def test_torch_and_ray_never_meet_in_one_file() -> None:
    assert [module for module in MODULES if {"torch", "ray"} <= libraries(module)] == []


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    listing = "\nimport sys; print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code + listing], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import dtmsearch",
        "import dtmsearch.cli",
        "from dtmsearch.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from dtmsearch.cli import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_help_loads_neither_torch_nor_ray(code: str) -> None:
    assert loaded_by(code) & {"torch", "transformers", "ray", "pyarrow"} == set()


def test_the_driver_runs_without_torch_and_starts_without_ray() -> None:
    assert loaded_by("import dtmsearch.workflows.run") & {"torch", "transformers", "bitsandbytes", "ray"} == set()


@pytest.mark.parametrize("library", ["bitsandbytes", "lm_eval", "datasets"])
def test_what_is_slow_to_import_is_imported_where_it_is_used(library: str) -> None:
    """Not at the top of a module, with which it would delay every start."""
    importing = (f"import {library}", f"from {library}")
    assert [name for name in MODULES if any(line.startswith(importing) for line in imports_at_the_top(name))] == []


@functools.cache
def imports_at_the_top(module: str) -> list[str]:
    statements = (node for node in parsed(MODULES[module]).body if isinstance(node, ast.Import | ast.ImportFrom))
    return [ast.unparse(node) for node in statements]


def test_what_replicas_are_sent_is_decided_without_ray() -> None:
    assert loaded_by("import dtmsearch.cluster.dispatcher, dtmsearch.cluster.verifier") & {"ray", "torch"} == set()


def test_the_search_needs_nothing_but_numpy() -> None:
    assert (
        loaded_by("import dtmsearch.search.strategies.strategy_registry") & {"torch", "ray", "pyarrow", "pydantic"}
        == set()
    )


def compares_families(path: Path) -> bool:
    """Whether a module tells schemes apart by their family's name, as a package's family could not be told."""
    comparisons = (node for node in nodes(path) if isinstance(node, ast.Compare))
    sides = (side for node in comparisons for side in (node.left, *node.comparators))
    return any(isinstance(side, ast.Attribute) and side.attr == "family" for side in sides)


def test_a_scheme_is_asked_never_told_apart_by_its_family_s_name() -> None:
    assert [name for name, path in MODULES.items() if compares_families(path)] == []


def test_what_is_public_says_what_it_is() -> None:
    """Every module, and every class and function at its top."""
    assert [silent for module in MODULES for silent in without_docstring(module)] == []


def without_docstring(module: str) -> Iterator[str]:
    tree = parsed(MODULES[module])
    if not ast.get_docstring(tree) and module != "__main__":
        yield module
    public = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"]
    yield from (f"{module}.{node.name}" for node in public if not ast.get_docstring(node))


# Private names of other libraries, which a release can take away.
COMPAT = {PACKAGE / "model" / "modules" / "compat.py", PACKAGE / "cluster" / "ray_compat.py"}
# What foreign names may be written as elsewhere: of Python itself, and of notebooks.
OTHERS = {"_exit", "_repr_html_"}


def private(path: Path) -> Iterator[str]:
    """Private names of other objects than `self` that a module takes, and private modules that it imports."""
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr):
            if not _is_self(node.value):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("dtmsearch", "__")):
            yield from (part for part in node.module.split(".") if part.startswith("_"))
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))


def own_names(path: Path) -> Iterator[str]:
    """Names that our classes and modules define."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_no_other_module_takes_a_private_name_of_a_library() -> None:
    ours = OTHERS | {name for path in MODULES.values() for name in own_names(path)}
    taken = {(path.name, name) for path in MODULES.values() if path not in COMPAT for name in private(path)}
    assert {(file, name) for file, name in taken if name not in ours} == set()


# Elsewhere these name another thing: the tokens of a forward batch, the confidence of an interval.
_OTHER_MEANINGS = {"batch_tokens", "confidence"}


def defaults_of(path: Path) -> Iterator[tuple[str, ast.expr]]:
    """(name, default) of every field of a class and every argument of a function."""
    for node in nodes(path):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value
        elif isinstance(node, ast.arguments):
            places = [*node.posonlyargs, *node.args]
            pairs = [*zip(reversed(places), reversed(node.defaults), strict=False)]
            pairs += [(arg, value) for arg, value in zip(node.kwonlyargs, node.kw_defaults, strict=True) if value]
            yield from ((arg.arg, value) for arg, value in pairs)


def says_something(default: ast.expr) -> bool:
    """Whether a default is a value written out, and one that means more than `not given`."""
    if isinstance(default, ast.Call) and isinstance(default.func, ast.Name) and default.func.id == "Field":
        default = next((keyword.value for keyword in default.keywords if keyword.arg == "default"), default)
    try:
        return ast.literal_eval(default) not in (None, "", (), [], {})
    except ValueError:
        return False


def test_the_default_of_a_knob_stands_in_one_place() -> None:
    """Others refer to it: `width: Positive = TreeSettings.width`."""
    settings = (TreeSettings, PruningSettings, RecoverySettings, ModelSpec)
    knobs = {field.name for one in settings for field in fields(one)} | {"rank_by", "through"}
    places: dict[str, list[str]] = {}
    for path in MODULES.values():
        for name, default in defaults_of(path):
            if name in knobs - _OTHER_MEANINGS and says_something(default):
                places.setdefault(name, []).append(f"{path.name}:{default.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
    assert {"width", "expand", "audit", "lr", "cap", "compile"} <= places.keys()


# The one place; and those whose output a process of ours reads, as JSON in ASCII.
PRINTING = {"console.printing", "model.replica.exported", "model.replica.by_llama_cpp"}


def test_nothing_is_printed_but_through_one_place() -> None:
    """Neither printed, nor given to rich as anything but text that is shown."""
    printing = {"print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write", "Text"}
    found = {name: calls_in(path) & printing for name, path in MODULES.items() if name not in PRINTING}
    assert {name: calls for name, calls in found.items() if calls} == {}


def calls_in(path: Path) -> set[str]:
    """What a module calls by a name, or by a name's attributes."""
    called = (node.func for node in nodes(path) if isinstance(node, ast.Call))
    return {ast.unparse(function) for function in called if isinstance(function, ast.Name | ast.Attribute)}
