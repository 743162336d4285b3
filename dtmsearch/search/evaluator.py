"""The side of a search that has the model: what a run asks of it. `ReplicaPool` answers from a cluster, `LocalReplicas`
in this process, and whatever is given as `run(..., evaluator=...)` in the place of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from dtmsearch.core.calibration import (
    Calibration,
    ExpertUse,
    InputStatistics,
    PackedMatrix,
    Routing,
    Through,
    WeightError,
)
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.documents import Texts
from dtmsearch.core.evaluation import Continuation, IntArray, PromptTokens, Reference, Speed
from dtmsearch.core.generation_rules import GenerationRules
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.prices import PriceBlock, PriceRequest
from dtmsearch.core.variant import Variant
from dtmsearch.search.protocols import Evaluator


class ModelEvaluator(Evaluator, Protocol):
    """An `Evaluator` of one model with all else that a run wants to know of it; opened and closed by `with`.

    Methods that a search has no use for need not be there: pruning without training never calls `save_pruned`, schemes
    without calibration nothing that has to do with it. `dtmsearch.model.replica.replica.Replica` has the reference
    implementation of each that is not described here.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    @property
    def num_replicas(self) -> int:
        """How many requests it works on side by side: for estimates of the time left."""

    def manifest(self) -> ModelManifest:
        """The model's components; asked for before anything else."""

    def conditions(self) -> tuple[NumericMode, GenerationRules]:
        """What decides the model's continuations beside its weights; part of a reference's identity."""

    # Prompts and references.

    def cut_prompts(
        self,
        texts: Texts,
        count: int,
        prompt_tokens: int,
        continuation_tokens: int,
        seed: int,
        *further: Any,
    ) -> tuple[PromptTokens, str]:
        """Windows of texts, and the id that their reference has or will have. Raises `TooLittleText`."""

    def tokenized(self, texts: Texts) -> list[IntArray]:
        """The tokens of texts, [tokens] each."""

    def reference_id(self, prompts: PromptTokens) -> str:
        """The id that a reference of these prompts has or will have."""

    def make_reference(self, prompts: PromptTokens) -> Reference:
        """The base model's own greedy continuations."""

    def use(self, reference: Reference) -> None:
        """Hold a reference; requests that name it come after this."""

    def routed_tokens(self, reference_id: str) -> dict[str, int]:
        """Of a mixture of experts: the reference's tokens that reach each expert's matrices."""

    def continuations(self, variant: Variant, reference_id: str, prompts: Sequence[int]) -> list[Continuation]:
        """A variant's own texts for some prompts of a reference."""

    # Calibration.

    def cut_calibration(
        self,
        texts: Texts,
        count: int,
        tokens: int,
        seed: int,
        through: Through = Calibration.through,
        experts: Routing = Calibration.experts,
    ) -> Calibration:
        """`count` windows of `tokens` tokens of texts, drawn by `seed`. Raises `TooLittleText`."""

    def gather_statistics(self, calibration: Calibration) -> InputStatistics:
        """Mean squares of every component's inputs over a calibration."""

    def use_calibration(self, calibration: Calibration, statistics: InputStatistics) -> None:
        """Hold a calibration; requests that name it come after this."""

    def weight_errors(
        self, components: Sequence[str], schemes: Sequence[str], calibration_id: str = "", by_hessian: bool = False
    ) -> list[WeightError]:
        """How far each scheme moves the weights of each component, by its inputs where a calibration is named."""

    def expert_uses(self, components: Sequence[str], schemes: Sequence[str], calibration_id: str) -> list[ExpertUse]:
        """How often experts are chosen over a calibration, and what schemes change of their outputs."""

    def outlier_shares(self, calibration_id: str) -> dict[int, float]:
        """Layer -> the share of weights that stand out by their inputs, as OWL counts them."""

    def solve(
        self, calibration_id: str, parts: Sequence[Sequence[tuple[str, str]]]
    ) -> Iterator[Sequence[PackedMatrix]]:
        """Solve (component, scheme) pairs; yields a part as it is done."""

    def use_solved(self, calibration_id: str, matrices: Iterable[PackedMatrix]) -> None:
        """Hold matrices that were solved for, whoever has done it."""

    # Prices.

    def unpriceable(self, components: Sequence[str]) -> str:
        """Why prices cannot be taken; empty where they can."""

    def price_blocks(self, requests: Sequence[PriceRequest]) -> Iterator[PriceBlock]:
        """Take prices; yields a block as it is done, in any order."""

    # Training.

    def save_pruned(self, variant: Variant, folder: str) -> None:
        """Write the weights of a variant, and its masks last, into a folder: what a training starts from."""

    def train(self, job: Path, stop_requested: Callable[[], bool]) -> int:
        """Run the training of a job's file until it ends, or has heard that it is to stop; the exit code of its
        process, `dtmsearch.model.training.main.STOPPED` after a stop. Nothing else may be under way."""

    # Costs.

    def measure_speed(self, count: int, prompt_tokens: int, continuation_tokens: int) -> Speed:
        """How long the parts of an evaluation take."""

    def decided(self, fdt_mean: float, bits_per_weight: float) -> None:
        """The search has decided; for those who watch the machines."""
