"""What the recorded text of a search file says, key by key, whichever version wrote it. Loads no schema: readers of a
store ask it of every run."""

from __future__ import annotations

from typing import Any

import yaml

from dtmsearch.core.metric_registry import BUILT_IN, is_metric_name

# What a store holds is read many times in a run. The users' own files are read by yaml.safe_load, for its messages.
QUICK_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def section_of(text: str, name: str) -> dict[str, Any]:
    """A section of a search file's YAML text as it stands, whichever version wrote it; empty where there is none."""
    try:
        content = yaml.load(text, Loader=QUICK_LOADER)  # noqa: S506 - as safe as yaml.safe_load
    except yaml.YAMLError:
        return {}
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else {}


def other_metrics_of(text: str) -> list[str]:
    """The metrics of other packages that a search file's YAML text names, in order; whether they are installed here or
    not."""
    search = section_of(text, "search")
    beside = search.get("metrics")
    named = [search.get("rank_by"), *(beside if isinstance(beside, list) else [])]
    return sorted({name for name in named if isinstance(name, str) and is_metric_name(name)} - set(BUILT_IN))
