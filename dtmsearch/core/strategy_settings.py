"""What strategies may be told: sections and keys of a search file, and arguments of their constructors. Defaults and
limits stand here alone.

Plain dataclasses, because a search needs no pydantic; `config` has pydantic check them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal

# Whole numbers up to here are the same as floats, and fit into every table.
LARGEST = 2**53


# The metric that ranks where nothing is said.
RANK_BY: Final = "fdt"


@dataclass(frozen=True)
class Within:
    """Limits that pydantic finds in an annotation: of a number (`ge` and `le` belong to what is allowed, `gt` does not)
    or of a list's length."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    min_length: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return handler(source) | {name: limit for name, limit in vars(self).items() if limit is not None}


Positive = Annotated[int, Within(ge=1)]
NonNegative = Annotated[int, Within(ge=0)]
TwoOrMore = Annotated[int, Within(ge=2)]
PositiveFloat = Annotated[float, Within(gt=0)]
NonNegativeFloat = Annotated[float, Within(ge=0)]
# A part of a whole, nothing and all of it among them; one that is more than nothing.
Part = Annotated[float, Within(ge=0, le=1)]
PositivePart = Annotated[float, Within(gt=0, le=1)]


class StrategySettings:
    """A section of a search file: unknown keys are errors, and the text under a key describes it. Raises `ValueError`
    for a number that floats cannot tell from its neighbours."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "allow_inf_nan": False,
    }

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError(f"{name} is larger than {LARGEST}")


@dataclass(frozen=True)
class TreeSettings(StrategySettings):
    """How greedy and beam, lazy or not, go down the tree of plans: keys of `search` itself."""

    width: Positive = 10
    """Plans kept at each depth."""
    expand: Literal["all"] | Positive = "all"
    """Children measured for each plan kept: all, or so many of the most promising."""
    confidence: PositivePart = 1.0
    """Candidates leave a round early with this probability of not being among its best; 1: none does."""
    indifference: NonNegativeFloat = 0.0
    """By how much more than this a candidate would have to be better to stay, in the metric's unit."""
    audit: Part = 0.002
    """Share of what lazy searches skip that is measured all the same."""


Allocate = Literal["sensitivity", "knapsack", "fdt75", "fdt_mean", "sdt", "kl", "owl", "uniform"]
Prune = Literal["magnitude", "wanda", "sparsegpt", "random"]


@dataclass(frozen=True)
class PruningSettings(StrategySettings):
    """How `sparsity` goes through its rounds: keys of `search` itself."""

    allocate: Allocate = "sensitivity"
    """How a round's points are divided among components."""
    prune: Prune = "magnitude"
    """Which weights of a component go first."""
    probe_points: tuple[PositiveFloat, ...] = ()
    """Added shares at which each component is probed; empty: the allocation's own."""
    probe_every: Annotated[float, Within(gt=0, le=100)] = 25.0
    """Percentage points after which components are probed again within a round."""
    cap: PositivePart = 1.0
    """The most that may be pruned of a component."""


@dataclass(frozen=True)
class AutoSettings(StrategySettings):
    """How much `auto` measures: prompts of a unit's probe, where prices cannot be had; else samples of the prices, and
    prompts of a slope; rounds of correction at most, the prompts of the first (each takes twice as many as the one
    before), the plans drawn in each and the swaps tried at once; and the prompts that all rounds together, and all
    swaps, may forward (a prompt once for every plan measured on it). `sensitivity` takes the probe from here."""

    probe_prompts: Positive = 4
    """Prompts on which each component is measured alone."""
    samples: TwoOrMore = 192
    """Samples of the prices that a search begins with, where these can be had."""
    slopes: TwoOrMore = 48
    """Prompts of a slope, where prices can be had."""
    rounds: NonNegative = 6
    """Rounds of correction at most."""
    prompts: Positive = 16
    """Prompts of the first round; each further one takes twice as many."""
    plans: Positive = 8
    """Plans drawn in a round, and swaps tried at once."""
    correction_prompts: NonNegative = 4_000
    """Prompts that all rounds may forward together, counted once for every plan."""
    polish_prompts: NonNegative = 3_000
    """Prompts that all swaps may forward together."""
    swap_prompts: NonNegative = 0
    """The same where prices can be had, and plans cost more than these say."""


@dataclass(frozen=True)
class FisherSettings(StrategySettings):
    """How much `fisher` measures, and each score of gradients of the research group."""

    samples: TwoOrMore = 512
    """Samples of the prices: a backward pass each."""


@dataclass(frozen=True)
class KnapsackSettings(StrategySettings):
    """How much `knapsack` measures."""

    prompts: Positive = 256
    """Prompts on which each component is measured alone under each scheme."""


@dataclass(frozen=True)
class SpdySettings(StrategySettings):
    """Coefficients drawn to begin with; then `generations` of `children` that draw some of the best one's anew."""

    starts: Positive = 100
    """Random starts."""
    generations: NonNegative = 20
    """Generations of mutation."""
    children: Positive = 16
    """Children of a generation."""
    prompts: Positive = 32
    """Prompts that each is measured on."""


@dataclass(frozen=True)
class EvolutionSettings(StrategySettings):
    """`prompts` of each stage of selection; `survivors` of all but the last, which leaves one. Raises `ValueError`
    where these are not as many as they must be."""

    generations: Positive = 400
    """Generations."""
    children: Positive = 16
    """Children of a generation."""
    prompts: tuple[Positive, ...] = (8, 32, 64)
    """Prompts of each stage of selection."""
    survivors: tuple[Positive, ...] = (4, 2)
    """How many each stage but the last keeps; the last keeps one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise ValueError("prompts: a stage of selection at least is wanted, got none")
        if len(self.survivors) != len(self.prompts) - 1:
            raise ValueError(f"survivors: {len(self.prompts)} stages have {len(self.prompts) - 1} between them")


@dataclass(frozen=True)
class McMoeSettings(StrategySettings):
    """What an expert's importance and the error of a scheme count. Raises `ValueError` for an exponent below 0."""

    alpha: float = 1.0
    """Exponent of the share of choices that fall on an expert."""
    beta: float = 1.5
    """Exponent of its share of the routing weight."""
    gamma: float = 2.0
    """Exponent of the error of the mixture's output."""
    others: str = ""
    """The scheme of what is no expert's; where it is not given, that of the search which is nearest to 4 bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "gamma"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is an exponent of at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class FloatingSettings(StrategySettings):
    """How much `floating` measures: prompts on which plans are tried, by which blocks are chosen and by which exchanges
    are judged, plans that are compared last on all, how soon it gives up exchanging blocks; and in how many rounds it
    goes, each with a training."""

    prompts: Positive = 24
    """Prompts by which blocks are chosen."""
    first_prompts: NonNegative = 8
    """Prompts on which plans are tried first, where `prompts` are more than twice as many: only those that may be
    better are measured on all of `prompts`. 0: all are."""
    exchange_prompts: Positive = 96
    """Prompts by which exchanges of blocks are judged, if they are more than `prompts`."""
    finalists: Positive = 4
    """Plans that are compared on all prompts in the end."""
    patience: NonNegative = 2
    """How often in a row exchanges of blocks may be tried and gain nothing; 0: blocks are not exchanged."""
    rounds: Positive = 1
    """Rounds of as much progress towards the stop rule; after each what is left is trained (recovery)."""


@dataclass(frozen=True)
class LocalSettings(StrategySettings):
    """Rounds of a local search, the swaps tried in each, and the prompts that they are first measured on."""

    rounds: Positive = 100
    """Rounds at most."""
    children: Positive = 16
    """Swaps tried in a round."""
    prompts: Positive = 32
    """Prompts that they are first measured on."""
