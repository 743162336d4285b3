"""llama.cpp's types of weights (`gguf-Q4_K`, `gguf-IQ4_XS`, ...): their blocks and sizes, what stands in for one whose
blocks do not divide a row, and the weights that they hold, by llama.cpp's own quantizer.

The quantizer is the library libggml-base of any build of llama.cpp, an optional dependency that is looked for when it
is first needed. Numbers and ctypes alone: what is given and what comes back is a tensor by its own methods.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core.identity import file_digest
from dtmsearch.core.number_formats import Rounding
from dtmsearch.errors import LibraryMissing, UserError

PREFIX = "gguf-"
# Names the library, or the folder that holds it.
VARIABLE = "DTMSEARCH_GGML"
_LIBRARY = "libggml-base"
_ENDINGS = (".so", ".dylib", ".dll")
# Matrices of fewer weights are quantized by one thread.
_PART_WEIGHTS = 1 << 18
# Of a digest that stands for a build, and what a build says that knows none.
_DIGITS = 16
_NOT_KNOWN = ("", "unknown")
_MOST_THREADS = 8


@dataclass(frozen=True)
class GgufType:
    """A type: its number in ggml, weights of a block and bytes that one takes, bits of a code as its name says them,
    and the type that llama.cpp takes instead for rows that its blocks do not divide (empty: F16)."""

    name: str
    number: int
    block: int
    block_bytes: int
    bits: int
    instead: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8.0 * self.block_bytes / self.block


# By ggml.h and ggml-common.h (sizes of blocks), and llama-quant.cpp (what stands in for what). Types of 2 bits with
# tables (IQ2, IQ1) are left out: their quantizer takes minutes to begin with.
TYPES = {
    kind.name: kind
    for kind in (
        GgufType("Q4_0", 2, 32, 18, 4),
        GgufType("Q4_1", 3, 32, 20, 4),
        GgufType("Q5_0", 6, 32, 22, 5),
        GgufType("Q5_1", 7, 32, 24, 5),
        GgufType("Q8_0", 8, 32, 34, 8),
        GgufType("Q2_K", 10, 256, 84, 2, "IQ4_NL"),
        GgufType("Q3_K", 11, 256, 110, 3, "IQ4_NL"),
        GgufType("Q4_K", 12, 256, 144, 4, "Q5_0"),
        GgufType("Q5_K", 13, 256, 176, 5, "Q5_1"),
        GgufType("Q6_K", 14, 256, 210, 6, "Q8_0"),
        GgufType("IQ3_XXS", 18, 256, 98, 3, "IQ4_NL"),
        GgufType("IQ4_NL", 20, 32, 18, 4),
        GgufType("IQ3_S", 21, 256, 110, 3, "IQ4_NL"),
        GgufType("IQ4_XS", 23, 256, 136, 4, "IQ4_NL"),
    )
}
# Of one make each.
_LINES = (
    ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
    ("Q8_0", "Q5_0", "Q4_0"),
    ("Q5_1", "Q4_1"),
    ("IQ4_XS", "IQ3_S", "IQ3_XXS"),
    ("IQ4_NL",),
)
# Which no importance matrix changes.
_WITHOUT_IMPORTANCE = ("Q8_0",)
F16_BITS = 16
# What llama.cpp's products with a type read: blocks of 8-bit integers, by `vec_dot_type` of ggml-cpu.c. (Q8_1, which
# Q4_1 and Q5_1 have, is Q8_0 and a sum for each block.)
_Q8_0 = Rounding("int8", "group", 32, "float16")
_Q8_K = Rounding("int8", "group", 256, "signed")


def names_of(weighted: bool) -> tuple[str, ...]:
    """Schemes of types that an importance matrix changes, or of those that none does."""
    return tuple(f"{PREFIX}{name}" for name in TYPES if (name not in _WITHOUT_IMPORTANCE) == weighted)


def lines_of(schemes: Collection[str]) -> list[tuple[str, ...]]:
    """Of these schemes, those that differ only in how much they compress: types of one make."""
    lines = (tuple(name for kind in line if (name := f"{PREFIX}{kind}") in schemes) for line in _LINES)
    return [line for line in lines if line]


def type_of(scheme: str) -> GgufType:
    """The type that a scheme names. Raises `KeyError` for another scheme."""
    return TYPES[scheme.removeprefix(PREFIX)]


def held_type(scheme: str, cols: int) -> GgufType | None:
    """The type in which llama.cpp holds rows of `cols` weights under a scheme: its own or, where its blocks do not
    divide them, what llama.cpp takes instead; None for F16."""
    kind = type_of(scheme)
    if cols % kind.block == 0:
        return kind
    other = TYPES.get(kind.instead)
    return other if other is not None and cols % other.block == 0 else None


def inputs_of(scheme: str, cols: int) -> Rounding | None:
    """How llama.cpp rounds what a matrix of `cols` inputs reads under a scheme; None where it is held in F16."""
    kind = held_type(scheme, cols)
    return None if kind is None else _Q8_K if kind.block == _Q8_K.size else _Q8_0


def stored_bits(scheme: str, shape: tuple[int, int]) -> int:
    """Bits that a matrix of `shape` takes in a GGUF file under a scheme."""
    rows, cols = shape
    kind = held_type(scheme, cols)
    return rows * cols * F16_BITS if kind is None else 8 * rows * (cols // kind.block) * kind.block_bytes


def blocks_of(weight: Any, scheme: str, mean_squares: Callable[[], Any] | None) -> NDArray[np.uint8] | None:
    """The blocks [rows, bytes of a row] in which llama.cpp holds `weight`, a tensor [rows, cols], quantized in 32 bits
    with the importance of each input, `mean_squares` [cols]; None for F16. Where no token has reached the inputs, all
    count alike, as in llama.cpp. Raises `UserError` where its library is not found, or is not the one that this is made
    for."""
    kind = held_type(scheme, weight.shape[1])
    if kind is None:
        return None
    values: NDArray[np.float32] = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    importance = None if mean_squares is None else importance_of(mean_squares().float().cpu().numpy())
    return quantized(values, kind, importance)


def importance_of(mean_squares: NDArray[np.float32]) -> NDArray[np.float32]:
    """The importance of inputs [cols] by their mean squares."""
    squares = np.ascontiguousarray(mean_squares, np.float32)
    return squares if (squares > 0.0).any() else np.ones_like(squares)


def weights_of(blocks: NDArray[np.uint8] | None, scheme: str, like: Any) -> Any:
    """The weights that `blocks_of` stand for, as a tensor of the shape, dtype and device of `like`, of which they were
    made."""
    kind = held_type(scheme, like.shape[1])
    if blocks is None or kind is None:
        return like.half().to(like.dtype)
    return like.new_tensor(dequantized(blocks, kind, like.shape[1]), dtype=None).to(like.dtype)


def made(weight: Any, scheme: str, mean_squares: Callable[[], Any] | None) -> Any:
    """The weights that llama.cpp holds of `weight` (see `blocks_of`), of the same shape and dtype."""
    return weights_of(blocks_of(weight, scheme, mean_squares), scheme, weight)


def round_trip(
    values: NDArray[np.float32], kind: GgufType, importance: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """What a type holds of `values` [rows, cols], by the columns' `importance` [cols]."""
    return dequantized(quantized(values, kind, importance), kind, values.shape[1])


def quantized(values: NDArray[np.float32], kind: GgufType, importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """The blocks of each row [rows, bytes of a row], as a GGUF file has them."""
    library = ggml()
    rows, cols = values.shape
    found = np.zeros((rows, cols // kind.block * kind.block_bytes), np.uint8)

    def part(first: int, last: int) -> None:
        library.quantize(kind, values[first:last], found[first:last], importance)

    threads = min(_MOST_THREADS, os.cpu_count() or 1, max(1, values.size // _PART_WEIGHTS))
    edges = [rows * at // threads for at in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, edges[:-1], edges[1:]))
    return found


def dequantized(blocks: NDArray[np.uint8], kind: GgufType, cols: int) -> NDArray[np.float32]:
    """The weights [rows, cols] of rows of blocks."""
    found = np.empty((len(blocks), cols), np.float32)
    ggml().dequantize(kind, blocks, found)
    return found


def build() -> str:
    """Which build of llama.cpp's quantizer is found here: its release and commit or, where it does not tell them, the
    digest of its file. Empty where there is none."""
    try:
        return ggml().build
    except UserError:
        return ""


class _Traits(ctypes.Structure):
    """The head of ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


def _told(library: ctypes.CDLL, function: str) -> str:
    """What a function without arguments says of the library; empty where there is none, or it does not know."""
    if not hasattr(library, function):
        return ""
    asked = getattr(library, function)
    asked.restype = ctypes.c_char_p
    said = bytes(asked() or b"").decode(errors="replace")
    return "" if said in _NOT_KNOWN else said


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Ggml:
    """libggml-base at `path`. Raises `UserError` where it cannot be loaded or has other blocks than are known here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            self._quantize = library.ggml_quantize_chunk
            self._init = library.ggml_quantize_init
            self._traits = library.ggml_get_type_traits
        except (OSError, AttributeError) as error:
            raise LibraryMissing(f"{path} is no library of llama.cpp's quantizer: {error}") from None
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        ]
        self._init.argtypes, self._init.restype = [ctypes.c_int], None
        self._traits.argtypes, self._traits.restype = [ctypes.c_int], ctypes.POINTER(_Traits)
        for kind in TYPES.values():
            self._check(kind)
        told = [_told(library, name) for name in ("ggml_version", "ggml_commit")]
        self.build = f"ggml {' '.join(told)}" if all(told) else f"ggml {file_digest(path)[:_DIGITS]}"

    def _check(self, kind: GgufType) -> None:
        traits = self._traits(kind.number).contents
        found = (bytes(traits.type_name or b"").decode().upper(), traits.blck_size, traits.type_size)
        if found != (kind.name.upper(), kind.block, kind.block_bytes):
            raise UserError(f"{self.path} has {found} as type {kind.number}, where {kind.name} was expected")

    def quantize(self, kind: GgufType, values: NDArray[np.float32], out: NDArray[np.uint8], importance: Any) -> None:
        """Rows of weights as blocks, into `out`."""
        rows, cols = values.shape
        if not rows:
            return
        self._init(kind.number)  # tables of some types, made once
        pointer = None if importance is None else importance.ctypes.data
        written = self._quantize(kind.number, values.ctypes.data, out.ctypes.data, 0, rows, cols, pointer)
        assert written == out.nbytes, (kind, values.shape, written)

    def dequantize(self, kind: GgufType, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Blocks of rows as weights, into `out`."""
        _TO_FLOAT(self._traits(kind.number).contents.to_float)(blocks.ctypes.data, out.ctypes.data, out.size)


def ggml() -> Ggml:
    """The library, looked for once. Raises `UserError` that says how to have it."""
    found = _found(os.environ.get(VARIABLE, ""))
    if isinstance(found, UserError):
        raise type(found)(str(found))
    return found


@lru_cache(maxsize=1)
def _found(named: str) -> Ggml | UserError:
    """What is found while `VARIABLE` names this, or why nothing is: every identity asks for the build."""
    try:
        found = next((at for place in _places(named) if (at := _library_at(place)) is not None), None)
        return _not_found() if found is None else Ggml(found)
    except UserError as error:
        return error.with_traceback(None)


def _not_found() -> LibraryMissing:
    return LibraryMissing(
        f"schemes such as gguf-Q4_K need llama.cpp's quantizer, {_LIBRARY}: pip install llama-cpp-python, or name the "
        f"library of any build of llama.cpp, or its folder, by {VARIABLE}"
    )


def _places(named: str) -> list[Path]:
    if named:
        if _library_at(Path(named)) is None:
            raise LibraryMissing(f"{VARIABLE}: there is no {_LIBRARY} at {named}")
        return [Path(named)]
    spec = importlib.util.find_spec("llama_cpp")
    places = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "lib"]
    system = ctypes.util.find_library("ggml-base")
    return [*places, *([Path(system)] if system else [])]


def _library_at(place: Path) -> Path | None:
    if place.is_dir():
        return next((found for end in _ENDINGS for found in sorted(place.glob(f"{_LIBRARY}*{end}*"))), None)
    return place if place.is_file() or place.name == str(place) else None
