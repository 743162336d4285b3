"""A checkpoint in a folder or on the hub -> model and tokenizer. Safetensors only."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dtmsearch.core.checkpoint_files import is_gguf, read_header, weight_files
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.errors import UserError
from dtmsearch.model.modules.compat import loaded_by, unconverted_parameters
from dtmsearch.model.modules.empty import without_values
from dtmsearch.model.modules.weight_reading import located, move_to_devices
from dtmsearch.model.sources.unquantized import described_folder, is_quantized, unquantized_folder

# Of what transformers says, in an error.
_LONGEST_REASON = 500

# A configuration may describe so many times the weights that are stored, where some are tied.
_MOST_TIMES = 100

log = logging.getLogger(__name__)

_INTEGERS = {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool}
# So many tensors are named; the others are counted.
_MOST_LISTED = 5
# From this size on a checkpoint's files are read by us; below it loading takes no time that matters.
_LARGE_BYTES = 4e9
_CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def checkpoint_folder(spec: ModelSpec) -> Path:
    """The folder that holds the model's files, fetched from the hub where `spec.path` is no folder; of a model that
    comes quantized, the folder of its unquantized weights (`model.sources.unquantized`).

    Raises `UserError` when there is no such model, or its weights are not safetensors.
    """
    folder = own_folder(spec)
    return unquantized_folder(folder, spec.dtype, loader) if is_quantized(folder) else folder


def described_checkpoint(spec: ModelSpec) -> Path:
    """As `checkpoint_folder`, for what asks for names and shapes only: of a quantized model it is a folder without
    values, which takes neither the time nor the room of the unquantized one."""
    folder = own_folder(spec)
    return described_folder(folder, spec.dtype, loader) if is_quantized(folder) else folder


def own_folder(spec: ModelSpec) -> Path:
    """The model's own folder, or GGUF file, fetched from the hub where `spec.path` is neither. Raises `UserError`."""
    folder = Path(spec.path)
    if is_gguf(folder):
        return folder
    if not folder.is_dir():
        folder = _fetch(spec)
    weight_files(folder)
    return folder


def _fetch(spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download

    patterns = _CHECKPOINT_FILES + (["*.py"] if spec.trust_remote_code else [])
    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=patterns))
    except Exception as error:  # every way in which a hub can fail, told as one
        reason = next(iter(str(error).strip().splitlines()), "no reason given")[:200]
        raise UserError(
            f"no model at {spec.path!r}: it is no folder here, and the hub gave none ({type(error).__name__}: {reason})"
        ) from error


@contextmanager
def _explained(what: str, folder: Path) -> Iterator[None]:
    """What transformers cannot make of a folder is a user's mistake, and the message says which folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (isinstance(error, OSError) and error.errno is not None) or _is_out_of_memory(error):
            raise  # of the machine, not of the folder
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or "no reason given"
        if not isinstance(error, ValueError | OSError):
            reason = f"{type(error).__name__}: {reason}"
        if "trust_remote_code" in reason:
            reason = "it needs Python code of its own. If you trust its author: model.trust_remote_code: true"
        if "attn_implementation" in reason:
            reason = f"{reason.partition('. ')[0]}. Another attention may do: model.attention: eager"
        raise UserError(f"cannot load the {what} in {folder}: {reason}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def tokenizer_folder(spec: ModelSpec) -> Path:
    """Where the tokenizer's files lie, of a model on this machine."""
    folder = Path(spec.path)
    return checkpoint_folder(spec) if is_gguf(folder) else folder


def load_tokenizer(folder: Path, spec: ModelSpec) -> Any:
    """The tokenizer of a checkpoint. Raises `UserError` where there is none that can be read."""
    with _explained("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    tokenizer.model_max_length = 10**9  # documents are longer than contexts, and are cut by us
    return tokenizer


def loader(config: Any) -> Any:
    """The class of transformers that loads a configuration's model: the one for causal language models; for models of
    images and text, of which the text alone is searched, the one for those."""
    causal, wrapped = (loaded_by(auto, config) for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
    if wrapped is None or getattr(config, "auto_map", None):
        return AutoModelForCausalLM
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    return AutoModelForImageTextToText if causal is None or named == wrapped.__name__ else AutoModelForCausalLM


def use_repeatable_attention() -> None:
    """Have no attention by cuDNN in this process. That of one token to many before it gives other bits every time
    (torch 2.11, H200): what a model says would change from one reference to the next. That of torch's own kernels does
    not, and is no slower."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_model(folder: Path, spec: ModelSpec, placed: torch.device | Mapping[str, int] | str) -> nn.Module:
    """The model in evaluation mode: on a device, or spread over GPUs as `placed` says, by accelerate."""
    transformers_logging.disable_progress_bar()
    use_repeatable_attention()
    if spec.trust_remote_code:
        log.warning("trust_remote_code is on: Python code that came with %s runs in this process", spec.path)
    with _explained("model", folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        own = _reads_itself(folder, spec, placed)
        places = {"": str(placed)} if isinstance(placed, torch.device) else placed
        model, loading = _without_report(folder, loader(config).from_pretrained)(
            folder,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attention,
            device_map={"": "cpu"} if own else places,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
        )
    _refuse_other_tensors(folder, model, loading)
    if own:
        assert not isinstance(places, str)
        files = {name: path for path in weight_files(folder) for name in read_header(path)}
        move_to_devices(model, located(model, files)[0], lambda name: _device_of(name, places))
        model.hf_device_map = dict(places)
    result: nn.Module = model.eval().requires_grad_(False)
    return result


def _reads_itself(folder: Path, spec: ModelSpec, placed: torch.device | Mapping[str, int] | str) -> bool:
    """Whether a model is large, goes to stated GPUs, and lies in its files as it is: then we read it, which is several
    times faster than transformers does."""
    if isinstance(placed, str) or (isinstance(placed, torch.device) and placed.type != "cuda"):
        return False
    files = weight_files(folder)
    if sum(path.stat().st_size for path in files) < _LARGE_BYTES:
        return False
    tensors = {name: tensor for path in files for name, tensor in read_header(path).items()}
    tree = empty_model(folder, spec)
    return all(tensors.get(name) == (spec.dtype, tuple(own.shape)) for name, own in tree.named_parameters())


def _device_of(name: str, places: Mapping[str, int | str]) -> torch.device:
    """The device of a parameter or buffer, by the longest name of a part in which it lies."""
    held = [part for part in places if not part or name == part or name.startswith(f"{part}.")]
    place = places[max(held, key=len)]
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def model_as_loaded(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model of a folder as transformers loads it, in the host's memory, in `dtype`."""
    kind = loader(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
    how = {"dtype": dtype, "device_map": {"": "cpu"}, "use_safetensors": True}
    return kind.from_pretrained(folder, trust_remote_code=trust_remote_code, **how)


def read_config(folder: Path, spec: ModelSpec) -> Any:
    """A checkpoint's configuration. Raises `UserError` where transformers cannot read it."""
    with _explained("model", folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)


def takes_settings(config: Any, changes: Mapping[str, Any]) -> bool:
    """Whether a family's configuration is one with some settings changed."""
    try:
        with _explained("configuration", Path(config.name_or_path or ".")):
            type(config).from_dict(config.to_dict() | changes)
    except UserError:
        return False
    return True


def empty_model(folder: Path, spec: ModelSpec) -> nn.Module:
    """The module tree without weights."""
    with _explained("model", folder), without_values():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        _check_num_layers(config, folder)
        model: nn.Module = loader(config).from_config(config, trust_remote_code=spec.trust_remote_code)
    _check_num_weights(model, folder)
    return model


def described_model(path: str, trust_remote_code: bool) -> Any:
    """The module tree of a configuration alone: a config.json, the folder that it lies in, or a hub id. Raises
    `UserError`."""
    place = Path(path).expanduser()
    if not place.exists() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise UserError(f"no model at {path!r}: give a folder, its config.json, or a hub id")
    if is_gguf(place):
        place = described_folder(place, "bfloat16", loader)
    with _explained("model", place), without_values():
        config = AutoConfig.from_pretrained(place if place.exists() else path, trust_remote_code=trust_remote_code)
        return loader(config).from_config(config, trust_remote_code=trust_remote_code)


def check_tensors(folder: Path, model: Any) -> None:
    """Raise `UserError` where the files' tensors are not those of `model`, a tree without weights.

    transformers loads tensors of the files' names and shapes, without values, as it would load theirs.
    """
    state = {
        name: torch.empty(shape, dtype=_torch_dtype(dtype), device="meta")
        for path in weight_files(folder)
        for name, (dtype, shape) in read_header(path).items()
    }
    load = _without_report(folder, type(model).from_pretrained)
    try:
        loaded, loading = load(None, config=model.config, state_dict=state, device_map={"": "meta"}, dtype=model.dtype)
    except UserError:
        raise
    except Exception as error:  # whatever a family's code needs values for; it is loaded with them next
        log.debug("the tensors of %s are not checked before they are loaded: %s", folder, error)
        return
    _refuse_other_tensors(folder, loaded, loading)


def loading_obstacle(folder: Path, model: Any, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Why transformers cannot load a checkpoint of tensors without values, quantized as `settings` say, as `model`, a
    tree without weights; empty where it can. `folder` has its configuration."""
    config = copy.deepcopy(model.config)
    config.quantization_config = dict(settings)
    load = _without_report(folder, type(model).from_pretrained)
    try:
        _, loading = load(None, config=config, state_dict=dict(tensors), device_map={"": "meta"}, dtype=model.dtype)
    except Exception as error:  # whatever a family's code cannot do without weights of its layers
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        return reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
    missing = sorted(loading["missing_keys"])
    return f"it would look for {_listed(missing)}" if missing else ""


def _torch_dtype(name: str) -> torch.dtype:
    """By the name that `read_header` gives: torch's, or safetensors' own for what is no floating-point number."""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else _INTEGERS.get(name, torch.uint8)


def _without_report(folder: Path, load: Callable[..., Any]) -> Callable[..., tuple[Any, Mapping[str, Any]]]:
    """A loader of transformers that gives also what it found amiss in a folder, which we say, and does not print it.
    Raises `UserError` where it cannot put tensors together, as it does with those of experts."""

    def quiet(*arguments: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:
        before = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            found: tuple[Any, Mapping[str, Any]] = load(
                *arguments, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except RuntimeError as error:
            names = unconverted_parameters(error)
            if not names:
                raise
            raise UserError(
                f"the checkpoint at {folder} lacks a part of {_listed(names)}, or has one too many or of another "
                "shape: transformers cannot put together the tensors that these are made of"
            ) from error
        finally:
            transformers_logging.set_verbosity(before)
        return found

    return quiet


def _refuse_other_tensors(folder: Path, model: Any, loading: Mapping[str, Any]) -> None:
    """transformers fills what is missing at random, and leaves out what it does not know; what its families declare
    ignorable is not in `loading`."""
    missing, unexpected = (sorted(loading[key]) for key in ("missing_keys", "unexpected_keys"))
    other = [
        f"{name} is {_shape(ours)} by config.json but {_shape(theirs)}"
        for name, theirs, ours in sorted(loading["mismatched_keys"])
    ]
    parts = (("misses", missing), ("has no place for", unexpected), ("has in another shape:", other))
    said = [f"{verb} {_listed(names)}" for verb, names in parts if names]
    if said:
        raise UserError(
            f"the configuration and the weights at {folder} are not of one model: for a {type(model).__name__} as "
            f"config.json describes it, the checkpoint {'; it '.join(said)}. Take both from one source"
        )


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more


def _check_num_layers(config: Any, folder: Path) -> None:
    """Raises `UserError` for more layers than the folder has tensors: building a million of them would take hours."""
    num_layers = config.get_text_config().num_hidden_layers
    num_tensors = sum(len(read_header(path)) for path in weight_files(folder))
    if not 0 < num_layers <= num_tensors:
        raise UserError(
            f"the config.json in {folder} says {num_layers} layers, but its weights are {num_tensors} tensors: the "
            "configuration and the weights are not of one model"
        )


def _check_num_weights(model: nn.Module, folder: Path) -> None:
    """Raises `UserError` for a tree of far more weights than the folder has, tied ones aside: no memory holds it."""
    described = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(math.prod(shape) for path in weight_files(folder) for _, shape in read_header(path).values())
    if described > _MOST_TIMES * stored:
        raise UserError(
            f"the config.json in {folder} describes {described} weights, but its files hold {stored}: the "
            "configuration and the weights are not of one model"
        )


def suppressed_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The end-of-text tokens, which neither the base model nor a candidate may choose."""
    ids: set[int] = set()
    for source in (model.config, model.generation_config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids |= set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
    return tuple(sorted(i for i in ids if i < vocabulary_size(model)))


def vocabulary_size(model: Any) -> int:
    """Rows of the head's matrix: the tokens that the model can choose."""
    return int(model.get_output_embeddings().weight.shape[0])
