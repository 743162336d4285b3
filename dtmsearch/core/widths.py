"""Widths: how many channels of an MLP, groups of query heads with their key and value head, or experts of a mixture a
block keeps.

What is cut are rows of some matrices of a block and columns of the last one, the same units of all; of a mixture whole
experts go, and their rows of the router. Knows shapes and names, never values: which units go is decided in
`dtmsearch.model.compress.width` and, of experts, in `dtmsearch.model.calibration.expert_scores`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

# What of a block is cut: channels of an MLP, groups of query heads of an attention, or experts of a mixture.
WidthKind = Literal["channels", "heads", "experts"]
# Which units go first: `dtmsearch.model.compress.width` says how and, of experts, `calibration.expert_scores`.
RULES = ("magnitude", "spectral", "wanda", "gradient", "ziplm", "random")
RULES_OF_EXPERTS = ("magnitude", "frequency", "reap", "routed", "random")
_SHARE = r"(0\.[0-9]{0,16}[1-9])"
_NAME = re.compile(
    rf"(?:channels-{_SHARE}|heads-([1-9][0-9]{{0,3}}):([1-9][0-9]{{0,3}}))-({'|'.join(RULES)})(-repair)?"
)
_NAME_OF_EXPERTS = re.compile(rf"experts-{_SHARE}-({'|'.join(RULES_OF_EXPERTS)})")
_BLOCKS: dict[WidthKind, str] = {"channels": "mlp", "heads": "attention", "experts": "mlp"}
# Kinds of the matrices of such blocks whose outputs are the units, and of those whose inputs are.
_ROWS = {
    "mlp": {"gate", "up", "fc1", "c_fc", "w1", "w3", "wi", "fc_in", "dense_h_to_4h", "gate_up"},
    "attention": {"q", "k", "v"},
}
_COLS = {
    "mlp": {"down", "fc2", "c_proj", "w2", "wo", "fc_out", "dense_4h_to_h"},
    "attention": {"o", "out", "dense"},
}
_EVERY_COL = frozenset().union(*_COLS.values())
# Matrices in which gates stand above what they are multiplied with.
_STACKED = {"gate_up"}
# What is kept of many channels is a multiple of this, as kernels and groups of quantized weights want it.
_STEP = 32
# Of fewer steps than this the step is smaller.
_LEAST_STEPS = 16

Side = Literal["rows", "cols"]


class Block(Protocol):
    """A block, by what it may be cut to; see `Component`."""

    @property
    def kind(self) -> str: ...

    @property
    def mixture(self) -> str: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def experts_per_token(self) -> int: ...


class Cuttable(Block, Protocol):
    """A matrix of a block, by what its cut follows from; see `Component`."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def expert(self) -> int: ...


@dataclass(frozen=True)
class Width:
    """What is left of a block: without a `share` of its channels or experts, or with `kept` of `groups` of query heads.
    `rule` says which units go, `repair` that the last matrix is fitted anew to what stays."""

    kind: WidthKind
    share: float
    kept: int
    groups: int
    rule: str
    repair: bool

    @property
    def block_kind(self) -> str:
        """The kind of block that it is for."""
        return _BLOCKS[self.kind]

    @property
    def takes_experts(self) -> bool:
        """Whether the units are the experts of a mixture, whose matrices stay as they are or go whole."""
        return self.kind == "experts"

    def is_for(self, block: Block) -> bool:
        """Whether a block may be of this width, by what it holds: of experts as many must be left as a token is given
        to, and one must go."""
        if not self.takes_experts or block.kind != self.block_kind:
            return block.kind == self.block_kind and not block.mixture
        return bool(block.mixture) and block.experts_per_token <= self.left(block.num_experts) < block.num_experts

    def is_of(self, matrix: Cuttable) -> bool:
        """Whether it is a matrix of a kind that blocks of these units consist of."""
        if self.takes_experts or matrix.mixture:
            return self.takes_experts and bool(matrix.mixture)
        return matrix.kind in _ROWS[self.block_kind] | _COLS[self.block_kind]

    def fits(self, matrix: Cuttable) -> bool:
        """Whether a matrix of the block has as many channels or groups as it says."""
        units = self.units(matrix)
        if self.takes_experts:
            return self.left(units) < units
        size = matrix.shape[0] if side_of(matrix) == "rows" else matrix.shape[1]
        return size % units == 0 and self.left(units) < units

    def units(self, matrix: Cuttable) -> int:
        """The channels or groups that a matrix of the block has before it is cut; the experts of its mixture."""
        if self.kind == "heads":
            return self.groups
        if self.takes_experts:
            return matrix.num_experts
        return channels_of(matrix)

    def left(self, units: int) -> int:
        """How many of so many units are kept: of many channels the nearest multiple of 32."""
        if self.kind == "heads":
            return self.kept
        if self.takes_experts:
            return min(max(round(units * (1.0 - self.share)), 1), units)
        step = _STEP
        while step > 1 and (units % step or units < _LEAST_STEPS * step):
            step //= 2
        return min(max(round(units * (1.0 - self.share) / step), 1) * step, units)

    def cut(self, matrix: Cuttable) -> tuple[int, int]:
        """The shape of a matrix of the block once it is cut. Experts are as good as each other here: as many as go, the
        last ones, have no rows left."""
        rows, cols = matrix.shape
        if self.takes_experts:
            return (0, cols) if matrix.expert >= self.left(matrix.num_experts) else (rows, cols)
        units = self.units(matrix)
        left = self.left(units)
        return (rows * left // units, cols) if side_of(matrix) == "rows" else (rows, cols * left // units)


def side_of(matrix: Cuttable) -> Side:
    """Which side of a matrix of a block the units are: the columns of the last one, the rows of the others."""
    return "cols" if matrix.kind in _EVERY_COL else "rows"


def is_stacked(matrix: Cuttable) -> bool:
    """Whether its rows are those of two matrices, of which each has all channels."""
    return matrix.kind in _STACKED


def channels_of(matrix: Cuttable) -> int:
    """The channels of an MLP, by one of its matrices."""
    rows, cols = matrix.shape
    return cols if side_of(matrix) == "cols" else rows // 2 if is_stacked(matrix) else rows


@lru_cache(maxsize=4096)
def width_of(name: str) -> Width | None:
    """The width of a scheme's name: `channels-0.25-wanda`, `heads-2:3-ziplm-repair`, `experts-0.25-reap`; None for
    another name."""
    if of_experts := _NAME_OF_EXPERTS.fullmatch(name):
        return Width("experts", float(of_experts[1]), 0, 0, of_experts[2], False)
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    share, kept, groups, rule, repair = match.groups()
    if share is not None:
        return Width("channels", float(share), 0, 0, rule, repair is not None)
    if int(kept) >= int(groups):
        return None
    return Width("heads", 1.0 - int(kept) / int(groups), int(kept), int(groups), rule, repair is not None)


def is_cuttable(width: Width, matrices: Sequence[Cuttable]) -> bool:
    """Whether the matrices of a block are those of one that a width is for: all of known kinds, the last one alone with
    the units as its inputs, and as many units in each. Of experts see `no_experts`."""
    if width.takes_experts:
        return not no_experts(width, matrices)
    known = _ROWS[width.block_kind], _COLS[width.block_kind]
    kinds = [matrix.kind for matrix in matrices]
    if not kinds or kinds[-1] not in known[1] or not set(kinds[:-1]) <= known[0] or len(kinds) < 2:
        return False
    if width.kind == "channels":
        return len({channels_of(matrix) for matrix in matrices}) == 1
    sizes = [m.shape[0] if side_of(m) == "rows" else m.shape[1] for m in matrices]
    return set(kinds[:-1]) == known[0] and all(size % width.groups == 0 for size in sizes)


def no_experts(width: Width, matrices: Sequence[Cuttable]) -> str:
    """Why no experts can be taken of the block that some matrices are all of; empty where they can."""
    experts = [matrix for matrix in matrices if matrix.mixture]
    mixtures = {matrix.mixture for matrix in experts}
    if len(mixtures) != 1:
        return f"it has {len(mixtures) or 'no'} mixtures"
    number, chosen = experts[0].num_experts, experts[0].experts_per_token
    of_kinds: dict[str, set[int]] = {}
    for matrix in experts:
        of_kinds.setdefault(matrix.kind, set()).add(matrix.expert)
    held = min(map(len, of_kinds.values()))
    if held != number:
        return f"its router chooses among {number}, of which {held} hold weights"
    left = width.left(number)
    if left >= number:
        return f"all of its {number} would stay"
    return f"{left} would be left, and a token is given to {chosen}" if left < chosen else ""


def nearest_width(name: str) -> str:
    """The width that a name which is none may have meant, where it begins as one does, or nearly; else empty."""
    given = name.partition("-")[0]
    kind: str = next(iter(difflib.get_close_matches(given, list[str](_BLOCKS), n=1, cutoff=0.8)), "")
    if kind == "experts":
        shares = [f"0.{hundredths:02}".rstrip("0") for hundredths in range(5, 100, 5)]
        known = [f"experts-{share}-{rule}" for share in shares for rule in RULES_OF_EXPERTS]
        return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    if not kind:
        return ""
    amounts = [f"0.{hundredths:02}".rstrip("0") for hundredths in range(5, 100, 5)]
    amounts = amounts if kind == "channels" else [f"{n}:{m}" for m in range(2, 17) for n in range(1, m)]
    known = [f"{kind}-{amount}-{rule}{end}" for amount in amounts for rule in RULES for end in ("", "-repair")]
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
