"""A model behind a server that speaks the OpenAI completions API: what it generates from token ids, and how likely it
finds tokens, as far as it tells.

Servers differ in what they tell. `prompt_logprobs` (vLLM) and `echo` give the likeliest tokens at every position of a
prompt in one request; of others that name tokens by id (llama.cpp) each position is a request of its own; of the rest
only text is known. Knows nothing of what is compared with what.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from dtmsearch.core.evaluation import IntArray
from dtmsearch.core.positions import Likeliest
from dtmsearch.errors import UserError
from dtmsearch.workflows.server_requests import (
    Failed,
    Progress,
    Refused,
    Served,
    Tells,
    ask_all,
    complete,
    get,
    post,
    require_completion,
)

_TOKEN_ID = "token_id:"  # noqa: S105 - as servers write a token by its id
# What the first OpenAI servers gave at most; newer ones give 20.
_FEWER_TOP = 20, 10, 5


@dataclass(frozen=True)
class Generated:
    """A greedy continuation: its tokens where the server names them by id, and its text."""

    text: str
    tokens: tuple[int, ...] | None


def is_url(name: str) -> bool:
    """Whether BASE or OTHER is a server."""
    return name.startswith(("http://", "https://"))


def connect(name: str, timeout_seconds: float, top: int) -> Served:
    """The model at `URL` or `URL#MODEL`, and what its server tells. Raises `ServerUnreachable`, and `UserError` for a
    server that has no such model or does not complete token ids."""
    url, _, wanted = name.partition("#")
    url = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
    found = Served(url, wanted, timeout_seconds)
    listed = get(found, "models").get("data")
    models = [each for each in listed if isinstance(each, dict) and "id" in each] if isinstance(listed, list) else []
    names = [str(each["id"]) for each in models]
    if wanted and names and wanted not in names:
        raise UserError(f"{url} serves no model {wanted!r}; it serves {', '.join(names)}")
    if not wanted and len(names) != 1:
        said = f"several models ({', '.join(names)})" if names else "no list of models"
        raise UserError(f"{url} has {said}: name one as {url}#MODEL")
    model = next((each for each in models if each["id"] == (wanted or names[0])), {})
    meta = model.get("meta") if isinstance(model.get("meta"), dict) else {}
    context = model.get("max_model_len") or (meta or {}).get("n_ctx")
    found = replace(
        found,
        model=wanted or names[0],
        context=context if isinstance(context, int) else None,
        root=str(model.get("root") or ""),
    )
    return _probed(found, top)


# How it tells probabilities.


def _probed(served: Served, top: int) -> Served:
    """What the server makes of a short prompt under each way of asking."""
    row = [1, 2, 3]
    numbers = sorted({top, *(fewer for fewer in _FEWER_TOP if fewer < top)}, reverse=True)
    ways: tuple[tuple[Tells, str, Mapping[str, Any]], ...] = (
        ("prompt_logprobs", "prompt_logprobs", {}),
        ("echo", "logprobs", {"echo": True, "return_tokens_as_token_ids": True}),
        ("next", "logprobs", {}),
    )
    for (tells, key, further), number in product(ways, numbers):
        with contextlib.suppress(Refused, Failed):  # a parameter that it does not know may be its error, or ours
            choice = complete(served, row, 1, {key: number, **further})
            if _read(tells, choice, row, 1) is not None:
                return replace(served, tells=tells, top=number)
    try:
        complete(served, row, 1, {})
    except Refused as refused:
        raise UserError(f"{served.url} does not complete token ids: {refused}") from None
    return served


def _read_prompt_logprobs(choice: Mapping[str, Any], row: Sequence[int], first: int) -> list[dict[int, float]] | None:
    found = choice.get("prompt_logprobs")
    if not isinstance(found, list) or len(found) != len(row):
        return None
    return [
        {int(token): float(entry["logprob"]) for token, entry in position.items()} if position else {}
        for position in found[first:]
    ]


def _read_echo(choice: Mapping[str, Any], row: Sequence[int], first: int) -> list[dict[int, float]] | None:
    told = choice.get("logprobs")
    if not isinstance(told, dict) or not isinstance(told.get("top_logprobs"), list):
        return None
    tokens, top, own = told.get("tokens") or [], told["top_logprobs"], told.get("token_logprobs") or []
    if min(len(tokens), len(top), len(own)) < len(row) or not str(tokens[0]).startswith(_TOKEN_ID):
        return None
    if [_id_of(token) for token in tokens[: len(row)]] != list(row):
        return None
    positions = []
    for at in range(first, len(row)):
        likeliest = {_id_of(token): float(value) for token, value in (top[at] or {}).items()}
        positions.append(likeliest | ({row[at]: float(own[at])} if own[at] is not None else {}))
    return positions


def _read_next(choice: Mapping[str, Any], row: Sequence[int], first: int) -> list[dict[int, float]] | None:
    """The likeliest next tokens, by id (llama.cpp's form)."""
    told = choice.get("logprobs")
    content = told.get("content") if isinstance(told, dict) else None
    if not isinstance(content, list) or not content:
        return None
    top = content[0].get("top_logprobs") or []
    if not top or "id" not in top[0]:
        return None
    return [{int(each["id"]): float(each["logprob"]) for each in top}]


_READ: Mapping[str, Callable[[Mapping[str, Any], Sequence[int], int], list[dict[int, float]] | None]] = {
    "prompt_logprobs": _read_prompt_logprobs,
    "echo": _read_echo,
    "next": _read_next,
}


def _read(tells: Tells, choice: Mapping[str, Any], row: Sequence[int], first: int) -> list[dict[int, float]] | None:
    """What an answer tells in a way of telling; None where it does not, or in another form."""
    try:
        return _READ[tells](choice, row, first)
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def _id_of(token: str) -> int:
    return int(str(token).removeprefix(_TOKEN_ID))


def likeliest(served: Served, rows: IntArray, first: int, threads: int, on_done: Progress) -> Likeliest:
    """The likeliest tokens at each position of `rows` [num_prompts, tokens] from `first` on, the row's own token always
    among them where the server tells it. Raises `UserError` for a server that tells none."""
    num_rows, length = rows.shape
    if served.tells == "next":
        wanted = [(row, at) for row in range(num_rows) for at in range(first, length)]
        asked = [rows[row, :at].tolist() for row, at in wanted]
        answers = ask_all(partial(_next_of, served), asked, threads, on_done)
        found = [answers[start : start + length - first] for start in range(0, len(answers), length - first)]
    elif served.tells == "text":
        raise UserError(f"{served.url} tells no probabilities by token id: only its text can be compared")
    else:
        found = ask_all(partial(_prompt_of, served, first), rows.tolist(), threads, on_done)
    most = max(len(position) for row in found for position in row)
    ids = np.full((num_rows, length - first, most), -1, np.int32)
    values = np.full(ids.shape, -np.inf, np.float32)
    for at, row in enumerate(found):
        for position, told in enumerate(row):
            ids[at, position, : len(told)] = list(told)
            values[at, position, : len(told)] = list(told.values())
    if not np.isfinite(values[ids >= 0]).all() and np.isnan(values).any():
        raise UserError(f"{served.url} gives probabilities that are no numbers")
    return Likeliest(ids, values)


def _prompt_of(served: Served, first: int, row: Sequence[int]) -> list[dict[int, float]]:
    key = {"prompt_logprobs": served.top} if served.tells == "prompt_logprobs" else {}
    echo = {"echo": True, "logprobs": served.top, "return_tokens_as_token_ids": True}
    choice = require_completion(served, row, 1, key or echo)
    found = _read(served.tells, choice, row, first)
    if found is None:
        raise UserError(f"{served.url} answered a prompt of {len(row)} tokens without their probabilities")
    return found


def _next_of(served: Served, row: Sequence[int]) -> dict[int, float]:
    # llama.cpp's own word for going on from what the last request has computed.
    found = _read("next", require_completion(served, row, 1, {"logprobs": served.top, "cache_prompt": True}), row, 0)
    if found is None:
        raise UserError(f"{served.url} answered a prompt of {len(row)} tokens without probabilities of the next")
    return found[0]


# What it writes.


def generated(
    served: Served, rows: IntArray, num_tokens: int, suppressed: Sequence[int], threads: int, on_done: Progress
) -> list[Generated]:
    """Greedy continuations of `rows` [num_prompts, prompt_tokens]; `suppressed` tokens are never chosen where the
    server can be told so."""
    asked: dict[str, Any] = {"return_token_ids": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    if served.takes_bias and suppressed:
        asked["logit_bias"] = {str(token): -100 for token in suppressed}
    if served.tells == "text":
        asked.pop("logprobs")

    def one(row: Sequence[int]) -> Generated:
        choice = require_completion(served, row, num_tokens, asked)
        return Generated(str(choice.get("text") or ""), _tokens_of(choice))

    return ask_all(one, rows.tolist(), threads, on_done)


def without_bias(served: Served, suppressed: Sequence[int]) -> Served:
    """As it is, or, of a server that refuses `logit_bias`, noted as one that cannot be told which tokens not to
    choose."""
    if not suppressed:
        return served
    try:
        complete(served, [1, 2, 3], 1, {"logit_bias": {str(token): -100 for token in suppressed}})
    except Refused:
        return replace(served, takes_bias=False)
    return served


def _tokens_of(choice: Mapping[str, Any]) -> tuple[int, ...] | None:
    ids = choice.get("token_ids")
    if isinstance(ids, list) and ids:
        return tuple(int(each) for each in ids)
    told = choice.get("logprobs")
    if not isinstance(told, dict):
        return None
    content = told.get("content")
    if isinstance(content, list) and content and all("id" in each for each in content):
        return tuple(int(each["id"]) for each in content)
    tokens = told.get("tokens")
    if isinstance(tokens, list) and tokens and all(str(token).startswith(_TOKEN_ID) for token in tokens):
        return tuple(_id_of(token) for token in tokens)
    return None


# Its tokenizer.


def check_tokenizer(served: Served, tokenizer: Any, texts: Sequence[str]) -> str:
    """Raise `UserError` where the server cuts `texts` into other tokens than `tokenizer`; how it was checked, empty
    where the server gives no way to.

    By its own `/tokenize` where it has one (vLLM, llama.cpp), else by how many tokens it counts in a text.
    """
    for text in texts:
        own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        try:
            theirs = _tokenized(served, text)
        except Refused:
            return _check_counts(served, tokenizer, texts)
        if theirs != own:
            at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), 0)
            raise UserError(
                f"{served.name} has another tokenizer: of the text {text[:30]!r} it makes {len(theirs)} tokens, "
                f"{theirs[at : at + 3]} from token {at} on, where {own[at : at + 3]} of {len(own)} are wanted. Only "
                "models of one vocabulary can be compared token by token"
            )
    return "its tokenizer gave the same tokens"


def _tokenized(served: Served, text: str) -> list[int]:
    # Both servers' words in one body: either ignores the other's.
    body = {"model": served.model, "prompt": text, "content": text, "add_special_tokens": False, "add_special": False}
    tokens = post(served, served.url.removesuffix("/v1") + "/tokenize", body).get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise Refused("no tokens")
    return tokens


def _check_counts(served: Served, tokenizer: Any, texts: Sequence[str]) -> str:
    for text in texts:
        body = {"model": served.model, "prompt": text, "max_tokens": 1, "temperature": 0}
        try:
            usage = post(served, f"{served.url}/completions", body).get("usage")
        except Refused:
            return ""
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if not isinstance(count, int):
            return ""
        own = {len(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (False, True)}
        if count not in own:
            raise UserError(
                f"{served.name} has another tokenizer: it counts {count} tokens in the text {text[:30]!r}, where "
                f"{min(own)} are wanted. Only models of one vocabulary can be compared token by token"
            )
    return "it counted as many tokens in each text"


def nats_of(told: Likeliest, rows: IntArray) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Nats of the rows' own tokens [num_prompts, positions]; where the server does not tell one, as it lies below its
    likeliest, the least that it can be: that of what these leave, at most as likely as the last of them."""
    found = told.of(rows)
    values = np.where(told.ids >= 0, told.log_probabilities, np.inf)
    rest = 1.0 - np.exp(np.where(told.ids >= 0, told.log_probabilities, -np.inf).astype(np.float64)).sum(axis=-1)
    most = np.minimum(values.min(axis=-1), np.log(np.maximum(rest, 1e-6)))
    nats = -np.where(np.isnan(found), most, found)
    return np.where(np.isfinite(nats), nats, math.inf).astype(np.float32)
