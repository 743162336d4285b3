"""Pruning a weight matrix: which weights are the least salient, exactly as many as the scheme says.

Saliencies are compared as integer keys: the bits of |w|, which order non-negative numbers as their values do. A cut
(the last key that is pruned, and how far its ties are) is all that a share needs, so that pruning again costs two
elementwise passes. Ties go by position, the earlier ones first.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtmsearch.core.schemes import Pruning

# Keys have 31 bits, or 15 where weights have 16; histograms are over the upper 15.
_BINS = 1 << 15
_KEY_TYPES = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Cut:
    """What a share prunes of flattened keys: all below `key`, and those equal to it up to position `last`."""

    key: int
    last: int


def magnitude_keys(weight: Tensor) -> Tensor:
    """|w| as integers of the same order, shape and width."""
    return weight.abs().view(_KEY_TYPES[weight.element_size()])


def random_keys(shape: tuple[int, ...], name: str, device: torch.device) -> Tensor:
    """Keys that follow from a position and `name` alone, the same on every device: mixed as by Chris Wellon's
    `lowbias32`, each with a seed of its own."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    keys = torch.arange(math.prod(shape), device=device).add_(seed)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        keys.bitwise_xor_(keys >> shift).mul_(factor).bitwise_and_(0xFFFFFFFF)
    return (keys >> 1).to(torch.int32).reshape(shape)


def histogram(keys: Tensor) -> NDArray[np.int32]:
    """How many keys lie in or below each bin."""
    counts: NDArray[np.int64] = torch.bincount(_coarse(keys).reshape(-1).int(), minlength=_BINS).cpu().numpy()
    return counts.cumsum(dtype=np.int32)


def _coarse(keys: Tensor) -> Tensor:
    return keys if keys.dtype == torch.int16 else keys >> 16


def cut(keys: Tensor, cumulative: NDArray[np.int32], count: int) -> Cut:
    """The cut that prunes the `count` smallest of `keys`, whose `histogram` is `cumulative`."""
    if count == 0:
        return Cut(0, -1)
    number = int(np.searchsorted(cumulative, count))
    inside = (_coarse(keys).reshape(-1) == number).nonzero().squeeze(1)
    left = count - int(cumulative[number - 1] if number else 0)
    ordered, order = keys.reshape(-1)[inside].sort(stable=True)
    return Cut(int(ordered[left - 1]), int(inside[order[left - 1]]))


def prune_below(weight: Tensor, keys: Tensor, cut: Cut) -> Tensor:
    """`weight` with zeros where `cut` prunes."""
    flat, flat_keys = weight.reshape(-1), keys.reshape(-1)
    upto = cut.last + 1
    pruned = flat.clone()
    for part, strict in ((slice(0, upto), False), (slice(upto, None), True)):
        gone = flat_keys[part] < cut.key if strict else flat_keys[part] <= cut.key
        pruned[part].masked_fill_(gone, 0.0)
    return pruned.reshape(weight.shape)


def pruned_by_pattern(keys: Tensor, kept: int, of: int) -> Tensor:
    """Mask [rows, cols] of all but the `kept` largest keys among every `of` consecutive ones of a row; of a shorter
    last group as many are kept."""
    rows, cols = keys.shape
    whole = cols - cols % of
    parts = [_pruned_in_groups(keys[:, :whole].reshape(rows, -1, of), kept).reshape(rows, whole)]
    if whole < cols:
        parts.append(_pruned_in_groups(keys[:, whole:].unsqueeze(1), kept).squeeze(1))
    return torch.cat(parts, dim=1)


def _pruned_in_groups(groups: Tensor, kept: int) -> Tensor:
    """By the rank of each key in its group [rows, groups, keys of a group]: how many of them go before it."""
    size = groups.shape[2]
    place = torch.arange(size, device=groups.device)
    rank = torch.zeros(groups.shape, dtype=torch.int16, device=groups.device)
    for other in range(size):
        key = groups[:, :, other : other + 1]
        rank += (key < groups) | ((key == groups) & (other < place))
    return rank < size - kept


@dataclass(frozen=True)
class RowCuts:
    """A cut for each row: all keys below `keys` [rows, 1], and those equal to them up to column `last` [rows, 1]."""

    keys: Tensor
    last: Tensor

    def mask(self, keys: Tensor) -> Tensor:
        """What is pruned [rows, cols]."""
        cols = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)
        return (keys < self.keys) | ((keys == self.keys) & (cols <= self.last))


def row_cuts(keys: Tensor, count: int) -> RowCuts:
    """The cuts that prune the `count` smallest of each row of `keys` [rows, cols]."""
    if count == 0:
        nowhere = torch.full((len(keys), 1), -1, dtype=torch.int32, device=keys.device)
        return RowCuts(torch.zeros_like(nowhere).to(keys.dtype), nowhere)
    last = keys.kthvalue(count, dim=1, keepdim=True).values
    tied = keys == last
    left = count - (keys < last).sum(dim=1, keepdim=True)
    reached = tied & (tied.cumsum(dim=1, dtype=torch.int32) == left)
    return RowCuts(last, reached.to(torch.int32).argmax(dim=1, keepdim=True).to(torch.int32))


def wanda_keys(weight: Tensor, mean_squares: Tensor) -> Tensor:
    """|w| times the norm of its input, as integers of the same order (arXiv 2306.11695, equation 1; norms up to a
    common factor)."""
    return (weight.float().abs() * mean_squares.sqrt()).view(torch.int32)


class Pruner:
    """Prunes components, and remembers of each what makes doing so again cheap: a histogram, and the cuts made."""

    def __init__(self) -> None:
        self._histograms: dict[str, NDArray[np.int32]] = {}
        self._cuts: dict[tuple[str, str], Cut] = {}
        self._row_cuts: dict[tuple[str, str], RowCuts] = {}

    def prune(self, component: str, weight: Tensor, pruning: Pruning, mean_squares: Tensor | None = None) -> Tensor:
        """`weight` [rows, cols], the component's own, with zeros where magnitude, chance or Wanda prunes it.

        Wanda needs the `mean_squares` [cols] of the component's inputs.
        """
        if pruning.saliency == "wanda":
            assert mean_squares is not None
            return self._prune_by_wanda(component, weight, pruning, mean_squares)
        by_chance = pruning.saliency == "random"
        name = f"{component}={pruning.name}"
        keys = random_keys(tuple(weight.shape), name, weight.device) if by_chance else magnitude_keys(weight)
        if pruning.pattern is not None:
            return weight.masked_fill(pruned_by_pattern(keys, *pruning.pattern), 0.0)
        found = self._cuts.get((component, pruning.name))
        if found is None:
            rows, cols = weight.shape
            cumulative = histogram(keys) if by_chance else self._histogram(component, keys)
            found = cut(keys, cumulative, pruning.pruned_weights((rows, cols)))
            self._cuts[component, pruning.name] = found
        return prune_below(weight, keys, found)

    def _prune_by_wanda(self, component: str, weight: Tensor, pruning: Pruning, mean_squares: Tensor) -> Tensor:
        keys = wanda_keys(weight, mean_squares)
        if pruning.pattern is not None:
            return weight.masked_fill(pruned_by_pattern(keys, *pruning.pattern), 0.0)
        cuts = self._row_cuts.get((component, pruning.name))
        if cuts is None:
            cuts = self._row_cuts[component, pruning.name] = row_cuts(keys, pruning.pruned_in_row(weight.shape[1]))
        return weight.masked_fill(cuts.mask(keys), 0.0)

    def _histogram(self, component: str, keys: Tensor) -> NDArray[np.int32]:
        if component not in self._histograms:
            self._histograms[component] = histogram(keys)
        return self._histograms[component]
