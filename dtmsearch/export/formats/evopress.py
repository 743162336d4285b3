"""`evopress`: the text configuration (`module: level`) and the weight database of EvoPress (arXiv 2410.14649), so that
its search and ours choose from identical weights.

The database has a folder for each module and in it a dense tensor for each level, `LEVEL.pth`. A level is a scheme's
bits or, where two schemes share them or one has none, its place in the list; `levels.json` tells which is which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import DENSE, parse_scheme
from dtmsearch.core.user_files import read_json, read_text
from dtmsearch.errors import UserError
from dtmsearch.export.component_weights import component_dense
from dtmsearch.export.job import Job, Written, refuse

CONFIGURATION, DATABASE, LEVELS = "configuration.txt", "database", "levels.json"
_DENSE_LEVEL = 16


def write_evopress(job: Job, folder: Path) -> Written:
    """The plan as a configuration, and a database of every scheme of the job for every component.

    Raises `UserError` for trained weights.
    """
    if job.trained is not None:
        why = "its database holds components only, but norms and biases were trained with them; `dense` holds all"
        raise refuse("evopress", why, [f"trained weights {job.weights_id}"])
    job.require_places()
    levels = levels_of(sorted({DENSE, *job.schemes, *(scheme for _, scheme in job.plan.entries)}))
    (folder / LEVELS).write_text(json.dumps(levels, indent=2) + "\n", encoding="utf-8")
    names = [c.name for c in job.manifest.components]
    (folder / CONFIGURATION).write_text(configuration_text(job.plan, names, levels), encoding="utf-8")
    files = [folder / CONFIGURATION, folder / LEVELS]
    for component in job.manifest.components:
        weight = job.matrix(component)
        place = folder / DATABASE / component.name
        place.mkdir(parents=True)
        for name, level in levels.items():
            scheme = parse_scheme(name)
            tensor = weight if scheme.is_unquantized else component_dense(job, component, weight, scheme)
            torch.save(tensor.detach().cpu().clone(), place / f"{level}.pth")
            files.append(place / f"{level}.pth")
    return Written(tuple(files), notes=["Each `.pth` file is one dense tensor; load it with `weights_only=True`."])


def levels_of(schemes: Sequence[str]) -> dict[str, int]:
    """Scheme -> level: bits where they tell schemes apart, `dense` being 16; else places in the list."""
    bits = {scheme: _DENSE_LEVEL if scheme == DENSE else parse_scheme(scheme).bits for scheme in schemes}
    if 0 not in bits.values() and len(set(bits.values())) == len(bits):
        return bits
    return {scheme: place for place, scheme in enumerate(schemes)}


def configuration_text(plan: Plan, components: Sequence[str], levels: Mapping[str, int]) -> str:
    """The plan as EvoPress's `configuration.txt` has it."""
    return "".join(f"{name}: {levels[plan.scheme_of(name)]}\n" for name in components)


def is_configuration(text: str) -> bool:
    """Whether a text reads as `module: level` lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and all(line.count(":") == 1 and line.split(":")[1].strip().isdecimal() for line in lines)


def read_configuration(path: Path, levels: Mapping[str, int] | None = None) -> Plan:
    """The plan of a configuration, by `levels` or the `levels.json` beside it. Raises `UserError` where a level has no
    scheme."""
    if levels is None:
        beside = path.with_name(LEVELS)
        if not beside.is_file():
            raise UserError(f"{path} names levels, and no {LEVELS} beside it says which schemes they are")
        levels = read_json(beside, "file of levels")
        if not isinstance(levels, dict) or not all(type(level) is int for level in levels.values()):
            raise UserError(f"{beside} should hold a level, a whole number, for each scheme")
    schemes = {str(level): scheme for scheme, level in levels.items()}
    plan: dict[str, str] = {}
    for line in read_text(path, "configuration").splitlines():
        name, _, level = line.partition(":")
        if not line.strip():
            continue
        scheme = schemes.get(level.strip().lstrip("0") or "0")
        if scheme is None:
            raise UserError(
                f"{path}: {name.strip()} has level {level.strip()}, which is no scheme; known are {dict(levels)}"
            )
        plan[name.strip()] = scheme
    return Plan.of(plan)


def read_weight(database: Path, component: str, level: int) -> Tensor:
    """One tensor of a database. Raises `UserError` when it is not there or is more than a tensor."""
    path = database / component / f"{level}.pth"
    if not path.is_file():
        raise UserError(f"the database {database} has no level {level} of {component}")
    tensor = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor):
        raise UserError(f"{path} holds a {type(tensor).__name__}, wanted a tensor")
    return tensor
