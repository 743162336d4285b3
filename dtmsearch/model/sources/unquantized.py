"""The folder that stands for a quantized source: the same model unquantized, written once into a cache on this machine,
so that all that loads, hashes, trains and exports works on an ordinary checkpoint.

What only asks for names and shapes is given a folder whose tensors hold no values, and take no room on the disk.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtmsearch.core.checkpoint_files import (
    DTYPE_BITS,
    content_hash,
    is_gguf,
    read_header,
    read_model_config,
    weight_files,
)
from dtmsearch.core.identity import file_digest, identity
from dtmsearch.errors import UserError
from dtmsearch.model.sources import (  # noqa: F401 (they register their formats)
    float_formats,
    gguf_source,
    integer_formats,
    library_formats,
)
from dtmsearch.model.sources.stored import StoredFormat, StoredWeight, format_of, settings_of, without_settings
from dtmsearch.model.sources.unquantized_cache import (
    CACHE,
    RECORD,
    cache_folder,
    hold,
    keep_within_limits,
    unquantized_models,
)

log = logging.getLogger(__name__)

# Raise it when the same source would be unquantized to other weights.
_VERSION = 1
_KEPT = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "additional_chat_templates/*.jinja")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Of models whose configuration says none.
_USUAL_DTYPE = "bfloat16"
_ST_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_STORED_BITS = {"I8": 8, "U8": 8, "BOOL": 8, "F8_E8M0": 8, "F4": 4, "I16": 16, "U16": 16, "I32": 32, "I64": 64}


@dataclass(frozen=True)
class SourceRecord:
    """What an unquantized folder was made of: the quantized folder or GGUF file at `path`, in the format `method`
    (`says` describes it), whose `dtype` is that of its weights when they are unquantized. `bits`: what each tensor of
    the folder takes in the source, of those that are quantized there."""

    path: str
    method: str
    says: str
    dtype: str
    bits: Mapping[str, int]


def record_of(folder: Path) -> SourceRecord | None:
    """What a folder was made of; None for an ordinary checkpoint."""
    path = folder / RECORD
    return SourceRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def is_quantized(path: Path) -> bool:
    """Whether a model's folder, or the file in its place, holds quantized weights."""
    if is_gguf(path):
        return True
    return (path / "config.json").is_file() and settings_of(read_model_config(path)) is not None


def is_read_here(settings: Mapping[str, Any]) -> bool:
    """Whether nothing that is installed runs a format but this package's own reading of it."""
    return settings.get("quant_method") in ("gptq", "awq") and find_spec("gptqmodel") is None


def source_hash(path: Path, code: Mapping[str, str] | None = None) -> str:
    """Identity of a quantized source by content, and of how it is unquantized."""
    whole = file_digest(path) if is_gguf(path) else content_hash(path, weight_files(path), code)
    return identity({"source": whole, "unquantized": _VERSION})


def unquantized_folder(path: Path, dtype: str, load_with: Callable[[Any], Any]) -> Path:
    """The unquantized folder of a source, its weights in `dtype`; made where it is not there yet. `load_with` tells the
    class that loads a configuration's model. Raises `UserError` for a source that cannot be read."""
    target = cache_folder() / f"{_key(path)}-{dtype}"

    def write(folder: Path) -> None:
        keep_within_limits()
        log.info("unquantizing %s into %s", path, target)
        if is_gguf(path):
            _write_gguf(path, folder, dtype, load_with)
        else:
            StoredCheckpoint(path).write(folder, dtype)

    is_new = not (target / RECORD).is_file()
    found = _made(target, write)
    hold(found)
    if is_new:
        keep_within_limits()  # with the new one, which is in use
    if not (found / RECORD).is_file():  # removed by another process, just before it was held
        return _made(target, write)
    if is_new:
        sizes = {model.path: model.num_bytes / 1e9 for model in unquantized_models()}
        log.warning(
            "%s is kept unquantized in %s, %.1f GB; all that is kept so takes %.1f GB (`dtmsearch cache` lists it)",
            path, found, sizes.get(str(found), 0.0), sum(sizes.values()),
        )  # fmt: skip
    return found


def is_unquantized_here(path: Path, dtype: str) -> bool:
    """Whether the unquantized folder of a source is there."""
    return (cache_folder() / f"{_key(path)}-{dtype}" / RECORD).is_file()


def described_folder(path: Path, dtype: str, load_with: Callable[[Any], Any]) -> Path:
    """A folder of the source's unquantized names and shapes, without values; of a GGUF file, the unquantized folder
    itself."""
    if is_gguf(path):
        return unquantized_folder(path, dtype, load_with)
    found = _made(cache_folder() / f"{_key(path)}-described", lambda folder: StoredCheckpoint(path).describe(folder))
    hold(found)
    return found


def _key(path: Path) -> str:
    """Names a source by its files as they lie there: reading them all would take as long as unquantizing them."""
    files = [path] if is_gguf(path) else [*weight_files(path), path / "config.json"]
    stamps = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return f"{path.name}-{identity({'files': stamps, 'version': _VERSION})[:16]}"


def _made(target: Path, write: Callable[[Path], None]) -> Path:
    """A folder of the cache, which is whole or not there."""
    if (target / RECORD).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not (target / RECORD).is_file():
                partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
                try:
                    write(partial)
                    partial.chmod(0o755)
                    partial.rename(target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"unquantized weights cannot be kept in {target.parent}: {error}. Say with {CACHE} where they may lie"
        ) from error
    return target


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time, of those on this machine."""
    with target.with_name(f"{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"unquantized weights take {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB free: say "
            f"with {CACHE} where else they may lie"
        )


def _finish(folder: Path, record: SourceRecord) -> None:
    (folder / RECORD).write_text(json.dumps(asdict(record)), encoding="utf-8")


def _write_gguf(path: Path, folder: Path, dtype: str, load_with: Callable[[Any], Any]) -> None:
    gguf_source.check_packages(path)
    says = gguf_source.says(path)
    try:
        gguf_source.write_unpacked(path, folder, getattr(torch, dtype), load_with)
    except UserError:
        raise
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"transformers cannot read the GGUF file {path}: {reason}") from error
    _finish(folder, SourceRecord(str(path), "gguf", says, _USUAL_DTYPE, gguf_source.stored_bits(path, folder)))


def _dtype_of(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in _ST_NAMES:
                return str(part[key])
    return _USUAL_DTYPE


class StoredCheckpoint:
    """A quantized checkpoint of safetensors: its `settings` of config.json, the `weights` that its tensors make, and
    the names of those that are `plain`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._config = read_model_config(path)
        settings = settings_of(self._config)
        assert settings is not None
        self.settings = settings
        self._form: StoredFormat = format_of(settings, str(path))
        self._form.check_packages(str(path))
        self._files = {name: file for file in weight_files(path) for name in read_header(file)}
        self._headers = {name: entry for file in weight_files(path) for name, entry in read_header(file).items()}
        self.weights = list(self._form.weights(self._headers, settings, self.read))
        if not self.weights:
            raise UserError(
                f"the config.json at {path} says that it is quantized by {self._form.name}, but its files hold no such "
                "weights: take both from one source"
            )
        self._says = self._form.says(settings)
        used = {part for weight in self.weights for part in weight.parts}
        left_out = self._form.dropped or ("/",)  # which no name of a tensor ends in
        self.plain = [name for name in self._headers if name not in used and not name.endswith(left_out)]

    def read(self, name: str) -> Tensor:
        """A tensor as it stands in the files."""
        with safe_open(self._files[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def _bits(self, weight: StoredWeight) -> int:
        """Of the weight's tensors, but those of a constant size for each matrix."""
        entries = (self._headers[part] for part in weight.parts if not part.endswith(("_shape", "_format")))
        return sum(prod(shape) * DTYPE_BITS.get(dtype, _STORED_BITS.get(dtype, 8)) for dtype, shape in entries)

    def _record(self) -> SourceRecord:
        bits = {weight.name: self._bits(weight) for weight in self.weights}
        return SourceRecord(str(self._path), self._form.name, self._says, _dtype_of(self._config), bits)

    def _copy_others(self, folder: Path, places: Mapping[str, str]) -> None:
        for file in sorted({file for pattern in _KEPT for file in self._path.glob(pattern)}):
            if not file.name.endswith(".index.json") and file.name != "config.json":
                copy = folder / file.relative_to(self._path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        config = without_settings(self._config)
        config.pop("transformers_weights", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if set(places.values()) != {_SINGLE}:
            index = {"metadata": {}, "weight_map": dict(sorted(places.items()))}
            (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _finish(folder, self._record())

    def _by_file(self) -> dict[Path, tuple[list[str], list[StoredWeight]]]:
        """What each file of the source gives: tensors as they are, and weights by the file of their first part."""
        found: dict[Path, tuple[list[str], list[StoredWeight]]] = {}
        for name in self.plain:
            found.setdefault(self._files[name], ([], []))[0].append(name)
        for weight in self.weights:
            found.setdefault(self._files[weight.parts[0]], ([], []))[1].append(weight)
        return found

    def _names(self, files: Mapping[Path, Any]) -> dict[Path, str]:
        """The names of the new files."""
        count = len(files)
        return {
            file: _SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            for number, file in enumerate(files, start=1)
        }

    def write(self, folder: Path, dtype: str) -> None:
        size = getattr(torch, dtype).itemsize
        _check_room(folder, sum(prod(w.shape) * size for w in self.weights) + self._plain_size)
        files = self._by_file()
        places: dict[str, str] = {}
        for file, new in self._names(files).items():
            plain, weights = files[file]
            tensors = {name: self.read(name) for name in plain}
            for weight in weights:
                made = weight.make({part: self.read(part) for part in weight.parts})
                if tuple(made.shape) != tuple(weight.shape):
                    raise UserError(f"{self._path}: {weight.name} is {list(made.shape)}, wanted {list(weight.shape)}")
                tensors[weight.name] = made.to(getattr(torch, dtype)).contiguous()
            save_file(tensors, folder / new, metadata={"format": "pt"})
            (folder / new).chmod(0o644)
            places |= dict.fromkeys(tensors, new)
        self._copy_others(folder, places)

    @property
    def _plain_size(self) -> int:
        entries = (self._headers[name] for name in self.plain)
        return sum(prod(shape) * DTYPE_BITS.get(dtype, _STORED_BITS.get(dtype, 8)) for dtype, shape in entries) // 8

    def describe(self, folder: Path) -> None:
        """Files of the right headers, whose values are holes."""
        files = self._by_file()
        own = _dtype_of(self._config)
        places: dict[str, str] = {}
        for file, new in self._names(files).items():
            plain, weights = files[file]
            raw = _raw_header(file)
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            at = 0
            entries = [(name, raw[name]["dtype"], raw[name]["shape"], _length(raw[name])) for name in plain]
            entries += [(w.name, _ST_NAMES[own], list(w.shape), prod(w.shape) * DTYPE_BITS[own] // 8) for w in weights]
            for name, dtype, shape, length in entries:
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
                at += length
            text = json.dumps(header).encode()
            with (folder / new).open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                out.truncate(8 + len(text) + at)
            places |= {name: new for name, *_ in entries}
        self._copy_others(folder, places)


def _raw_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        found: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return found


def _length(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end) - int(start)
