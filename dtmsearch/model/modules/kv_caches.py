"""What attention keeps of tokens, its keys (after their rotation) and values, as modules that can be replaced.

A layer's attention gets a child `kv_cache` with two parts, which hand on what they are given or round it as a cache of
that format would hold it. Every token's row is rounded by itself, so that a token reads the same of a cache however
texts are batched, cut or continued.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dtmsearch.core.components import CACHE_KINDS, Component
from dtmsearch.core.schemes import Scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.number_rounding import to_number
from dtmsearch.model.modules.compat import wrap_attention

PARTS = "keys", "values"
_CHILD = "kv_cache"
# vLLM's least scale of a row.
_LEAST_SCALE = 1e-6


class CachedPart(nn.Module):
    """Keys or values [prompts, tokens, heads * head_dim], of heads of `head_dim`, as a cache under `scheme` gives them
    back; as they are where it is None. It has an empty `weight`, as it has no weights."""

    def __init__(self, head_dim: int, scheme: Scheme | None = None) -> None:
        super().__init__()
        self.head_dim, self.scheme = head_dim, scheme
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        return values if self.scheme is None else round_cached(values, self.head_dim, self.scheme)


class KvCache(nn.Module):
    """Both parts of an attention."""

    def __init__(self, head_dim: int, scheme: Scheme | None = None) -> None:
        super().__init__()
        self.keys, self.values = CachedPart(head_dim, scheme), CachedPart(head_dim, scheme)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys and values [prompts, heads, tokens, head_dim]."""
        return _through(self.keys, key), _through(self.values, value)


def _through(part: nn.Module, states: Tensor) -> Tensor:
    heads = states.shape[1]
    rows: Tensor = part(states.transpose(1, 2).flatten(2))
    given: Tensor = rows.unflatten(2, (heads, -1)).transpose(1, 2)
    return given.contiguous()


def round_cached(values: Tensor, head_dim: int, scheme: Scheme) -> Tensor:
    """[..., heads * head_dim] as a cache gives it back, in its own dtype; all arithmetic in 32 bits.

    `kv-fp8`: e4m3 with a scale of 1, larger values cut, as vLLM keeps it where nothing was calibrated. `kv-int8`: codes
    of -128 to 127, a scale for each token's head, the largest over 127. `kv-int4`: 16 codes between the least and the
    largest of each token's head and 0, which has one of them (the zero point): else a row of one sign would be cut.
    """
    rows = values.float().unflatten(-1, (-1, head_dim))
    if scheme.name == "kv-fp8":
        found = to_number(rows, "e4m3")
    elif scheme.bits == 8:
        scale = (rows.abs().amax(dim=-1, keepdim=True) / 127.0).clamp_min(_LEAST_SCALE)
        found = (rows / scale).round().clamp(-128.0, 127.0) * scale
    else:
        least = rows.amin(dim=-1, keepdim=True).clamp_max(0.0)
        largest = rows.amax(dim=-1, keepdim=True).clamp_min(0.0)
        scale = ((largest - least) / 15.0).clamp_min(_LEAST_SCALE)
        zero = (-least / scale).round().clamp(0.0, 15.0)
        found = (((rows / scale).round() + zero).clamp(0.0, 15.0) - zero) * scale
    return found.flatten(-2).to(values.dtype)


def caches_of(model: Any, layers_name: str, num_layers: int, context: int, batch: int) -> tuple[Component, ...]:
    """Keys and values of every layer whose attention keeps them, as components: a row a token and head, of `batch`
    texts of `context` tokens, of a layer with a sliding window no more than that. Raises `UserError` for a model that
    has no such attention."""
    found: list[Component] = []
    for name, module, head_dim, heads in _attentions(model):
        if not name.startswith(f"{layers_name}."):
            continue
        layer = int(name[len(layers_name) + 1 :].partition(".")[0])
        window = _window(model.config.get_text_config(), module, layer)
        tokens = min(context, window) if window else context
        shape = (batch * tokens * heads, head_dim)
        found += [
            Component(f"{name}.{_CHILD}.{part}", layer, kind, shape)
            for part, kind in zip(PARTS, CACHE_KINDS, strict=True)
        ]
    if not found or len({component.layer for component in found}) < num_layers:
        raise UserError(
            f"model.kv_cache: {num_layers - len({c.layer for c in found})} of the {num_layers} layers of "
            f"{type(model).__name__} keep no keys and values of heads of one size (k_proj, v_proj, head_dim): leave it "
            "out"
        )
    return tuple(found)


def _window(config: Any, module: nn.Module, layer: int) -> int:
    """The tokens that an attention looks back at most; 0 where it looks at all."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds[layer] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None)) if slides else None
    return window if isinstance(window, int) and window > 0 else 0


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
    """Attentions with keys and values of their own: (name, module, head_dim, heads)."""
    for name, module in model.named_modules():
        key, value, head_dim = (getattr(module, part, None) for part in ("k_proj", "v_proj", "head_dim"))
        if not (isinstance(key, nn.Linear) and isinstance(value, nn.Linear) and isinstance(head_dim, int)):
            continue
        if key.out_features == value.out_features and key.out_features % head_dim == 0:
            yield name, module, head_dim, key.out_features // head_dim


def attach(model: Any, attention: str, scheme: Scheme | None = None) -> None:
    """Give every attention of a loaded model its `kv_cache`, through which its keys and values go from now on, under a
    scheme or as they are. Raises `UserError` for an attention implementation that does not tell."""
    if not wrap_attention(attention, _given):
        raise UserError(
            f"model.kv_cache: transformers does not tell keys and values of attention {attention!r}: take sdpa"
        )
    for _, module, head_dim, _ in list(_attentions(model)):
        like = next(module.parameters())
        setattr(module, _CHILD, KvCache(head_dim, scheme).to(like.device))


def _given(module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    cache = getattr(module, _CHILD, None)
    return (key, value) if cache is None else cache(key, value)
