"""Names that other packages can add to: of schemes, strategies, metrics and export formats."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from dtmsearch.errors import UserError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """What is known under a name: entries that were added here, and those of installed packages that name them in the
    entry-point group `group`. A package is imported when its entry is first asked for."""

    def __init__(self, group: str, what: str) -> None:
        self._group, self._what = group, what
        self._entries: dict[str, Entry] = {}
        self._points: dict[str, EntryPoint] | None = None

    def add(self, name: str, entry: Entry) -> Entry:
        """Register `entry`. Raises `UserError` where the name is another's."""
        if self._entries.get(name, entry) is not entry:
            raise UserError(f"there is a {self._what} {name!r} already; give yours another name")
        self._entries[name] = entry
        return entry

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._installed()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._entries, *self._installed()]))

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name. Raises `UserError`, naming the nearest one, where there is none."""
        if name not in self._entries and name in self._installed():
            self._entries[name] = self._installed()[name].load()
        if name not in self._entries:
            near = difflib.get_close_matches(name, list(self), 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(self)}"
            raise UserError(f"no {self._what} {name!r}; {hint}")
        return self._entries[name]

    def version_of(self, name: str) -> str:
        """`package==version` of the installed package that an entry comes from; empty for what was added here."""
        point = self._installed().get(name)
        if point is None or point.dist is None:
            return ""
        return f"{point.dist.name}=={point.dist.version}"

    def _installed(self) -> dict[str, EntryPoint]:
        if self._points is None:
            self._points = {point.name: point for point in entry_points(group=self._group)}
        return self._points
