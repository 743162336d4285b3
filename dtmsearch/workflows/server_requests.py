"""Questions to a server that speaks the OpenAI completions API: one by one over HTTP, or so many at a time.

What cannot be had is told apart: no answer, an answer that the server fails, and one that it does not do what it was
asked. Knows nothing of what is asked for.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dtmsearch.errors import ServerUnreachable, UserError

_T = TypeVar("_T")
_R = TypeVar("_R")
Tells = Literal["prompt_logprobs", "echo", "next", "text"]
Progress = Callable[[int, int], None]
KEY_VARIABLE = "OPENAI_API_KEY"
_ATTEMPTS, _FIRST_WAIT_SECONDS = 3, 0.5
_BUSY = (429, 502, 503, 504)
_LONGEST_REASON = 200


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


class Failed(ServerUnreachable):
    """The server answered that it failed."""


class Refused(Exception):
    """The server require_completion, and did not do what was asked."""


def require_completion(served: Served, row: Sequence[int], num_tokens: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """As `complete`. Raises `UserError` where the server refuses it."""
    try:
        return complete(served, row, num_tokens, asked)
    except Refused as refused:
        raise UserError(f"{served.url} refused a prompt of {len(row)} tokens: {refused}") from None


def complete(served: Served, row: Sequence[int], num_tokens: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice of the server to go on from the tokens `row`, `asked` for more. Raises `Refused`."""
    body = {"model": served.model, "prompt": list(row), "max_tokens": num_tokens, "temperature": 0, **asked}
    answer = post(served, f"{served.url}/completions", body)
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Refused(f"its answer has no choices: {json.dumps(answer)[:_LONGEST_REASON]}")
    return choices[0]


def get(served: Served, path: str) -> dict[str, Any]:
    """What the server says at a path below its address. Raises `UserError` where it refuses."""
    try:
        return _sent(served, urllib.request.Request(f"{served.url}/{path}"))  # noqa: S310 - http(s), as `is_url` has it
    except Refused as refused:
        raise UserError(f"{served.url} is no server of the OpenAI kind: {refused}") from None


def post(served: Served, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What it answers to a JSON body. Raises `ServerUnreachable`, `Refused` and `UserError`."""
    content = json.dumps(body).encode()
    return _sent(served, urllib.request.Request(url, content, {"Content-Type": "application/json"}))  # noqa: S310


def _sent(served: Served, request: urllib.request.Request) -> dict[str, Any]:
    """The JSON of an answer. Raises `ServerUnreachable` where none comes, and `Refused` for one that is an error."""
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
                raise Failed(f"{served.url} fails ({reason})") from None
            raise Refused(reason) from None
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
        return Refused(f"its answer is no JSON ({error})")
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


def ask_all(work: Callable[[_T], _R], items: Iterable[_T], threads: int, on_done: Progress) -> list[_R]:
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
