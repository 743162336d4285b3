"""A search file for a model that nobody has searched yet: commented, and fit to the model and to this machine.

Reads headers and the configuration alone, never the weights. What it guesses, the file says in a comment.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from dtmsearch.core.components import checkpoint_dtype, read_header, read_model_config, weight_files
from dtmsearch.errors import UserError

_GIB = 1 << 30
# Beside its weights a replica takes activations, and on a GPU the libraries' own memory.
_REPLICA_FACTOR, _GPU_OVERHEAD_BYTES = 1.2, 2 * _GIB
# Windows of the paper; a model that reads less gets half of what it reads for each.
_PROMPT_TOKENS = 100
# Prompts to search with on a CPU and on a GPU.
_COUNTS = {"cpu": 32, "cuda": 256}
_VALIDATION_FACTOR = 4
# Inputs that share a scale, where they divide every matrix's: exports of uneven groups are refused.
_GROUP = 32


@dataclass(frozen=True)
class Machine:
    """What replicas can have here: bytes of memory for each GPU, or of the machine where there is none."""

    gpu_bytes: tuple[int, ...]
    memory_bytes: int | None
    cores: int

    @property
    def device(self) -> str:
        return "cuda" if self.gpu_bytes else "cpu"


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint's headers and configuration say."""

    path: str
    architecture: str
    num_layers: int | None
    num_weights: int
    dtype: str
    context: int | None
    groups_divide: bool = True
    """Whether groups of 32 divide the inputs of every matrix."""

    @property
    def weight_bytes(self) -> int:
        return self.num_weights * (4 if self.dtype == "float32" else 2)


def read_model(path: str) -> ModelFacts:
    """The facts of the checkpoint in a local folder. Raises `UserError` when there is none that can be read."""
    folder = _folder(path)
    files = weight_files(folder)
    config = read_model_config(folder)
    if "quantization_config" in config:
        raise UserError(f"{path} is quantized already: a search starts from 16- or 32-bit weights")
    text = config.get("text_config", config)
    text = text if isinstance(text, dict) else config
    shapes = [shape for file in files for _, shape in read_header(file).values()]
    return ModelFacts(
        path=str(folder.resolve()) if Path(path).expanduser().is_dir() else path,
        architecture=next(iter(config.get("architectures") or ()), config.get("model_type", "unknown")),
        num_layers=text.get("num_hidden_layers"),
        num_weights=sum(_product(shape) for shape in shapes),
        dtype=checkpoint_dtype(files),
        context=text.get("max_position_embeddings"),
        groups_divide=all(shape[-1] % _GROUP == 0 for shape in shapes if len(shape) > 1),
    )


def _folder(path: str) -> Path:
    """Where a model lies: the folder itself, or what the hub's client has fetched of a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"], local_files_only=True))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, ValueError):
        raise UserError(
            f"no model {path!r}: no folder of that name is here, and the hub's cache does not hold it. Fetch it first: "
            f"hf download {path}"
        ) from None


def _product(shape: tuple[int, ...]) -> int:
    number = 1
    for size in shape:
        number *= size
    return number


def this_machine() -> Machine:
    from dtmsearch.workflows.doctor import available_memory, num_cpus

    try:
        import torch

        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        gpu_bytes = tuple(torch.cuda.mem_get_info(index)[1] for index in gpus)
    except ImportError:  # a head node may do without torch
        gpu_bytes = ()
    return Machine(gpu_bytes, available_memory(), num_cpus())


def propose(model: ModelFacts, machine: Machine, prompts: str, held_out: str, cost: str | None = None) -> str:
    """The text of a search file over two texts; `cost` are the lines of its estimate.

    Raises `UserError` when the model fits into no memory here.
    """
    dtype = model.dtype if machine.gpu_bytes else "float32"
    need = model.num_weights * (4 if dtype == "float32" else 2) * _REPLICA_FACTOR
    where = _where(machine, need)
    window = min(_PROMPT_TOKENS, (model.context or 2 * _PROMPT_TOKENS) // 2)
    count = _COUNTS[machine.device]
    scales = f"g{_GROUP}" if model.groups_divide else "channel"
    uneven = (
        "" if model.groups_divide else f"      # {_GROUP} does not divide all inputs: groups of it are not exported"
    )
    layers = "" if model.num_layers is None else f", {model.num_layers} layers"
    return f"""\
# {model.architecture}{layers}, {_millions(model.num_weights)} million weights in {model.dtype}.
# {where.comment}
{_cost_comment(cost)}
# To run it: dtmsearch run FILE{where.options}
run: {run_name(model.path)}      # a name inside the store

model:
  path: {json.dumps(model.path)}
  dtype: {dtype}      # of the computation{"" if machine.gpu_bytes else ": CPUs are slow in 16 bits"}

prompts:                # where candidates are measured: text like what you serve
  files: [{json.dumps(prompts)}]
  count: {count}            # more prompts tell smaller differences apart, and take as much longer
  prompt_tokens: {window}
  continuation_tokens: {window}

validation:             # held out: other text than above
  files: [{json.dumps(held_out)}]
  count: {count * _VALIDATION_FACTOR}

search:
  strategy: auto        # prices each option by backward passes, solves, and measures around the plan; beam is slower
  rank_by: kl           # or fdt, sdt, dppl, ppl
  schemes: [int8-channel, int4-{scales}, int3-{scales}]{uneven}
  components: {{include: ["*"], exclude: []}}      # by name or kind, such as q, k, v, o, gate, up, down
  stop: {{bits_per_weight: 4.5}}      # or share, components, sparsity, size_mb, min_fdt, seconds

seed: 0
"""


@dataclass(frozen=True)
class _Where:
    comment: str
    options: str


def _where(machine: Machine, need: float) -> _Where:
    """How replicas fit, as the file's comment and the command's options say it."""
    if machine.gpu_bytes:
        smallest = min(machine.gpu_bytes)
        if need + _GPU_OVERHEAD_BYTES <= smallest:
            share = (
                f"{len(machine.gpu_bytes)} GPU{'s' if len(machine.gpu_bytes) > 1 else ''} of {smallest / _GIB:.0f} GiB"
            )
            return _Where(f"A replica takes about {need / _GIB:.1f} GiB: one on each of {share}.", "")
        each = math.ceil(need / (smallest - _GPU_OVERHEAD_BYTES))
        if each <= len(machine.gpu_bytes):
            options = f" --gpus-per-replica {each}"
            return _Where(f"A replica takes about {need / _GIB:.1f} GiB and is spread over {each} GPUs.", options)
        raise UserError(
            f"a replica takes about {need / _GIB:.0f} GiB, and the GPUs here have "
            f"{sum(machine.gpu_bytes) / _GIB:.0f} GiB together: run on a larger machine, "
            "or on a cluster (--address) with several nodes to a replica (--nodes-per-replica)"
        )
    if machine.memory_bytes is None:
        return _Where(f"A replica takes about {need / _GIB:.1f} GiB.", "")
    fitting = int(machine.memory_bytes // max(need, 1.0))
    if fitting == 0:
        raise UserError(
            f"a replica takes about {need / _GIB:.1f} GiB of memory, and {machine.memory_bytes / _GIB:.1f} GiB are "
            "free here: run on a larger machine, or on a cluster (--address) with several nodes to a replica "
            "(--nodes-per-replica)"
        )
    replicas = max(1, min(fitting, machine.cores))
    fits = f"A replica takes {_gib(need)}; {machine.memory_bytes / _GIB:.1f} GiB are free, no GPU."
    return _Where(fits, "" if replicas == machine.cores else f" --replicas {replicas}")


def _gib(size: float) -> str:
    return f"about {size / _GIB:.2f} GiB" if size >= 0.01 * _GIB else "less than 0.01 GiB"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.0f}" if number >= 10_000_000 else f"{number / 1e6:.2g}"


def _cost_comment(cost: str | None) -> str:
    if cost is None:
        return "# What it will cost, once its texts are there: dtmsearch run FILE --dry-run"
    return "\n".join(["# What it will cost, as timed on this machine:", *(f"#{line}" for line in cost.splitlines())])


def run_name(path: str) -> str:
    """A run's name after its model."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-._") or "search"
    return name[:100]
