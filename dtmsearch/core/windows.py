"""Windows of tokens: which of them repeat each other, and what of a text other windows hold already. Numbers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtmsearch.errors import UserError

# Texts count as the same where they share so many tokens in a row, or the whole of a shorter window.
SHARED_RUN = 50

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]
_Hashes = NDArray[np.uint64]

# Between documents: no token of any vocabulary, so that no run spans two of them.
_BORDER = -1
_PART_TOKENS = 1 << 20
_FACTOR = 0x9E3779B97F4A7C15


class TooLittleText(UserError):
    """A text holds fewer windows than are asked for; more of the same text may hold enough."""


@dataclass(frozen=True)
class Supply:
    """What a text held when windows were cut from it: whole windows, how many of them differ, its tokens, and how many
    of these belong to windows that it had to be cut apart from."""

    num_windows: int
    num_distinct: int
    num_tokens: int
    num_taken: int


def taken(documents: Sequence[Tokens], windows: Sequence[Tokens], length: int) -> list[Mask]:
    """For every document, which of its tokens other `windows` hold: those of each run of `SHARED_RUN` tokens that is
    also in one of them, wherever the two texts come from.

    Shorter runs count where a window, or one of `length` that is to be cut, is shorter than that itself.
    """
    found = [np.zeros(len(document), np.bool_) for document in documents]
    if not documents or not any(map(len, windows)):
        return found
    whole, starts = _joined(documents)
    held = np.zeros(len(whole), np.bool_)
    for run, rows in _by_run(windows, length).items():
        of_whole = _hashes(whole, run)
        for some in _in_parts(rows, run):
            known = np.unique(np.concatenate([_hashes(row, run) for row in some]))
            held |= _covered(np.flatnonzero(_contains(known, of_whole)), run, len(whole))
    return [held[start : start + len(document)] for start, document in zip(starts, documents, strict=True)]


def num_touching(windows: Tokens, others: Tokens) -> int:
    """How many of `windows` [num_windows, tokens] share text with any of `others`, as `taken` tells it."""
    return sum(bool(held.any()) for held in taken(list(windows), list(others), windows.shape[1]))


def num_repeats(windows: Tokens) -> int:
    """How many of `windows` [num_windows, tokens] are the same, token by token, as one before them."""
    return len(windows) - len({window.tobytes() for window in np.ascontiguousarray(windows)})


def stretches(held: Mask) -> list[tuple[int, int]]:
    """(start, end) of every stretch of False."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], held, [True]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _by_run(windows: Sequence[Tokens], length: int) -> dict[int, list[Tokens]]:
    """length of a run that tells -> the windows that it is looked for in."""
    found: dict[int, list[Tokens]] = {}
    for window in windows:
        if len(window):
            found.setdefault(min(SHARED_RUN, length, len(window)), []).append(window)
    return found


def _in_parts(rows: Sequence[Tokens], run: int) -> Iterator[list[Tokens]]:
    """All runs of so many tokens of the rows, in parts of about `_PART_TOKENS`: training text is long."""
    part: list[Tokens] = []
    size = 0
    for row in rows:
        for start in range(0, len(row) - run + 1, _PART_TOKENS):
            part.append(row[start : start + _PART_TOKENS + run - 1])
            size += len(part[-1])
            if size >= _PART_TOKENS:
                yield part
                part, size = [], 0
    if part:
        yield part


def _joined(documents: Sequence[Tokens]) -> tuple[Tokens, list[int]]:
    """All documents as one with borders between, and where each starts."""
    parts: list[Tokens] = []
    starts, at = [], 0
    for document in documents:
        starts.append(at)
        parts += [document, np.array([_BORDER], np.int32)]
        at += len(document) + 1
    return np.concatenate(parts), starts


def _hashes(tokens: Tokens, run: int) -> _Hashes:
    """A 64-bit hash of every run of so many tokens, by where it starts: a polynomial in an odd factor, modulo 2^64, of
    tokens that are scattered first. Runs are joined from runs of 1, 2, 4, ... tokens."""
    if len(tokens) < run:
        return np.zeros(0, np.uint64)
    part = (tokens.astype(np.int64).view(np.uint64) + np.uint64(2)) * np.uint64(_FACTOR)
    part = (part ^ (part >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    part ^= part >> np.uint64(32)
    length, factor = 1, _FACTOR  # of the parts, and its power
    found, found_length = np.zeros(len(tokens) + 1, np.uint64), 0
    while found_length < run:
        if run & length:
            found = found[: len(tokens) + 1 - found_length - length] * np.uint64(factor) + part[found_length:]
            found_length += length
        part = part[:-length] * np.uint64(factor) + part[length:]
        length, factor = 2 * length, factor * factor % 2**64
    return found


def _contains(ordered: _Hashes, wanted: _Hashes) -> Mask:
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    found: Mask = ordered[at] == wanted
    return found


def _covered(starts: NDArray[np.intp], run: int, size: int) -> Mask:
    """The positions that runs from these starts cover."""
    steps = np.zeros(size + 1, np.int64)
    steps[starts] += 1
    np.subtract.at(steps, starts + run, 1)
    covered: Mask = np.cumsum(steps[:-1]) > 0
    return covered
