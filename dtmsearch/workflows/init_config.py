"""A search file for a model that nobody has searched yet: commented, and fit to the model and to this machine.

Reads headers and the configuration alone, never the weights. What it guesses, the file says in a comment.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtmsearch.core.checkpoint_files import checkpoint_dtype, is_gguf, read_header, read_model_config, weight_files
from dtmsearch.errors import UserError
from dtmsearch.workflows.engines import WANTED, EngineName, menu

_GIB = 1 << 30
# Beside its weights a replica takes activations, and on a GPU the libraries' own memory.
_REPLICA_FACTOR, _GPU_OVERHEAD_BYTES = 1.2, 2 * _GIB
# Windows of the paper; a model that reads less gets half of what it reads for each.
_PROMPT_TOKENS = 100
# Prompts to search with on a CPU and on a GPU.
_COUNTS = {"cpu": 32, "cuda": 256}
_VALIDATION_FACTOR = 4
# Groups of inputs that share a scale: exports refuse those that do not divide every matrix's inputs.
_GROUPS = (256, 128, 64, 32)
# Models of fewer weights start faster in one process than Ray does.
_SMALL_WEIGHTS = 500_000_000
# So many processes for each core make what takes seconds take minutes.
_BUSY = 2.0
# Names under which people keep the two texts, with each of the endings that are read.
_SEARCH_NAMES, _HELD_OUT_NAMES = ("calibration", "train"), ("validation", "valid", "held-out", "test")
_ENDINGS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Machine:
    """What replicas can have here: bytes of memory for each GPU, or of the machine where there is none."""

    gpu_bytes: tuple[int, ...]
    memory_bytes: int | None
    cores: int
    load: float = 0.0
    """How many processes wanted a core in the last minute, on average."""

    @property
    def is_busy(self) -> bool:
        return self.load > _BUSY * self.cores

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
    largest_group: int = _GROUPS[0]
    """Of groups of 256, 128, 64 and 32 inputs the largest that divides those of every matrix; 0 where none does."""
    own_code: bool = False
    """Whether Python code comes with it."""

    @property
    def weight_bytes(self) -> int:
        return self.num_weights * (4 if self.dtype == "float32" else 2)


def read_model(path: str) -> ModelFacts:
    """The facts of the checkpoint in a local folder. Raises `UserError` when there is none that can be read."""
    folder = _unquantized(_folder(path))
    files = weight_files(folder)
    config = read_model_config(folder)
    text = config.get("text_config", config)
    text = text if isinstance(text, dict) else config
    shapes = [shape for file in files for _, shape in read_header(file).values()]
    return ModelFacts(
        path=str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path,
        architecture=next(iter(config.get("architectures") or ()), config.get("model_type", "unknown")),
        num_layers=text.get("num_hidden_layers"),
        num_weights=sum(math.prod(shape) for shape in shapes),
        dtype=checkpoint_dtype(files),
        context=text.get("max_position_embeddings"),
        largest_group=_largest_group(shapes),
        own_code="auto_map" in config,
    )


def _folder(path: str) -> Path:
    """Where a model lies: the folder itself, or what the hub's client has fetched of a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir() or is_gguf(folder) or path.startswith(("/", ".", "~")) or path.count("/") > 1:
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


def _largest_group(shapes: Sequence[tuple[int, ...]]) -> int:
    inputs = [shape[-1] for shape in shapes if len(shape) > 1]
    return next((group for group in _GROUPS if all(number % group == 0 for number in inputs)), 0)


def _unquantized(folder: Path) -> Path:
    """A folder of the unquantized names and shapes of a model that comes quantized; of any other the folder itself."""
    if not is_gguf(folder):
        weight_files(folder)
        config = read_model_config(folder)
        text = config.get("text_config")
        if "quantization_config" not in config | (text if isinstance(text, dict) else {}):
            return folder
    from dtmsearch.core.evaluation import ModelSpec
    from dtmsearch.model.modules.loading import described_checkpoint

    return described_checkpoint(ModelSpec(str(folder)))


def this_machine() -> Machine:
    """This machine's GPUs, free memory, CPU cores and load."""
    from dtmsearch.workflows.doctor import available_memory, num_cpus

    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists():  # torch takes seconds to load
        return Machine((), available_memory(), num_cpus(), os.getloadavg()[0])
    try:
        import torch

        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        gpu_bytes = tuple(torch.cuda.mem_get_info(index)[1] for index in gpus)
    except ImportError:  # a head node may do without torch
        gpu_bytes = ()
    return Machine(gpu_bytes, available_memory(), num_cpus(), os.getloadavg()[0])


@dataclass(frozen=True)
class NamedText:
    """One of a search's two texts: the `name` that the search file gives it, and whether it `is_there`."""

    name: str
    is_there: bool = True


def find_texts(prompts: str | None, held_out: str | None, folder: Path) -> tuple[NamedText, NamedText]:
    """The texts that are asked for, or else those that lie in a folder under the usual names."""
    return _find(prompts, _SEARCH_NAMES, folder), _find(held_out, _HELD_OUT_NAMES, folder)


def _find(asked: str | None, names: Sequence[str], folder: Path) -> NamedText:
    if asked is not None:
        return NamedText(asked, (folder / Path(asked).expanduser()).is_file())
    usual = [f"{name}{ending}" for name in names for ending in _ENDINGS]
    found = next((name for name in usual if (folder / name).is_file()), None)
    return NamedText(usual[0], False) if found is None else NamedText(found)


@dataclass(frozen=True)
class Proposal:
    """The text of a search file, its run's name, the options with which `dtmsearch run` fits this machine, and what a
    person should know, empty where there is nothing."""

    text: str
    run: str
    options: str
    note: str


def proposed_dtype(model: ModelFacts, machine: Machine) -> str:
    """The dtype in which a model is searched on a machine."""
    return model.dtype if machine.gpu_bytes else "float32"


def propose(
    model: ModelFacts,
    machine: Machine,
    prompts: NamedText,
    held_out: NamedText,
    engine: EngineName = "transformers",
    bits: float | None = None,
    cost: str | None = None,
    out: str = "FILE",
) -> Proposal:
    """A search file over two texts, for an engine and within so many bits per weight (None: what suits the engine);
    `cost` are the lines of its estimate, `out` is what the file is called.

    Raises `UserError` when the model fits into no memory here.
    """
    wants = WANTED[engine]
    dtype = proposed_dtype(model, machine)
    need = model.num_weights * (4 if dtype == "float32" else 2) * _REPLICA_FACTOR
    where = _where(machine, need)
    window = min(_PROMPT_TOKENS, (model.context or 2 * _PROMPT_TOKENS) // 2)
    count = _COUNTS[machine.device]
    offered = menu(engine, bits, model.largest_group)
    options = where.options
    if not machine.gpu_bytes and model.num_weights < _SMALL_WEIGHTS:
        options = " --in-process"  # a small model starts faster without Ray
    run = run_name(model.path)
    own_code = "\n  # trust_remote_code: true      # Python code comes with it: allow it if you trust its author"
    fused = "\n  fused: true           # q, k, v and gate, up share a scheme: the engine runs them as one matrix each"
    scales = "float16" if model.dtype == "float16" else "bfloat16"
    layers = "" if model.num_layers is None else f", {model.num_layers} layers"
    text = f"""\
# {model.architecture}{layers}, {_millions(model.num_weights)} million weights in {model.dtype}.
# {where.comment}
{_cost_comment(cost, out)}
# To run it: dtmsearch run {out}{options}
# For {engine}: dtmsearch export {run} {WANTED[engine].export} --out {run}-{engine}
run: {run}      # a name inside the store

model:
  path: {json.dumps(model.path)}
  dtype: {dtype}      # of the computation{"" if machine.gpu_bytes else ": CPUs are slow in 16 bits"}
  scale_dtype: {scales}      # scales as the export stores them{own_code if model.own_code else ""}

prompts:                # where candidates are measured: text like what you serve
{_text_lines(prompts, "train")}
  count: {count}            # more prompts tell smaller differences apart, and take as much longer
  prompt_tokens: {window}
  continuation_tokens: {window}

validation:             # held out: other text than above
{_text_lines(held_out, "test")}
  count: {count * _VALIDATION_FACTOR}

search:
  strategy: auto        # prices each option by backward passes, solves, and measures around the plan; beam is slower
  rank_by: kl           # or fdt, sdt, dppl, ppl
  schemes: [{", ".join(offered.schemes)}]      # what an export for {engine} holds{fused if wants.fused else ""}
  components: {{include: ["*"], exclude: []}}      # by name or kind, such as q, k, v, o, gate, up, down
  stop: {{bits_per_weight: {offered.bits_per_weight:g}}}      # or share, components, sparsity, size_mb, min_fdt

seed: 0
"""
    return Proposal(text, run, options, offered.note)


def _text_lines(text: NamedText, split: str) -> str:
    """The lines that name a text; of one that is not there also what to bring in its place."""
    line = f"  files: [{json.dumps(text.name)}]"
    if text.is_there:
        return line
    dataset = f"{{path: Salesforce/wikitext, name: wikitext-2-raw-v1, split: {split}, column: text}}"
    return (
        f"{line}      # TO BRING: a text, .jsonl or .parquet file of some 100 kB; or instead of this line\n"
        f"  # dataset: {dataset}"
    )


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
        return _Where(
            f"A replica takes about {need / _GIB:.0f} GiB, more than the GPUs here have: its weights pass through one, "
            "layer by layer.",
            " --weights streamed",
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


def _cost_comment(cost: str | None, out: str) -> str:
    if cost is None:
        return f"# What it will cost, once its texts are there: dtmsearch run {out} --dry-run"
    return "\n".join(["# What it will cost, as timed on this machine:", *(f"#{line}" for line in cost.splitlines())])


def run_name(path: str) -> str:
    """A run's name after its model."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-._") or "search"
    return name[:100]
