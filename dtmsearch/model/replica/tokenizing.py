"""A document -> its tokens: long texts in pieces, conversations by the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.documents import ASSISTANT, Conversation, Document
from dtmsearch.errors import UserError

Ids = NDArray[np.int32]

# Characters of a piece of a long text, and how many pieces are tokenized at a time, one a core: a tokenizer takes some
# 600 bytes for each token until it is done.
_PIECE, _OVERLAP = 1 << 17, 1 << 12
_AT_A_TIME = 16
# Tokens in a row that two pieces must have alike where one goes over into the other.
_ALIKE = 64


@dataclass(frozen=True)
class Tokens:
    """A document's tokens. Of a conversation, where each of the assistant's answers begins (`answers`), how many are
    left out because the template writes what precedes them otherwise once they are there (`num_left_out`), and how many
    tokens at its begin others may share, for they are the template's and the system's (`head`; `system` is that number
    where the conversation has a system text, else 0)."""

    ids: Ids
    answers: tuple[int, ...] = ()
    num_left_out: int = 0
    head: int = 0
    system: int = 0
    is_conversation: bool = False


def tokens_of(tokenizer: Any, document: Document) -> Tokens:
    """The tokens of a document, with nothing put around them. Raises `UserError` for a conversation where the tokenizer
    has no chat template, or one that refuses it."""
    if isinstance(document, Conversation):
        return _of_conversation(tokenizer, document)
    if len(document) <= _PIECE or not getattr(tokenizer, "is_fast", False):
        return Tokens(_ids(tokenizer, document))
    return Tokens(_in_pieces(tokenizer, document))


def tokens_of_each(tokenizer: Any, documents: Iterable[Document]) -> Iterator[Tokens]:
    """`tokens_of` each document; short texts, as the rows of data sets are, many at a time."""
    if not getattr(tokenizer, "is_fast", False):
        yield from (tokens_of(tokenizer, document) for document in documents)
        return
    short: list[str] = []
    size = 0
    for document in documents:
        length = len(document) if isinstance(document, str) else _PIECE + 1
        if size + length > _PIECE:
            yield from _together(tokenizer, short)
            short, size = [], 0
        if isinstance(document, str) and length <= _PIECE:
            short.append(document)
            size += length
        else:
            yield tokens_of(tokenizer, document)
    yield from _together(tokenizer, short)


def _together(tokenizer: Any, texts: list[str]) -> Iterator[Tokens]:
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return (Tokens(np.array(ids, np.int64).astype(np.int32)) for ids in found)


def _ids(tokenizer: Any, text: str) -> Ids:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64).astype(np.int32)


def _in_pieces(tokenizer: Any, text: str) -> Ids:
    """The tokens of a long text, some pieces at a time. Pieces overlap, and one goes over into the next in the middle
    of a run of tokens that both have at the same characters; where there is none, the whole text is tokenized at
    once."""
    starts = [0, *range(_PIECE - _OVERLAP, len(text) - _OVERLAP, _PIECE - _OVERLAP)]
    found: list[Ids] = []
    before = 0  # tokens that begin before this character stand in `found`
    for first in range(0, len(starts), _AT_A_TIME):
        some = starts[first : first + _AT_A_TIME]
        pieces = _placed(tokenizer, text, some, _PIECE)
        seams = _placed(tokenizer, text, [start + _PIECE - _OVERLAP for start in some], 2 * _OVERLAP)
        for start, (ids, places), seam in zip(some, pieces, seams, strict=True):
            own = int(np.searchsorted(places, before)) if start else 0
            if start == starts[-1]:
                return np.concatenate([*found, ids[own:]])
            border = _border(ids, places, *seam)
            if border is None:
                return _ids(tokenizer, text)
            found.append(ids[own : int(np.searchsorted(places, border))])
            before = border
    raise AssertionError("a text has a last piece")


def _placed(tokenizer: Any, text: str, starts: list[int], length: int) -> list[tuple[Ids, NDArray[np.int64]]]:
    """Of each piece of that many characters, by where it begins: its tokens, and the characters at which they
    begin."""
    pieces = [text[start : start + length] for start in starts]
    made = tokenizer(pieces, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return [
        (np.array(ids, np.int64).astype(np.int32), np.array(offsets, np.int64).reshape(-1, 2)[:, 0] + start)
        for start, ids, offsets in zip(starts, made["input_ids"], made["offset_mapping"], strict=True)
    ]


def _border(ids: Ids, places: NDArray[np.int64], others: Ids, at: NDArray[np.int64]) -> int | None:
    """A character at which a token of both pieces begins, `_ALIKE` tokens alike around it."""
    if not len(at):
        return None
    first = int(np.searchsorted(places, at[0]))
    tail, tail_places = ids[first:], places[first:]
    for ours in range(len(tail) - _ALIKE):
        theirs = int(np.searchsorted(at, tail_places[ours]))
        if theirs + _ALIKE > len(others):
            return None
        same_ids = np.array_equal(tail[ours : ours + _ALIKE], others[theirs : theirs + _ALIKE])
        if same_ids and np.array_equal(tail_places[ours : ours + _ALIKE], at[theirs : theirs + _ALIKE]):
            middle = ours + _ALIKE // 2
            # Several tokens of one character begin at the same place: the border is the first of these.
            while middle > ours and tail_places[middle] == tail_places[middle - 1]:
                middle -= 1
            return int(tail_places[middle])
    return None


def _of_conversation(tokenizer: Any, conversation: Conversation) -> Tokens:
    messages = [{"role": role, "content": text} for role, text in conversation.messages]
    if not messages:
        return Tokens(np.empty(0, np.int32), is_conversation=True)
    whole = _written(tokenizer, messages)
    turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT and number]
    begins = [_answer(tokenizer, messages, number, whole) for number in turns]
    answers = tuple(begin for begin in begins if begin is not None)
    system = [message for message in messages[:1] if message["role"] == "system"]
    other = _written(tokenizer, [*system, {"role": "user", "content": "0"}])
    head = _num_alike(other, whole)
    return Tokens(whole, answers, len(turns) - len(answers), head, head if system else 0, is_conversation=True)


def _answer(tokenizer: Any, messages: list[dict[str, str]], number: int, whole: Ids) -> int | None:
    """Where message `number` begins in the tokens of all: after what the template writes for an answer to come, as far
    as that stands there, for it may open a thought that no finished answer keeps. None where what was said before is
    written otherwise now."""
    before = _written(tokenizer, messages[:number])
    prompt = _written(tokenizer, messages[:number], add_generation_prompt=True)
    alike = _num_alike(prompt, whole)
    return alike if alike >= min(len(before), len(prompt)) else None


def _num_alike(one: Ids, other: Ids) -> int:
    """How many tokens two texts have in common at their begins."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _written(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> Ids:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("chat: true needs a chat template, and the model's tokenizer has none: give plain text")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template raises what it likes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        roles = ", ".join(message["role"] for message in messages)[:200]
        raise UserError(f"the model's chat template refuses a conversation of {roles}: {reason}") from error
    return _ids(tokenizer, text)
