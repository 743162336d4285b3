"""A search file's text as keys and values, overrides among them, and a reader's mistakes in words."""

from __future__ import annotations

import difflib
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dtmsearch.config.recorded_text import QUICK_LOADER
from dtmsearch.core.user_files import read_text, shown
from dtmsearch.errors import UserError

# What a person writes has fewer values and levels than this; longer texts take PyYAML minutes.
_MOST_VALUES, _MOST_LEVELS, MOST_BYTES = 100_000, 50, 4 << 20


def read_yaml_file(path: Path, what: str) -> dict[str, Any]:
    """The keys of a file of the user's; `what` says in errors what it should have been. Raises `UserError`."""
    return read_yaml(read_text(path, what, MOST_BYTES), str(path), what)


def read_yaml(text: str, source: str, what: str = "search file", quick: bool = False) -> dict[str, Any]:
    """The keys of a search file's text, or of another file's; `quick` of what dtmsearch has written itself, by libyaml,
    which takes a seventh of the time and has other messages. Raises `UserError`, naming `source`, for what is none."""
    content = _parse(text, source, QUICK_LOADER if quick else yaml.SafeLoader)
    if not isinstance(content, dict):
        raise UserError(f"{source} is no {what}: it should hold {_KEYS[what]}")
    return content


_KEYS = {
    "search file": "keys such as run, model, prompts and search",
    "sweep file": "the keys sweep, base and grid",
    "table of times": "the keys device, prefill_tokens and rows",
}


def _parse(text: str, source: str, kind: Any = yaml.SafeLoader) -> Any:
    """What a YAML text holds: plain values under names, as many as a person would write."""
    try:
        loader = kind(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, source)
            content = loader.construct_document(node)
        finally:
            loader.dispose()
    except UserError:
        raise
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {_place(error)}") from None
    except RecursionError:
        raise UserError(f"{source} is not YAML that can be read: it is nested too deeply") from None
    except Exception as error:  # of a value that is not what its tag says: `!!bool maybe`, `2026-13-45`
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} is not YAML: a value is not what it is marked as ({reason})") from None
    _check_texts(content, source)
    return content


def _place(error: yaml.YAMLError) -> str:
    """A YAML error in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _check_size(root: yaml.Node, source: str) -> None:
    """Raises `UserError` for more values or levels than a person writes. An alias counts wherever it is used: ten of
    ten of ten ... may stand for a billion values, or for themselves."""
    count = 0
    waiting: list[tuple[yaml.Node, int]] = [(root, 1)]
    while waiting:
        node, level = waiting.pop()
        count += 1
        if count > _MOST_VALUES or level > _MOST_LEVELS:
            raise UserError(
                f"{source} holds more than {_MOST_VALUES} values or {_MOST_LEVELS} levels, aliases counted wherever "
                "they are used: write a smaller file"
            )
        if isinstance(node, yaml.SequenceNode):
            waiting += [(inner, level + 1) for inner in node.value]
        elif isinstance(node, yaml.MappingNode):
            waiting += [(inner, level + 1) for pair in node.value for inner in pair]


def _check_texts(content: Any, source: str) -> None:
    """Raises `UserError` for keys that are no text, and for characters that no path or table can hold."""
    if isinstance(content, dict):
        for key, value in content.items():
            if not isinstance(key, str):
                raise UserError(f"{source} has a key that is no text: {shown(key)}")
            _check_texts(key, source)
            _check_texts(value, source)
    elif isinstance(content, list | tuple | set):
        for value in content:
            _check_texts(value, source)
    elif isinstance(content, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in content):
        raise UserError(f"{source} has a text with a character that no path or table can hold: {shown(content)}")


def override_key(content: dict[str, Any], override: str) -> None:
    """Put `a.b=VALUE` into the keys of a file, sections made where they are missing. Raises `UserError`."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes KEY=VALUE such as search.width=4, got {shown(override)}")
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
        section[last] = _parse(value, "the value")
    except UserError as error:
        raise UserError(
            f"--set {shown(override)}: {error}. Quote what YAML gives a meaning to, such as "
            """--set 'search.components.include=["*attn*"]'"""
        ) from None


def explain(error: ValidationError, root: type) -> list[str]:
    """What is wrong with a section `root`, a line a problem; an unknown key with the known one nearest to it."""
    lines = []
    for problem in error.errors():
        where = ".".join(
            str(part) for part in problem["loc"] if not str(part).startswith(("function-", "constrained-"))
        )
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(f"unknown key {shown(where)}{_nearest_key(problem['loc'], root)}")
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = "" if isinstance(problem["input"], dict) else f", got {shown(problem['input'])}"
            names_its_key = not where or message.startswith(f"{where}.")
            lines.append(message if names_its_key else f"{where}: {message}{got}")
    return lines


def _nearest_key(location: tuple[int | str, ...], root: type) -> str:
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


def _known_keys(section: type, prefix: str = "") -> list[str]:
    """Keys of a section and of those in it; none where it is a value."""
    if is_dataclass(section):
        return [prefix + field.name for field in fields(section)]
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return []
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            keys += _known_keys(inner, f"{prefix}{name}.")
    return keys


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """`a.b` -> value for keys within keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in flatten(inner, f"{prefix}.{name}".lstrip(".")).items()}
