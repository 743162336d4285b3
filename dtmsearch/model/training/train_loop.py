"""A training from its start, or from its last checkpoint, to its end: batches, looks at the loss, checkpoints, the
result. Knows neither losses nor optimisers."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor

from dtmsearch.core.checkpoint_files import read_header
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.identity import file_digest
from dtmsearch.errors import UserError
from dtmsearch.model.modules.loading import checkpoint_folder, load_tokenizer
from dtmsearch.model.training.batches import batch_rows, check_batch, read_rows
from dtmsearch.model.training.checkpoints import (
    checkpoint_content,
    checkpoint_tensors,
    checkpoints,
    write_checkpoint,
)
from dtmsearch.model.training.learner import Learner, accelerator_for
from dtmsearch.model.training.recipe import Recipe
from dtmsearch.model.training.repair import repaired
from dtmsearch.model.weights.trained import MASKS_FILE, START_FILE, masks_of_parameters, write_whole

log = logging.getLogger(__name__)

RESULT_FILE, REPAIRED_FILE = "result.json", "repaired.safetensors"
# Losses are fetched this many steps apart: each time, the host waits for the device.
_STEPS_BETWEEN_LOOKS = 10


class TrainingDiverged(RuntimeError):
    """The loss is no number any more; the last good checkpoint is kept."""


class TrainingStopped(Exception):
    """Somebody asked the training to stop; its checkpoint is kept."""


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

    Raises `UserError` for a text that is too short or a checkpoint that violates its mask, `TrainingDiverged`, and
    `TrainingStopped` after writing a checkpoint when `stop_requested` turns true.
    """
    result = training.folder / RESULT_FILE
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    return Loop(training, texts, recipe).run(stop_requested)


class Loop:
    """One process's time with a training."""

    def __init__(self, training: Training, texts: Sequence[str], recipe: Recipe) -> None:
        self._training, self._recipe = training, recipe
        self._accelerator = accelerator_for(recipe)
        recipe.check_shares(self._accelerator.num_processes)
        source = checkpoint_folder(training.spec)
        tokenizer = load_tokenizer(source, training.spec)
        with self._accelerator.main_process_first():
            self._rows = read_rows(texts, tokenizer, recipe.sequence_tokens, training.folder.parent / "texts")
        check_batch(recipe, len(self._rows))  # after all have met: whoever raises before leaves the others waiting
        over = [path for path in (training.base, training.folder / START_FILE) if path is not None]
        kept = masks_of_parameters(training.folder / MASKS_FILE)
        if recipe.repair_tokens:
            over.append(self._repaired(source, over, kept))
        self._learner = Learner(self._accelerator, recipe, training.spec, source, over, kept)
        self._step, self._losses = 0, list[float]()
        self._pending: list[Tensor] = []
        self._started_at = time.monotonic()

    def _repaired(self, source: Path, over: Sequence[Path], kept: Mapping[str, Tensor]) -> Path:
        """The file of what a repair changes, made by the first process where it is not there. Raises `UserError` in all
        processes alike."""
        path, recipe = self._training.folder / REPAIRED_FILE, self._recipe
        problem = [""]
        if self._accelerator.is_main_process and not path.exists():
            count = min(-(-recipe.repair_tokens // recipe.sequence_tokens), len(self._rows))
            rows = torch.from_numpy(self._rows[batch_rows(0, count, len(self._rows), recipe.seed)]).long()
            try:
                found = repaired(self._training.spec, source, over, kept, rows.to(self._accelerator.device))
                write_whole(path, lambda temporary: save_file(found, temporary))
            except UserError as error:
                problem = [str(error)]
            except BaseException:  # whoever waits for this process learns of it
                broadcast_object_list(["the first process could not fit what is left: see its error"])
                raise
        broadcast_object_list(problem)
        if problem[0]:
            raise UserError(problem[0])
        return path

    def run(self, stop_requested: Callable[[], bool]) -> dict[str, Any]:
        self._restore()
        while self._step < self._recipe.num_steps:
            self.advance(stop_requested)
        return self._finish()

    def advance(self, stop_requested: Callable[[], bool]) -> None:
        """One step, and what is due after it: a look at the loss, a check of masks, a checkpoint. Raises as `train`."""
        recipe = self._recipe
        self._pending.append(self._learner.learn(self._step, self._parts()))
        self._step += 1
        last = self._step == recipe.num_steps
        if self._step % _STEPS_BETWEEN_LOOKS == 0 or last:
            self._look()
        if self._step == recipe.masked_steps:
            self._learner.check_masks("the trained model")
        stopping = self._agreed(stop_requested)
        if (self._step % recipe.checkpoint_steps == 0 or stopping) and not last:
            self._look()
            self._save()
        if stopping and not last:
            raise TrainingStopped(f"stopped at step {self._step} of {recipe.num_steps}")

    @property
    def _seconds(self) -> float:
        """The training's time, with that of ended processes up to the checkpoint from which this one goes on."""
        return time.monotonic() - self._started_at

    def _agreed(self, stop_requested: Callable[[], bool]) -> bool:
        """Whether any process wants to stop, the same for all of them; several ask each other only now and then."""
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return stop_requested()
        if self._step % _STEPS_BETWEEN_LOOKS:
            return False
        wish = torch.tensor(float(stop_requested()), device=accelerator.device)
        return bool(accelerator.reduce(wish, "sum") > 0)

    def _parts(self) -> list[Tensor]:
        """This process's rows of the batch, in parts."""
        recipe, accelerator = self._recipe, self._accelerator
        chosen = batch_rows(self._step, recipe.rows, len(self._rows), recipe.seed)
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        rows = torch.from_numpy(self._rows[mine]).long()
        if accelerator.device.type == "cuda":
            rows = rows.pin_memory()
        return list(rows.to(accelerator.device, non_blocking=True).chunk(recipe.accumulate))

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

    def _save(self) -> None:
        tensors = self._learner.state()
        if self._accelerator.is_main_process:
            content = {"step": self._step, "losses": self._losses, "seconds": self._seconds}
            write_checkpoint(self._training.folder, self._step, tensors, content)
        self._accelerator.wait_for_everyone()

    def _restore(self) -> None:
        found = checkpoints(self._training.folder)
        if not found:
            return
        content = checkpoint_content(found[-1])
        self._learner.put_state(checkpoint_tensors(found[-1]) if self._accelerator.is_main_process else {})
        self._step, self._losses = content["step"], content["losses"]
        self._started_at = time.monotonic() - content["seconds"]
        if self._step <= self._recipe.masked_steps:
            self._learner.check_masks(f"the checkpoint {found[-1]}")

    def _finish(self) -> dict[str, Any]:
        recipe, training = self._recipe, self._training
        weights = self._learner.weights()
        result: dict[str, Any] = {}
        if self._accelerator.is_main_process:
            result = {
                "weights_id": self._write_weights(weights),
                "steps": recipe.num_steps,
                "tokens": recipe.num_steps * recipe.rows * recipe.sequence_tokens,
                "seconds": self._seconds,
                "losses": self._losses,
                "fitted": len(read_header(training.folder / REPAIRED_FILE)) if recipe.repair_tokens else 0,
            }
            write_whole(training.folder / RESULT_FILE, lambda path: path.write_text(json.dumps(result)))
            for folder in checkpoints(training.folder):
                shutil.rmtree(folder)
        self._accelerator.wait_for_everyone()
        return result or dict(json.loads((training.folder / RESULT_FILE).read_text(encoding="utf-8")))

    def _write_weights(self, weights: dict[str, Tensor]) -> str:
        """Keep trained weights, in the model's dtype, under the digest of their file, which names them."""
        training = self._training
        dtype = getattr(torch, training.spec.dtype)
        temporary = training.folder / "trained.safetensors"
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, temporary)
        weights_id = file_digest(temporary)[:32]
        training.weights_folder.mkdir(parents=True, exist_ok=True)
        write_whole(training.weights_folder / f"{weights_id}.safetensors", temporary.replace)
        return weights_id
