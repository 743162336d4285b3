"""The documents that prompts are cut from: text, conversations, and mixtures of several texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtmsearch.errors import UserError

# What data sets call the columns of a conversation, the fields of a message, and the roles.
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
_ROLE_FIELDS, _TEXT_FIELDS = ("role", "from"), ("content", "value", "text")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Conversation:
    """Messages as (role, text), which a model's chat template writes."""

    messages: tuple[tuple[str, str], ...]


Document = str | Conversation


@dataclass(frozen=True)
class Mixed:
    """Several texts, each of documents; of every text as many prompts as its weight's share."""

    parts: tuple[Sequence[Document], ...]
    weights: tuple[float, ...]

    def turns(self, count: int) -> list[int]:
        """The part of each of `count` prompts: the one that is furthest behind its share, so that more prompts extend
        fewer."""
        whole, taken = sum(self.weights), [0] * len(self.weights)
        order = []
        for number in range(1, count + 1):
            behind = [weight / whole * number - had for weight, had in zip(self.weights, taken, strict=True)]
            part = max(range(len(behind)), key=behind.__getitem__)
            taken[part] += 1
            order.append(part)
        return order


Texts = Sequence[Document] | Mixed


def conversation_of(row: Mapping[str, Any], place: str) -> Conversation:
    """The conversation in a row of a data set. Raises `UserError` that begins with `place` where there is none."""
    column = next((name for name in MESSAGE_COLUMNS if row.get(name) is not None), None)
    found = None if column is None else row[column]
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise UserError(
            f"{place} holds no conversation: a column {' or '.join(map(repr, MESSAGE_COLUMNS[:2]))} should be a list "
            f"of messages; its columns are {', '.join(map(str, row))[:200]}"
        )
    messages = []
    for message in found:
        role = _first(message, _ROLE_FIELDS)
        if not isinstance(role, str):
            raise UserError(f"{place} has a message without a role: its fields should be role and content")
        messages.append((_ROLES.get(role.lower(), role.lower()), _text(_first(message, _TEXT_FIELDS))))
    return Conversation(tuple(messages))


def _first(message: Any, names: Sequence[str]) -> Any:
    given = message if isinstance(message, Mapping) else {}
    return next((given[name] for name in names if given.get(name) is not None), None)


def _text(content: Any) -> str:
    """A message's text; of one in parts, those of text."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "".join(_text(_first(part, ("text", "content"))) for part in content)
    return content if isinstance(content, str) else ""
