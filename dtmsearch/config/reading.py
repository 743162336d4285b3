"""A search file's text as keys and values, overrides among them, and a reader's mistakes in words."""

from __future__ import annotations

import difflib
import typing
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dtmsearch.errors import UserError


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """The keys of a search file's text. Raises `UserError`, naming `source`, for what is none."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source} is no search file: it should hold keys such as run, model, prompts and search")
    return content


def override_key(content: dict[str, Any], override: str) -> None:
    """Put `a.b=VALUE` into the keys of a file, sections made where they are missing. Raises `UserError`."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes KEY=VALUE such as search.width=4, got {override!r}")
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        inner = section.setdefault(parent, {})
        if inner is None:
            inner = section[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: {parent} is a value, not a section")
        section = inner
    try:
        section[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(
            f"--set {override}: the value is not YAML ({problem}). Quote what YAML gives a meaning to, such as "
            """--set 'search.components.include=["*attn*"]'"""
        ) from None


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """What is wrong with a section `root`, a line a problem; an unknown key with the known one nearest to it."""
    lines = []
    for problem in error.errors():
        where = ".".join(
            str(part) for part in problem["loc"] if not str(part).startswith(("function-", "constrained-"))
        )
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {where!r}{_nearest_key(problem['loc'], root)}")
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            names_its_key = not where or message.startswith(f"{where}.")
            lines.append(message if names_its_key else f"{where}: {message}{got}")
    return lines


def _nearest_key(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """'; did you mean ...' with the known key nearest to an unknown one, of its own section if any is close there."""
    prefix, key = ".".join(map(str, location[:-1])), str(location[-1])
    known = _known_keys(root)
    here = [k for k in known if k.rpartition(".")[0] == prefix]
    by_last = {k.rpartition(".")[2]: k for k in [*known, *here]}
    nearest = difflib.get_close_matches(key, [k.rpartition(".")[2] for k in here], n=1, cutoff=0.5)
    nearest = nearest or difflib.get_close_matches(key, list(by_last), n=1, cutoff=0.7)
    if nearest:
        return f"; did you mean {by_last[nearest[0]]!r}?"
    return f"; known keys there are {', '.join(k.rpartition('.')[2] for k in here)}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += _known_keys(inner, f"{prefix}{name}.")
    return keys


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """`a.b` -> value for keys within keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in flatten(inner, f"{prefix}.{name}".lstrip(".")).items()}
