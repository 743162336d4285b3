"""The sections of a search file: their keys, defaults and limits, and what goes with what."""

from __future__ import annotations

import typing
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dtmsearch.core.metrics import METRICS
from dtmsearch.core.plan import Budget
from dtmsearch.core.records import RUN_NAME
from dtmsearch.core.schemes import parse_scheme

RunName = Annotated[str, Field(pattern=RUN_NAME)]
Metric = Literal["fdt", "sdt", "dppl", "ppl", "kl"]
assert set(typing.get_args(Metric)) == set(METRICS)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    path: str
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    trust_remote_code: bool = False
    compile: Literal["auto", "always", "never"] = "auto"
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class DatasetSection(Section):
    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"


class PromptsSection(Section):
    files: tuple[str, ...] = ()
    dataset: DatasetSection | None = None
    count: int = Field(default=100, ge=1)
    prompt_tokens: int = Field(default=100, ge=1)
    continuation_tokens: int = Field(default=100, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _one_source(self) -> PromptsSection:
        if bool(self.files) == (self.dataset is not None):
            raise ValueError("give either files or dataset")
        return self


class ValidationSection(Section):
    """As `prompts`; a field that is not set is taken from there."""

    files: tuple[str, ...] = ()
    dataset: DatasetSection | None = None
    count: int | None = Field(default=None, ge=1)
    prompt_tokens: int | None = Field(default=None, ge=1)
    continuation_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None


class CalibrationSection(Section):
    """Text by which pruning and quantization are calibrated: `count` rows of `tokens` tokens. A field that is not set
    is taken from `prompts`, whose human text it is then."""

    files: tuple[str, ...] = ()
    dataset: DatasetSection | None = None
    count: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=2)
    seed: int | None = None


class ComponentsSection(Section):
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


class StopSection(Section):
    """A search ends at the first rule that is met."""

    share: float | None = Field(default=None, gt=0, le=1)
    components: int | None = Field(default=None, ge=1)
    bits_per_weight: float | None = Field(default=None, gt=0)
    sparsity: float | None = Field(default=None, gt=0, le=1)
    size_mb: float | None = Field(default=None, gt=0)
    min_fdt: float | None = Field(default=None, ge=0)
    seconds: float | None = Field(default=None, gt=0)

    @property
    def budget(self) -> Budget:
        return Budget(self.share, self.components, self.bits_per_weight, self.sparsity, self.size_mb)


class AutoSection(Section):
    """How much `auto` measures: prompts of a unit's probe; rounds of correction at most, the prompts of the first (each
    takes twice as many as the one before), the plans drawn in each and the switches tried at once; and the prompts that
    all rounds together, and all switches, may forward (a prompt once for every plan measured on it). `sensitivity`
    takes the probe from here."""

    probe_prompts: int = Field(default=4, ge=1)
    rounds: int = Field(default=5, ge=0)
    prompts: int = Field(default=16, ge=1)
    plans: int = Field(default=8, ge=1)
    correction_prompts: int = Field(default=4_000, ge=0)
    polish_prompts: int = Field(default=3_000, ge=0)


class KnapsackSection(Section):
    prompts: int = Field(default=256, ge=1)


class SpdySection(Section):
    starts: int = Field(default=100, ge=1)
    generations: int = Field(default=20, ge=0)
    children: int = Field(default=16, ge=1)
    prompts: int = Field(default=32, ge=1)


class EvolutionSection(Section):
    """`prompts` of each stage of selection; `survivors` of all but the last, which leaves one."""

    generations: int = Field(default=400, ge=1)
    children: int = Field(default=16, ge=1)
    prompts: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(8, 32, 64), min_length=1)
    survivors: tuple[Annotated[int, Field(ge=1)], ...] = (4, 2)

    @model_validator(mode="after")
    def _a_stage_each(self) -> EvolutionSection:
        if len(self.survivors) != len(self.prompts) - 1:
            raise ValueError(f"survivors: {len(self.prompts)} stages have {len(self.prompts) - 1} between them")
        return self


class LocalSection(Section):
    """`children` are the switches of a round, `prompts` what they are first measured on."""

    rounds: int = Field(default=100, ge=1)
    children: int = Field(default=16, ge=1)
    prompts: int = Field(default=32, ge=1)


class RecoverySection(Section):
    """Training after a round of pruning: `masked_steps` with what is pruned held at zero, then `unmasked_steps`."""

    files: tuple[str, ...] = Field(min_length=1)
    masked_steps: int = Field(default=450, ge=0)
    unmasked_steps: int = Field(default=50, ge=0)
    batch_tokens: int = Field(default=65_536, ge=1)
    sequence_tokens: int = Field(default=512, ge=2)
    lr: float = Field(default=1e-4, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    accumulate: int = Field(default=1, ge=1)
    checkpointing: bool = False
    checkpoint_steps: int = Field(default=100, ge=1)
    distill: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _some_steps(self) -> RecoverySection:
        if self.masked_steps + self.unmasked_steps == 0:
            raise ValueError("masked_steps and unmasked_steps are both 0: leave recovery out to train nothing")
        if self.batch_tokens < self.sequence_tokens * self.accumulate:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is less than {self.accumulate} x sequence_tokens "
                f"{self.sequence_tokens}: every part of an accumulated batch holds a sequence at least"
            )
        return self


class SearchSection(Section):
    strategy: Literal[
        "probe", "greedy", "beam", "lazy_greedy", "lazy_beam",
        "knapsack", "sensitivity", "auto", "spdy", "evolution", "local", "sparsity",
    ] = "beam"  # fmt: skip
    rank_by: Metric = "fdt"
    width: int = Field(default=10, ge=1)
    expand: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    confidence: float = Field(default=1.0, gt=0, le=1)
    indifference: float = Field(default=0.0, ge=0)
    audit: float = Field(default=0.002, ge=0, le=1)
    schemes: tuple[str, ...] = ()
    components: ComponentsSection = ComponentsSection()
    tied: tuple[tuple[str, ...], ...] = ()
    fused: bool = False
    stop: StopSection = StopSection()
    auto: AutoSection = AutoSection()
    knapsack: KnapsackSection = KnapsackSection()
    spdy: SpdySection = SpdySection()
    evolution: EvolutionSection = EvolutionSection()
    local: LocalSection = LocalSection()
    rounds: tuple[Annotated[float, Field(gt=0)], ...] = ()
    allocate: Literal["sensitivity", "knapsack", "fdt75", "fdt_mean", "sdt", "kl", "owl", "uniform"] = "sensitivity"
    prune: Literal["magnitude", "wanda", "sparsegpt", "random"] = "magnitude"
    probe_points: tuple[Annotated[float, Field(gt=0)], ...] = ()
    probe_every: float = Field(default=25.0, gt=0, le=100)
    cap: float = Field(default=1.0, gt=0, le=1)
    recovery: RecoverySection | None = None

    @field_validator("schemes")
    @classmethod
    def _known_schemes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if parse_scheme(name).family == "dense":
                raise ValueError("dense is where every search starts, so it is no scheme to search for")
        if len(set(names)) < len(names):
            raise ValueError("a scheme stands there twice")
        return names

    @model_validator(mode="after")
    def _what_the_strategy_needs(self) -> SearchSection:
        if self.strategy != "sparsity":
            if not self.schemes:
                raise ValueError("search.schemes is missing: the schemes to choose from, such as [int8-channel]")
            if self.rounds or self.recovery is not None:
                raise ValueError(f"rounds and recovery go with strategy: sparsity, not with {self.strategy}")
            return self
        if self.schemes:
            raise ValueError("strategy: sparsity takes prune: magnitude, wanda, ... and shares of its own, no schemes")
        if self.recovery is not None and self.prune == "sparsegpt":
            raise ValueError(
                "recovery goes with prune: magnitude or wanda; SparseGPT solves for the base model's weights"
            )
        if not self.pruning_rounds:
            raise ValueError("strategy: sparsity needs rounds, such as [20, 15, 10], or stop.sparsity for a single one")
        if sum(self.pruning_rounds) > 100:
            raise ValueError(f"rounds add up to {sum(self.pruning_rounds):g} points, but there are 100 to prune")
        return self

    @property
    def pruning_rounds(self) -> tuple[float, ...]:
        """Percentage points that each round of a sparsity search adds; one round where only the end is given."""
        if self.rounds or self.stop.sparsity is None:
            return self.rounds
        return (100.0 * self.stop.sparsity,)

    @model_validator(mode="after")
    def _can_keep_fdt(self) -> SearchSection:
        if self.stop.min_fdt is not None and self.strategy in ("knapsack", "spdy", "evolution", "local"):
            raise ValueError(f"stop.min_fdt: {self.strategy} keeps to sizes only; auto, greedy, beam can keep an FDT")
        return self

    @model_validator(mode="after")
    def _can_race(self) -> SearchSection:
        if self.indifference and self.confidence == 1.0:
            raise ValueError("indifference says when a candidate may leave early, which needs a confidence below 1")
        if self.confidence < 1.0 and self.strategy not in ("greedy", "beam"):
            raise ValueError(f"confidence: {self.strategy} needs every value; greedy and beam can do with fewer")
        if self.confidence < 1.0 and self.rank_by not in ("fdt", "sdt", "kl"):
            raise ValueError(
                f"confidence below 1 goes with rank_by fdt, sdt or kl, got {self.rank_by}: the values of a perplexity "
                "have no bound that would let a candidate leave early"
            )
        return self
