"""A replica of any model that transformers loads, as its users load it, to be compared with another: what it makes of
every position, and what of it outlasts its layers so that two models need never be in memory together."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtmsearch.core.checkpoint_files import is_gguf, read_model_config
from dtmsearch.core.evaluation import (
    Continuation,
    EvalRequest,
    FloatArray,
    IntArray,
    ModelSpec,
    PromptTokens,
    Reference,
    ReplicaSettings,
)
from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import BASE
from dtmsearch.errors import reason_of
from dtmsearch.model.forward.head_metrics import Divergence
from dtmsearch.model.forward.partial import Body
from dtmsearch.model.modules.discovery import find_layers
from dtmsearch.model.modules.loading import checkpoint_folder, load_model, own_folder, suppressed_tokens
from dtmsearch.model.replica.exported import ServedReplica, rounds_caches, rounds_inputs
from dtmsearch.model.replica.loaded_reference import BaseOutputs
from dtmsearch.model.replica.replica import LoadedModel
from dtmsearch.model.replica.samples import written_out
from dtmsearch.model.sources.stored import format_of, settings_of
from dtmsearch.model.sources.unquantized import is_quantized, record_of

log = logging.getLogger(__name__)

# Rows of the head's inputs of which distributions are looked up at a time.
_ROWS = 256
_CACHES_UNROUNDED = "; its KV caches are not rounded, as they are where it is served"


def described(spec: ModelSpec) -> str:
    """What a model's files hold, in a few words: `bfloat16 safetensors`, `GGUF Q4_K`, `compressed-tensors INT4`."""
    folder = own_folder(spec)
    if is_gguf(folder):
        record = record_of(checkpoint_folder(spec))
        return "GGUF" if record is None else record.says
    settings = settings_of(read_model_config(folder))
    if settings is None:
        stored = read_model_config(folder)
        dtype = stored.get("dtype") or stored.get("torch_dtype") or stored.get("text_config", {}).get("dtype")
        return f"{dtype} safetensors" if dtype else "safetensors"
    return format_of(settings, str(folder)).says(settings)


class ComparedReplica(ServedReplica):
    """`suppressed` tokens are never chosen; where it is None, the model's own end-of-text tokens.

    A folder loads as transformers loads it, quantized or not; a GGUF file, and a format that transformers cannot run
    here, by the weights that its files stand for (`way` says which of the two). Raises `UserError` for what cannot be
    loaded either way.
    """

    def __init__(self, spec: ModelSpec, settings: ReplicaSettings, suppressed: tuple[int, ...] | None = None) -> None:
        self._given_suppressed = suppressed
        self.way = "as transformers runs it"
        super().__init__(spec, settings)

    def _load(self, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        folder = own_folder(spec)
        if is_gguf(folder):
            self.way = "by the weights that its types stand for, run by transformers"
            return self._plainly(checkpoint_folder(spec), spec, settings)
        if not is_quantized(folder):
            return self._plainly(folder, spec, settings)
        has_caches = bool((settings_of(read_model_config(folder)) or {}).get("kv_cache_scheme"))
        if has_caches and not rounds_caches(folder):
            self.way += _CACHES_UNROUNDED
        try:
            return super()._load(replace(spec, path=str(folder)), settings)
        except Exception as error:  # whatever a format's own library raises
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                raise
            log.debug("transformers cannot run %s", folder, exc_info=error)
            self.way = (
                f"by the weights that its files stand for, since transformers cannot run it here ({reason_of(error)})"
            )
            if has_caches:
                self.way += _CACHES_UNROUNDED
            if rounds_inputs(folder):
                self.way += "; what its layers read is not rounded, as it is where it is served"
            return self._plainly(checkpoint_folder(spec), spec, settings)

    def _plainly(self, folder: Path, spec: ModelSpec, settings: ReplicaSettings) -> LoadedModel:
        """Of an unquantized folder, whose tensors are checked against its configuration."""
        model = load_model(folder, spec, self._device)
        return self._as_loaded(model, folder, spec)

    def _make_body(self, model: Any, known_as: Hashable) -> Body:
        return Body(model)

    def _suppressed_tokens(self, loaded: LoadedModel) -> tuple[int, ...]:
        if self._given_suppressed is None:
            return suppressed_tokens(loaded.model, loaded.tokenizer)
        return self._given_suppressed

    def use_from(self, reference: Reference, base: BaseOutputs | None) -> None:
        """Take a reference that another model has made, and what it keeps of its distributions."""
        self._references.check_fits(reference)
        self._evaluator.use(reference, base)

    @torch.inference_mode()
    def positions(self, reference: Reference, metrics: Sequence[str]) -> dict[str, Divergence]:
        """What this model makes of each position: `continuation`, and `text` where `metrics` ask for it."""
        request = EvalRequest(Plan(), reference.id, (0, reference.num_prompts), tuple(metrics))
        return self._evaluator.positions(request)

    @torch.inference_mode()
    def outputs(self, reference: Reference) -> BaseOutputs:
        """What there is to keep of this model's distributions over a reference that it uses."""
        return BaseOutputs(self._body, self._evaluator.head_inputs(reference.id))

    @torch.inference_mode()
    def go_on(self, start: PromptTokens) -> tuple[IntArray, FloatArray]:
        """Greedy continuations of prompts and the margin of each choice, each [num_prompts, continuation_tokens]."""
        self._bench.become(BASE)
        found = self._bench.batches.halving(lambda: self._references.continue_from(start))
        return found, self._references.margins_of(start, found)

    def write_out(
        self,
        prompts: Sequence[int],
        start: PromptTokens,
        base: tuple[IntArray, FloatArray],
        own: tuple[IntArray, FloatArray],
    ) -> list[Continuation]:
        """See `samples.written_out`, by this model's tokenizer."""
        return written_out(self._tokenizer, prompts, start, base, own)

    def drop_layers(self) -> None:
        """Let go of all weights between embeddings and head: from now on only `BaseOutputs` can be asked."""
        self.forget()
        _, layers = find_layers(self._body.model)
        for layer in layers:
            for tensor in [*layer.parameters(), *layer.buffers()]:
                tensor.data = tensor.data.new_empty(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def log_probabilities_at(outputs: BaseOutputs, ids: IntArray) -> FloatArray:
    """Log-probabilities, in nats, of tokens `ids` [num_prompts, positions, tokens] at each position; -inf where an id
    is negative."""

    def of(logits: Tensor, wanted: Tensor) -> Tensor:
        found = logits.float().log_softmax(dim=1).gather(1, wanted.clamp(min=0))
        return found.masked_fill(wanted < 0, -torch.inf)

    flat = torch.from_numpy(np.ascontiguousarray(ids)).long().reshape(-1, ids.shape[-1])
    found = np.concatenate([of(logits, flat[at : at + len(logits)].to(logits.device)).cpu().numpy()
                            for at, logits in _distributions(outputs, slice(None))])  # fmt: skip
    return np.asarray(found.reshape(ids.shape), np.float32)


@torch.inference_mode()
def margins_of(outputs: BaseOutputs, prompts: Sequence[int], suppressed: Sequence[int]) -> FloatArray:
    """How many nats likelier the best token is than the runner-up, [prompts, positions], of some prompts."""
    parts = []
    for _, logits in _distributions(outputs, list(prompts)):
        scores = logits.float()
        scores[:, [token for token in suppressed if token < scores.shape[1]]] = -torch.inf
        best = scores.topk(2, dim=1).values
        parts.append((best[:, 0] - best[:, 1]).cpu())
    return np.asarray(torch.cat(parts).reshape(len(prompts), -1).numpy(), np.float32)


def _distributions(outputs: BaseOutputs, prompts: Any) -> list[tuple[int, Tensor]] | Any:
    body: Body = outputs.body
    rows = outputs.hidden[prompts].reshape(-1, outputs.hidden.shape[-1])
    with body.head_only():
        for at in range(0, len(rows), _ROWS):
            yield at, body.logits(rows[at : at + _ROWS])
