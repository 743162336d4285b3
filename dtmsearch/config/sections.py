"""The sections of a search file but `search`: their keys, defaults and limits, and what goes with what."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from dtmsearch.core.calibration import Calibration, Routing, Through
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.numeric_mode import ATTENTION, DTYPE, SCALE_DTYPE
from dtmsearch.core.records import RUN_NAME
from dtmsearch.core.strategy_settings import LARGEST

RunName = Annotated[str, Field(pattern=RUN_NAME)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A section of a file: unknown keys are errors, and the text under a key describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _exact_as_floats(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError(f"{name} is larger than {LARGEST}")
        return self


class CacheSection(Section):
    """What layers keep of tokens, whose keys and values are components then, by the names of their attention:
    `model.layers.3.self_attn.kv_cache.keys` and `.values`."""

    context: PositiveInt
    """Tokens of each text that are kept."""
    batch: PositiveInt = 1
    """Texts at a time. Bytes of caches are those of so many texts of so many tokens."""


class ModelSection(Section):
    """The model that is searched, and the numbers that it computes in."""

    path: str
    """A folder with a Hugging Face checkpoint in safetensors, or a hub id. A relative path starts at the search file's
    folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "float16", "bfloat16"] = DTYPE
    """The dtype that the model computes in."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = ATTENTION
    """transformers' attention implementation."""
    trust_remote_code: bool = ModelSpec.trust_remote_code
    """Run Python code that comes with the model. It runs with all your rights."""
    compile: Literal["auto", "always", "never"] = ModelSpec.compile
    """Compile layers with torch.compile; auto: on GPUs, for models at least 1,024 wide."""
    scale_dtype: Literal["float32", "float16", "bfloat16"] = SCALE_DTYPE
    """The dtype that scales of rounded weights are stored in. vLLM keeps them in the model's."""
    kv_cache: CacheSection | None = None
    """Count KV caches, and let them be searched: by patterns of components.include that name keys or values."""


class DatasetSection(Section):
    """Text of a Hugging Face dataset."""

    path: str
    """A Hugging Face dataset: a hub id, or a folder of its files, or one that save_to_disk has written. A relative path
    starts at the search file's folder."""
    name: str | None = None
    """Its configuration, where it has several."""
    split: str = "train"
    """Its split."""
    column: str = "text"
    """The column that holds text; each row is a document."""


class MixedSection(Section):
    """One of several texts."""

    files: tuple[str, ...] = ()
    """As prompts.files."""
    dataset: DatasetSection | None = None
    """As prompts.dataset."""
    chat: bool = False
    """As prompts.chat."""
    weight: float = Field(default=1.0, gt=0)
    """Of all prompts this text gives its weight's share."""

    @model_validator(mode="after")
    def _one_source(self) -> MixedSection:
        if bool(self.files) == (self.dataset is not None):
            raise ValueError("give either files or dataset")
        return self


class PromptsSection(Section):
    """Windows of text: what the model reads, and how many tokens it then generates."""

    files: tuple[str, ...] = ()
    """Text files, or patterns such as docs/*.txt; each file is a document, of .jsonl and .parquet files each row's
    text. .gz and .zst are decompressed."""
    dataset: DatasetSection | None = None
    """A dataset instead of files."""
    mix: tuple[MixedSection, ...] = ()
    """Several texts instead, each with a weight: of every one as many prompts as its weight's share."""
    chat: bool = False
    """Rows are conversations (a column messages or conversations), written by the model's chat template; a prompt ends
    where the assistant begins."""
    count: int = Field(default=100, ge=1)
    """How many windows of text are drawn, without overlap."""
    prompt_tokens: int = Field(default=100, ge=1)
    """Tokens of each window that the model reads."""
    continuation_tokens: int = Field(default=100, ge=1)
    """Tokens that the base model then generates, greedily or as search.decoding says: FDT lies between 0 and this."""
    seed: Seed = 0
    """Draws the windows. A larger count extends a smaller one."""

    @model_validator(mode="after")
    def _one_source(self) -> PromptsSection:
        if bool(self.files) + (self.dataset is not None) + bool(self.mix) != 1:
            raise ValueError("give either files or dataset, or several of them under mix")
        if self.mix and self.chat:
            raise ValueError("under mix each text says chat: true for itself")
        return self

    @property
    def sources(self) -> tuple[MixedSection, ...]:
        """The texts that it names, the only one or several."""
        return self.mix or (MixedSection(files=self.files, dataset=self.dataset, chat=self.chat),)


class ValidationSection(Section):
    """As `prompts`; a field that is not set is taken from there."""

    files: tuple[str, ...] = ()
    """As prompts.files."""
    dataset: DatasetSection | None = None
    """As prompts.dataset."""
    mix: tuple[MixedSection, ...] = ()
    """As prompts.mix."""
    chat: bool | None = None
    """As prompts.chat."""
    count: int | None = Field(default=None, ge=1)
    """As prompts.count."""
    prompt_tokens: int | None = Field(default=None, ge=1)
    """As prompts.prompt_tokens."""
    continuation_tokens: int | None = Field(default=None, ge=1)
    """As prompts.continuation_tokens."""
    seed: Seed | None = None
    """As prompts.seed."""


class CalibrationSection(Section):
    """Text by which pruning and quantization are calibrated: `count` rows of `tokens` tokens. A field that is not set
    is taken from `prompts`, whose human text it is then."""

    files: tuple[str, ...] = ()
    """As prompts.files."""
    dataset: DatasetSection | None = None
    """As prompts.dataset."""
    mix: tuple[MixedSection, ...] = ()
    """As prompts.mix."""
    chat: bool | None = None
    """As prompts.chat."""
    count: int | None = Field(default=None, ge=1)
    """Rows of text."""
    tokens: int | None = Field(default=None, ge=2)
    """Tokens of a row."""
    seed: Seed | None = None
    """Draws the rows."""
    through: Through = Calibration.through
    """What the text has passed where GPTQ and SparseGPT solve for a layer: the layers below as the base model has them,
    or compressed by the same scheme, which helps uniform plans more than those of several schemes."""
    experts: Routing = Calibration.experts
    """The tokens by which the experts of a mixture are calibrated: routed, those that the router gives each; all, every
    token through every expert, so that those which few tokens reach are solved for too."""
