"""Versions that a submitted search is pinned to: written into its environment, checked where its replicas load.

Knows which packages make numbers, and nothing of how a job is submitted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from dtmsearch.core.library_versions import versions
from dtmsearch.errors import UserError

__all__ = ["VARIABLE", "check", "environment", "versions"]

VARIABLE = "DTMSEARCH_PINS"


def environment(pins: Mapping[str, str]) -> dict[str, str]:
    """The environment variable that carries pins to every process of a job."""
    return {VARIABLE: json.dumps(pins, sort_keys=True)}


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raises `UserError` when this process has other versions than its job was pinned to."""
    pins: dict[str, str] = json.loads(environ.get(VARIABLE, "{}"))
    here = versions(tuple(pins))
    other = {name: wanted for name, wanted in pins.items() if here.get(name) != wanted}
    if other:
        found = ", ".join(f"{name} {here.get(name, 'missing')} (pinned to {wanted})" for name, wanted in other.items())
        raise UserError(
            f"a node of the cluster has other versions than the machine that submitted the search: {found}. Submit "
            "with `--pins install` to have the pinned ones installed for it, or with `--pins none` to take the "
            "cluster's"
        )
