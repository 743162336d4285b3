"""Versions of the libraries whose numbers an evaluation's value is made of."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

# Packages whose version can change what an evaluation measures.
NUMERIC_PACKAGES = ("bitsandbytes", "numpy", "tokenizers", "torch", "transformers")


def versions(packages: Sequence[str] = NUMERIC_PACKAGES) -> dict[str, str]:
    """Package -> installed version, without the build's own suffix: `2.13.0+cu130` and `2.13.0+cpu` are one version.
    What is not installed has no entry."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
