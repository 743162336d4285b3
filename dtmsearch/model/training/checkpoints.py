"""A training's checkpoints: folders of tensors and a JSON file. Knows nothing of what they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dtmsearch.model.weights.trained import sync

_PREFIX = "checkpoint-"
_KEPT = 2
_TENSORS, _CONTENT = "state.safetensors", "state.json"


def checkpoints(folder: Path) -> list[Path]:
    """A training's checkpoints, in order of their steps."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def write_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """A checkpoint, there whole or not at all; of those before it the last stays."""
    temporary = folder / f".tmp-{_PREFIX}{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / _TENSORS)
    (temporary / _CONTENT).write_text(json.dumps(content), encoding="utf-8")
    for path in temporary.iterdir():
        sync(path)
    shutil.rmtree(folder / f"{_PREFIX}{step}", ignore_errors=True)
    temporary.rename(folder / f"{_PREFIX}{step}")
    sync(folder)
    for old in checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old)


def checkpoint_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their names."""
    return load_file(checkpoint / _TENSORS)


def checkpoint_content(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors: step, losses, seconds."""
    content: dict[str, Any] = json.loads((checkpoint / _CONTENT).read_text(encoding="utf-8"))
    return content
