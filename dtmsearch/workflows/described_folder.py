"""What the README of an exported folder says to programs, in its front matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dtmsearch.errors import UserError


def read_card(folder: Path) -> Mapping[str, Any]:
    """The front matter; empty where there is none."""
    card = folder / "README.md"
    match = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    front = yaml.safe_load(match.group(1)) if match else None
    return front if isinstance(front, dict) else {}


def base_model_of(folder: Path) -> str:
    """The base model that a folder's README names. Raises `UserError` when it names none."""
    front = read_card(folder)
    if "base_model" not in front:
        raise UserError(f"{folder} has no README.md that names its base model: say with --base what it is")
    return str(front["base_model"])
