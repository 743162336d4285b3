"""GGUF files: loaded and unpacked by transformers, their sizes read by GGUF's own library."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dtmsearch.core.checkpoint_files import read_header, weight_files
from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import gguf_settings

_EXPERT = re.compile(r"\.experts\.\d+\.")


def check_packages(path: Path) -> None:
    """Raises `UserError` where GGUF's library is not installed."""
    if find_spec("gguf") is None:
        raise UserError(f"{path} is a GGUF file, which needs: pip install gguf")


def says(path: Path) -> str:
    """The types of a file's matrices, the one that holds most weights first."""
    weights: Counter[str] = Counter()
    for tensor in _reader(path).tensors:
        if len(tensor.shape) > 1:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
    return f"GGUF {', '.join(name for name, _ in weights.most_common())}"


def write_unpacked(path: Path, folder: Path, dtype: torch.dtype, load_with: Any) -> None:
    """The model and tokenizer of a file as a checkpoint folder in `dtype`; `load_with` tells the class that loads a
    configuration's model."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(**place)
    settings = gguf_settings()
    further = {} if settings is None else {"quantization_config": settings}
    model = load_with(config).from_pretrained(**place, dtype=dtype, device_map={"": "cpu"}, **further)
    for part in (model.config, model):
        for name in ("quantization_config", "hf_quantizer"):  # else it would be saved as if it were still packed
            if getattr(part, name, None) is not None:
                delattr(part, name)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def stored_bits(path: Path, folder: Path) -> dict[str, int]:
    """Tensor of the unpacked folder -> its bits in the file, of those that the library knows the place of."""
    import gguf

    reader = _reader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        return {}
    num_layers = int(reader.fields[f"{architecture}.block_count"].contents())
    named = gguf.get_tensor_name_map(numbers[architecture], num_layers)
    sizes = {tensor.name: 8 * int(tensor.n_bytes) for tensor in reader.tensors}
    shapes = {name: shape for file in weight_files(folder) for name, (_, shape) in read_header(file).items()}
    stacks = {name: _EXPERT.sub(".experts.", name) for name in shapes}
    of_stack = Counter(stacks.values())
    found = {}
    for name, stack in stacks.items():
        place = named.get_name(stack, try_suffixes=(".weight", ".bias"))
        if place in sizes:
            found[name] = sizes[place] // of_stack[stack]
    return found


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # the library raises whatever it meets in a damaged file
        raise UserError(f"{path} is no GGUF file, or a damaged one ({str(error)[:200]})") from None
