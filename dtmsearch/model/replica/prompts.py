"""Text -> prompt tokens: windows of documents, drawn by seed, and apart from windows that others hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.documents import Document, Mixed, Texts
from dtmsearch.core.evaluation import IntArray, PromptTokens
from dtmsearch.core.vocabulary import check_known
from dtmsearch.core.windows import Supply, TooLittleText, stretches, taken
from dtmsearch.errors import UserError
from dtmsearch.model.replica.tokenizing import tokens_of_each

# Short texts that every vocabulary can say one of: they show what a tokenizer puts around a text.
_SAMPLES = ("0", "a", " the")
_LEFT_OUT = "begin no prompt"  # of answers, in notes


@dataclass(frozen=True)
class Windows:
    """`tokens` [windows, length] of human text, and what else the text held. `notes` say, for a person, what of the
    text is not in them; `held`, where they are too few, how many there are of which text."""

    tokens: IntArray
    supply: Supply
    notes: tuple[str, ...] = ()
    held: str = ""


def check_context(num_tokens: int, keys: str, context: int | None, model: str) -> None:
    """Raises `UserError` where what `keys` of a search file ask for is longer than the model reads."""
    if context is not None and num_tokens > context:
        raise UserError(f"{keys} is {num_tokens}, but {model} reads {context} at most")


def _beside_others(supply: Supply) -> str:
    if not supply.num_taken:
        return ""
    return f" beside what other windows hold ({supply.num_taken:,} of its {supply.num_tokens:,} tokens)"


class Cutter:
    """Cuts texts as a replica of the model does, with its tokenizer alone. `context` is what the model at `path` reads
    at most, `num_embeddings` how many tokens it knows; None where that is not known."""

    def __init__(
        self, tokenizer: Any, path: str, context: int | None = None, num_embeddings: int | None = None
    ) -> None:
        self._tokenizer, self._path, self._context, self._num_embeddings = tokenizer, path, context, num_embeddings

    def prompts(
        self,
        texts: Texts,
        count: int,
        prompt_tokens: int,
        continuation_tokens: int,
        seed: int,
        apart_from: Sequence[IntArray] = (),
        key: str = "prompts.count",
    ) -> PromptTokens:
        """`count` windows of prompt_tokens + continuation_tokens tokens; see `cut_windows`. Raises `TooLittleText`,
        which names the search file's `key`, and `UserError` for prompts that are longer than the model reads."""
        length = prompt_tokens + continuation_tokens
        check_context(length, "prompt_tokens + continuation_tokens", self._context, self._path)
        windows = self._windows(texts, count, length, seed, apart_from, prompt_tokens)
        if len(windows.tokens) < count:
            raise TooLittleText(
                f"{key} asks for {count} prompts of {prompt_tokens} + {continuation_tokens} tokens, but {windows.held} "
                f"of that length{_beside_others(windows.supply)}: give more text, or a smaller count, prompt_tokens or "
                f"continuation_tokens{''.join(f' ({note})' for note in windows.notes if _LEFT_OUT in note)}"
            )
        return PromptTokens(windows.tokens, prompt_tokens, windows.notes, windows.supply)

    def documents(self, texts: Texts) -> list[IntArray]:
        """The tokens of whole texts, with nothing put around them, each one row [1, tokens]: what prompts can be cut
        apart from."""
        parts = texts.parts if isinstance(texts, Mixed) else (texts,)
        return [each.ids.reshape(1, -1) for part in parts for each in tokens_of_each(self._tokenizer, part)]

    def calibration(self, texts: Texts, count: int, tokens: int, seed: int) -> IntArray:
        """`count` windows of `tokens` tokens; see `cut_windows`. Raises `TooLittleText`, and `UserError` for rows that
        are longer than the model reads."""
        check_context(tokens, "calibration.tokens", self._context, self._path)
        windows = self._windows(texts, count, tokens, seed)
        if len(windows.tokens) < count:
            raise TooLittleText(
                f"calibration.count asks for {count} rows of {tokens} tokens, but {windows.held} of that length: give "
                "more text, or a smaller calibration.count or calibration.tokens"
            )
        return windows.tokens

    def _windows(
        self,
        texts: Texts,
        count: int,
        length: int,
        seed: int,
        apart_from: Sequence[IntArray] = (),
        prompt_tokens: int = 0,
    ) -> Windows:
        """`prompt_tokens`: where the assistant's answers shall begin in windows of conversations; 0: anywhere."""
        further = self._num_embeddings, apart_from, prompt_tokens
        if not isinstance(texts, Mixed):
            return cut_windows(texts, self._tokenizer, count, length, seed, *further)
        turns = texts.turns(count)
        parts: list[Windows] = []
        for number, documents in enumerate(texts.parts):
            apart = (*apart_from, *(part.tokens for part in parts))  # several may name one text
            wanted = turns.count(number)
            parts.append(
                cut_windows(
                    documents, self._tokenizer, wanted, length, seed, self._num_embeddings, apart, prompt_tokens
                )
            )
        return _in_turns(parts, turns)


def _in_turns(parts: Sequence[Windows], turns: Sequence[int]) -> Windows:
    """The windows of several texts, each as its turn comes, until a text has none left."""
    rows = [iter(part.tokens) for part in parts]
    cut, held = [], ""
    for part in turns:
        row = next(rows[part], None)
        if row is None:
            number, wanted = len(parts[part].tokens), turns.count(part)
            held = f"of the mixture's texts number {part + 1}, whose share is {wanted}, holds {number}"
            break
        cut.append(row)
    figures = [[getattr(part.supply, each.name) for part in parts] for each in fields(Supply)]
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    windows = np.array(cut, np.int32).reshape(-1, parts[0].tokens.shape[1])
    return Windows(windows, Supply(*map(sum, figures)), notes, held)


def cut_windows(
    texts: Sequence[Document],
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    vocabulary_size: int | None = None,
    apart_from: Sequence[IntArray] = (),
    prompt_tokens: int = 0,
) -> Windows:
    """`count` windows of `length` tokens, none overlapping, drawn from `texts` by `seed`; all where there are fewer.

    Every document is cut into whole windows; the rest at its end is left out. A tokenizer that opens texts with a
    token of its own opens every window with it, once; one that closes texts closes none. Where a text has such tokens
    itself, a document ends and another begins, whose windows all open with the begin token that it has. A larger
    `count` extends a smaller one, and windows that repeat another's tokens come after all that do not.

    A conversation is written by the chat template, and its windows open as those of text do. With `prompt_tokens` they
    are those in which one of the assistant's answers begins after so many tokens, else any; they open with the system's
    text, where it takes no more than half of these, and go on with what was said last, as a server cuts them.

    No window holds text of `apart_from` ([num_windows, tokens] each, as `taken` tells it): documents are cut from where
    that ends. Raises `UserError` for tokens that a model of `vocabulary_size` embeddings lacks.
    """
    opening, closing = around(tokenizer)
    begin, borders = getattr(tokenizer, "bos_token_id", None), _borders(tokenizer, opening, closing)
    num_borders = num_answers = num_left_out = num_long = 0
    pieces: list[_Piece] = []
    for found in tokens_of_each(tokenizer, texts):
        tokens = found.ids
        if vocabulary_size is not None:
            check_known(tokens, vocabulary_size, tokenizer.convert_ids_to_tokens)
        if found.is_conversation:
            # What the template opens a conversation with, every window is opened with.
            written = len(opening) if tokens[: len(opening)].tolist() == list(opening) else 0
            opens, first = opening, written
            if prompt_tokens and found.system:
                with_system = [*(() if written else opening), *tokens[: found.system].tolist()]
                if 2 * len(with_system) <= prompt_tokens:
                    opens, first = with_system, found.system
                else:
                    num_long += 1
            before = first + prompt_tokens - len(opens)
            starts = tuple(at - before for at in found.answers) if prompt_tokens else None
            pieces.append(_Piece(tokens[first:], opens, starts, max(found.head - first, 0)))
            num_answers += len(found.answers) + found.num_left_out
            num_left_out += found.num_left_out
            continue
        at_border = np.isin(tokens, list(borders))
        if not at_border.any():  # of the many rows of a data set nearly all
            pieces.append(_Piece(tokens, opening))
            continue
        num_borders += int(at_border.sum())
        for document in np.split(tokens, np.flatnonzero(at_border)):
            own = document[:1].tolist() if begin != getattr(tokenizer, "eos_token_id", None) else []
            text_tokens = document[~np.isin(document, list(borders))]
            pieces.append(_Piece(text_tokens, opening or (own if own == [begin] else [])))
    others = [
        row if _has_conversations(pieces) else row[~np.isin(row, list(borders))] for rows in apart_from for row in rows
    ]
    of_own = taken([piece.tokens[piece.head :] for piece in pieces], others, length)
    held = [np.concatenate([np.zeros(p.head, np.bool_), mask]) for p, mask in zip(pieces, of_own, strict=True)]
    windows = _joined(piece.windows(mask, length) for piece, mask in zip(pieces, held, strict=True))
    windows = windows.reshape(-1, length)
    order, num_distinct = _repeats_last(windows, np.random.default_rng(seed).permutation(len(windows)))
    supply = Supply(
        len(windows), num_distinct, sum(len(p.tokens) for p in pieces), sum(int(mask.sum()) for mask in held)
    )
    notes = _notes(tokenizer, closing, borders, num_borders)
    if num_left_out:
        notes += (
            f"{num_left_out} of {num_answers} answers {_LEFT_OUT}: with them there, the chat template writes what was "
            "said before otherwise",
        )
    if num_long:
        notes += (
            f"the system's text takes more than half of prompt_tokens in {num_long} conversations, whose prompts hold "
            "the last of it only if at all: a larger prompt_tokens keeps it",
        )
    return Windows(windows[order[:count]], supply, notes, f"the text holds {len(windows)}")


def _has_conversations(pieces: Sequence[_Piece]) -> bool:
    return any(piece.starts is not None or piece.head for piece in pieces)


def _joined(parts: Iterable[NDArray[np.int32]]) -> NDArray[np.int32]:
    found = [part.reshape(-1) for part in parts if part.size]
    return np.concatenate(found) if found else np.empty(0, np.int32)


@dataclass(frozen=True)
class _Piece:
    """A document, or what of it stands between borders: its tokens, those that open each of its windows, where windows
    may begin (None: wherever one ends), and how many tokens at its begin are not its own."""

    tokens: NDArray[np.int32]
    opening: Sequence[int]
    starts: tuple[int, ...] | None = None
    head: int = 0

    def windows(self, held: NDArray[np.bool_], length: int) -> NDArray[np.int32]:
        """Its windows [windows, length], outside of what others have `held`."""
        if self.starts is not None:
            return self._at_starts(held, length)
        if len(self.tokens) + len(self.opening) < length:
            return np.empty((0, length), np.int32)
        found = [_cut(self.tokens[start:end], self.opening, length) for start, end in stretches(held)]
        return np.concatenate(found) if found else np.empty((0, length), np.int32)

    def _at_starts(self, held: NDArray[np.bool_], length: int) -> NDArray[np.int32]:
        assert self.starts is not None
        found, before = [], 0
        for start in self.starts:
            end = start + length - len(self.opening)
            if before <= start < end <= len(self.tokens) and not held[start:end].any():
                found.append([*self.opening, *self.tokens[start:end].tolist()])
                before = end
        return np.array(found, np.int32).reshape(-1, length)


def _repeats_last(windows: NDArray[np.int32], order: NDArray[np.int64]) -> tuple[list[int], int]:
    """An order of windows with those behind that repeat one before them, and how many repeat none."""
    first: list[int] = []
    again: list[int] = []
    seen: set[bytes] = set()
    for i in order.tolist():
        content = blake2b(windows[i].tobytes(), digest_size=16).digest()
        (again if content in seen else first).append(i)
        seen.add(content)
    return first + again, len(first)


def _cut(tokens: NDArray[np.int32], opening: Sequence[int], length: int) -> NDArray[np.int32]:
    body = length - len(opening)
    if body < 1:
        raise UserError(
            f"windows of {length} tokens hold nothing of the text: each is opened by {len(opening)} of the tokenizer's "
            "own. Ask for more prompt_tokens"
        )
    count = len(tokens) // body
    cut = tokens[: count * body].reshape(count, body)
    return np.hstack([np.tile(np.array(opening, np.int32), (count, 1)), cut]) if opening else cut


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before a text and after it."""
    for sample in _SAMPLES:
        bare = list(tokenizer(sample, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(sample)["input_ids"])
        for at in range(len(whole) - len(bare) + 1):
            if bare and whole[at : at + len(bare)] == bare:
                return whole[:at], whole[at + len(bare) :]
    return [], []


def _borders(tokenizer: Any, opening: Sequence[int], closing: Sequence[int]) -> set[int]:
    """The tokens at which one document of a text ends, or another begins.

    An end that the chat template writes is none: it ends a turn, and the conversation goes on.
    """
    begin, end = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    borders = {begin, *opening, *closing, None if end is None or _ends_turns(tokenizer) else end}
    return {token for token in borders if token is not None}


def _ends_turns(tokenizer: Any) -> bool:
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return "eos_token" in template or str(tokenizer.eos_token) in template


def _notes(tokenizer: Any, closing: Sequence[int], borders: Collection[int], num_borders: int) -> tuple[str, ...]:
    notes = []
    if closing:
        notes.append(f"the tokenizer ends texts with {_named(tokenizer, closing)}: prompts are cut without it")
    if num_borders:
        notes.append(
            f"the text has {_named(tokenizer, borders)} in it, {num_borders} in all: a document ends there, and what "
            "begins a text stands once, at the begin of a prompt"
        )
    return tuple(notes)


def _named(tokenizer: Any, ids: Collection[int]) -> str:
    return ", ".join(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids)))
