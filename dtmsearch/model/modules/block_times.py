"""What attention and MLP blocks take beside the products with their matrices (attention itself, rotary embeddings,
activations, the cache): measured on a model of a few layers of the same configuration, with random weights."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dtmsearch.core.components import Component, blocks_of
from dtmsearch.model.modules.blocks import take_out
from dtmsearch.model.modules.discovery import components_of
from dtmsearch.model.modules.loading import loader

# Layers of the model that is timed, tokens that stand before a decoded one, and random words.
_LAYERS, _BEFORE, _WORDS = 4, 64, 512
# Times in which all variants take turns, and runs of each in one.
_ROUNDS, _RUNS = 25, 4
# Of a token, and of a prompt, in milliseconds.
Milliseconds = tuple[float, float]


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What repeats the kernels that `work` launches: on a GPU a CUDA graph of them, as engines decode, so that they
    are timed and not their launching; `work` itself where there is none, or it cannot be captured. It is called up to
    three times before."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:  # it waits for the device
        torch.cuda.synchronize()
        return work
    return graph.replay


def decoding(body: Any, tokens: int, device: torch.device) -> Callable[[], object]:
    """A call that has a model decode one token after so many, which it has read."""
    ids = torch.randint(_WORDS, (1, tokens + 1), device=device)
    cache = body(input_ids=ids[:, :-1], use_cache=True).past_key_values
    # A captured call repeats what was captured; others go on from where they are.
    caches = [copy.deepcopy(cache) for _ in range(3)]

    def decode() -> object:
        held = caches.pop() if len(caches) > 1 else caches[0]
        return body(input_ids=ids[:, -1:], past_key_values=held, use_cache=True)

    return decode


def block_times(
    tree: Any, products: Mapping[tuple[int, int], Milliseconds], prefill_tokens: int, dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Milliseconds]:  # fmt: skip
    """Kind of block -> milliseconds of one beside its `products`, of a token and of a prompt: of models without experts
    by the difference that its blocks make. `tree` is the model of the configuration, without weights."""
    model = _shallow(tree, max(prefill_tokens, _BEFORE + 4 * _RUNS * _ROUNDS), dtype, device)
    components = components_of(model)
    if any(component.mixture for component in components):
        return {}
    blocks = [block for block in blocks_of(components) if block.kind != "layer"]
    kinds = [kind for kind in ("attention", "mlp") if any(block.kind == kind for block in blocks)]
    with torch.inference_mode():
        taken = _without_each(model, blocks, kinds, prefill_tokens, device)
    found = {}
    for kind in kinds:
        own = {block.name for block in blocks if block.kind == kind}
        inside = [component for component in components if component.block in own]
        rest = [
            max(taken[""][at] - taken[kind][at] - sum(products[c.shape][at] for c in inside), 0.0) / len(own)
            for at in (0, 1)
        ]
        found[kind] = rest[0], rest[1]
    return found


def _without_each(
    model: nn.Module, blocks: Sequence[Component], kinds: Sequence[str], prefill_tokens: int, device: torch.device
) -> dict[str, Milliseconds]:
    """What the layers take without the blocks of each kind, and ("") with all: medians of times that take turns."""
    body: Any = getattr(model, "base_model", model)
    prompt = torch.randint(_WORDS, (1, prefill_tokens), device=device)
    calls: dict[str, list[Callable[[], object]]] = {}
    for out in ("", *kinds):
        _take_out(model, blocks, out)
        decode = captured(decoding(body, _BEFORE, device), device)
        calls[out] = [decode, captured(lambda: body(input_ids=prompt, use_cache=False), device)]
    seconds: dict[str, list[list[float]]] = {out: [[], []] for out in calls}
    for _ in range(_ROUNDS):
        for out, pair in calls.items():
            _take_out(model, blocks, out)
            for at, call in enumerate(pair):
                seconds[out][at].append(_seconds(call, _RUNS if at == 0 or device.type == "cuda" else 1, device))
    _take_out(model, blocks, "")
    medians = {out: [statistics.median(each) * 1e3 for each in pair] for out, pair in seconds.items()}
    return {out: (decode, prefill) for out, (decode, prefill) in medians.items()}


def _take_out(model: nn.Module, blocks: Sequence[Component], kind: str) -> None:
    for block in blocks:
        take_out(model.get_submodule(block.name), block, block.kind == kind)


def _seconds(call: Callable[[], object], runs: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(runs):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / runs


def _shallow(tree: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of the same configuration with few layers and words, and with positions for so many tokens."""
    config = copy.deepcopy(tree.config)
    text: Any = config.get_text_config()
    before = text.num_hidden_layers
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, key, value[:_LAYERS])
    text.num_hidden_layers = min(_LAYERS, before)
    text.vocab_size = _WORDS
    if getattr(text, "max_position_embeddings", None) is not None:
        text.max_position_embeddings = max(text.max_position_embeddings, tokens)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, key, None)
    with torch.device(device):
        model = loader(config).from_config(config)
    return model.to(dtype).eval()
