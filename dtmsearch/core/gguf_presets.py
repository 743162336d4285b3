"""llama.cpp's own mixtures (`Q4_K_M`, ...) as plans: the rivals of a plan of its types at the same bytes.

Which tensor a mixture keeps in more bits follows llama-quantize with an importance matrix, for models without experts
whose keys and values have matrices of their own or one with the queries; its exception for models of 80 layers is left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.gguf_types import PREFIX
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import WITH_CACHE, parse_scheme
from dtmsearch.errors import UserError

# How a plan is asked for by a mixture's name.
PRESET = "preset:"
# The head's type, which becomes Q8_0 where its blocks do not divide the rows; and how the head is called.
_HEAD = "Q6_K"
_HEAD_KINDS = ("lm_head", "output", "embed_out")
# Which llama.cpp never quantizes.
_TABLES_OF_POSITIONS = ("wpe", "embed_positions", "position_embeddings")
_GROUPED = 4  # queries to a value from which values are kept in more bits
# kind, which layer of how many, queries to a value -> the type; None: the mixture's usual one.
_Rule = Callable[[str, int, int, float], str | None]


def in_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third layer between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _q2_k(kind: str, layer: int, layers: int, grouped: float) -> str | None:
    if kind == "v":
        return "Q4_K" if grouped >= _GROUPED else "Q3_K"
    return "Q3_K" if kind in ("down", "o") else None


def _q3_k_m(kind: str, layer: int, layers: int, grouped: float) -> str | None:
    if kind == "v":
        return "Q5_K" if layer < 2 else "Q4_K"
    if kind == "down":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    return "Q4_K" if kind in ("o", "qkv") else None


def _q3_k_l(kind: str, layer: int, layers: int, grouped: float) -> str | None:
    return "Q5_K" if kind in ("v", "down", "o") else "Q4_K" if kind == "qkv" else None


def _iq4_xs(kind: str, layer: int, layers: int, grouped: float) -> str | None:
    return "Q5_K" if kind == "v" and grouped >= _GROUPED else None


def _q4_k_s(kind: str, layer: int, layers: int, grouped: float) -> str | None:
    is_early = (kind == "v" and layer < 4) or (kind == "down" and layer < layers // 8)
    return "Q5_K" if is_early else None


def _medium(of_qkv: str) -> _Rule:
    def rule(kind: str, layer: int, layers: int, grouped: float) -> str | None:
        if kind in ("v", "down") and in_more_bits(layer, layers):
            return "Q6_K"
        return of_qkv if kind == "qkv" else None

    return rule


def _none(kind: str, layer: int, layers: int, grouped: float) -> str | None:
    return None


# Mixture -> its usual type, and what is kept otherwise.
PRESETS: dict[str, tuple[str, _Rule]] = {
    "Q2_K": ("Q2_K", _q2_k),
    "Q3_K_S": ("Q3_K", _none),
    "Q3_K_M": ("Q3_K", _q3_k_m),
    "Q3_K_L": ("Q3_K", _q3_k_l),
    "IQ4_XS": ("IQ4_XS", _iq4_xs),
    "Q4_K_S": ("Q4_K", _q4_k_s),
    "Q4_K_M": ("Q4_K", _medium("Q5_K")),
    "Q5_K_S": ("Q5_K", _none),
    "Q5_K_M": ("Q5_K", _medium("Q6_K")),
    "Q6_K": ("Q6_K", _none),
}


def check_preset(name: str) -> None:
    """Raises `UserError` for a mixture that is not known here, and for a scheme of KV caches that there is not."""
    weights, cache = _parts(name)
    if weights not in PRESETS:
        raise UserError(f"there is no {PRESET}{name}; llama.cpp's mixtures here are {', '.join(PRESETS)}")
    if cache and not parse_scheme(cache).is_of_cache:
        raise UserError(f"{PRESET}{name}: {cache} rounds no KV caches")


def _parts(name: str) -> tuple[str, str]:
    """Of `Q4_K_M+kv-fp8` the mixture and the scheme of KV caches; of `Q4_K_M` no such scheme."""
    weights, joint, cache = name.partition(WITH_CACHE)
    return weights, f"{WITH_CACHE[1:]}{cache}" if joint else ""


def preset_plan(name: str, components: Sequence[Component], manifest: ModelManifest) -> Plan:
    """The plan of a mixture over some components of a model; KV caches stay as they are or, of `Q4_K_M+kv-fp8`, have
    that scheme, all of them. Raises `UserError` for a mixture that is not known, for KV caches that the components are
    without, and for a model with experts, which llama.cpp treats otherwise."""
    check_preset(name)
    if any(component.mixture for component in manifest.components):
        raise UserError(f"{PRESET}{name}: llama.cpp's mixtures of models with experts are not known here")
    weights, cache = _parts(name)
    caches = [component.name for component in components if component.is_cache]
    if cache and not caches:
        raise UserError(f"{PRESET}{name}: no KV caches are searched (model.kv_cache says of how many tokens)")
    usual, rule = PRESETS[weights]
    layers = manifest.num_layers
    heads = heads_of(manifest)
    rows = {(component.layer, component.kind): component.shape[0] for component in manifest.components}

    def scheme(component: Component) -> str:
        layer = component.layer
        if not 0 <= layer < layers:  # an embedding, or the head
            return f"{PREFIX}{_HEAD if component.name in heads else usual}"
        grouped = rows.get((layer, "q"), 0) / rows.get((layer, "v"), 1)
        return f"{PREFIX}{rule(component.kind, layer, layers, grouped) or usual}"

    quantized = (c for c in components if not c.is_cache and c.shape[0] > 1 and c.kind not in _TABLES_OF_POSITIONS)
    of_caches = dict.fromkeys(caches if cache else (), cache)
    return Plan.of({component.name: scheme(component) for component in quantized} | of_caches)


def heads_of(manifest: ModelManifest) -> set[str]:
    """The model's head, or the embedding that is the head too where there is none beside it."""
    own = {c.name for c in manifest.others if c.layer >= manifest.num_layers and c.kind in _HEAD_KINDS}
    return own or {c.name for c in manifest.others if c.layer < 0}


def largest_preset(
    components: Sequence[Component],
    manifest: ModelManifest,
    fits: Callable[[Plan], bool],
    cache: str = "",
) -> dict[str, Plan]:
    """How it is asked for -> the plan, of the mixture that stores most among those that fit, with KV caches under the
    scheme `cache` if one is given; empty where none does, or the model has experts."""
    if any(component.mixture for component in manifest.components):
        return {}
    beside = f"+{cache}" if cache else ""
    plans = {f"{name}{beside}": preset_plan(f"{name}{beside}", components, manifest) for name in PRESETS}
    sizes = {
        name: sum(plan.scheme(c.name).stored_bits(c.shape, 16) for c in components)
        for name, plan in plans.items()
        if fits(plan)
    }
    if not sizes:
        return {}
    name = max(sizes, key=lambda name: (sizes[name], list(plans).index(name)))
    return {f"{PRESET}{name}": plans[name]}
