"""A checkpoint folder in the making: tensors streamed into safetensors shards, beside the base model's other files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dtmsearch.core.components import Component
from dtmsearch.export.job import Job, Written

# Of the base model's folder: what a model is loaded with beside its weights.
_KEPT = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "additional_chat_templates/*.jinja")
_INDEX = "model.safetensors.index.json"
# Smaller models lie in one file.
_LEAST_SHARD_BYTES = 64 << 20


class ShardWriter:
    """Writes tensors in the order in which they come, a shard at a time: no more than the job's largest layer is held.

    Tensors that are handed over belong to the writer. `close` gives the shards their names and writes their index.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self._folder = folder
        self._limit = max(job.largest_layer_bytes, _LEAST_SHARD_BYTES)
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.tensor_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self._limit:
            self._flush()
        # Off the device now, and apart from whatever larger tensor it was cut from.
        self._held[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._held_bytes += size
        self.tensor_bytes += size

    def _flush(self) -> None:
        path = self._folder / f"shard-{len(self._shards)}.safetensors"
        save_file(self._held, path, metadata={"format": "pt"})
        path.chmod(0o644)  # it is written for its owner's eyes alone
        self._shards.append((path, list(self._held)))
        self._held, self._held_bytes = {}, 0

    def close(self) -> tuple[Path, ...]:
        self._flush()
        count = len(self._shards)
        if count == 1:
            return (self._shards[0][0].rename(self._folder / "model.safetensors"),)
        files: list[Path] = []
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            files.append(path.rename(self._folder / f"model-{number:05d}-of-{count:05d}.safetensors"))
            weight_map |= dict.fromkeys(names, files[-1].name)
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return tuple(files)


def write_quantized(
    job: Job,
    folder: Path,
    parts_of: Callable[[Component, Tensor], tuple[Mapping[str, Tensor], Mapping[str, int]]],
    quantization_config: dict[str, Any] | None,
    tensors: Iterable[tuple[str, Component | None, Tensor]] | None = None,
    kept_as: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Written:
    """The job's checkpoint with every component in parts. `parts_of` a component and its weight gives its tensors by
    the ending of their names, and what they hold beyond the plan's arithmetic, in bits. `tensors`: other ones than the
    checkpoint's, those of components by the names of their modules in the files. `kept_as` (name, tensor): what the
    files hold of a tensor that is no component of the plan."""
    writer = ShardWriter(folder, job)
    extra: Counter[str] = Counter()
    for name, component, tensor in _told_apart(job) if tensors is None else tensors:
        if component is None:
            writer.add(name, kept_as(name, tensor))
            continue
        parts, more = parts_of(component, tensor)
        for ending, part in parts.items():
            writer.add(f"{name}.{ending}", part)
        extra.update(more)
    files = writer.close()
    copy_other_files(job, folder, quantization_config)
    return Written(files, writer.tensor_bytes, {what: bits for what, bits in extra.items() if bits})


def _told_apart(job: Job) -> Iterator[tuple[str, Component | None, Tensor]]:
    """The checkpoint's tensors; those of the plan's components by the names of these."""
    for name, tensor in job.tensors():
        component = job.component(name)
        yield (name if component is None else component.name), component, tensor


def copy_other_files(job: Job, folder: Path, quantization_config: dict[str, Any] | None = None) -> None:
    """Configuration, tokenizer and whatever else the base model is loaded with; config.json tells the dtype and how the
    weights are quantized."""
    for path in sorted({path for pattern in _KEPT for path in job.folder.glob(pattern)}):
        if path.name not in (_INDEX, "config.json", "training.json"):
            copy = folder / path.relative_to(job.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    config = json.loads((job.folder / "config.json").read_text(encoding="utf-8"))
    for stale in ("torch_dtype", "transformers_weights"):  # the second names the base model's own file of weights
        config.pop(stale, None)
    config["dtype"] = str(job.dtype).removeprefix("torch.")
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def header_bytes(path: Path) -> int:
    """What of a safetensors file is no tensor: the length of its header and the header."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
