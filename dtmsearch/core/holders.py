"""Which export, for which engine, holds a scheme, and in how many bits: what is known without writing anything.

The exporters refuse by the same functions, so that what is told here is what they do. Descriptions of a constant size
for each matrix (its shape, tables of codes) are left out of sizes; whatever grows with the matrix is in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dtmsearch.core import gguf_types
from dtmsearch.core.components import CACHE_KINDS, Component
from dtmsearch.core.engine_rules import ENGINES
from dtmsearch.core.fusion import untied_groups
from dtmsearch.core.plan import Plan, cut_by
from dtmsearch.core.plan_widths import is_even
from dtmsearch.core.schemes import SCALE_BITS, Scheme, families, parse_scheme

Shape = tuple[int, int]

# A file that is larger than the plan by no more than this part of it counts as being of its size.
SIZE_TOLERANCE = 0.01
_WORD_BITS = 32


def _nothing_together(plan: Plan, components: Sequence[Component]) -> str | None:
    return None


def _any_place(component: Component) -> str | None:
    return None


@dataclass(frozen=True)
class Holder:
    """An export format, for an engine that loads it.

    `obstacle` says why a matrix [rows, cols] cannot be written under a scheme, None where it can; `misplaced` why a
    component cannot be under any, for how the model keeps it. `file_bits` are the
    bits of a matrix in the files, by scheme, shape, bits of an unquantized weight and of a stored scale. `together`
    says why one model cannot hold what each of its matrices could. `caches`: schemes that it can give the KV caches of
    all layers.
    """

    export: str
    engine: str
    obstacle: Callable[[Scheme, Shape], str | None]
    file_bits: Callable[[Scheme, Shape, int, int], int]
    together: Callable[[Plan, Sequence[Component]], str | None] = _nothing_together
    misplaced: Callable[[Component], str | None] = _any_place
    caches: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.export} ({self.engine})"


LINEAR_ONLY = "it stores linear layers only"
STACKED_IN_FILES = "the files hold the experts of a layer in one tensor, where engines look for each by itself"
VLLM_TOGETHER = "vLLM runs q, k, v and gate, up as one matrix each, and all experts of a layer alike, of one scheme"


EMBEDDINGS = "of embeddings it stores integers of rows or groups, without zero points, and activations as they are"
CACHED = "it holds weights, and a KV cache is none"
CACHED_TOGETHER = "it gives the keys and values of all layers one scheme, kv-fp8"
TIED = (
    "its weights are the head's too, which loaders of packed weights look for elsewhere: `dense` holds it, or leave it "
    "out"
)


def embedding_obstacle(scheme: Scheme) -> str | None:
    """Of an embedding as compressed-tensors stores it and vLLM looks it up (its CompressedTensorsEmbeddingWNA16Int)."""
    is_plain = scheme.is_unquantized or (scheme.weights is None and scheme.granularity != "tensor")
    return None if is_plain and not scheme.asymmetric and not scheme.needs_hessians else EMBEDDINGS


def _not_linear(component: Component) -> str | None:
    """Of modules that keep the transpose (GPT-2's Conv1D), as the files name them; and of embeddings, as a component
    does not tell whether they are tied to the head, which `embedding_obstacle` is not asked of then."""
    return LINEAR_ONLY if component.transposed or component.layer < 0 else None


def _not_linear_in_files(component: Component) -> str | None:
    """Also of experts that the files hold in stacks: engines look for each by itself."""
    return STACKED_IN_FILES if component.stacked and not component.apart else _not_linear(component)


def _not_linear_in_transformers(component: Component) -> str | None:
    """Also of experts in one parameter, which the files may hold each by itself."""
    return LINEAR_ONLY if component.stacked else _not_linear(component)


def dense_obstacle(scheme: Scheme, shape: Shape) -> str | None:
    """Why a checkpoint of unquantized tensors cannot hold a scheme; None where it can."""
    if scheme.rounds_activations:
        holds = "bitsandbytes" if scheme.kind.as_module else "compressed-tensors"
        holds = "gguf" if scheme.name.startswith(gguf_types.PREFIX) else holds
        return f"it rounds activations as well, which no weights can tell; `{holds}` holds it"
    return None


def _dense_bits(scheme: Scheme, shape: Shape, dense_bits: int, scale_bits: int) -> int:
    return shape[0] * shape[1] * dense_bits


def bitsandbytes_obstacle(scheme: Scheme, shape: Shape) -> str | None:
    """Why bitsandbytes cannot hold a scheme; None where it can."""
    return None if scheme.kind.as_module or scheme.is_unquantized else "it stores w8a8, llm-int8, nf4 and fp4 only"


def _bitsandbytes_bits(scheme: Scheme, shape: Shape, dense_bits: int, scale_bits: int) -> int:
    return scheme.stored_bits(shape, dense_bits)


_BITSANDBYTES_KINDS = {"w8a8": "threshold 0", "llm-int8": "threshold 6", "nf4": "4 bits", "fp4": "4 bits"}


def bitsandbytes_kinds(plan: Plan) -> dict[str, list[str]]:
    """What transformers would have to be told to load a plan's components: its words -> `component: scheme`."""
    by_kind: dict[str, list[str]] = {}
    for name, scheme in plan.entries:
        by_kind.setdefault(_BITSANDBYTES_KINDS[scheme], []).append(f"{name}: {scheme}")
    return by_kind


def _bitsandbytes_together(plan: Plan, components: Sequence[Component]) -> str | None:
    if len(bitsandbytes_kinds(plan)) > 1:
        return "transformers loads a model in 8 bits or in 4 bits, and with one outlier threshold"
    return None


# Of `ModelManifest.source`: formats whose folders may hold layers that are not quantized beside those that are.
_BESIDE_OTHERS = ("FP8", "MXFP4", "compressed-tensors", "GPTQ", "AWQ")


def source_obstacle(scheme: Scheme, shape: Shape) -> str | None:
    """Of the format that the base model comes in: it keeps what is not changed, and has the rest unquantized."""
    return dense_obstacle(scheme, shape)


def _source_bits(scheme: Scheme, shape: Shape, dense_bits: int, scale_bits: int) -> int:
    return shape[0] * shape[1] * dense_bits


def source_refusal(source: str, plan: Plan) -> str | None:
    """Why the format that a base model comes in (`ModelManifest.source`) cannot hold a plan, None where it can."""
    if not source:
        return "the base model does not come quantized"
    if source.startswith("GGUF"):
        return "GGUF files are not written"
    if source.startswith(_BESIDE_OTHERS) or all(scheme.is_source for scheme in plan.parsed.values()):
        return None
    return f"{source} is written as a whole only, without other layers beside it"


def source_note(source: str, schemes: Iterable[Scheme]) -> str | None:
    """What to know before a search that keeps components as a quantized base model stores them beside others: that no
    export holds such plans at their size. None where one does."""
    kept = {scheme.is_source for scheme in schemes}
    if kept != {True, False} or not source or source.startswith(_BESIDE_OTHERS):
        return None
    return (
        f"no export holds `source` beside other schemes for a base model in {source}: `dense` writes such components "
        "unquantized"
    )


def packed_obstacle(scheme: Scheme, shape: Shape) -> str | None:
    """Of compressed-tensors' packed integers, as transformers loads them."""
    if scheme.is_source:
        return "it stores what it rounds itself; the export `source` keeps the base model's own bytes"
    if scheme.weights is not None:
        return scheme.misfit(shape) or _uneven(scheme, shape)
    if not scheme.kind.on_grid and not scheme.is_unquantized:
        return (
            "it stores integers and short floats with a scale for a tensor, a row or a group; `dense` takes the others"
        )
    return _uneven(scheme, shape)


def _uneven(scheme: Scheme, shape: Shape) -> str | None:
    if scheme.granularity == "group" and shape[1] % scheme.group_size:
        return f"its groups divide the inputs evenly, and {scheme.group_size} does not divide {shape[1]}"
    return None


def engine_obstacle(engine: str, scheme: Scheme, shape: Shape) -> str | None:
    """The same, as an engine's kernels read them (`engine_rules`)."""
    return packed_obstacle(scheme, shape) or ENGINES[engine].obstacle(scheme, shape)


def vllm_obstacle(scheme: Scheme, shape: Shape) -> str | None:
    """The same, as vLLM's kernels for GPUs read them."""
    return engine_obstacle("vllm", scheme, shape)


def is_packed(scheme: Scheme, engine: str) -> bool:
    """Whether compressed-tensors' codes are packed. transformers makes room for zero points that are not packed, but
    the library writes packed ones: what has zero points loads there only as whole bytes. vLLM reads packed ones."""
    return engine != "transformers" or not scheme.asymmetric


def packing_bits(scheme: Scheme, shape: Shape, engine: str) -> int:
    """What packed codes and zero points take beyond their own bits: whole bytes, or padding to words of 32 bits."""
    if scheme.weights is not None and not scheme.weights.packs_in_words:
        return 0
    rows, cols = shape
    num_zeros = scheme.num_scales(shape) if scheme.asymmetric else 0
    if not is_packed(scheme, engine):
        return (rows * cols + num_zeros) * (8 - scheme.bits)
    return rows * (-cols * scheme.bits % _WORD_BITS) + (num_zeros // rows) * (-rows * scheme.bits % _WORD_BITS)


def _packed_bits(engine: str) -> Callable[[Scheme, Shape, int, int], int]:
    def bits(scheme: Scheme, shape: Shape, dense_bits: int, scale_bits: int) -> int:
        counted = scheme.stored_bits(shape, dense_bits)
        if scheme.is_unquantized:
            return counted
        if scheme.weights is not None:
            floats = scheme.num_scales(shape) if scheme.weights.scale == "float" else 0
            return counted + floats * (scale_bits - SCALE_BITS) + packing_bits(scheme, shape, engine)
        # vLLM keeps scales in a model's 16 bits, whatever the file says; GPTQ solves for such.
        short = scheme.needs_hessians or (engine != "transformers" and dense_bits == SCALE_BITS)
        wider = 0 if short else scheme.num_scales(shape) * (scale_bits - SCALE_BITS)
        return counted + wider + packing_bits(scheme, shape, engine)

    return bits


SYMMETRIC_EXPERTS = "vLLM's kernels for experts take no zero points: schemes without -asym"


def _vllm_together(plan: Plan, components: Sequence[Component]) -> str | None:
    if untied_groups(plan, components):
        return f"{VLLM_TOGETHER} (search with `fused: true`)"
    if any(plan.scheme(component.name).asymmetric for component in components if component.mixture):
        return SYMMETRIC_EXPERTS
    return None


def llama_cpp_obstacle(scheme: Scheme, shape: Shape) -> str | None:
    """Of llama.cpp's files, by its own quantizer."""
    if scheme.is_unquantized or scheme.name.startswith(gguf_types.PREFIX):
        return None
    return "llama.cpp holds its own types, such as gguf-Q4_K; the nearest in bits take the place of others"


def _counted_bits(scheme: Scheme, shape: Shape, dense_bits: int, scale_bits: int) -> int:
    return scheme.stored_bits(shape, dense_bits)


HOLDERS: list[Holder] = [
    Holder(
        *("compressed-tensors", "vllm", vllm_obstacle, _packed_bits("vllm"), _vllm_together, _not_linear_in_files),
        caches=ENGINES["vllm"].caches,
    ),
    Holder(
        *("compressed-tensors", "transformers", packed_obstacle, _packed_bits("transformers")),
        misplaced=_not_linear_in_transformers,
    ),
    Holder(
        *("bitsandbytes", "transformers", bitsandbytes_obstacle, _bitsandbytes_bits, _bitsandbytes_together),
        misplaced=_not_linear_in_transformers,
    ),
    Holder("dense", "any", dense_obstacle, _dense_bits),
    Holder("gguf", "llama.cpp", llama_cpp_obstacle, _counted_bits),
    Holder("source", "what loads the base model", source_obstacle, _source_bits),
]


def examples() -> tuple[str, ...]:
    """One scheme of each kind of name, of every family that is known or installed."""
    return tuple(example for family in families() for example in family.examples)


@dataclass(frozen=True)
class Held:
    """How a holder has a scheme or a plan: its bits per weight in the files, or the `obstacle`. `at_size`: whether the
    files take what is counted, to `SIZE_TOLERANCE`."""

    holder: str
    bits_per_weight: float | None
    at_size: bool
    obstacle: str | None = None


@dataclass(frozen=True)
class SchemeFacts:
    """What is known of a scheme: its counted bits per weight over a matrix of `shape`, what it `needs` to be made, and
    who holds it."""

    scheme: str
    family: str
    shape: Shape
    bits_per_weight: float
    needs: str
    held: tuple[Held, ...]

    @property
    def at_size(self) -> tuple[str, ...]:
        return tuple(held.holder for held in self.held if held.at_size)


def scheme_facts(name: str, shape: Shape = (4096, 4096), dense_bits: int = 16, scale_bits: int = 16) -> SchemeFacts:
    """Raises `ValueError` for an unknown scheme."""
    scheme = parse_scheme(name)
    component = Component(name="matrix", layer=0, kind=CACHE_KINDS[0] if scheme.is_of_cache else "o", shape=shape)
    plan, counted = Plan.of({component.name: name}), scheme.stored_bits(shape, dense_bits)
    parts = [(component, scheme)]
    held = tuple(
        _held(h, plan, [component], parts, counted, dense_bits, scale_bits, "") for h in HOLDERS if h.export != "source"
    )
    return SchemeFacts(name, scheme.family, shape, counted / component.num_weights, needs_of(scheme), held)


def needs_of(scheme: Scheme) -> str:
    """What it takes to make a scheme, beside the weights."""
    if scheme.is_tuned:
        return "calibration text, AutoRound"
    if scheme.needs_hessians:
        return "calibration text (Hessians)"
    return "calibration text (mean squares of inputs)" if scheme.needs_calibration else "nothing"


def holders_of(
    plan: Plan, components: Iterable[Component], dense_bits: int, scale_bits: int, source: str = ""
) -> list[Held]:
    """How each holder has the compressed components of a plan, the unquantized ones left aside; `source` is the format
    that the base model comes in, where that is quantized."""
    components = [left for component in components if (left := cut_by(plan, component)).num_weights]
    by_name = {component.name: component for component in components}
    inside = {name for name in by_name if plan.drops(name) and name not in plan.dropped}
    parts = [
        (by_name[name], scheme)
        for name in sorted(by_name)
        if name not in inside and not (scheme := plan.scheme(name)).is_unquantized
    ]
    counted = sum(scheme.bits_of(component, dense_bits) for component, scheme in parts)
    return [_held(holder, plan, components, parts, counted, dense_bits, scale_bits, source) for holder in HOLDERS]


def _held(
    holder: Holder,
    plan: Plan,
    components: Sequence[Component],
    parts: Sequence[tuple[Component, Scheme]],
    counted: int,
    dense_bits: int,
    scale_bits: int,
    source: str,
) -> Held:
    cached = _cache_obstacle(holder, plan, components)
    matrices = [(c, scheme) for c, scheme in parts if scheme.width is None]
    found = (
        cached if c.is_cache else holder.obstacle(scheme, c.shape) or holder.misplaced(c) for c, scheme in matrices
    )
    obstacles = Counter(why for why in found if why is not None)
    # What goes with a block is in no file, and rules nothing out there.
    left = Plan.of({c.name: plan.schemes[c.name] for c, _ in matrices if c.name in plan.schemes})
    why = _shape_obstacle(holder, plan, components) or next(iter(obstacles), None) or holder.together(left, components)
    if holder.export == "source":
        why = source_refusal(source, plan) or why
    if why is not None:
        return Held(holder.name, None, False, why)
    bits = sum(_file_bits(holder, component, scheme, dense_bits, scale_bits) for component, scheme in parts)
    num_weights = sum(component.num_weights for component, _ in parts)
    return Held(holder.name, bits / max(num_weights, 1), bits <= counted * (1 + SIZE_TOLERANCE))


# Exports that hold a model without some of its blocks.
SMALLER = ("dense", "compressed-tensors", "bitsandbytes")


def _shape_obstacle(holder: Holder, plan: Plan, components: Sequence[Component]) -> str | None:
    """Why a holder has no model without the blocks that a plan drops; None where it drops none, or the holder has."""
    inside = [c for c in components if plan.drops(c.name) and c.name not in plan.dropped]
    if not (inside or plan.widths):
        return None
    if holder.export not in SMALLER:
        return "it holds no model without some of its blocks" if inside else "it holds no model of cut blocks"
    fuses = holder.engine in ENGINES and ENGINES[holder.engine].fuses
    if plan.widths and fuses and not is_even(plan, components):
        return "engines run no model whose layers have several widths: give each kind of block one width"
    if not inside:
        return None
    layers = {component.layer for component in inside}
    single = any(not plan.drops(c.name) for c in components if c.layer in layers and not c.is_cache)
    if single and fuses:
        return "engines run no model without single attention or MLP blocks: drop whole layers (search.drop: [layer])"
    return None


def _cache_obstacle(holder: Holder, plan: Plan, components: Sequence[Component]) -> str | None:
    """Why a holder cannot say how the KV caches of a plan are kept; None where it can."""
    if not holder.caches:
        return CACHED
    found = {plan.scheme_of(component.name) for component in components if component.is_cache}
    return None if len(found) == 1 and found <= holder.caches else CACHED_TOGETHER


def _file_bits(holder: Holder, component: Component, scheme: Scheme, dense_bits: int, scale_bits: int) -> int:
    if component.is_cache or scheme.width is not None or (scheme.is_source and holder.export == "source"):
        return scheme.bits_of(component, dense_bits)
    return holder.file_bits(scheme, component.shape, dense_bits, scale_bits)


# Ends the sentence on a plan that is no gain.
_LARGER = ": the plan is larger than what it was made from"


def is_larger_than_source(sentence: str) -> bool:
    """Whether `source_sentence` has said so of a plan."""
    return sentence.endswith(_LARGER)


def source_sentence(plan: Plan | None, components: Iterable[Component], dense_bits: int, source: str) -> str | None:
    """What the base model's own files take, where it comes quantized, beside a plan over the same components; in words
    for a person."""
    components = list(components)
    if not source or not components:
        return None
    weights = sum(component.num_weights for component in components)
    own = sum(component.source_bits or component.num_weights * dense_bits for component in components) / weights
    said = f"{source}: the source itself stores {own:.2f} bits per weight"
    if plan is None:
        return said
    bits = sum(plan.scheme(c.name).bits_of(c, dense_bits) for c in components) / weights
    return f"{said}, the plan {bits:.2f}{_LARGER if bits > own else ''}"


def size_sentence(
    plan: Plan, components: Iterable[Component], dense_bits: int, scale_bits: int, source: str = ""
) -> str:
    """Whether a plan can be written at its counted size, and by which export; in words for a person."""
    components = list(components)
    compressed = [c for c in components if not plan.scheme(c.name).is_unquantized or plan.width_of(c) is not None]
    if not compressed:
        return "nothing is compressed"
    held = holders_of(plan, components, dense_bits, scale_bits, source)
    at_size = [each.holder for each in held if each.at_size]
    if at_size:
        return f"written at its size by {', '.join(at_size)}"
    num_weights = sum(component.num_weights for component in compressed)
    bits = sum(plan.scheme(c.name).bits_of(c, dense_bits) for c in compressed) / num_weights
    larger = [f"{each.holder} takes {each.bits_per_weight:.2f}" for each in held if each.bits_per_weight is not None]
    remedy = ""
    if scale_bits > SCALE_BITS and any(h.at_size for h in holders_of(plan, components, dense_bits, SCALE_BITS)):
        remedy = "; with `model.scale_dtype: bfloat16` it could be"
    return (
        f"no export writes it at its size, {bits:.2f} bits per weight where it is compressed: "
        f"{'; '.join(larger) or 'none holds it at all'}{remedy}"
    )
