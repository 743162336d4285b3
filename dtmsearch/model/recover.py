"""Training under masks: what was pruned stays exactly zero while the rest of a model learns to do without it.

A training is a function of its start, its text and its recipe: the order of the data follows from the seed and the
step alone, and a checkpoint holds all else, so one that is killed goes on as if it had not been. Knows folders and
tensors, nothing of plans, rounds or the store. accelerate decides on devices and processes.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional

from dtmsearch.model.discovery import find_layers
from dtmsearch.model.loading import checkpoint_folder, load_model, load_tokenizer
from dtmsearch.model.trained import MASKS_FILE, START_FILE, sync, unpack_masks, write_whole
from dtmsearch.plans.evaluation import ModelSpec
from dtmsearch.plans.identity import file_digest, identity

log = logging.getLogger(__name__)

RESULT_FILE = "result.json"
_CHECKPOINT = "checkpoint-"
_KEPT_CHECKPOINTS = 2
# Losses are fetched this many steps apart: each time, the host waits for the device.
_STEPS_BETWEEN_LOOKS = 10
_BETAS = (0.9, 0.95)
# Texts are tokenized in pieces of about this many characters, side by side.
_PIECE_CHARACTERS = 50_000


class TrainingDiverged(RuntimeError):
    """The loss is no number any more; the last good checkpoint is kept."""


class TrainingStopped(Exception):
    """Somebody asked the training to stop; its checkpoint is kept."""


@dataclass(frozen=True)
class Recipe:
    """How a model trains: `masked_steps` with what is pruned held at zero, then `unmasked_steps` without. A step takes
    `batch_tokens` in rows of `sequence_tokens`, in `accumulate` parts. `lr` follows `schedule` after a linear warm-up.
    `clip` bounds the norm of the gradient. `distill` is the weight of KL to the base model's distributions beside the
    loss on the text. `checkpoint_steps` lie between checkpoints."""

    masked_steps: int
    unmasked_steps: int
    batch_tokens: int
    sequence_tokens: int
    lr: float
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    accumulate: int = 1
    checkpointing: bool = False
    checkpoint_steps: int = 100
    distill: float = 0.0
    seed: int = 0

    @property
    def num_steps(self) -> int:
        return self.masked_steps + self.unmasked_steps

    @property
    def rows(self) -> int:
        """Rows of a batch: a multiple of its parts."""
        return max(1, self.batch_tokens // self.sequence_tokens // self.accumulate) * self.accumulate

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, from 0: up to `lr` over the warm-up, then constant, or down to a tenth of it
        along half a cosine."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        part = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.lr * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * part)))


def tokenized(texts: Sequence[str], tokenizer: Any, sequence_tokens: int) -> NDArray[np.int32]:
    """Rows [rows, sequence_tokens] of the texts, one after the other; the rest at the end is left out."""
    pieces = [piece for text in texts for piece in _pieces(text)]
    ids = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []
    flat = np.concatenate([np.array(part, np.int32) for part in ids]) if ids else np.empty(0, np.int32)
    whole = len(flat) // sequence_tokens * sequence_tokens
    return flat[:whole].reshape(-1, sequence_tokens)


def text_digest(texts: Sequence[str]) -> str:
    return identity([sha256(text.encode(errors="surrogatepass")).hexdigest() for text in texts])


def _save_rows(path: Path, rows: NDArray[np.int32]) -> None:
    with path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end at line ends."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def batch_rows(step: int, rows: int, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Which of `num_rows` rows step `step` takes: every epoch is a permutation of its own, one after the other."""
    epochs, places = np.divmod(np.arange(step * rows, (step + 1) * rows), num_rows)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in np.unique(epochs).tolist()}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)])


class Masks:
    """Which weights of a model stay zero. Gradients there are taken away before the optimiser sees them: its moments
    stay zero, so do its steps, and decay of a zero is zero."""

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor]) -> None:
        named = dict(model.named_parameters())
        self._pairs = [(name, named[name], _placed(mask, named[name])) for name, mask in kept.items()]

    def hold(self) -> None:
        gradients = [p.grad for _, p, _ in self._pairs if p.grad is not None]
        torch._foreach_mul_(gradients, [mask for _, p, mask in self._pairs if p.grad is not None])

    def check(self, what: str) -> None:
        """Raise `ValueError` where a weight is not zero that ought to be."""
        for name, parameter, mask in self._pairs:
            wrong = int(((parameter.detach() != 0) & ~mask).sum())
            if wrong:
                raise ValueError(
                    f"{what} violates its mask: {wrong} weights of {name} are not zero though they were pruned. It was "
                    "written by something else, or damaged: remove it, and the training starts from the one before"
                )


def _placed(mask: Tensor, parameter: nn.Parameter) -> Tensor:
    """A mask where its parameter is, cut up as the parameter is between devices."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter.data, DTensor):
        here = mask.to(parameter.data.device)
        return distribute_tensor(here, parameter.data.device_mesh, parameter.data.placements)
    if parameter.shape != mask.shape:
        raise ValueError("masks need parameters that keep their shapes: with accelerate's FSDP, set fsdp_version: 2")
    return mask.to(parameter.device)


@dataclass(frozen=True)
class Training:
    """What is trained: the model's own weights, others over them (`base`, a safetensors file), the pruned ones over
    those, both from `folder`, where checkpoints and the result go, too. `weights_folder` takes the trained weights."""

    spec: ModelSpec
    folder: Path
    weights_folder: Path
    base: Path | None = None


def train(
    training: Training, texts: Sequence[str], recipe: Recipe, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; the result, as it stands in `result.json`.

    Embeddings and the head stay as they are, so that distributions remain comparable with the base model's at the
    same cost. Raises `ValueError` for a text that is too short or a checkpoint that violates its mask,
    `TrainingDiverged`, and `TrainingStopped` after writing a checkpoint when `stop_requested` turns true.
    """
    result = training.folder / RESULT_FILE
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    return _Loop(training, texts, recipe).run(stop_requested)


class _Loop:
    """One process's time with a training."""

    def __init__(self, training: Training, texts: Sequence[str], recipe: Recipe) -> None:
        self._training, self._recipe = training, recipe
        # On processors accelerate joins the other processes only when told that there is nothing else.
        self._accelerator = Accelerator(mixed_precision=_precision(recipe), cpu=not torch.cuda.is_available())
        _check_shares(recipe, self._accelerator.num_processes)
        source = checkpoint_folder(training.spec)
        self._rows = self._read(texts, load_tokenizer(source, training.spec))
        device = self._accelerator.device
        model = load_model(source, replace(training.spec, dtype="float32"), device, 1)
        self._trained = _make_trainable(model)
        _overlay(model, training.base)
        _overlay(model, training.folder / START_FILE)
        if recipe.checkpointing:
            # Its name before transformers 5.20 is the other one.
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._teacher = load_model(source, training.spec, device, 1) if recipe.distill else None
        optimizer = torch.optim.AdamW(_groups(model, recipe), betas=_BETAS, fused=device.type == "cuda")
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)
        kept = {f"{name}.weight": mask for name, mask in unpack_masks(training.folder / MASKS_FILE).items()}
        self._masks = Masks(self._accelerator.unwrap_model(self._model), kept)
        self._step, self._losses = 0, list[float]()
        self._pending: list[Tensor] = []
        self._seconds = 0.0

    def _read(self, texts: Sequence[str], tokenizer: Any) -> NDArray[np.int32]:
        recipe = self._recipe
        digest = identity([text_digest(texts), tokenizer.backend_tokenizer.to_str(), recipe.sequence_tokens])
        kept = self._training.folder.parent / "texts" / f"{digest}.npy"
        with self._accelerator.main_process_first():
            if not kept.exists():
                found = tokenized(texts, tokenizer, recipe.sequence_tokens)
                write_whole(kept, lambda path: _save_rows(path, found))
        rows: NDArray[np.int32] = np.load(kept, mmap_mode="r")
        if len(rows) < recipe.rows:
            raise ValueError(
                f"the training text holds {len(rows)} rows of {recipe.sequence_tokens} tokens, but one batch takes "
                f"{recipe.rows}: give more text, or a smaller recovery.batch_tokens"
            )
        return rows

    def run(self, stop_requested: Callable[[], bool]) -> dict[str, Any]:
        recipe = self._recipe
        self._restore()
        started_at = time.monotonic() - self._seconds
        while self._step < recipe.num_steps:
            self._take_step()
            self._seconds = time.monotonic() - started_at
            last = self._step == recipe.num_steps
            if self._step % _STEPS_BETWEEN_LOOKS == 0 or last:
                self._look()
            if self._step == recipe.masked_steps:
                self._masks.check("the trained model")
            stopping = self._agreed(stop_requested)
            if (self._step % recipe.checkpoint_steps == 0 or stopping) and not last:
                self._look()
                self._save()
            if stopping and not last:
                raise TrainingStopped(f"stopped at step {self._step} of {recipe.num_steps}")
        return self._finish()

    def _agreed(self, stop_requested: Callable[[], bool]) -> bool:
        """Whether any process wants to stop, the same for all of them; several ask each other only now and then."""
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return stop_requested()
        if self._step % _STEPS_BETWEEN_LOOKS:
            return False
        wish = torch.tensor(float(stop_requested()), device=accelerator.device)
        return bool(accelerator.reduce(wish, "sum") > 0)

    def _take_step(self) -> None:
        recipe = self._recipe
        torch.manual_seed(1_000_003 * recipe.seed + self._step)  # dropout, where a model has any
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.lr_at(self._step)
        total = torch.zeros((), device=self._accelerator.device)
        parts = self._parts()
        for number, rows in enumerate(parts):
            with self._synchronising(number == len(parts) - 1):
                loss = self._loss(rows) / len(parts)
                self._accelerator.backward(loss)
            total += loss.detach()
        if self._step < recipe.masked_steps:
            self._masks.hold()
        self._accelerator.clip_grad_norm_(self._trained, recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._pending.append(total)
        self._step += 1

    def _synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged between processes once a batch, with its last part."""
        synchronising: AbstractContextManager[Any] = nullcontext() if last else self._accelerator.no_sync(self._model)
        return synchronising

    def _parts(self) -> list[Tensor]:
        """This process's rows of the batch, in parts."""
        recipe, accelerator = self._recipe, self._accelerator
        chosen = batch_rows(self._step, recipe.rows, len(self._rows), recipe.seed)
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        rows = torch.from_numpy(self._rows[mine]).long()
        if accelerator.device.type == "cuda":
            rows = rows.pin_memory()
        return list(rows.to(accelerator.device, non_blocking=True).chunk(recipe.accumulate))

    def _loss(self, rows: Tensor) -> Tensor:
        if self._teacher is None:
            loss: Tensor = self._model(input_ids=rows, labels=rows, use_cache=False).loss
            return loss
        logits = self._model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            wanted = self._teacher(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        on_text = functional.cross_entropy(logits.float(), rows[:, 1:].flatten())
        own, base = logits.float().log_softmax(dim=1), wanted.float().log_softmax(dim=1)
        to_base = functional.kl_div(own, base, reduction="batchmean", log_target=True)
        return (1.0 - self._recipe.distill) * on_text + self._recipe.distill * to_base

    def _look(self) -> None:
        """Fetch the losses since the last look, of all processes, and see that they are numbers."""
        if not self._pending:
            return
        means = self._accelerator.reduce(torch.stack(self._pending), "mean").tolist()
        self._pending = []
        for number, loss in enumerate(means):
            if not math.isfinite(loss):
                step = len(self._losses) + number
                raise TrainingDiverged(
                    f"the loss is {loss} at step {step}, with lr {self._recipe.lr_at(step):.2g}. The last good "
                    f"checkpoint is kept in {self._training.folder}. Lower search.recovery.lr, or raise "
                    "warmup_steps, and give the run another name: what it measured is found again"
                )
        self._losses += means
        if self._accelerator.is_main_process:
            log.info("step %d of %d: loss %.4f", self._step, self._recipe.num_steps, means[-1])

    # Checkpoints.

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's and the optimiser's state, whole and on the processor, from all processes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_state_dict(self._model, self._bare_optimizer, options=options)

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        bare: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return bare

    def _save(self) -> None:
        model, optimizer = self._state()
        if self._accelerator.is_main_process:
            tensors = {f"model {name}": model[name] for name in self._names()}
            for name, state in optimizer["state"].items():
                tensors |= {f"{key} {name}": value for key, value in state.items()}
            content = {"step": self._step, "losses": self._losses, "seconds": self._seconds}
            write_checkpoint(self._training.folder, self._step, tensors, content)
        self._accelerator.wait_for_everyone()

    def _names(self) -> list[str]:
        model = self._accelerator.unwrap_model(self._model)
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def _restore(self) -> None:
        found = checkpoints(self._training.folder)
        if not found:
            return
        folder = found[-1]
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        model, optimizer = self._state()  # for all that a checkpoint leaves out: it follows from the recipe
        if self._accelerator.is_main_process:  # the others have no whole state; they get theirs from the first
            for key, tensor in load_file(folder / "state.safetensors").items():
                kind, _, name = key.partition(" ")
                if kind == "model":
                    model[name] = tensor
                else:
                    optimizer["state"][name][kind] = tensor
        several = self._accelerator.num_processes > 1
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
        set_model_state_dict(self._model, model, options=options)
        set_optimizer_state_dict(self._model, self._bare_optimizer, optimizer, options=options)
        self._step, self._losses, self._seconds = content["step"], content["losses"], content["seconds"]
        if self._step <= self._recipe.masked_steps:
            self._masks.check(f"the checkpoint {folder}")

    def _finish(self) -> dict[str, Any]:
        recipe, training = self._recipe, self._training
        model, _ = self._state()
        dtype = getattr(torch, training.spec.dtype)
        result: dict[str, Any] = {}
        if self._accelerator.is_main_process:
            tensors = {name: model[name].to(dtype).contiguous() for name in self._names()}
            training.weights_folder.mkdir(parents=True, exist_ok=True)
            temporary = training.folder / "trained.safetensors"
            save_file(tensors, temporary)
            weights_id = file_digest(temporary)[:32]
            write_whole(training.weights_folder / f"{weights_id}.safetensors", temporary.replace)
            result = {
                "weights_id": weights_id,
                "steps": recipe.num_steps,
                "tokens": recipe.num_steps * recipe.rows * recipe.sequence_tokens,
                "seconds": self._seconds,
                "losses": self._losses,
            }
            write_whole(training.folder / RESULT_FILE, lambda path: path.write_text(json.dumps(result)))
            for folder in checkpoints(training.folder):
                shutil.rmtree(folder)
        self._accelerator.wait_for_everyone()
        return result or dict(json.loads((training.folder / RESULT_FILE).read_text(encoding="utf-8")))


def write_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """A checkpoint, there whole or not at all; of those before it the last stays."""
    temporary = folder / f".tmp-{_CHECKPOINT}{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps(content), encoding="utf-8")
    for path in temporary.iterdir():
        sync(path)
    shutil.rmtree(folder / f"{_CHECKPOINT}{step}", ignore_errors=True)
    temporary.rename(folder / f"{_CHECKPOINT}{step}")
    sync(folder)
    for old in checkpoints(folder)[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """A training's checkpoints, in order of their steps."""
    found = [path for path in folder.glob(f"{_CHECKPOINT}*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_CHECKPOINT)))


def _check_shares(recipe: Recipe, num_processes: int) -> None:
    """Raise `ValueError` for batches that processes cannot share: each part of one holds as many rows for each."""
    if recipe.rows % (recipe.accumulate * num_processes):
        least = recipe.accumulate * num_processes
        raise ValueError(
            f"a batch has {recipe.rows} rows of {recipe.sequence_tokens} tokens, which {num_processes} processes "
            f"cannot share in {recipe.accumulate} parts: make recovery.batch_tokens a multiple of "
            f"{least * recipe.sequence_tokens}"
        )


def _precision(recipe: Recipe) -> str:
    wanted = recipe.precision
    if wanted == "auto":
        wanted = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return "bf16" if wanted == "bfloat16" else "no"


def _overlay(model: nn.Module, path: Path | None) -> None:
    """Put the weights of a file over a model's own."""
    if path is None:
        return
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(path).items():
            named[name].copy_(tensor)


def _make_trainable(model: nn.Module) -> list[nn.Parameter]:
    """Let all learn but the embeddings and the head."""
    fixed = {id(p) for module in _ends(model) for p in module.parameters()}
    model.train()
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()  # what is mapped from a file cannot be written
        parameter.requires_grad_(id(parameter) not in fixed)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _ends(model: Any) -> list[nn.Module]:
    find_layers(model)  # a model without layers is no language model of ours
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group | {"lr": recipe.lr_at(0)} for group in groups if group["params"]]
