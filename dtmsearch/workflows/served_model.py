"""A model behind a server that speaks the OpenAI completions API: what it generates from token ids, and how likely it
finds tokens, as far as it tells.

Servers differ in what they tell. `prompt_logprobs` (vLLM) and `echo` give the likeliest tokens at every position of a
prompt in one request; of others that name tokens by id (llama.cpp) each position is a request of its own; of the rest
only text is known. Knows nothing of what is compared with what.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal, TypeVar

import numpy as np

from dtmsearch.core.evaluation import IntArray
from dtmsearch.core.positions import Likeliest
from dtmsearch.errors import ServerUnreachable, UserError

_T = TypeVar("_T")
_R = TypeVar("_R")
Tells = Literal["prompt_logprobs", "echo", "next", "text"]
KEY_VARIABLE = "OPENAI_API_KEY"
_TOKEN_ID = "token_id:"  # noqa: S105 - as servers write a token by its id
_ATTEMPTS, _FIRST_WAIT_SECONDS = 3, 0.5
_BUSY = (429, 502, 503, 504)
# What the first OpenAI servers gave at most; newer ones give 20.
_FEWER_TOP = 20, 10, 5
_LONGEST_REASON = 200
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Served:
    """Where a model is served, and what was found out of its server: `tells` how it tells probabilities, of `top`
    tokens a position at most; `context` the most tokens that it reads, None where it does not say; `takes_bias`:
    whether tokens can be kept from being chosen."""

    url: str
    model: str
    timeout_seconds: float
    tells: Tells = "text"
    top: int = 0
    context: int | None = None
    takes_bias: bool = True
    root: str = ""

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"


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
    listed = _get(found, "models").get("data")
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
        with contextlib.suppress(_Refused, _Failed):  # a parameter that it does not know may be its error, or ours
            choice = _complete(served, row, 1, {key: number, **further})
            if _read(tells, choice, row, 1) is not None:
                return replace(served, tells=tells, top=number)
    try:
        _complete(served, row, 1, {})
    except _Refused as refused:
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
        answers = _all(partial(_next_of, served), asked, threads, on_done)
        found = [answers[start : start + length - first] for start in range(0, len(answers), length - first)]
    elif served.tells == "text":
        raise UserError(f"{served.url} tells no probabilities by token id: only its text can be compared")
    else:
        found = _all(partial(_prompt_of, served, first), rows.tolist(), threads, on_done)
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
    choice = _answered(served, row, 1, key or echo)
    found = _read(served.tells, choice, row, first)
    if found is None:
        raise UserError(f"{served.url} answered a prompt of {len(row)} tokens without their probabilities")
    return found


def _next_of(served: Served, row: Sequence[int]) -> dict[int, float]:
    # llama.cpp's own word for going on from what the last request has computed.
    found = _read("next", _answered(served, row, 1, {"logprobs": served.top, "cache_prompt": True}), row, 0)
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
        choice = _answered(served, row, num_tokens, asked)
        return Generated(str(choice.get("text") or ""), _tokens_of(choice))

    return _all(one, rows.tolist(), threads, on_done)


def without_bias(served: Served, suppressed: Sequence[int]) -> Served:
    """As it is, or, of a server that refuses `logit_bias`, noted as one that cannot be told which tokens not to
    choose."""
    if not suppressed:
        return served
    try:
        _complete(served, [1, 2, 3], 1, {"logit_bias": {str(token): -100 for token in suppressed}})
    except _Refused:
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
        except _Refused:
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
    tokens = _post(served, served.url.removesuffix("/v1") + "/tokenize", body).get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise _Refused("no tokens")
    return tokens


def _check_counts(served: Served, tokenizer: Any, texts: Sequence[str]) -> str:
    for text in texts:
        body = {"model": served.model, "prompt": text, "max_tokens": 1, "temperature": 0}
        try:
            usage = _post(served, f"{served.url}/completions", body).get("usage")
        except _Refused:
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


# HTTP.


class _Failed(ServerUnreachable):
    """The server answered that it failed."""


class _Refused(Exception):
    """The server answered, and did not do what was asked."""


def _answered(served: Served, row: Sequence[int], num_tokens: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _complete(served, row, num_tokens, asked)
    except _Refused as refused:
        raise UserError(f"{served.url} refused a prompt of {len(row)} tokens: {refused}") from None


def _complete(served: Served, row: Sequence[int], num_tokens: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    body = {"model": served.model, "prompt": list(row), "max_tokens": num_tokens, "temperature": 0, **asked}
    answer = _post(served, f"{served.url}/completions", body)
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _Refused(f"its answer has no choices: {json.dumps(answer)[:_LONGEST_REASON]}")
    return choices[0]


def _get(served: Served, path: str) -> dict[str, Any]:
    try:
        return _sent(served, urllib.request.Request(f"{served.url}/{path}"))  # noqa: S310 - http(s), as `is_url` has it
    except _Refused as refused:
        raise UserError(f"{served.url} is no server of the OpenAI kind: {refused}") from None


def _post(served: Served, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    content = json.dumps(body).encode()
    return _sent(served, urllib.request.Request(url, content, {"Content-Type": "application/json"}))  # noqa: S310


def _sent(served: Served, request: urllib.request.Request) -> dict[str, Any]:
    """The JSON of an answer. Raises `ServerUnreachable` where none comes, and `_Refused` for one that is an error."""
    key = os.environ.get(KEY_VARIABLE)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    for attempt in range(_ATTEMPTS):
        last = attempt + 1 == _ATTEMPTS
        try:
            with urllib.request.urlopen(request, timeout=served.timeout_seconds) as answer:  # noqa: S310
                return _parsed(answer.read())
        except urllib.error.HTTPError as error:
            if error.code in _BUSY and not last:
                time.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
                continue
            reason = f"HTTP {error.code}: {_reason(error.read())}"
            if error.code in (401, 403):
                raise UserError(f"{served.url} does not let us in ({reason}): set {KEY_VARIABLE}") from None
            if error.code >= 500:
                raise _Failed(f"{served.url} fails ({reason})") from None
            raise _Refused(reason) from None
        except http.client.InvalidURL as error:
            raise UserError(f"{served.url} is no address of a server ({error})") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            raise _unreachable(served, error) from None
    raise AssertionError("every attempt returns or raises")


def _unreachable(served: Served, error: Exception) -> Exception:
    reason = getattr(error, "reason", error)
    if isinstance(reason, socket.timeout | TimeoutError):
        return ServerUnreachable(
            f"{served.url} gave no answer in {served.timeout_seconds:g} s: give it longer with --timeout, or fewer "
            "questions at a time with --threads 1"
        )
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return _Refused(f"its answer is no JSON ({error})")
    words = " ".join(str(reason).split())
    return ServerUnreachable(f"no server answers at {served.url} ({words}): start it, or check the address")


def _parsed(content: bytes) -> dict[str, Any]:
    answer = json.loads(content)
    if not isinstance(answer, dict):
        raise ValueError(f"got a {type(answer).__name__}")
    return answer


def _reason(content: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        told = json.loads(content)
        inner = told.get("error", told) if isinstance(told, dict) else told
        text = inner.get("message", inner) if isinstance(inner, dict) else inner
    except ValueError:
        text = content.decode(errors="replace")
    return " ".join(str(text).split())[:_LONGEST_REASON] or "no reason given"


def _all(work: Callable[[_T], _R], items: Iterable[_T], threads: int, on_done: Progress) -> list[_R]:
    """`work` of each item, in their order, so many at a time; the first error ends it. Threads are daemons: what waits
    for a slow server does not keep an interrupted process."""
    todo: queue.SimpleQueue[tuple[int, _T]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    listed = list(items)
    for entry in enumerate(listed):
        todo.put(entry)
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            try:
                index, item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, work(item), None))
            except BaseException as error:  # told to the one who waits
                done.put((index, None, error))

    for _ in range(max(1, min(threads, len(listed)))):
        threading.Thread(target=run, daemon=True).start()
    found: dict[int, Any] = {}
    try:
        while len(found) < len(listed):
            index, value, error = done.get()
            if error is not None:
                raise error
            found[index] = value
            on_done(len(found), len(listed))
    finally:
        stopped.set()
    return [found[index] for index in range(len(listed))]


def nats_of(told: Likeliest, rows: IntArray) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Nats of the rows' own tokens [num_prompts, positions]; where the server does not tell one, as it lies below its
    likeliest, the least that it can be: that of what these leave, at most as likely as the last of them."""
    found = told.of(rows)
    values = np.where(told.ids >= 0, told.log_probabilities, np.inf)
    rest = 1.0 - np.exp(np.where(told.ids >= 0, told.log_probabilities, -np.inf).astype(np.float64)).sum(axis=-1)
    most = np.minimum(values.min(axis=-1), np.log(np.maximum(rest, 1e-6)))
    nats = -np.where(np.isnan(found), most, found)
    return np.where(np.isfinite(nats), nats, math.inf).astype(np.float32)
