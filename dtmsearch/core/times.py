"""What a matrix takes to run under a scheme, by a table: milliseconds of one token (decode) and of a prompt (prefill).

The table is measured on the device and by the kernels that serve (`dtmsearch profile`, or a serving engine's own
figures): nothing is derived from bits, for fewer bits are not always faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dtmsearch.core.components import Component, kind_of_block
from dtmsearch.core.schemes import DENSE, DROP
from dtmsearch.core.widths import side_of
from dtmsearch.errors import UserError

# Whole numbers add up the same in any order.
PICOSECONDS = 1_000_000_000
TimeRule = Literal["decode_ms", "prefill_ms"]
# Scheme, outputs, inputs.
Shape = tuple[str, int, int]
# Of a token, and of a prompt where that is known.
Picoseconds = tuple[int, int | None]
_MOST_NAMED = 4


@dataclass(frozen=True)
class Times:
    """`rows`: (scheme, outputs, inputs) -> picoseconds of a token and of `prefill_tokens` tokens at once. `device` says
    where they were measured. `blocks`: kind of block -> what one takes beside its products, which its last matrix is
    counted to take."""

    rows: Mapping[Shape, tuple[int, int]]
    prefill_tokens: int
    device: str = ""
    blocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def of(self, component: Component, scheme: str) -> Picoseconds | None:
        """A component under a scheme; None where the table has no row for its shape. Of an expert a token takes its
        share on average, for it runs for few tokens; a prompt's time is not known: a share of the tokens takes more
        than that share of the time. What is dropped takes none."""
        if scheme == DROP:
            return 0, None if component.mixture else 0
        found = self.rows.get((scheme, *component.shape))
        if found is None or not component.mixture:
            beside = self.blocks.get(kind_of_block(component)) if found and side_of(component) == "cols" else None
            return found if found is None or beside is None else (found[0] + beside[0], found[1] + beside[1])
        return round(found[0] * component.read_share), None

    def total(self, components: Iterable[Component], schemes: Mapping[str, str]) -> Picoseconds | None:
        """All components, those that `schemes` does not name unquantized; None where a row is missing."""
        decode: int = 0
        prefill: int | None = 0
        for component in components:
            found = self.of(component, schemes.get(component.name, DENSE))
            if found is None:
                return None
            decode += found[0]
            prefill = None if prefill is None or found[1] is None else prefill + found[1]
        return decode, prefill

    def require(self, components: Iterable[Component], schemes: Iterable[str]) -> None:
        """Raises `UserError` where a shape of these components has no row under one of these schemes."""
        shapes = sorted({component.shape for component in components})
        wanted = [(scheme, *shape) for scheme in (DENSE, *schemes) if scheme != DROP for shape in shapes]
        missing = [
            f"{scheme} of {rows} x {cols}" for scheme, rows, cols in wanted if (scheme, rows, cols) not in self.rows
        ]
        if missing:
            more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
            raise UserError(
                f"search.times has no row for {', '.join(missing[:_MOST_NAMED])}{more}: measure them on what serves "
                "the model (dtmsearch profile, of widths with --cut), or take the scheme or width out of the search"
            )
