"""Write the pages of docs/ that are made from the code: `python docs/generate.py`; `--check` only says what is stale.

search-file.md and search-file.schema.json from the search file's sections, store.md's tables from the store's schemas,
cli.md from the command line, api.md from the public API's signatures and docstrings, architecture.svg from the
package's imports; in architecture.md the line of every link to the code.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import click

import dtmsearch as dtm
from dtmsearch.cli import cli
from dtmsearch.config import json_schema
from dtmsearch.store import schemas

DOCS = Path(__file__).parent
PACKAGE = Path(dtm.__file__).parent
_MADE = "<!-- Made by docs/generate.py; do not edit. -->\n\n"


def pages() -> dict[str, str]:
    """File name -> content of every page that is made from the code."""
    return {
        "search-file.md": search_file_page(),
        "search-file.schema.json": json_schema(),
        "tables.md": tables_page(),
        "cli.md": cli_page(),
        "api.md": api_page(),
        "architecture.svg": architecture_picture(),
        "architecture.md": with_lines((DOCS / "architecture.md").read_text(encoding="utf-8")),
    }


# The search file.


def search_file_page() -> str:
    schema = json.loads(json_schema())
    lines = [
        _MADE + "# The search file\n",
        "What a search is stands in a YAML file; where it runs (cluster, replicas, GPUs) never does. Every key, with "
        "its default; `--set a.b=c` overrides any of them. Unknown keys are errors that name the nearest known one. "
        "`dtmsearch init MODEL` writes a commented file, `dtmsearch validate FILE` checks one, and `dtmsearch schema` "
        "prints the JSON schema for editors.\n",
        *_section("", schema, schema["$defs"]),
    ]
    return "\n".join(lines) + "\n"


def _section(name: str, section: dict[str, Any], sections: dict[str, Any]) -> Iterator[str]:
    inner: list[tuple[str, str]] = []
    yield f"## {name or 'The file'}\n"
    if name and section.get("description"):
        yield section["description"].replace("\n", " ") + "\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for key, value in section["properties"].items():
        path = f"{name}.{key}" if name else key
        target = _reference(value)
        if target is not None:
            inner.append((path, target))
        default = "required" if key in section.get("required", ()) else _default(value, target)
        kind = f"[section](#{path.replace('.', '').lower()})" if target is not None else _kind(value)
        yield f"| `{path}` | {kind} | {default} | {value['description'].replace(chr(10), ' ')} |"
    yield ""
    for path, target in inner:
        yield from _section(path, sections[target], sections)


def _reference(value: dict[str, Any]) -> str | None:
    options = [value, *value.get("anyOf", ()), *value.get("allOf", ())]
    return next((o["$ref"].rpartition("/")[2] for o in options if "$ref" in o), None)


def _default(value: dict[str, Any], target: str | None) -> str:
    default = value.get("default")
    return "" if default in (None, []) or target is not None else f"`{json.dumps(default)}`"


def _kind(value: dict[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(_kind(option) for option in value["anyOf"] if option.get("type") != "null")
    if "enum" in value:
        return ", ".join(f"`{option}`" for option in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array":
        return f"list of {_kind(value.get('items', {}))}"
    limits = [f"{sign} {value[key]:g}" for key, sign in _LIMITS.items() if key in value]
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
    return " ".join([kind.get(value.get("type", ""), "any"), ", ".join(limits)]).strip()


_LIMITS = {"minimum": "&ge;", "exclusiveMinimum": "&gt;", "maximum": "&le;", "exclusiveMaximum": "&lt;"}


# The store's tables.


def tables_page() -> str:
    lines = [
        _MADE + "# The store's tables\n",
        f'Format {schemas.FORMAT_VERSION}. Every table can be read with `dtmsearch query "SELECT ..."`. Times are UTC; '
        "null means that something was not measured.\n",
    ]
    for name, schema in schemas.SCHEMAS.items():
        lines += [f"## {name}\n", "| column | type |\n|---|---|"]
        lines += [f"| `{field.name}` | {_arrow_type(field.type)} |" for field in schema]
        lines.append("")
    return "\n".join(lines)


def _arrow_type(kind: Any) -> str:
    text = "text" if kind == schemas.CODED else str(kind)
    return escape(text.replace("item: ", "").replace("element: ", ""))


# The command line.


def cli_page() -> str:
    lines = [
        _MADE + "# Commands\n",
        "Exit codes: 0 done, 1 failed, 2 usage, 3 stopped and resumable, 4 store unreadable, "
        "5 cluster unreachable. Data goes to stdout, everything else to stderr.\n",
    ]
    root = click.Context(cli, info_name="dtmsearch", **cli.context_settings)
    for name, verb in sorted(cli.commands.items()):
        context = click.Context(verb, info_name=name, parent=root, terminal_width=100)
        text = verb.get_help(context).replace("\b\n", "")
        lines += [f"## {name}\n", "```text", text.strip(), "```", ""]
    return "\n".join(lines)


# The public API.


def api_page() -> str:
    lines = [
        _MADE + "# Python API\n",
        "`import dtmsearch as dtm`. Verbs take a search file as a path, a mapping or an "
        "object, and a store as a folder, a URL or an object.\n",
    ]
    members = {name: getattr(dtm, name) for name in dtm.__all__ if not name.startswith("_")}
    groups = {
        "Functions": [n for n, m in members.items() if inspect.isfunction(m)],
        "Types": [n for n, m in members.items() if inspect.isclass(m) and not issubclass(m, BaseException)],
        "Exceptions": [n for n, m in members.items() if inspect.isclass(m) and issubclass(m, BaseException)],
    }
    for title, names in groups.items():
        lines.append(f"## {title}\n")
        for name in sorted(names):
            lines += _member(name, members[name])
    return "\n".join(lines)


def _member(name: str, member: Any) -> Iterator[str]:
    exception = inspect.isclass(member) and issubclass(member, BaseException)
    signature = "" if exception or (inspect.isclass(member) and "model_fields" in dir(member)) else _signature(member)
    yield f"### {name}\n"
    yield f"```python\n{name}{signature}\n```\n"
    yield (inspect.getdoc(member) or "") + "\n"
    if inspect.isclass(member) and not exception:
        for method, value in vars(member).items():
            if (
                not method.startswith("_")
                and (inspect.isfunction(value) or isinstance(value, property))
                and value.__doc__
            ):
                shown = f"{method}{_signature(value)}" if inspect.isfunction(value) else method
                first = inspect.cleandoc(value.__doc__).partition("\n\n")[0].replace("\n", " ")
                yield f"- `{shown}`: {first}"
        yield ""


def _signature(member: Any) -> str:
    try:
        text = str(inspect.signature(member)).replace("'", "")
        text = re.sub(r"<function <lambda> at 0x[0-9a-f]+>", "...", text)  # an address, another each time
        return re.sub(r"PoolSettings\([^()]*\)", "Where()", text)
    except ValueError:
        return ""


# Links to lines of the code.

_TO_CODE = re.compile(r"\[`(?P<path>[\w/]+\.py)` `(?P<name>[\w.]+)`\]\([^)]*\)")


def with_lines(text: str) -> str:
    """A page whose links to the code, [`path.py` `Class.method`](...), lead to the lines where their names are defined.
    Raises `ValueError` for a name that is nowhere in its file."""
    return _TO_CODE.sub(lambda link: f"{link[0].partition('(')[0]}({_place(link['path'], link['name'])})", text)


def _place(path: str, name: str) -> str:
    node: ast.AST = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        inner = [each for each in getattr(node, "body", ()) if part in _names(each)]
        if not inner:
            raise ValueError(f"docs/architecture.md: {path} has no {name}")
        node = inner[0]
    return f"../{PACKAGE.name}/{path}#L{getattr(node, 'lineno', 1)}"


def _names(node: ast.AST) -> list[str]:
    """What a statement of a module or class gives a name."""
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return [getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))]


# The picture of the package.


def architecture_picture() -> str:
    """Folders from the ground up, with an arrow for each that imports another; as SVG."""
    arrows = _arrows()
    names = sorted({name for pair in arrows for name in pair})
    floors = dict.fromkeys(names, 0)
    for _ in names:
        for upper, lower in arrows:
            floors[upper] = max(floors[upper], floors[lower] + 1)
    rows: dict[int, list[str]] = {}
    for name in names:
        rows.setdefault(floors[name], []).append(name)
    width, height, gap, row_height = 120, 34, 24, 84
    total = max(len(row) for row in rows.values()) * (width + gap) + gap
    top = max(rows)
    at = {
        name: ((total - len(row) * (width + gap) + gap) // 2 + i * (width + gap), (top - floor) * row_height + 20)
        for floor, row in rows.items()
        for i, name in enumerate(row)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {(top + 1) * row_height}" '
        'font-family="sans-serif" font-size="14">',
        f'<rect width="{total}" height="{(top + 1) * row_height}" fill="white"/>',
    ]
    for upper, lower in sorted(arrows):
        (x1, y1), (x2, y2) = at[upper], at[lower]
        lines.append(
            f'<line x1="{x1 + width // 2}" y1="{y1 + height}" x2="{x2 + width // 2}" y2="{y2}" stroke="#9ab" />'
        )
    for name, (x, y) in at.items():
        lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="#eef4fb" stroke="#357"/>')
        lines.append(f'<text x="{x + width // 2}" y="{y + 22}" text-anchor="middle">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _arrows() -> set[tuple[str, str]]:
    """(folder, folder that it imports), loose modules under their own names; the package's own API left out."""
    found: set[tuple[str, str]] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dtmsearch."):
                found.add((folder, str(node.module).split(".")[1]))
    return {(a, b) for a, b in found if a != b and not a.startswith("__")}


def main() -> int:
    made = pages()
    stale = [name for name, text in made.items() if not _same(DOCS / name, text)]
    if "--check" in sys.argv:
        print("\n".join(f"stale: {name}; run python docs/generate.py" for name in stale) or "all pages are fresh")
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(made[name], encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
