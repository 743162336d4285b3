"""What other installed packages add, by the entry points of their distributions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dtmsearch.errors import UserError

SCHEMES, FORMATS = "dtmsearch.schemes", "dtmsearch.formats"


@dataclass(frozen=True)
class Plugin:
    """An object that an installed package adds; `version` is its distribution's name and version."""

    name: str
    added: Any
    version: str


def plugins(group: str) -> Iterator[Plugin]:
    """What installed packages add to a group, in order of name. Raises `UserError` for one that cannot be loaded."""
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        try:
            added = point.load()
        except Exception as error:  # whatever the package's own code raises
            raise UserError(
                f"{point.name} of {_distribution(point)} ({group}) cannot be loaded: {type(error).__name__}: {error}; "
                "mend or uninstall that package"
            ) from error
        yield Plugin(point.name, added, _distribution(point))


def plugin_names(group: str) -> tuple[str, ...]:
    """Their names, without loading any."""
    return tuple(sorted(point.name for point in entry_points(group=group)))


def _distribution(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
