"""How a model is repaired and trained after a round of pruning: the section `recovery`. Defaults and limits stand here
alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from dtmsearch.core.strategy_settings import (
    NonNegative,
    NonNegativeFloat,
    Part,
    Positive,
    PositiveFloat,
    StrategySettings,
    TwoOrMore,
    Within,
)


@dataclass(frozen=True)
class RecoverySettings(StrategySettings):
    """What follows a round of pruning: a fit of what is left to `repair_tokens` of text, `masked_steps` of training
    with what is pruned held at zero, then `unmasked_steps`."""

    files: Annotated[tuple[str, ...], Within(min_length=1)]
    """Training text."""
    masked_steps: NonNegative = 450
    """Steps with what is pruned held at zero."""
    unmasked_steps: NonNegative = 50
    """Steps after that without the masks."""
    batch_tokens: Positive = 65_536
    """Tokens of an optimiser step."""
    sequence_tokens: TwoOrMore = 512
    """Tokens of a sequence."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: NonNegative = 10
    """Steps in which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's weight decay."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of forward and backward passes; auto: bfloat16 on GPUs."""
    accumulate: Positive = 1
    """Parts that a batch is computed in."""
    checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""
    checkpoint_steps: Positive = 100
    """Steps between checkpoints."""
    distill: Part = 0.0
    """Share of the loss that is distilled from the base model's logits."""
    distill_hidden: NonNegativeFloat = 0.0
    """Weight, beside that loss, of how far hidden states are from the base model's: of what each layer that is left
    reads, and of the last, squared, over the base model's own squares."""
    repair_tokens: NonNegative = 0
    """Tokens of the text to which what is left is fitted by least squares before any step; 0 fits nothing."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for settings that would change nothing, and for batches without a sequence."""
        super().__post_init__()
        if self.num_steps == 0 and self.repair_tokens == 0:
            raise ValueError(
                "masked_steps, unmasked_steps and repair_tokens are all 0: leave recovery out to train nothing"
            )
        if 0 < self.repair_tokens < 2 * self.sequence_tokens:
            raise ValueError(
                f"repair_tokens {self.repair_tokens} is less than two sequences of sequence_tokens "
                f"{self.sequence_tokens}: one tests what is fitted to the other"
            )
        if self.batch_tokens < self.sequence_tokens * self.accumulate:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is less than {self.accumulate} x sequence_tokens "
                f"{self.sequence_tokens}: every part of an accumulated batch holds a sequence at least"
            )

    @property
    def num_steps(self) -> int:
        return self.masked_steps + self.unmasked_steps

    @property
    def asks_base(self) -> bool:
        """Whether every step has the base model read the batch, too."""
        return self.distill > 0.0 or self.distill_hidden > 0.0
