"""The sweep file: a base search file, and for some of its keys the values to try; every combination is a search.

Knows what the searches are, nothing of where they run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dtmsearch.config import RunName, SearchFile, load
from dtmsearch.config.reading import explain, read_yaml_file
from dtmsearch.errors import UserError

_LONGEST_NAME = 100


class StopDominated(BaseModel):
    """A search is stopped when at `patience` decisions in a row another one on the same prompts had a plan as small or
    smaller whose mean FDT there was higher by `margin` tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    margin: float = Field(default=1.0, ge=0)
    patience: int = Field(default=3, ge=1)


class SweepFile(BaseModel):
    """`grid`: keys as `--set` takes them, each with its values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sweep: RunName
    base: str
    grid: dict[str, list[Any]] = Field(min_length=1)
    stop_dominated: StopDominated | None = None


def load_sweep(path: Path, overrides: tuple[str, ...] = ()) -> tuple[SweepFile, list[SearchFile]]:
    """A sweep file and its searches, in the grid's order; `overrides` are those of every search.

    Raises `UserError` for a user's mistake in it, in the base file or in a combination.
    """
    content = read_yaml_file(path, "sweep file")
    try:
        sweep = SweepFile.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in explain(error, SweepFile))) from None
    empty = [key for key, values in sweep.grid.items() if not values]
    if empty or "run" in sweep.grid:
        raise UserError(f"{path}: grid.{empty[0] if empty else 'run'}: give other keys, with at least one value each")
    for key, values in sweep.grid.items():
        if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
            raise UserError(f"{path}: grid.{key}: a value stands there twice")
    base = path.parent / sweep.base
    combinations = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    names = run_names(sweep, combinations)
    return sweep, [_search(sweep, base, overrides, *pair) for pair in zip(combinations, names, strict=True)]


def _search(
    sweep: SweepFile, base: Path, overrides: tuple[str, ...], chosen: Mapping[str, Any], name: str
) -> SearchFile:
    settings = tuple(f"{key}={json.dumps(value, default=str)}" for key, value in chosen.items())
    strategies = sweep.grid.get("search.strategy", ())  # of several, each takes of the base file what it uses
    return load(base, (*overrides, *settings, f"run={name}"), [str(strategy) for strategy in strategies])


def run_names(sweep: SweepFile, combinations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the combinations' runs: always the same, so that a sweep that is run again finds its runs, and no
    two alike, also where values differ only in what a name cannot hold."""
    varied = [key for key, values in sweep.grid.items() if len(values) > 1]
    plain = [_name(sweep, chosen, varied) for chosen in combinations]
    times = Counter(plain)
    return [
        name if len(name) <= _LONGEST_NAME and times[name] == 1 else _with_digest(name, chosen)
        for name, chosen in zip(plain, combinations, strict=True)
    ]


def _name(sweep: SweepFile, chosen: Mapping[str, Any], varied: Sequence[str]) -> str:
    return ".".join([sweep.sweep, *(f"{key.rpartition('.')[2]}-{_plain(chosen[key])}" for key in varied)])


def _with_digest(name: str, chosen: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{name[: _LONGEST_NAME - 13]}.{digest}"


def _plain(value: Any) -> str:
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)
