"""When a search ends: its section `stop`, and the table of times that two of its rules go by."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dtmsearch.config.sections import Section
from dtmsearch.core.plan import Budget
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.strategy_settings import Positive
from dtmsearch.core.times import PICOSECONDS, Times


class TimeRow(Section):
    """What a matrix of a shape takes under a scheme."""

    scheme: str
    """The scheme, `dense` among them."""
    outputs: Positive
    """Rows of the matrix."""
    inputs: Positive
    """Its columns."""
    decode_ms: float = Field(ge=0)
    """Milliseconds for one token."""
    prefill_ms: float = Field(ge=0)
    """Milliseconds for prefill_tokens at once."""

    @field_validator("scheme")
    @classmethod
    def _by_its_name(cls, name: str) -> str:
        return parse_scheme(name).name


class BlockRow(Section):
    """What a block takes beside the products with its matrices."""

    kind: Literal["attention", "mlp"]
    """Its kind."""
    decode_ms: float = Field(ge=0)
    """Milliseconds for one token."""
    prefill_ms: float = Field(ge=0)
    """Milliseconds for prefill_tokens at once."""


class TimesSection(Section):
    """What matrices take to run, as measured on the device that serves: what `dtmsearch profile` writes."""

    device: str = ""
    """Where it was measured."""
    prefill_tokens: Positive = 512
    """Tokens of the prompt that prefill_ms is for."""
    rows: tuple[TimeRow, ...] = Field(min_length=1)
    """A row for every scheme, `dense` among them, and every shape of the searched components."""

    blocks: tuple[BlockRow, ...] = ()
    """What attentions and MLPs take beside their products, which goes where they are dropped."""

    @property
    def table(self) -> Times:
        """The rows by scheme and shape, and what blocks take beside."""
        rows = {
            (row.scheme, row.outputs, row.inputs): (
                round(row.decode_ms * PICOSECONDS),
                round(row.prefill_ms * PICOSECONDS),
            )
            for row in self.rows
        }
        blocks: dict[str, tuple[int, int]] = {
            row.kind: (round(row.decode_ms * PICOSECONDS), round(row.prefill_ms * PICOSECONDS)) for row in self.blocks
        }
        return Times(rows, self.prefill_tokens, self.device, blocks)


class StopSection(Section):
    """A search ends at the first rule that is met."""

    share: float | None = Field(default=None, gt=0, le=1)
    """This share of the searched components' weights is compressed."""
    components: int | None = Field(default=None, ge=1)
    """So many components are compressed."""
    bits_per_weight: float | None = Field(default=None, gt=0)
    """The plan's average stored bits per weight are at most this."""
    sparsity: float | None = Field(default=None, gt=0, le=1)
    """This share of the weights is pruned."""
    size_mb: float | None = Field(default=None, gt=0)
    """The plan's stored size is at most this many megabytes (10^6 bytes)."""
    active_bits_per_weight: float | None = Field(default=None, gt=0)
    """Of a mixture of experts: the stored bits that a token reads are at most this for each weight that it reads, an
    expert's counted by the share of the experts that a token is given to. Elsewhere the same as bits_per_weight."""
    decode_ms: float | None = Field(default=None, gt=0)
    """The components take at most so many milliseconds for one token, by search.times."""
    prefill_ms: float | None = Field(default=None, gt=0)
    """The components take at most so many milliseconds for a prompt of search.times' length."""
    blocks: int | None = Field(default=None, ge=1)
    """So many attention and MLP blocks are dropped whole; a layer counts as its blocks."""
    parameters: float | None = Field(default=None, ge=0, lt=1)
    """At most this share of the searched components' weights is left, once what is dropped is taken out."""
    flops: float | None = Field(default=None, ge=0, lt=1)
    """At most this share of a token's multiplications with these weights is left, an expert's counted by the share of
    tokens that it is given."""
    min_fdt: float | None = Field(default=None, ge=0)
    """The smallest plan whose mean FDT is shown to be at least this many tokens, on prompts that the search did not
    see."""
    min_fdt_confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """With what confidence min_fdt is kept: so seldom does a plan that falls below it count as keeping it."""
    min_fdt_prompts: int | None = Field(default=None, ge=8)
    """On how many prompts of its own min_fdt is shown to be kept, cut from what is left of the prompts' text, else of
    the validation's; as many as prompts.count where it is not set."""
    seconds: float | None = Field(default=None, gt=0)
    """The search has taken this long."""

    @property
    def budget(self) -> Budget:
        sizes = self.bits_per_weight, self.sparsity, self.size_mb, self.active_bits_per_weight
        times = self.decode_ms, self.prefill_ms
        return Budget(self.share, self.components, *sizes, *times, self.blocks, self.parameters, self.flops)
