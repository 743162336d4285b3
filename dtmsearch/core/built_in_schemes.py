"""The families of schemes that this package knows: how their names become schemes, and what is common to each.

They come in by `register`, as those of other packages do: whoever imports `dtmsearch.core` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from dtmsearch.core import autoround_library, gguf_types
from dtmsearch.core.scheme_names import (
    AUTOROUND,
    AWQ,
    BITSANDBYTES,
    SMOOTH,
    other_shares,
    other_widths,
    pruned_parts,
    quantized_parts,
    scaled_base,
)
from dtmsearch.core.schemes import (
    DENSE,
    DROP,
    SCALE_BITS,
    SOURCE,
    UNQUANTIZED,
    Line,
    Pruning,
    Scheme,
    SchemeFamily,
    Shape,
    parse_scheme,
    register,
)
from dtmsearch.core.served_schemes import CACHE_SCALE_BITS, CACHES, SERVED, served_format
from dtmsearch.core.widths import width_of

# bitsandbytes' modules keep their scales in float32.
_BITSANDBYTES_SCALE_BITS = 32


def _unquantized(name: str) -> Scheme | None:
    return UNQUANTIZED if name == DENSE else None


def _of_cache(name: str) -> Scheme | None:
    found = CACHES.get(name)
    return None if found is None else Scheme(name, "kv_cache", found.bits, "none")


def _cache_bits(scheme: Scheme, shape: Shape, dense_bits: int) -> int:
    """Of rows that are each a token's head: codes, and a scale of 32 bits for each, or for all."""
    per_row = CACHES[scheme.name].scale_of_row
    return shape[0] * shape[1] * scheme.bits + (shape[0] if per_row else 1) * CACHE_SCALE_BITS


def _as_stored(name: str) -> Scheme | None:
    return Scheme(name, name, 0, "none") if name == SOURCE else None


def _dropped(name: str) -> Scheme | None:
    return Scheme(name, name, 0, "none") if name == DROP else None


def _cut(name: str) -> Scheme | None:
    width = width_of(name)
    return None if width is None else Scheme(name, "width", 0, "none", width=width)


def _bits_left(scheme: Scheme, shape: Shape, dense_bits: int) -> int:
    """Of a block, taken for a matrix of its units: what stays, unquantized."""
    assert scheme.width is not None
    return round((1.0 - scheme.width.share) * shape[0] * shape[1]) * dense_bits


def _bitsandbytes(name: str) -> Scheme | None:
    if name not in BITSANDBYTES:
        return None
    bits, block = BITSANDBYTES[name]
    grain = "block" if block else "channel"
    return Scheme(name, "bitsandbytes", bits, grain, block or 0, rounds_activations=bits == 8)


def _pruned(name: str) -> Scheme | None:
    pruning = _pruning(name)
    return None if pruning is None else Scheme(name, "pruning", 0, "none", pruning=pruning)


def _rounded(name: str) -> Scheme | None:
    return None if name.startswith("gptq-") else _quantized(name, "rounding")


def _solved(name: str) -> Scheme | None:
    return _quantized(name, "gptq") if name.startswith("gptq-") else None


def _scaled_integers(name: str) -> Scheme | None:
    """AWQ: of rows or groups, for an export moves scales of rows as well."""
    base = scaled_base(name, AWQ)
    found = None if base is None else _rounded(base)
    if base is None or found is None or found.granularity == "tensor":
        return None
    return replace(found, name=name, family="awq", scaled=base)


def _tuned(name: str) -> Scheme | None:
    """AutoRound's: of rows or groups."""
    base = scaled_base(name, AUTOROUND)
    found = None if base is None else _rounded(base)
    return None if found is None or found.granularity == "tensor" else replace(found, name=name, family="autoround")


def _not_tuned(scheme: Scheme, shape: Shape) -> str | None:
    multiple = autoround_library.MULTIPLE
    return f"AutoRound leaves matrices whose sides are no multiples of {multiple}" if _uneven(shape, multiple) else None


def _uneven(shape: Shape, multiple: int) -> bool:
    return any(side % multiple for side in shape)


def _smoothed(name: str) -> Scheme | None:
    """SmoothQuant: of integers whose inputs are integers, too."""
    base = scaled_base(name, SMOOTH)
    found = None if base is None else _served("integers")(base)
    if base is None or found is None or found.activations is None or found.activations.number != "int8":
        return None
    return replace(found, name=name, family="smoothquant", scaled=base)


def _smoothed_bits(scheme: Scheme, shape: Shape, dense_bits: int) -> int:
    return parse_scheme(scheme.scaled).stored_bits(shape, dense_bits)


def _paired(name: str) -> Scheme | None:
    quantized, plus, pruned = name.partition("+")
    pruning = _pruning(pruned) if plus else None
    found = None if pruning is None else _quantized(quantized, "pair")
    return None if found is None else replace(found, name=name, pruning=pruning, quantizer=quantized)


def _served(family: str) -> Callable[[str], Scheme | None]:
    def parse(name: str) -> Scheme | None:
        served = served_format(family, name)
        if served is None:
            return None
        weights, activations = served.weights, served.activations
        return Scheme(
            *(name, family, weights.bits, weights.grain, weights.size),
            rounds_activations=activations is not None,
            weights=weights,
            activations=activations,
        )

    return parse


def _served_bits(scheme: Scheme, shape: Shape, dense_bits: int) -> int:
    served = served_format(scheme.family, scheme.name)
    assert served is not None
    return served.stored_bits(shape, SCALE_BITS)


def _of_llama_cpp(weighted: bool) -> SchemeFamily:
    """llama.cpp's types: with an importance matrix of the component's inputs, or those that none changes."""
    family, names = "gguf" if weighted else "gguf-plain", gguf_types.names_of(weighted)

    def parse(name: str) -> Scheme | None:
        if name not in names:
            return None
        kind = gguf_types.type_of(name)
        return Scheme(name, family, kind.bits, "group", kind.block, rounds_activations=True)

    def pack(weight: Any, scheme: Scheme, mean_squares: Callable[[], Any]) -> Any:
        return gguf_types.blocks_of(weight, scheme.name, mean_squares if weighted else None)

    def unpack(blocks: Any, scheme: Scheme, like: Any) -> Any:
        return gguf_types.weights_of(blocks, scheme.name, like)

    def make(weight: Any, scheme: Scheme, mean_squares: Callable[[], Any]) -> Any:
        return unpack(pack(weight, scheme, mean_squares), scheme, weight)

    return SchemeFamily(
        family,
        parse,
        version=2,
        stored_bits=lambda scheme, shape, dense_bits: gguf_types.stored_bits(scheme.name, shape),
        make=make,
        check_installed=gguf_types.ggml,
        build=gguf_types.build,
        pack=pack,
        unpack=unpack,
        inputs=lambda scheme, cols: gguf_types.inputs_of(scheme.name, cols),
        needs="mean_squares" if weighted else "nothing",
        examples=names,
        uniform_lines=lambda scheme, grains: gguf_types.lines_of(names),
    )


def _quantized(name: str, family: str) -> Scheme | None:
    parts = quantized_parts(name)
    return None if parts is None else Scheme(name, family, *parts)


def _pruning(name: str) -> Pruning | None:
    parts = pruned_parts(name)
    return None if parts is None else Pruning(name, *parts)


def _rounding_lines(scheme: Scheme, grains: Collection[str]) -> Sequence[Line]:
    named = scheme.quantizer or scheme.name
    prefix = next((prefix for prefix in ("gptq-", AWQ) if named.startswith(prefix)), "")
    pruned = f"+{scheme.pruning.name}" if scheme.pruning is not None else ""
    return [
        tuple(f"{prefix}int{bits}-{grain}{asym}{pruned}" for bits in range(2, 9))
        for grain in grains
        if not (prefix == AWQ and grain == "tensor")
        for asym in ("", "-asym")
    ]


def _bitsandbytes_lines(scheme: Scheme, grains: Collection[str]) -> Sequence[Line]:
    return [(name,) for name, (bits, _) in BITSANDBYTES.items() if bits == scheme.bits]


def _pruning_lines(scheme: Scheme, grains: Collection[str]) -> Sequence[Line]:
    assert scheme.pruning is not None
    if scheme.pruning.pattern is not None:
        return [other_shares(scheme.pruning.name)]
    hundredths = (f"0.{share:02}".rstrip("0") for share in range(1, 100))
    return [tuple(f"{scheme.pruning.saliency}-{share}" for share in hundredths)]


# Versions of families whose weights once were others under the same name are above 1.
for _family in (
    SchemeFamily(DENSE, _unquantized, examples=(DENSE,)),
    SchemeFamily(
        "rounding",
        _rounded,
        version=2,
        examples=("int8-tensor", "int8-channel", "int4-g128", "int4-g32-asym", "int3-g128", "int2-g32"),
        on_grid=True,
        siblings=lambda scheme: other_widths(scheme.name),
        uniform_lines=_rounding_lines,
    ),
    SchemeFamily(
        "gptq",
        _solved,
        version=2,
        examples=("gptq-int4-g128", "gptq-int3-g128-asym"),
        on_grid=True,
        siblings=lambda scheme: other_widths(scheme.name),
        uniform_lines=_rounding_lines,
    ),
    SchemeFamily(
        "autoround",
        _tuned,
        examples=("autoround-int4-g128", "autoround-int3-g32-asym"),
        on_grid=True,
        check_installed=autoround_library.python,
        build=autoround_library.build,
        misfit=_not_tuned,
        siblings=lambda scheme: other_widths(scheme.name),
        uniform_lines=lambda scheme, grains: [(scheme.name,)],  # each is a tuning of the whole model
    ),
    SchemeFamily(
        "awq",
        _scaled_integers,
        examples=("awq-int4-g128", "awq-int4-g32-asym"),
        on_grid=True,
        siblings=lambda scheme: other_widths(scheme.name),
        uniform_lines=_rounding_lines,
    ),
    SchemeFamily(
        "bitsandbytes",
        _bitsandbytes,
        examples=tuple(BITSANDBYTES),
        as_module=True,
        scale_bits=_BITSANDBYTES_SCALE_BITS,
        uniform_lines=_bitsandbytes_lines,
    ),
    SchemeFamily(
        "pruning",
        _pruned,
        examples=("magnitude-0.5", "wanda-0.5", "wanda-2:4", "sparsegpt-0.5", "random-0.5"),
        only_prunes=True,
        siblings=lambda scheme: other_shares(scheme.name),
        uniform_lines=_pruning_lines,
    ),
    SchemeFamily(
        "pair",
        _paired,
        version=2,
        examples=("int4-g128+wanda-0.5", "gptq-int4-g128+magnitude-0.5"),
        siblings=lambda scheme: other_widths(scheme.name),
        uniform_lines=_rounding_lines,
    ),
    *(
        SchemeFamily(
            family,
            _served(family),
            stored_bits=_served_bits,
            examples=tuple(SERVED[family]),
            rounds_by_number=True,
            uniform_lines=lambda scheme, grains: [(scheme.name,)],
        )
        for family in SERVED
    ),
    SchemeFamily(
        "smoothquant",
        _smoothed,
        stored_bits=_smoothed_bits,
        examples=("smooth-w8a8-channel", "smooth-w4a8-g128"),
        rounds_by_number=True,
        uniform_lines=lambda scheme, grains: [(scheme.name,)],
    ),
    _of_llama_cpp(weighted=True),
    _of_llama_cpp(weighted=False),
    SchemeFamily(
        "kv_cache",
        _of_cache,
        stored_bits=_cache_bits,
        examples=tuple(CACHES),
        of_cache=True,
        uniform_lines=lambda scheme, grains: [(scheme.name,)],
    ),
    SchemeFamily(DROP, _dropped, examples=(DROP,), only_prunes=True),
    SchemeFamily(
        "width",
        _cut,
        stored_bits=_bits_left,
        only_prunes=True,
        examples=(
            "channels-0.25-wanda",
            "channels-0.25-ziplm-repair",
            "heads-2:3-ziplm-repair",
            "experts-0.25-reap",
        ),
    ),
    SchemeFamily(SOURCE, _as_stored, examples=(SOURCE,), uniform_lines=lambda scheme, grains: [(SOURCE,)]),
):
    register(_family)
