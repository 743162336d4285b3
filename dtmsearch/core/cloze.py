"""Multiple-choice questions made of text: which of several tokens goes on from here? Knows tokens only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
# `passage`: what follows, among what follows elsewhere; the context decides, so that it is easy. `near`: among other
# stretches of the same window. `word`: one rare token, such as a name, among others as rare; it has to be known.
QuestionKind = Literal["passage", "near", "word"]
KINDS: tuple[QuestionKind, ...] = ("passage", "near", "word")
CHOICES = 4
# Tokens of a choice, but for `word`, which has one.
SPAN = 6


@dataclass(frozen=True)
class Questions:
    """`rows` [questions x choices, context + span]: a context and one of its choices, the right one first; `context` is
    how many tokens come before a choice."""

    kind: QuestionKind
    rows: IntArray
    context: int

    @property
    def num_questions(self) -> int:
        return len(self.rows) // CHOICES


def questions_of(kind: QuestionKind, windows: IntArray, context: int, seed: int = 0) -> Questions:
    """A question from each of `windows` [windows, tokens], whose right answer is what the text has, but for those of
    which a wrong choice would be the right one again (text that repeats itself): there is nothing to tell. Raises
    `ValueError` for windows of less than `context` + 3 x `SPAN` tokens, or fewer than `CHOICES` of them."""
    count, length = windows.shape
    if count < CHOICES or length < context + 3 * SPAN:
        raise ValueError(f"{CHOICES} windows of {context + 3 * SPAN} tokens are wanted, got {count} of {length}")
    random = np.random.default_rng((seed, KINDS.index(kind)))
    if kind == "word":
        return _words(windows, context, random)
    right = windows[:, context : context + SPAN]
    if kind == "passage":
        # Shifts by less than all windows, so that no question has its own answer twice.
        shifts = 1 + random.permutation(count - 1)[: CHOICES - 1]
        wrong = [np.roll(right, shift, axis=0) for shift in shifts]
    else:
        starts = [context + SPAN, context + 2 * SPAN, context - SPAN]
        wrong = [windows[:, start : start + SPAN] for start in starts]
    return _asked(kind, windows[:, :context], [right, *wrong], context)


def _words(windows: IntArray, context: int, random: np.random.Generator) -> Questions:
    """The rarest token of each window behind its context, beside the answers nearest to it in number in the text."""
    counts = np.bincount(windows.reshape(-1))
    places = context + counts[windows[:, context:]].argmin(axis=1)
    right = np.take_along_axis(windows, places[:, None], axis=1)[:, 0]
    before = np.stack([row[place - context : place] for row, place in zip(windows, places, strict=True)])
    others = np.unique(right)
    others = others[np.argsort(counts[others] + random.random(len(others)))]  # equals in an order by chance
    rank = {int(token): at for at, token in enumerate(others)}
    wrong = np.empty((len(right), CHOICES - 1), np.int32)
    for row, token in enumerate(right.tolist()):
        near = sorted((abs(at - rank[token]), at) for at in range(len(others)) if at != rank[token])
        chosen = [int(others[at]) for _, at in near[: CHOICES - 1]]
        wrong[row] = (chosen + chosen[:1] * CHOICES)[: CHOICES - 1] if chosen else token
    return _asked("word", before, [right[:, None], *(wrong[:, at : at + 1] for at in range(CHOICES - 1))], context)


def _asked(kind: QuestionKind, before: IntArray, choices: list[IntArray], context: int) -> Questions:
    right, *wrong = choices
    tells = np.all([(choice != right).any(axis=1) for choice in wrong], axis=0)
    rows = np.stack([np.concatenate([before, choice], axis=1) for choice in choices], axis=1)[tells]
    return Questions(kind, rows.reshape(-1, rows.shape[2]).astype(np.int32), context)


def answers_of(nats: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which choice a model gives [questions], from the mean nats of each row [questions x choices]; 0 is right."""
    answers: NDArray[np.int64] = nats.reshape(-1, CHOICES).argmin(axis=1)
    return answers
