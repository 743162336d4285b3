"""A model on trial, before anything is spent on it: loaded as a replica loads it, and run over a few tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil
import torch

from dtmsearch.core.checkpoint_files import DTYPE_BITS, read_header, weight_files
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.model.forward.partial import PROVED_TOKENS, Body
from dtmsearch.model.modules.loading import checkpoint_folder, load_model, own_folder, vocabulary_size
from dtmsearch.model.replica.reference_maker import infinite_logits
from dtmsearch.model.sources.unquantized import is_quantized, is_unquantized_here

# Memory that a model takes beside its weights, as a part of these.
_ROOM = 1.25
# Weights above which a CPU makes one pass alone: trying where passes may start takes about as many as there are layers.
_MOST_PROVED_BYTES = {"cpu": 4 << 30, "cuda": 1 << 40}
_GB = 1e9


@dataclass(frozen=True)
class Trial:
    """What came of it: on which `device`, in how many seconds, loading included; `starts` says from which layers passes
    cannot start, empty where they can from all, None where that was not tried."""

    device: str
    num_bytes: int
    wall_seconds: float
    starts: str | None

    @property
    def line(self) -> str:
        """The same for a person."""
        if self.starts is None:
            starts = "from which layers passes can start is found out when a search loads it"
        else:
            starts = self.starts or "passes can start from every layer"
        return (
            f"it ran over {PROVED_TOKENS} tokens here ({self.device}, {self.num_bytes / _GB:.2g} GB, "
            f"{self.wall_seconds:.1f} s): {starts}"
        )


def obstacle(spec: ModelSpec) -> str:
    """Why a model on this machine is not put on trial; empty where it is."""
    folder = own_folder(spec)
    if is_quantized(folder) and not is_unquantized_here(folder, spec.dtype):
        return "it comes quantized, and `run` writes its unquantized weights first"
    device, room = _place()
    needed = _num_bytes(spec) * _ROOM
    if needed > room:
        return f"it would take {needed / _GB:.1f} GB, and {_WHERE[device]} has {room / _GB:.1f} GB free"
    return ""


_WHERE = {"cpu": "this machine", "cuda": "its GPU"}


def try_model(spec: ModelSpec) -> Trial:
    """Load a model and run it. Raises `UserError` where it cannot be loaded, or gives logits that are not finite."""
    started_at = time.perf_counter()
    device, num_bytes = torch.device(_place()[0]), _num_bytes(spec)
    model = load_model(checkpoint_folder(spec), spec, device)
    tokens = torch.arange(1, PROVED_TOKENS + 1, device=device).remainder_(vocabulary_size(model)).unsqueeze(0)
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise infinite_logits(spec, f"over {PROVED_TOKENS} tokens")
    starts = Body(model).how_it_runs() if num_bytes <= _MOST_PROVED_BYTES[device.type] else None
    return Trial(device.type, num_bytes, time.perf_counter() - started_at, starts)


def _place() -> tuple[str, int]:
    """Where a replica would run, and the free memory there."""
    if torch.cuda.is_available():
        return "cuda", int(torch.cuda.mem_get_info()[0])
    return "cpu", int(psutil.virtual_memory().available)


def _num_bytes(spec: ModelSpec) -> int:
    """Of a model's weights in the dtype in which it is searched."""
    folder = Path(checkpoint_folder(spec))
    size = DTYPE_BITS[str(spec.dtype)] // 8
    return sum(prod(shape) * size for file in weight_files(folder) for _, shape in read_header(file).values())
