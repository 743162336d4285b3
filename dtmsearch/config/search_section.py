"""The section `search` of a search file, and those within it: keys, defaults and limits, and what goes with what."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, WithJsonSchema, field_validator, model_validator

from dtmsearch.config.decoding_section import DecodingSection
from dtmsearch.config.sections import Section
from dtmsearch.config.stop_section import StopSection, TimesSection
from dtmsearch.core import plugins
from dtmsearch.core.components import BlockKind, Experts
from dtmsearch.core.metric_registry import BUILT_IN, METRICS
from dtmsearch.core.plan import Budget
from dtmsearch.core.scheme_names import ALIASES
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.strategy_settings import (
    RANK_BY,
    Allocate,
    AutoSettings,
    EvolutionSettings,
    FisherSettings,
    FloatingSettings,
    KnapsackSettings,
    LocalSettings,
    McMoeSettings,
    NonNegativeFloat,
    Part,
    Positive,
    PositiveFloat,
    PositivePart,
    Prune,
    PruningSettings,
    SpdySettings,
    TreeSettings,
    Within,
)
from dtmsearch.core.training_settings import RecoverySettings


class ComponentsSection(Section):
    """Which components are searched: what is included and not excluded."""

    include: tuple[str, ...] = ("*",)
    """Patterns of component names or kinds that are searched. Embeddings and head only by a pattern that names them."""
    exclude: tuple[str, ...] = ()
    """Patterns of those left out."""


# Strategies that do not ask how much of the FDT a plan keeps.
_KEEP_TO_SIZES = (
    *("probe", "knapsack", "fisher", "squared_gradients", "gradient_changes", "spdy", "evolution", "local"),
    *("mc_moe", "sparsity", "floating"),
)


# The strategies of this package, which `dtmsearch.search.strategies` registers under these names, and `sparsity`.
BUILT_IN_STRATEGIES = (
    *("probe", "greedy", "beam", "lazy_greedy", "lazy_beam", "knapsack", "sensitivity", "auto", "fisher", "spdy"),
    *("evolution", "local", "squared_gradients", "gradient_changes", "mc_moe", "sparsity", "floating"),
)
# Those that answer a study's question: they only measure, and `search.options` says what.
STUDY_STRATEGIES = ("discriminability", "ladder", "costs", "domains", "orders")


# Strategies that drop blocks, and the rules that count what is dropped.
DROPPING = (
    *("floating", "auto", "sensitivity", "knapsack", "evolution", "local"),
    *("greedy", "beam", "lazy_greedy", "lazy_beam", "probe"),
)
_NEED_BLOCKS = ("blocks", "parameters", "flops")

# The widest weights that a model has, and the narrowest that are pruned: float32 and float8.
_WIDEST_BITS, _NARROWEST_BITS = 32, 8


def _least_bits(scheme: str) -> float:
    """A bound from below of the stored bits per weight of a scheme: those of a huge matrix, without what says where its
    weights were pruned, which takes less in small ones."""
    shape, parsed = (1 << 12, 1 << 20), parse_scheme(scheme)
    if parsed.is_source:
        return 0.0  # as the base model's files say
    mask = 0 if parsed.pruning is None or parsed.own is not None else parsed.pruning.mask_bits(shape)
    return (parsed.stored_bits(shape, _NARROWEST_BITS) - mask) / (shape[0] * shape[1])


def _known_strategy(name: str) -> str:
    """A built-in strategy, or one that an installed package has registered; it is not imported for that."""
    known = (*BUILT_IN_STRATEGIES, *STUDY_STRATEGIES, *plugins.plugin_names(plugins.STRATEGIES))
    if name not in known:
        raise ValueError(plugins.nearest(name, known, "strategy"))
    return name


StrategyName = Annotated[
    str, AfterValidator(_known_strategy), WithJsonSchema({"type": "string", "examples": list(BUILT_IN_STRATEGIES)})
]
_AUTO, _SPARSITY = ("auto",), ("sparsity",)
# Keys of `search` that only some strategies use, `a.b` within a section; all others hold for every strategy.
USED_BY: dict[str, tuple[str, ...]] = {
    "width": ("beam", "lazy_beam"),
    "expand": ("greedy", "beam", "lazy_greedy", "lazy_beam"),
    "confidence": ("greedy", "beam"),
    "indifference": ("greedy", "beam"),
    "audit": ("lazy_greedy", "lazy_beam"),
    "auto": ("auto", "sensitivity"),
    **dict.fromkeys(("auto.samples", "auto.slopes", "auto.rounds", "auto.plans"), _AUTO),
    **dict.fromkeys(("auto.correction_prompts", "auto.polish_prompts"), _AUTO),
    "fisher": ("fisher", "squared_gradients", "gradient_changes"),
    **{name: (name,) for name in ("knapsack", "spdy", "evolution", "local", "floating", "mc_moe")},
    **dict.fromkeys(("rounds", "allocate", "prune", "probe_points", "probe_every", "cap"), _SPARSITY),
    "recovery": ("sparsity", "floating"),
}


def leave_out_unused(search: dict[str, Any], strategies: Collection[str] | None = None) -> None:
    """Take out of the keys of a `search` section those that its strategy does not use: all of them, or of `strategies`
    only those that one of these uses. A key that is null is none, and goes in any case. What a strategy of another
    package uses is not known here."""
    strategy = search.get("strategy", SearchSection.model_fields["strategy"].default)
    if strategy not in BUILT_IN_STRATEGIES:
        return
    for key, users in USED_BY.items():
        parent, _, last = key.rpartition(".")
        section = search.get(parent) if parent else search
        if strategy in users or not isinstance(section, dict) or last not in section:
            continue
        if section[last] is None or strategies is None or not set(users).isdisjoint(strategies):
            del section[last]


def _known_metric(name: str) -> str:
    """A metric of this package, or of an installed one; it is not imported for that."""
    if name not in METRICS:
        raise ValueError(plugins.nearest(name, METRICS, "metric"))
    return name


MetricName = Annotated[
    str, AfterValidator(_known_metric), WithJsonSchema({"type": "string", "examples": list(BUILT_IN)})
]


def _is_given(search: Mapping[str, Any], key: str) -> bool:
    """Whether a `search` section has a key, `a.b` within a section."""
    parent, _, last = key.rpartition(".")
    section = search.get(parent) if parent else search
    return isinstance(section, Mapping) and last in section


def _or_a_path(schema: dict[str, Any]) -> None:
    """A section that may be given as the path of a file that holds it."""
    schema["anyOf"].insert(0, {"type": "string"})


class SearchSection(Section):
    """How plans are chosen, from what, and when the search ends. Keys that the strategy does not use are errors."""

    strategy: StrategyName = "beam"
    """How plans are chosen."""
    rank_by: MetricName = RANK_BY
    """The metric that decides: fdt, sdt, dppl, ppl, kl, accepted (tokens a step, as a draft of 5 tokens for the base
    model), or one of another package."""
    metrics: tuple[MetricName, ...] = ()
    """Metrics that are measured beside it, of every candidate and on held-out prompts, where kl and ppl always are."""
    decoding: DecodingSection = DecodingSection()
    """How continuations are decoded."""
    width: Positive = TreeSettings.width
    """beam, lazy_beam: plans kept at each depth."""
    expand: Literal["all"] | Positive = TreeSettings.expand
    """Children measured for each kept plan; all, or so many of the most promising."""
    confidence: PositivePart = TreeSettings.confidence
    """greedy, beam: candidates leave a round early with this probability of not being among its best; 1: every
    candidate is measured on every prompt."""
    indifference: NonNegativeFloat = TreeSettings.indifference
    """With a confidence below 1: candidates leave that cannot be better by more than this, in the metric's unit."""
    options: dict[str, Any] = Field(default={})
    """Settings of a study's strategy, or of one that another package has registered."""
    audit: Part = TreeSettings.audit
    """lazy_greedy, lazy_beam: share of the skipped children that is measured all the same, to tell how often the order
    was wrong."""
    schemes: tuple[str, ...] = ()
    """The schemes to choose from, such as [int8-channel, int4-g128]."""
    components: ComponentsSection = ComponentsSection()
    """Which components are searched."""
    drop: tuple[BlockKind, ...] = ()
    """What may be dropped whole, beside what schemes do: attention and mlp of a layer, or the layer. schemes may be
    left out then. Layers are not compiled."""
    cut: tuple[str, ...] = ()
    """What attentions and MLPs may be cut to, beside what schemes do: widths such as [channels-0.25-ziplm-repair], and
    [experts-0.25-reap] of a mixture, of which each block may have one. schemes may be left out then. Layers are not
    compiled."""
    tied: tuple[tuple[str, ...], ...] = ()
    """Kinds in a layer that must share a scheme, such as [[q, k, v], [gate, up]]."""
    fused: bool = False
    """Tie what engines such as vLLM fuse: q, k, v and gate, up."""
    experts: Experts = "layer"
    """Of a mixture of experts: layer, all matrices of all experts of a layer share a scheme, as engines run them;
    expert, each is chosen a scheme for, which no engine runs."""
    stop: StopSection = StopSection()
    """When the search ends."""
    times: TimesSection | None = Field(default=None, json_schema_extra=_or_a_path)
    """What components take to run, for stop.decode_ms and stop.prefill_ms: a file that `dtmsearch profile` wrote, or
    what it holds."""
    auto: AutoSettings = AutoSettings()
    """Effort of auto and sensitivity."""
    fisher: FisherSettings = FisherSettings()
    """Effort of fisher."""
    knapsack: KnapsackSettings = KnapsackSettings()
    """Effort of knapsack."""
    spdy: SpdySettings = SpdySettings()
    """Effort of spdy."""
    evolution: EvolutionSettings = EvolutionSettings()
    """Effort of evolution."""
    floating: FloatingSettings = FloatingSettings()
    """Effort of floating."""
    local: LocalSettings = LocalSettings()
    """Effort of local."""
    mc_moe: McMoeSettings = McMoeSettings()
    """What mc_moe weighs."""
    rounds: tuple[PositiveFloat, ...] = ()
    """sparsity: percentage points that each round adds."""
    allocate: Allocate = PruningSettings.allocate
    """sparsity: how a round's points are divided among components."""
    prune: Prune = PruningSettings.prune
    """sparsity: which weights of a component go first."""
    probe_points: tuple[PositiveFloat, ...] = PruningSettings.probe_points
    """sparsity: added shares at which each component is probed."""
    probe_every: Annotated[float, Within(gt=0, le=100)] = PruningSettings.probe_every
    """sparsity: percentage points after which components are probed again within a round."""
    cap: PositivePart = PruningSettings.cap
    """sparsity: most that may be pruned of a component."""
    recovery: RecoverySettings | None = None
    """sparsity, floating: training after every round."""

    @property
    def every_scheme(self) -> tuple[str, ...]:
        """The schemes to choose from, and those that uniform plans may be measured under by the table of times."""
        timed = () if self.times is None else tuple(row.scheme for row in self.times.rows)
        return tuple(dict.fromkeys((*self.schemes, *timed)))

    @field_validator("schemes")
    @classmethod
    def _known_schemes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if parse_scheme(name).is_unquantized:
                raise ValueError("dense is where every search starts, so it is no scheme to search for")
            if parse_scheme(name).width is not None:
                raise ValueError(f"{name} is a width, of blocks and not of matrices: it belongs into search.cut")
        names = tuple(ALIASES.get(name, name) for name in names)
        if len(set(names)) < len(names):
            raise ValueError("a scheme stands there twice")
        return names

    @field_validator("cut")
    @classmethod
    def _known_widths(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if parse_scheme(name).width is None:
                raise ValueError(
                    f"{name} is no width: give ones such as channels-0.25-wanda (a quarter of an MLP's channels goes), "
                    "heads-2:3-wanda (2 of 3 key heads stay, with their query heads) or experts-0.25-reap (a quarter "
                    "of a mixture's experts goes)"
                )
        if len(set(names)) < len(names):
            raise ValueError("a width stands there twice")
        return names

    @property
    def shapes_blocks(self) -> bool:
        """Whether blocks may be dropped or cut."""
        return bool(self.drop or self.cut)

    @model_validator(mode="wrap")
    @classmethod
    def _only_keys_that_the_strategy_uses(cls, given: Any, made_of: ModelWrapValidatorHandler[Self]) -> Self:
        made = made_of(given)
        if made.strategy not in BUILT_IN_STRATEGIES or not isinstance(given, Mapping):
            return made
        others = [key for key, users in USED_BY.items() if made.strategy not in users and _is_given(given, key)]
        whole = [key for key in others if key.partition(".")[0] not in others or "." not in key]
        if whole:
            used = "; ".join(f"search.{key} is a key of {', '.join(USED_BY[key])}" for key in whole)
            raise ValueError(
                f"search.strategy: {made.strategy} does not use every key that is given: {used}. Take such a strategy, "
                f"or leave the key out (--set search.{whole[0]}=null)"
            )
        return made

    @model_validator(mode="after")
    def _what_the_strategy_needs(self) -> SearchSection:
        if self.strategy != "sparsity":
            if not self.schemes and not self.shapes_blocks:
                raise ValueError("search.schemes is missing: the schemes to choose from, such as [int8-channel]")
            counted = [rule for rule in _NEED_BLOCKS if getattr(self.stop, rule) is not None]
            if without := [r for r in counted if not (self.drop if r == "blocks" else self.shapes_blocks)]:
                raise ValueError(
                    f"stop.{without[0]} counts what is dropped whole, and nothing may be: give search.drop, such as "
                    "[attention, mlp]"
                )
            if self.strategy == "floating" and (self.schemes or not self.shapes_blocks):
                raise ValueError(
                    "strategy: floating drops and cuts blocks and nothing else: give search.drop, and no schemes (or "
                    "search.cut)"
                )
            if self.strategy == "floating" and self.stop.budget == Budget():
                raise ValueError(
                    "strategy: floating drops blocks until a size is met, and stop has none: give stop.blocks, "
                    "stop.parameters, stop.flops, stop.size_mb, stop.bits_per_weight, ..., such as stop: {blocks: 4}"
                )
            if self.strategy == "floating":
                self._check_rounds()
            if self.shapes_blocks and self.strategy in BUILT_IN_STRATEGIES and self.strategy not in DROPPING:
                key, does = ("drop", "drop") if self.drop else ("cut", "cut")
                raise ValueError(
                    f"search.{key}: {self.strategy} does not {does} blocks; take one of {', '.join(DROPPING)}"
                )
            self._check_cut()
            ends = self.stop.budget.limits_size or self.stop.min_fdt is not None or self.strategy == "probe"
            if not ends and any(parse_scheme(name).is_source for name in self.schemes):
                raise ValueError("schemes: source leaves components as they are, so stop needs a rule that counts bits")
            return self
        if self.schemes or self.shapes_blocks:
            raise ValueError("strategy: sparsity takes prune: magnitude, wanda, ... and shares of its own, no schemes")
        if self.recovery is not None and self.recovery.repair_tokens:
            raise ValueError(
                "recovery.repair_tokens fits what stands before dropped blocks, or in cut ones; sparsity prunes weight "
                "by weight: leave it at 0"
            )
        if self.recovery is not None and self.prune == "sparsegpt":
            raise ValueError(
                "recovery goes with prune: magnitude or wanda; SparseGPT solves for the base model's weights"
            )
        if not self.pruning_rounds:
            raise ValueError("strategy: sparsity needs rounds, such as [20, 15, 10], or stop.sparsity for a single one")
        if sum(self.pruning_rounds) > 100:
            raise ValueError(f"rounds add up to {sum(self.pruning_rounds):g} points, but there are 100 to prune")
        return self

    def _check_rounds(self) -> None:
        """Raises `ValueError` for rounds of `floating` that cannot be."""
        if self.recovery is None:
            if self.floating.rounds > 1:
                raise ValueError("floating.rounds: rounds differ from steps by the training after each: give recovery")
            return
        if self.recovery.unmasked_steps:
            raise ValueError(
                f"recovery.unmasked_steps: {self.recovery.unmasked_steps} would let blocks grow again that are dropped "
                "or cut: give unmasked_steps: 0"
            )
        if of_experts := next((n for n in self.cut if (w := parse_scheme(n).width) and w.takes_experts), None):
            raise ValueError(
                f"search.cut: {of_experts} and recovery: training holds at zero what is taken, and a router would go "
                "on giving tokens to experts of zeros; leave one of both out"
            )

    @property
    def training_rounds(self) -> int:
        """After how many rounds the search has what it has come to trained."""
        if self.recovery is None:
            return 0
        return len(self.pruning_rounds) if self.strategy == "sparsity" else self.floating.rounds

    def _check_cut(self) -> None:
        """Raises `ValueError` for what is not there beside widths."""
        if not self.cut:
            return
        of_experts = next((name for name in self.cut if (w := parse_scheme(name).width) and w.takes_experts), None)
        if of_experts is not None and self.experts == "expert" and self.schemes:
            raise ValueError(
                f"search.cut: {of_experts} leaves out experts that a text tells, and what schemes of their own take is "
                "not known before: set search.experts: layer"
            )
        for name in self.schemes:
            scheme = parse_scheme(name)
            shares = scheme.weights is not None and scheme.weights.shares_scale
            if scheme.solved is not None or scheme.is_source or scheme.scaled or shares:
                why = "keeps whole matrices" if scheme.is_source else "is solved for whole matrices"
                why = "shares a scale among whole matrices" if shares else why
                raise ValueError(f"search.cut: {name} {why}, and cut blocks have smaller ones; leave one of both out")

    @model_validator(mode="after")
    def _times_for_budgets_of_milliseconds(self) -> SearchSection:
        wanted = [rule for rule in ("decode_ms", "prefill_ms") if getattr(self.stop, rule) is not None]
        if wanted and self.times is None:
            raise ValueError(
                f"stop.{wanted[0]} needs search.times: a table of what matrices take to run, as `dtmsearch profile "
                "MODEL --out times.json` measures it"
            )
        return self

    @model_validator(mode="after")
    def _bits_that_can_be_come_to(self) -> SearchSection:
        """What is known without the model: with it, the search's space says more exactly."""
        for rule in ("bits_per_weight", "active_bits_per_weight"):
            wanted: float | None = getattr(self.stop, rule)
            if wanted is None or not self.schemes:
                continue
            if wanted >= _WIDEST_BITS:
                raise ValueError(
                    f"stop.{rule}: {wanted:g} asks for nothing, since no model's weights have more than "
                    f"{_WIDEST_BITS} bits; give a smaller number"
                )
            least, scheme = min((_least_bits(name), name) for name in self.schemes)
            if wanted < least and not self.shapes_blocks:
                raise ValueError(
                    f"stop.{rule}: {wanted:g} is out of reach of these schemes; the least is {least:g} bits per "
                    f"weight, of {scheme}"
                )
        return self

    @property
    def tree(self) -> TreeSettings:
        """What is said of the tree searches."""
        return TreeSettings(**{field.name: getattr(self, field.name) for field in fields(TreeSettings)})

    @property
    def pruning(self) -> PruningSettings:
        """What is said of `sparsity`, but for its rounds."""
        return PruningSettings(**{field.name: getattr(self, field.name) for field in fields(PruningSettings)})

    @property
    def pruning_rounds(self) -> tuple[float, ...]:
        """Percentage points that each round of a sparsity search adds; one round where only the end is given."""
        if self.rounds or self.stop.sparsity is None:
            return self.rounds
        return (100.0 * self.stop.sparsity,)

    @model_validator(mode="after")
    def _whose_options(self) -> SearchSection:
        if self.options and self.strategy in BUILT_IN_STRATEGIES:
            raise ValueError(
                f"options are for strategies of other packages and of studies; {self.strategy} has keys of its own"
            )
        return self

    @model_validator(mode="after")
    def _can_keep_fdt(self) -> SearchSection:
        if self.stop.min_fdt is not None and self.strategy in _KEEP_TO_SIZES:
            raise ValueError(f"stop.min_fdt: {self.strategy} keeps to sizes only; auto, greedy, beam can keep an FDT")
        return self

    @model_validator(mode="after")
    def _can_rank(self) -> SearchSection:
        if not METRICS[self.rank_by].ranks:
            raise ValueError(
                f"rank_by takes a metric of which more or less is better, got {self.rank_by}: measure it beside, by "
                f"metrics: [{self.rank_by}]"
            )
        return self

    @model_validator(mode="after")
    def _can_race(self) -> SearchSection:
        if self.indifference and self.confidence == 1.0:
            raise ValueError("indifference says when a candidate may leave early, which needs a confidence below 1")
        if self.confidence < 1.0 and METRICS[self.rank_by].loss_from_zero(1) is None:
            raise ValueError(
                f"confidence below 1 goes with rank_by fdt, sdt or kl, got {self.rank_by}: its values have no bound "
                "that would let a candidate leave early"
            )
        return self
