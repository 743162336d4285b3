"""Versions of the libraries whose numbers an evaluation's value is made of, and names of theirs that a release can
take away."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

# Packages whose version can change what an evaluation measures.
NUMERIC_PACKAGES = ("bitsandbytes", "numpy", "tokenizers", "torch", "transformers")


def versions(packages: Sequence[str] = NUMERIC_PACKAGES) -> dict[str, str]:
    """Package -> installed version, without the build's own suffix: `2.13.0+cu130` and `2.13.0+cpu` are one version.
    What is not installed has no entry."""
    found = ((package, _version(package)) for package in packages)
    return {package: version for package, version in found if version is not None}


@functools.cache
def _version(package: str) -> str | None:
    """What this process has or would import of a package."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class ForeignName:
    """A name of another library that is private there, or that its releases have changed: dotted, from the library's
    own name. `use` says what we need it for; `find` finds it where it is no attribute of a module or class."""

    name: str
    use: str
    find: Callable[[], object] | None = None

    def broken(self) -> str:
        """What to say where the installed release lacks it; empty where it has it."""
        try:
            if self.find is None:
                _resolved(self.name)
            else:
                self.find()
        except (ImportError, AttributeError, KeyError, TypeError) as error:
            library = self.name.partition(".")[0]
            release = versions((library.replace("_", "-"),)).get(library.replace("_", "-"), "of no known version")
            return f"{library} {release} has no {self.name} ({error}), which is used to {self.use}"
        return ""


def _resolved(name: str) -> object:
    """The object of a dotted name: modules as far as they go, then attributes."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ".".join(parts[:end])
        if importlib.util.find_spec(parts[0]) is not None and _is_module(path):
            return reduce(getattr, parts[end:], importlib.import_module(path))
    raise ModuleNotFoundError(f"{parts[0]} is not installed")


def _is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:  # what should hold it is no package
        return False
