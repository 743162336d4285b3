"""What the files of a quantized checkpoint hold: which of their tensors make one weight, of which shape, in how many
bits, and how. Formats are registered by name; a folder's configuration says which one it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from dtmsearch.errors import UserError

Shape = tuple[int, ...]
# name -> (dtype as `core.checkpoint_files.read_header` names it, shape)
Headers = Mapping[str, tuple[str, Shape]]
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class StoredWeight:
    """One unquantized tensor of a model and the tensors of the files, `parts`, that `make` makes it of, in float32 or
    in a dtype that holds its values exactly. `parts` are told by name to `make`."""

    name: str
    shape: Shape
    parts: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class StoredFormat:
    """A format of quantized checkpoints.

    `weights` finds the quantized weights of a checkpoint's tensors (by its headers, the format's settings in
    config.json, and a function that reads a tensor, asked for small ones only); `says` describes it from the settings,
    in a few words; `needs` are packages beside this one's own, module -> what pip installs. Tensors that end in one of
    `dropped` belong to activations and are left out.
    """

    name: str
    weights: Callable[[Headers, Mapping[str, Any], Read], Iterable[StoredWeight]]
    says: Callable[[Mapping[str, Any]], str]
    needs: Mapping[str, str]
    dropped: tuple[str, ...] = ()

    def check_packages(self, path: str) -> None:
        """Raises `UserError` for what is not installed."""
        missing = [package for module, package in self.needs.items() if find_spec(module) is None]
        if missing:
            raise UserError(f"{path} is stored as {self.name}, which needs: pip install {' '.join(missing)}")


_FORMATS: dict[str, StoredFormat] = {}


def register(form: StoredFormat) -> StoredFormat:
    """Add a format under the `quant_method` that configurations name it by."""
    assert form.name not in _FORMATS, form.name
    _FORMATS[form.name] = form
    return form


def settings_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a checkpoint is quantized, by its config.json, which says it at its top or in the part for text; None where
    it is not."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if isinstance(found, Mapping):
                return dict(found)
    return None


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the same model, unquantized."""
    keys = ("quantization_config", "compression_config")
    left = {key: value for key, value in config.items() if key not in keys}
    if isinstance(left.get("text_config"), Mapping):
        left["text_config"] = {key: value for key, value in left["text_config"].items() if key not in keys}
    return left


def format_of(settings: Mapping[str, Any], path: str) -> StoredFormat:
    """The format of a checkpoint's settings. Raises `UserError` for one that is not known here."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in _FORMATS:
        raise UserError(
            f"{path} is quantized by {method!r}, which is not read here: formats that are, are "
            f"{', '.join(_FORMATS)} and GGUF files. Give the model in 16 bits, or in one of these"
        )
    return _FORMATS[str(method)]
