"""The search file: what a search is. The only reader of configuration.

Where a search runs (address, replicas, GPUs) is not in here and enters no identity.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from dtmsearch.plans.evaluation import ModelSpec
from dtmsearch.plans.metrics import METRICS
from dtmsearch.plans.plan import Budget
from dtmsearch.plans.schemes import parse_scheme

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Metric = Literal["fdt", "sdt", "dppl", "ppl", "kl"]
assert set(typing.get_args(Metric)) == set(METRICS)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    path: str
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    trust_remote_code: bool = False
    compile: Literal["auto", "always", "never"] = "auto"
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class DatasetSection(_Section):
    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"


class PromptsSection(_Section):
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


class ValidationSection(_Section):
    """As `prompts`; a field that is not set is taken from there."""

    files: tuple[str, ...] = ()
    dataset: DatasetSection | None = None
    count: int | None = Field(default=None, ge=1)
    prompt_tokens: int | None = Field(default=None, ge=1)
    continuation_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None


class CalibrationSection(_Section):
    """Text by which pruning and quantization are calibrated: `count` rows of `tokens` tokens. A field that is not set
    is taken from `prompts`, whose human text it is then."""

    files: tuple[str, ...] = ()
    dataset: DatasetSection | None = None
    count: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=2)
    seed: int | None = None


class ComponentsSection(_Section):
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


class StopSection(_Section):
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


class AutoSection(_Section):
    """How much `auto` measures: prompts of a unit's probe; rounds of correction, their prompts, and the plans drawn in
    each. `sensitivity` takes the probe from here."""

    probe_prompts: int = Field(default=4, ge=1)
    rounds: int = Field(default=2, ge=0)
    prompts: int = Field(default=32, ge=1)
    plans: int = Field(default=8, ge=1)


class KnapsackSection(_Section):
    prompts: int = Field(default=256, ge=1)


class SpdySection(_Section):
    starts: int = Field(default=100, ge=1)
    generations: int = Field(default=20, ge=0)
    children: int = Field(default=16, ge=1)
    prompts: int = Field(default=32, ge=1)


class EvolutionSection(_Section):
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


class LocalSection(_Section):
    """`children` are the switches of a round, `prompts` what they are first measured on."""

    rounds: int = Field(default=100, ge=1)
    children: int = Field(default=16, ge=1)
    prompts: int = Field(default=32, ge=1)


class RecoverySection(_Section):
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


class SearchSection(_Section):
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


class SearchFile(_Section):
    run: RunName
    model: ModelSection
    prompts: PromptsSection
    validation: ValidationSection | None = None
    calibration: CalibrationSection | None = None
    search: SearchSection
    seed: int = 0

    # The folder that relative paths start from: part of where the file lies, not of what the search is.
    _folder: Path = PrivateAttr(default_factory=Path)

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def validation_prompts(self) -> PromptsSection | None:
        """The held-out prompts, unset fields filled from `prompts`; None when the file has no validation."""
        if self.validation is None:
            return None
        # Not by `exclude_unset`: a file that was written out by `to_yaml` sets every key, many of them to nothing.
        own = {key: value for key, value in self.validation.model_dump().items() if value not in (None, ())}
        values = self.prompts.model_dump() | own
        if self.validation.dataset is not None:
            values["files"] = ()
        elif self.validation.files:
            values["dataset"] = None
        return PromptsSection.model_validate(values)

    @property
    def calibration_text(self) -> PromptsSection:
        """Where calibration text comes from: rows of `prompt_tokens + continuation_tokens` tokens."""
        section = self.calibration or CalibrationSection()
        own = {key: getattr(section, key) for key in ("count", "seed") if getattr(section, key) is not None}
        if section.tokens is not None:
            own |= {"prompt_tokens": section.tokens - 1, "continuation_tokens": 1}
        if section.files or section.dataset is not None:
            own |= {"files": section.files, "dataset": section.dataset}
        return PromptsSection.model_validate(self.prompts.model_dump() | own)

    def resolve(self, path: str) -> Path:
        """A path as the file means it: from the file's own folder or, where nothing is there, the current one."""
        beside = self._folder / Path(path).expanduser()
        return beside if beside.exists() else Path(path).expanduser()

    @property
    def model_spec(self) -> ModelSpec:
        """What replicas load. A path that names no folder here is left as it stands: a hub id."""
        folder = self.resolve(self.model.path)
        path = str(folder.resolve()) if folder.is_dir() else self.model.path
        section = self.model
        options = (
            *(section.dtype, section.attention, section.trust_remote_code, section.compile),
            section.scale_dtype,
        )
        return ModelSpec(path, section.revision, *options)

    def to_yaml(self) -> str:
        """The file as YAML with every default written out, so that two files that mean the same read the same."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> SearchFile:
    """Read a search file and apply overrides such as `search.width=4`. Raises `ValueError` for a user's mistake."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"no search file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the search file {path}: {error}") from None
    return parse(text, str(path), path.absolute().parent, overrides)


def parse(text: str, source: str, folder: Path, overrides: tuple[str, ...] = ()) -> SearchFile:
    """A search file from its text; `source` names it in errors, `folder` is where its relative paths start."""
    content = _read_yaml(text, source)
    for override in overrides:
        _apply(content, override)
    try:
        file = SearchFile.model_validate(content)
    except ValidationError as error:
        raise ValueError("\n".join(f"{source}: {line}" for line in _explain(error))) from None
    file._folder = folder
    return file


def recovery_of(file: SearchFile, overrides: Sequence[str]) -> RecoverySection:
    """How to train a model of a search file: as its `search.recovery` says, with overrides such as `lr=0.0003`."""
    content: dict[str, Any] = {} if file.search.recovery is None else file.search.recovery.model_dump(mode="json")
    for override in overrides:
        _apply(content, override)
    if not content.get("files"):
        raise ValueError("recover needs a training text: --set 'files=[train.txt]'")
    try:
        return RecoverySection.model_validate(content)
    except ValidationError as error:
        raise ValueError("\n".join(f"recovery: {line}" for line in _explain(error))) from None


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source} is no search file: it should hold keys such as run, model, prompts and search")
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set takes KEY=VALUE such as search.width=4, got {override!r}")
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        inner = section.setdefault(parent, {})
        if inner is None:
            inner = section[parent] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override}: {parent} is a value, not a section")
        section = inner
    try:
        section[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ValueError(
            f"--set {override}: the value is not YAML ({problem}). Quote what YAML gives a meaning to, such as "
            """--set 'search.components.include=["*attn*"]'"""
        ) from None


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        where = ".".join(
            str(part) for part in problem["loc"] if not str(part).startswith(("function-", "constrained-"))
        )
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {where!r}{_nearest_key(problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            names_its_key = not where or message.startswith(f"{where}.")
            lines.append(message if names_its_key else f"{where}: {message}{got}")
    return lines


def _nearest_key(location: tuple[int | str, ...]) -> str:
    """'; did you mean ...' with the known key nearest to an unknown one, of its own section if any is close there."""
    prefix, key = ".".join(map(str, location[:-1])), str(location[-1])
    known = _known_keys(SearchFile)
    here = [k for k in known if k.rpartition(".")[0] == prefix]
    by_last = {k.rpartition(".")[2]: k for k in [*known, *here]}
    nearest = difflib.get_close_matches(key, [k.rpartition(".")[2] for k in here], n=1, cutoff=0.5)
    nearest = nearest or difflib.get_close_matches(key, list(by_last), n=1, cutoff=0.7)
    if nearest:
        return f"; did you mean {by_last[nearest[0]]!r}?"
    return f"; known keys there are {', '.join(k.rpartition('.')[2] for k in here)}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += _known_keys(inner, f"{prefix}{name}.")
    return keys


def difference(old: str, new: str) -> list[str]:
    """What changed between two search files' YAML texts: `key: old -> new`, one line a key."""
    before, after = _flatten(yaml.safe_load(old)), _flatten(yaml.safe_load(new))
    return [
        f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, "unset") != after.get(key, "unset")
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in _flatten(inner, f"{prefix}.{name}".lstrip(".")).items()}


def json_schema() -> str:
    """The JSON schema of a search file, for editors that complete and check YAML."""
    schema = SearchFile.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def section_of(text: str, name: str) -> dict[str, Any]:
    """A section of a search file's YAML text as it stands, whichever version wrote it; empty where there is none."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else {}
