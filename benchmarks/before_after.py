"""Whether a change of the code changed a result: the same searches and exports by two revisions, compared.

    python benchmarks/before_after.py BEFORE [AFTER] [--folder FOLDER]

BEFORE and AFTER are git revisions; without AFTER it is the working tree. Each runs a probe, a beam, `auto`, two rounds
of sparsity with training, and two exports of the packaged model, without Ray. Then every table of the two stores is
compared column by column, and the exports file by file. Columns that say when, where and by which version something
ran are left out. Rows are matched by what they say, not by their ids: a changed identity is told as a column that
differs. Exits with 1 where anything differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import getsourcefile
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.feather
import yaml

from dtmsearch.store.schemas import SCHEMAS

REPOSITORY = Path(__file__).resolve().parents[1]
# When, where, how fast and by which version: never the same twice.
INCIDENTAL = frozenset(
    {"created_at", "finished_at", "wall_seconds", "node", "replica", "attempts", "version", "versions"}
    | {"config_folder", "continue_command"}
)
SEARCHES: Mapping[str, Mapping[str, Any]] = {
    "probe": {"strategy": "probe", "schemes": ["int8-channel", "int4-g32", "nf4", "magnitude-0.5"]},
    "beam": {
        "strategy": "beam",
        "width": 2,
        "expand": 3,
        "schemes": ["int8-channel", "int4-g32"],
        "stop": {"share": 0.3},
    },
    "auto": {
        "strategy": "auto",
        "rank_by": "kl",
        "schemes": ["int3-g32", "int4-g32", "gptq-int3-g32", "int8-channel"],
        "stop": {"bits_per_weight": 4.5},
        "auto": {"samples": 32, "slopes": 16, "rounds": 2, "swap_prompts": 200},
    },
    "sparsity": {"strategy": "sparsity", "rounds": [20, 20], "prune": "wanda"},
}
RECOVERY = {"masked_steps": 3, "unmasked_steps": 1, "batch_tokens": 256, "sequence_tokens": 64}
EXPORTS = {"dense": "beam", "compressed-tensors": "auto"}  # format: the run whose plan is written
# Text that every Python has, so that both revisions read the same.
SEARCH_TEXT, HELD_OUT_TEXT, TRAINING_TEXT = "argparse", "subprocess", "typing"


def _text(module: str) -> str:
    return getsourcefile(__import__(module)) or ""


def _search_file(name: str, model: Path) -> dict[str, Any]:
    search = dict(SEARCHES[name])
    if name == "sparsity":
        search["recovery"] = {"files": [_text(TRAINING_TEXT)], **RECOVERY}
    return {
        "run": name,
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {"files": [_text(SEARCH_TEXT)], "count": 12, "prompt_tokens": 32, "continuation_tokens": 32},
        "validation": {"files": [_text(HELD_OUT_TEXT)], "count": 8},
        "search": search,
    }


def record(checkout: Path, model: Path, folder: Path) -> None:
    """Run every search and export by the package in `checkout`; store and exports come to lie in `folder`."""
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "DTMSEARCH_STORE": "store"}

    def dtmsearch(*arguments: str) -> None:
        command = [sys.executable, "-m", "dtmsearch", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            raise click.ClickException(f"{checkout.name}: dtmsearch {' '.join(arguments)}\n{done.stderr}")

    for name in SEARCHES:
        click.echo(f"{folder.name}: {name}", err=True)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(_search_file(name, model)))
        dtmsearch("run", str(path), "--in-process", "--quiet")
    for form, run in EXPORTS.items():
        click.echo(f"{folder.name}: export of {run} as {form}", err=True)
        dtmsearch("export", run, "--to", form, "--out", form, "--no-check")


@contextmanager
def _checkout(revision: str | None, folder: Path) -> Iterator[Path]:
    """A git worktree at the revision for as long as the context lasts; the repository itself for none."""
    if revision is None:
        yield REPOSITORY
        return
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)  # noqa: S603
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)  # noqa: S603


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows without what is incidental, in the order of what they say apart from ids."""
    names = [name for name in table.column_names if name not in INCIDENTAL]
    rows: list[dict[str, Any]] = table.select(names).to_pylist()
    return sorted(rows, key=lambda row: json.dumps([_key(row, False), _key(row, True)], default=str))


def _key(row: Mapping[str, Any], ids: bool) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in sorted(row.items()) if name.endswith("_id") == ids]


def _same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # NaN equals itself, and bits count


def compare_tables(before: pa.Table, after: pa.Table) -> tuple[int, int, dict[str, str]]:
    """Rows before, rows after, and what is wrong with each column that differs."""
    one, other = _rows(before), _rows(after)
    wrong: dict[str, str] = {}
    for name in sorted({*before.column_names, *after.column_names} - INCIDENTAL):
        if name not in before.column_names or name not in after.column_names:
            wrong[name] = "only " + ("after" if name in after.column_names else "before")
            continue
        differ = sum(not _same(a[name], b[name]) for a, b in zip(one, other, strict=False))
        if differ or len(one) != len(other):
            wrong[name] = f"{differ} rows differ"
    return len(one), len(other), wrong


def _tables(folder: Path, checkout: Path) -> dict[str, pa.Table]:
    """Every table of a store, by the package that wrote it."""
    out = folder / "tables"
    out.mkdir()
    script = (
        "import sys, pyarrow.feather as feather, dtmsearch as dtm\n"
        "store = dtm.open_store(sys.argv[1])\n"
        "for name in sys.argv[3:]:\n"
        "    feather.write_feather(store.query(f'SELECT * FROM {name}'), f'{sys.argv[2]}/{name}.feather')\n"
    )
    command = [sys.executable, "-c", script, str(folder / "store"), str(out), *SCHEMAS]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(checkout)})  # noqa: S603
    return {name: pa.feather.read_table(out / f"{name}.feather") for name in SCHEMAS}


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@click.command()
@click.argument("before")
@click.argument("after", required=False)
@click.option("--folder", type=click.Path(path_type=Path), help="Where stores and exports stay; else they are removed.")
def main(before: str, after: str | None, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        scratch = folder or Path(temporary)
        model = scratch / "model"  # one folder for both, so that paths are the same in what they write
        shutil.copytree(REPOSITORY / "dtmsearch" / "demo" / "model", model)
        tables, exports = [], []
        for side, revision in (("before", before), ("after", after)):
            with _checkout(revision, Path(temporary) / f"checkout-{side}") as checkout:
                record(checkout, model, scratch / side)
                tables.append(_tables(scratch / side, checkout))
            exports.append({form: _digests(scratch / side / form) for form in EXPORTS})
        differs = False
        for name in SCHEMAS:
            rows, rows_after, wrong = compare_tables(tables[0][name], tables[1][name])
            differs |= bool(wrong)
            found = ", ".join(f"{column}: {what}" for column, what in wrong.items()) or "same"
            click.echo(f"{name:<14} {rows:>6} {rows_after:>6}  {found}")
        for form in EXPORTS:
            one, other = exports[0][form], exports[1][form]
            wrong_files = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
            differs |= bool(wrong_files)
            click.echo(f"{form:<22} {len(other):>6}  {', '.join(wrong_files) or 'same'}")
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    main()
