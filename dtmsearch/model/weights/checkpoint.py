"""The original weights of a model, in its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dtmsearch.core.checkpoint_files import read_header
from dtmsearch.model.modules.weight_reading import Span, located


class Checkpoint:
    """Original weights by module name, read one at a time. Knows which names the files hold as they are."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._file_of = {name: path for path in files for name in read_header(path)}

    def holds(self, component: str) -> bool:
        return f"{component}.weight" in self._file_of

    def read(self, component: str) -> Tensor:
        return self._tensor(f"{component}.weight")

    def with_file(self, path: Path) -> Checkpoint:
        """The same, with what another file holds in place of its own."""
        other = Checkpoint(())
        other._file_of = self._file_of | dict.fromkeys(read_header(path), path)
        return other

    def has(self, name: str) -> bool:
        """Whether a parameter of this full name is there."""
        return name in self._file_of

    def parameter(self, name: str) -> Tensor:
        """A parameter of any kind by its full name."""
        return self._tensor(name)

    def map_apart(self, model: nn.Module) -> None:
        """Give every weight on the CPU a mapping of its file for itself.

        The loader maps a file once for all its weights, and memory holds the whole as long as one of them is in use.
        """
        for name, parameter in model.named_parameters():
            if parameter.device.type == "cpu":
                own = self._tensor(name) if name in self._file_of else parameter.data.clone()
                if own.dtype != parameter.dtype:
                    continue  # the loader has made a copy
                if torch.equal(own, parameter.data):
                    parameter.data = own
                else:  # it makes something else of what has this name in the files
                    del self._file_of[name]

    def located(self, model: nn.Module) -> dict[str, Span]:
        """Where the parameters of a model in the host's memory lie in files, as they are there, by name. What the
        loader has made something else of is no longer taken for the original weights."""
        found, other = located(model, self._file_of)
        for name in other:
            del self._file_of[name]
        return found

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
