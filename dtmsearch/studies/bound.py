"""How near SDT comes to its bound, and why perplexity bounds nothing ("Divergent Token Metrics", arXiv 2311.01544,
section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtmsearch.analysis.findings import Axis, Findings, FoundTable, Picture, Row
from dtmsearch.core.metric_registry import perplexity, share_of_divergent_tokens
from dtmsearch.errors import UserError
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.ladders import rungs
from dtmsearch.studies.study import PartRun, Study

Logits = NDArray[np.float64]


@dataclass(frozen=True)
class SamePerplexity:
    """Two models' logits [positions, vocabulary] over a text, their perplexities on it, and how many of the first
    one's greedy tokens diverge under the second."""

    logits: Logits
    others: Logits
    perplexities: tuple[float, float]
    divergent: int


def same_perplexity(text: NDArray[np.int64], vocabulary: int, seed: int = 0, tie: float = 1e-6) -> SamePerplexity:
    """Proposition 3.2 as an example: for any text there are two models of one perplexity on it whose greedy tokens
    differ at every position. The two likeliest tokens of each position, neither of them the text's, lie `tie` nats
    apart and change places. Raises `UserError` for a vocabulary of less than 3 tokens."""
    if vocabulary < 3:
        raise UserError(f"two tokens beside the text's change places: a vocabulary of 3 is wanted, got {vocabulary}")
    random = np.random.default_rng(seed)
    logits = random.normal(size=(len(text), vocabulary))
    at = np.arange(len(text))
    first = (text + 1 + random.integers(vocabulary - 2, size=len(text))) % vocabulary
    second = next_of(first, text, vocabulary)
    top = logits.max(axis=1) + 1.0
    logits[at, first], logits[at, second] = top + tie, top
    others = logits.copy()
    others[at, first], others[at, second] = logits[at, second], logits[at, first]
    both = tuple(float(perplexity(_nats(each, text)[None].astype(np.float32))[0]) for each in (logits, others))
    chosen = logits.argmax(axis=1) != others.argmax(axis=1)
    divergent = int(share_of_divergent_tokens(chosen[None])[0])
    return SamePerplexity(logits, others, (both[0], both[1]), divergent)


def next_of(first: NDArray[np.int64], text: NDArray[np.int64], vocabulary: int) -> NDArray[np.int64]:
    """At each position the first token after `first`, around the vocabulary, that is not the text's."""
    following = (first + 1) % vocabulary
    return np.where(following == text, (following + 1) % vocabulary, following)


def _nats(logits: Logits, text: NDArray[np.int64]) -> Logits:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: Logits = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(text)), text]
    return found


def conclude(store: ResultStore, parts: Sequence[PartRun]) -> Findings:
    """The bound of every plan of the ladder, prompt by prompt."""
    (part,) = parts
    length = part.file.prompts.continuation_tokens
    _, ladder = rungs(store, part)
    rows, broken, count = [], 0, 0
    points: list[Row] = []
    for rung in ladder:
        sdt = rung.found.values("sdt")
        bound = length * rung.found.values("dppl") / math.log(2.0)
        # DPPL is kept in single precision.
        broken += int((sdt > np.minimum(bound, length) * (1 + 1e-5) + 1e-4).sum())
        count += len(sdt)
        kl = float(rung.found.values("kl").mean())
        ratio = sdt.mean() / bound.mean()
        rows.append((rung.name, f"{kl:.2g}", f"{sdt.mean():.2f}", f"{bound.mean():.1f}", f"{ratio:.3f}"))
        points.append({"plan": rung.name, "kind": rung.kind, "sdt": float(sdt.mean()), "bound": float(bound.mean())})
    held = "holds on every one" if not broken else f"is broken on {broken}"
    low, high = min(float(row[4]) for row in rows), max(float(row[4]) for row in rows)
    example = same_perplexity(np.arange(length) % 50, 50)
    said = (
        f"SDT <= (N - n) log2(DPPL) {held} of {count:,} prompts under {len(ladder)} plans. SDT is {low:.3f} to "
        f"{high:.3f} of the bound: DPPL counts the base model's own uncertainty, which the bound cannot tell from "
        "divergence, so it says least where plans are mild.",
        f"Perplexity on human text bounds nothing: the construction of Proposition 3.2 gives perplexities of "
        f"{example.perplexities[0]:.6f} and {example.perplexities[1]:.6f} on one text, with {example.divergent} of "
        f"{length} greedy tokens different.",
    )
    table = FoundTable(
        "SDT and its bound, means over prompts",
        ("plan", "KL", "SDT", "bound", "SDT / bound"),
        tuple(rows),
        "KL in nats per token, SDT and its bound in tokens of a prompt. A bound above the length of the continuation "
        f"({length}) says nothing.",
    )
    drawn = [point for point in points if point["sdt"] > 0]
    if not drawn:
        return Findings((*said, "No plan diverged on any prompt: take harder schemes or more prompts."), (table,), ())
    ends = [min(point["sdt"] for point in drawn), max(point["sdt"] for point in drawn)]
    picture = Picture(
        "sdt-and-bound",
        "dots",
        drawn,
        Axis("bound", "bound on SDT (tokens of a prompt)", logarithmic=True),
        Axis("sdt", "SDT (tokens of a prompt)", logarithmic=True),
        "SDT of plans against its bound from DPPL; on the dashed line they would be equal",
        series="kind",
        marks=[{"x": end, "y": end} for end in ends],
    )
    return Findings(said, (table,), (picture,))


STUDY = Study(
    "bound",
    "SDT and its bound by DPPL",
    "How near does the number of divergent tokens come to its bound (N - n) log2(DPPL), and does perplexity bound it?",
    conclude,
)
