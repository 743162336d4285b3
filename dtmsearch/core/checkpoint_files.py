"""The files of a checkpoint: which they are, what headers and configuration say, and an identity by content. Never the
values of weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from dtmsearch.core.identity import file_digest, identity
from dtmsearch.core.user_files import MOST_BYTES, check_regular, is_file, parse_json, read_text, shown
from dtmsearch.errors import UserError

DTYPE_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
# What of config.json changes no logit.
_CONFIG_NOISE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder that transformers loads, by name.

    These are `model.safetensors`, or else the shards of `model.safetensors.index.json`; other files beside them are
    no weights of the model. Raises `UserError` when the folder is missing, is no checkpoint, holds pickled weights
    only, or two sets of weights of which loaders do not take the same.
    """
    if not folder.is_dir():
        raise UserError(f"no model at {folder}: the folder does not exist")
    _check_entries(folder)
    config = read_model_config(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"the model at {folder} is an adapter, or has one beside it (adapter_config.json), for which transformers "
            "would load another base model: merge it into its model, or remove it"
        )
    if "transformers_weights" in config:
        return _named_by_config(folder, str(config["transformers_weights"]))
    single, shards = folder / _SINGLE, _shards(folder, _INDEX)
    if not single.is_file():
        return shards or _no_weights(folder)
    if shards not in ([], [single]):
        raise UserError(
            f"the model at {folder} has two sets of weights: {_SINGLE}, which transformers loads, and the "
            f"{len(shards)} files that {_INDEX} names ({shards[0].name}, ...), which other loaders take. "
            "Remove the one that is not the model"
        )
    return [single]


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).exists():
        raise UserError(f"no model at {folder}: it holds no {name}")
    found = parse_json(read_text(folder / name, "file"), f"the model at {folder} has a {name} that")
    if not isinstance(found, dict):
        raise UserError(f"the model at {folder} has a {name} that is no JSON object but {type(found).__name__}")
    return found


def _named_by_config(folder: Path, name: str) -> list[Path]:
    """The weights of a configuration that names their file, or their index, itself."""
    if name.endswith(".index.json"):
        return _shards(folder, name)
    if not _is_inside(name) or not is_file(folder / name):
        raise UserError(
            f"the config.json at {folder} names {shown(name)} as its weights, which is no file in the folder"
        )
    return [folder / name]


def _shards(folder: Path, index: str) -> list[Path]:
    """The files that an index names; none where there is no index."""
    if not (folder / index).is_file():
        return []
    weight_map = _read_object(folder, index).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    outside = [name for name in named if not isinstance(name, str) or not _is_inside(name)]
    if not named or outside:
        got = f", and names {shown(str(outside[0]))}" if outside else ""
        raise UserError(f"the {index} at {folder} is no index: its weight_map must name files in the folder{got}")
    names = sorted(set(named))
    missing = [name for name in names if not is_file(folder / name)]
    if missing:
        whole = f". If {_SINGLE} is the whole model, remove the index" if (folder / _SINGLE).is_file() else ""
        raise UserError(
            f"the model at {folder} is incomplete: its index names {missing[0][:100]}, which is not there{whole}"
        )
    return [folder / name for name in names]


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _no_weights(folder: Path) -> NoReturn:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise UserError(
            f"no weights at {folder}: it holds {', '.join(others[:3])}, but transformers loads {_SINGLE} or the files "
            f"of {_INDEX}. Rename what is the model"
        )
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"the model at {folder} has pickled weights only ({pickled[0]}): loading them could run foreign code. "
            "Convert it once with save_pretrained, which writes safetensors"
        )
    raise UserError(f"no weights at {folder}: it holds no .safetensors file")


def _check_entries(folder: Path) -> None:
    """Raises `UserError` for a pipe, a socket or a device in the folder: whoever opens it may wait for ever."""
    for entry in sorted(folder.iterdir()):
        if entry.exists() and not entry.is_dir():
            check_regular(entry, "model's file")


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return path.suffix.lower() == ".gguf" and is_file(path)


def read_model_config(folder: Path) -> dict[str, Any]:
    """What the config.json of a model's folder holds. Raises `UserError` when it is missing or unreadable."""
    return _read_object(folder, "config.json")


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors in one safetensors file, read from its header alone."""
    length = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= min(length, MOST_BYTES) else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        needed = 8 + size + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        tensors = {
            name: (_SAFETENSORS_DTYPES.get(entry["dtype"], str(entry["dtype"])), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError):
        raise UserError(f"{path} is no safetensors file, or a cut one: it begins with no readable header") from None
    if needed > length:
        raise UserError(f"{path} is no safetensors file, or a cut one: it has {length} bytes of {needed}")
    return tensors


def checkpoint_dtype(files: list[Path]) -> str:
    """The dtype that most matrices of the checkpoint are stored in."""
    counts: dict[str, int] = {}
    for path in files:
        for dtype, shape in read_header(path).values():
            if len(shape) == 2 and dtype in DTYPE_BITS:
                counts[dtype] = counts.get(dtype, 0) + 1
    if not counts:
        raise UserError(f"{files[0].parent} holds no floating-point matrices: is the checkpoint quantized already?")
    return max(counts, key=lambda dtype: counts[dtype])


def content_hash(folder: Path, files: list[Path], code: Mapping[str, str] | None = None) -> str:
    """Identity of a checkpoint by content: its weights' files, the configuration, and `code` of its own (name ->
    digest), if it runs any, wherever the folder lies."""
    with ThreadPoolExecutor(max_workers=min(16, max(4, os.cpu_count() or 1))) as pool:
        digests = list(pool.map(file_digest, files))
    config = {key: value for key, value in read_model_config(folder).items() if key not in _CONFIG_NOISE}
    return identity({"config": config, "files": digests} | ({"code": dict(code)} if code else {}))
