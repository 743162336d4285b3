"""What other installed packages add, by the entry points of their distributions."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from dtmsearch.errors import UserError

SCHEMES, FORMATS, STRATEGIES = "dtmsearch.schemes", "dtmsearch.formats", "dtmsearch.strategies"
METRICS = "dtmsearch.metrics"

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Plugin:
    """An object that an installed package adds; `version` is its distribution's name and version."""

    name: str
    added: Any
    version: str


def plugins(group: str) -> Iterator[Plugin]:
    """What installed packages add to a group, in order of name. Raises `UserError` for one that cannot be loaded."""
    return (_loaded(point) for point in sorted(_points(group), key=lambda point: point.name))


def plugin_names(group: str) -> tuple[str, ...]:
    """Their names, without loading any."""
    return tuple(sorted(point.name for point in _points(group)))


def _points(group: str) -> EntryPoints:
    return _points_of(group, tuple((path, _changed_at(path)) for path in sys.path))


@functools.lru_cache(maxsize=8)
def _points_of(group: str, installed: tuple[tuple[str, int], ...]) -> EntryPoints:
    """What all that is installed adds to a group, read again where a folder of packages has changed."""
    return entry_points(group=group)


def _changed_at(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0


def nearest(name: str, names: Iterable[str], what: str) -> str:
    """What to say of a name that nobody has: the nearest one, or all."""
    names = list(names)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"there is no {what} {name!r}; {hint}"


class Registry(Generic[Entry]):
    """Entries by name: those added here, and those of installed packages, which are loaded when first asked for.
    `check` (name, what was loaded) raises `UserError` where a package added something that is no entry."""

    def __init__(self, group: str, what: str, check: Callable[[str, Any], None] = lambda name, added: None) -> None:
        self._group, self._what, self._check = group, what, check
        self._entries: dict[str, Entry] = {}
        self._plugins: dict[str, Plugin] = {}
        self._unlisted: set[str] = set()

    def add(self, name: str, entry: Entry, listed: bool = True) -> Entry:
        """Register `entry`; one that is not `listed` is had by its name alone. Raises `UserError` where the name is
        another's."""
        if self._entries.get(name, entry) is not entry:
            raise UserError(f"there is a {self._what} {name!r} already; give yours another name")
        self._entries[name] = entry
        if not listed:
            self._unlisted.add(name)
        return entry

    def remove(self, name: str) -> None:
        """Forget an entry that was added, or what was loaded of a package."""
        self._entries.pop(name, None)
        self._plugins.pop(name, None)

    def version(self, name: str) -> str:
        """Name and version of the distribution that an entry comes from; empty for those added in this process. Raises
        `UserError` as the entry does."""
        return "" if name in self._entries else self._plugin(name).version

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._plugins or name in plugin_names(self._group)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Iterator[str]:
        listed = (name for name in self._entries if name not in self._unlisted)
        return iter(dict.fromkeys([*listed, *plugin_names(self._group)]))

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name. Raises `UserError`, naming the nearest one, where there is none."""
        if name in self._entries:
            return self._entries[name]
        return cast(Entry, self._plugin(name).added)

    def _plugin(self, name: str) -> Plugin:
        if name not in self._plugins:
            for point in _points(self._group).select(name=name):
                found = _loaded(point)
                self._check(name, found.added)
                self._plugins[name] = found
                return found
            raise UserError(nearest(name, self, self._what))
        return self._plugins[name]


def _loaded(point: EntryPoint) -> Plugin:
    try:
        added = point.load()
    except Exception as error:  # whatever the package's own code raises
        whose = f"{point.name} of {_distribution(point)} ({point.group})"
        raise UserError(
            f"{whose} cannot be loaded: {type(error).__name__}: {error}; mend or uninstall that package"
        ) from error
    return Plugin(point.name, added, _distribution(point))


def _distribution(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
