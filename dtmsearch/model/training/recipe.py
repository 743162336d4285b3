"""How a model trains: numbers alone, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtmsearch.core.training_settings import RecoverySettings
from dtmsearch.errors import UserError


@dataclass(frozen=True)
class Recipe(RecoverySettings):
    """How a model trains: its settings, and the `seed` that batches are drawn by. A step takes `batch_tokens` in rows
    of `sequence_tokens`, in `accumulate` parts. `lr` follows `schedule` after a linear warm-up. `clip` bounds the norm
    of the gradient. `distill` is the weight of KL to the base model's distributions beside the loss on the text.
    `checkpoint_steps` lie between checkpoints."""

    seed: int = 0

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

    def check_shares(self, num_processes: int) -> None:
        """Raise `UserError` for batches that processes cannot share: each part of one holds as many rows for each."""
        least = self.accumulate * num_processes
        if self.rows % least:
            raise UserError(
                f"a batch has {self.rows} rows of {self.sequence_tokens} tokens, which {num_processes} processes "
                f"cannot share in {self.accumulate} parts: make recovery.batch_tokens a multiple of "
                f"{least * self.sequence_tokens}"
            )
