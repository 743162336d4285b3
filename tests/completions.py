"""A server of the OpenAI completions API around a tiny model, in a thread, in the dialects of real ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

Dialect = Literal["vllm", "echo", "llama.cpp", "text"]


@dataclass
class Behaviour:
    """How a server differs from a good one: what it answers each completion with instead of the model's (status and
    body), when it does not answer, how many tokens it tells at most, whether it takes `logit_bias`, and how it cuts
    texts (None: it does not say)."""

    dialect: Dialect = "vllm"
    instead: tuple[int, bytes] | None = None
    hangs: threading.Event | None = None
    most_top: int = 20
    takes_bias: bool = True
    tokenize: Any = "own"
    models: tuple[str, ...] = ("tiny",)
    context: int = 128
    asked: list[dict[str, Any]] = field(default_factory=list)


class _Model:
    def __init__(self, folder: Path) -> None:
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.lock = threading.Lock()

    def log_probabilities(self, row: list[int]) -> torch.Tensor:
        with self.lock, torch.no_grad():
            return self.model(input_ids=torch.tensor([row])).logits[0].float().log_softmax(-1)

    def greedy(self, row: list[int], num_tokens: int, bias: dict[str, float]) -> list[int]:
        found: list[int] = []
        for _ in range(num_tokens):
            scores = self.log_probabilities([*row, *found])[-1]
            for token, value in bias.items():
                scores[int(token)] += value
            found.append(int(scores.argmax()))
        return found


def _top(row: torch.Tensor, most: int) -> list[tuple[int, float]]:
    values, ids = row.topk(most)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def _completed(model: _Model, behaviour: Behaviour, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    prompt = body["prompt"]
    row = model.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    if "logit_bias" in body and not behaviour.takes_bias:
        return 400, {"error": {"message": "logit_bias is not supported"}}
    asked = max(body.get("prompt_logprobs") or 0, body.get("logprobs") or 0)
    if asked > behaviour.most_top:
        return 400, {"error": {"message": f"at most {behaviour.most_top} logprobs"}}
    tokens = model.greedy(row, body["max_tokens"], body.get("logit_bias", {}))
    choice: dict[str, Any] = {"text": model.tokenizer.decode(tokens)}
    if behaviour.dialect == "vllm":
        if body.get("prompt_logprobs"):
            told = model.log_probabilities(row)
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": value} for token, value in _top(told[at - 1], asked)}
                | {str(row[at]): {"logprob": float(told[at - 1, row[at]])}}
                for at in range(1, len(row))
            ]
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
    if behaviour.dialect == "echo" and body.get("logprobs"):
        whole = [*row, *tokens] if body.get("echo") else tokens
        told = model.log_probabilities([*row, *tokens])
        first = len(row) + len(tokens) - len(whole)
        places = range(first, len(row) + len(tokens))
        choice["logprobs"] = {
            "tokens": [f"token_id:{token}" for token in whole],
            "token_logprobs": [None if at == 0 else float(told[at - 1, whole[at - first]]) for at in places],
            "top_logprobs": [
                None if at == 0 else {f"token_id:{t}": v for t, v in _top(told[at - 1], asked)} for at in places
            ],
        }
    if behaviour.dialect == "llama.cpp" and body.get("logprobs"):
        told = model.log_probabilities([*row, *tokens])[len(row) - 1 :]
        choice["logprobs"] = {
            "content": [
                {"id": token, "top_logprobs": [{"id": t, "logprob": v} for t, v in _top(told[at], asked)]}
                for at, token in enumerate(tokens)
            ]
        }
    return 200, {"choices": [choice], "usage": {"prompt_tokens": len(row)}}


def _handler(model: _Model, behaviour: Behaviour) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            models = [{"id": name, "max_model_len": behaviour.context} for name in behaviour.models]
            self.answer(200, json.dumps({"data": models}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            behaviour.asked.append(body)
            if self.path == "/tokenize":
                if behaviour.tokenize is None:
                    return self.answer(404, b"{}")
                own = model.tokenizer(body["content"], add_special_tokens=False)["input_ids"]
                tokens = own if behaviour.tokenize == "own" else behaviour.tokenize(body["content"])
                return self.answer(200, json.dumps({"tokens": tokens}).encode())
            if behaviour.hangs is not None:
                behaviour.hangs.wait(60)
            if behaviour.instead is not None:
                return self.answer(*behaviour.instead)
            status, found = _completed(model, behaviour, body)
            return self.answer(status, json.dumps(found).encode())

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *_: Any) -> None:
        """A client that has hung up is no error of this server."""


@contextmanager
def serving(folder: Path, behaviour: Behaviour | None = None) -> Iterator[str]:
    """The address of a server of the model in a folder, until the end of the block."""
    behaviour = behaviour or Behaviour()
    server = _Server(("127.0.0.1", 0), _handler(_Model(folder), behaviour))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        if behaviour.hangs is not None:
            behaviour.hangs.set()
        server.shutdown()
        server.server_close()
        thread.join()
