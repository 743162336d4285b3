"""Who may import whom. A room is a folder or a module directly under the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dtmsearch

PACKAGE = Path(dtmsearch.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}

COMPOSITION = {
    *("calibrating", "recovering", "driver", "named", "compose"),
    *("plans", "config", "search", "results", "texts", "cluster"),
}

# room -> the rooms that it may import, ground floor first. A module of a room can have its own line. What has no line
# is an edge of the house (the command line, terminals, reports): free to import rooms, and imported by none.
MAY_IMPORT: dict[str, set[str]] = {
    "plans": set(),
    "config": {"plans"},
    "search": {"plans", "config"},
    "results": {"plans", "config"},
    "model": {"plans", "config"},
    "export": {"plans", "model.compress", "model.compressor"},
    "texts": {"plans", "config"},
    "cluster": {"plans"},
    "cluster.sweep": {"plans", "config", "search", "results", "run"},
    "sweepfile": {"config"},
    "logs": set(),
    "submission": {"plans", "config", "texts", "cluster"},
    "compose": {"plans", "config", "search"},
    "estimate": {"plans", "config", "search", "texts", "cluster", "compose"},
    "calibrating": {"plans", "config", "search", "results", "texts", "cluster"},
    "training": {"config", "texts", "model"},
    "recovering": {"plans", "config", "search", "results", "texts", "cluster", "training"},
    "driver": {"plans", "config", "search", "results", "texts", "cluster"},
    "named": {"plans", "config", "search", "results", "texts"},
    "exporting": {"plans", "config", "results", "model", "export"},
    "validation": {"calibrating", "driver", "plans", "config", "search", "results", "cluster"},
    "measuring": COMPOSITION,
    "run": COMPOSITION | {"logs", "measuring", "validation"},
    "report": {"plans", "config", "results", "output"},
}

EDGE_FOLDERS = {"cli", "demo"}

# room -> what it may load that is neither ours nor Python's.
MAY_LOAD: dict[str, set[str]] = {
    "plans": {"numpy"},
    "config": {"pydantic", "yaml"},
    "sweepfile": {"pydantic", "yaml"},
    "search": {"numpy"},
    "results": {"pyarrow", "duckdb", "numpy"},
    "model": {
        "torch",
        "triton",
        "transformers",
        "accelerate",
        "bitsandbytes",
        "compressed_tensors",
        "safetensors",
        "datasets",
        "huggingface_hub",
        "numpy",
        "psutil",
    },
    "export": {"torch", "safetensors", "compressed_tensors", "gguf", "numpy"},
    "cluster": {"ray", "numpy"},
    "validation": {"numpy"},
    "run": set(),
    "report": {"altair", "jinja2", "markupsafe", "vl_convert", "pyarrow", "numpy"},
}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out from the package's name"
            assert node.module is not None
            # `from dtmsearch.store import tables` imports a module, `from dtmsearch.core.plan import Plan` a name.
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name.removeprefix("dtmsearch.") in MODULES else node.module for name in names)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room_of(m) in MAY_IMPORT))
def test_a_room_imports_only_rooms_below_it(module: str) -> None:
    allowed = {room_of(module)} | MAY_IMPORT.get(module, MAY_IMPORT[room_of(module)])
    ours = [name.removeprefix("dtmsearch.") for name in imported(MODULES[module]) if within(name, "dtmsearch")]
    others = [name for name in ours if name != "dtmsearch" and not any(within(name, room) for room in allowed)]
    assert others == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room_of(m) in MAY_LOAD))
def test_a_room_loads_only_its_own_libraries(module: str) -> None:
    roots = {name.partition(".")[0] for name in imported(MODULES[module])}
    foreign = roots - sys.stdlib_module_names - {"dtmsearch"} - MAY_LOAD[room_of(module)]
    assert foreign == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_torch_and_ray_never_meet_in_one_file(module: str) -> None:
    roots = {name.partition(".")[0] for name in imported(MODULES[module])}
    assert not {"torch", "ray"} <= roots


def test_every_folder_of_code_is_a_room() -> None:
    folders = {room_of(module) for module in MODULES if "." in module}
    assert folders - MAY_IMPORT.keys() - EDGE_FOLDERS == set()


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room_of(m) != "cli" and m != "__main__"))
def test_nothing_imports_the_command_line(module: str) -> None:
    assert [name for name in imported(MODULES[module]) if within(name, "dtmsearch.cli")] == []


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


def test_the_driver_runs_without_torch() -> None:
    assert loaded_by("import dtmsearch.workflows.run") & {"torch", "transformers", "bitsandbytes"} == set()


def test_the_search_needs_nothing_but_numpy() -> None:
    assert loaded_by("import dtmsearch.search.strategies.registry") & {"torch", "ray", "pyarrow", "pydantic"} == set()
