"""The search file: what a search is. The only reader of configuration.

Names of `search_file` are imported when they are first asked for: who reads what a store has recorded, by
`recorded_text`, waits for no schema.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtmsearch.config.search_file import (
        SearchFile,
        difference,
        from_mapping,
        json_schema,
        load,
        parse,
        recorded,
        recovery_of,
        times_of,
    )
    from dtmsearch.config.search_section import SearchSection
    from dtmsearch.config.sections import DatasetSection, MixedSection, PromptsSection, RunName, ValidationSection

__all__ = [
    "DatasetSection",
    "MixedSection",
    "PromptsSection",
    "RunName",
    "SearchFile",
    "SearchSection",
    "ValidationSection",
    "difference",
    "from_mapping",
    "json_schema",
    "load",
    "parse",
    "recorded",
    "recovery_of",
    "times_of",
]

# name here -> module of this folder, where it is not search_file
_ELSEWHERE = {
    "DatasetSection": "sections",
    "MixedSection": "sections",
    "PromptsSection": "sections",
    "RunName": "sections",
    "SearchSection": "search_section",
    "ValidationSection": "sections",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'search_file')}")
    globals()[name] = getattr(module, name)
    return globals()[name]
