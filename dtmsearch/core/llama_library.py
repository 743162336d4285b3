"""llama.cpp's own logits of a GGUF file, by the library libllama beside the quantizer (`gguf_types`).

What is passed by value is given as the library itself makes it, and but its first four numbers are touched, whose order
is checked: so any build will do. Numbers and ctypes alone. The library ends the process where it finds a fault of its
own kind; what is of value runs in another one (`model.replica.by_llama_cpp`).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core import gguf_types
from dtmsearch.errors import LibraryMissing, UserError

# More than a parameter structure of any build takes.
_STRUCTURE_BYTES = 1024
# By llama.h: n_ctx, n_batch, n_ubatch and n_seq_max as llama_context_default_params has them.
_DEFAULTS = (512, 2048, 512, 1)
_FILE = r"(lib)?{}(\.v[0-9.]+)?\.(so|dylib|dll)(\.[0-9]+)*"


class _Structure(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * _STRUCTURE_BYTES),)


class _Batch(ctypes.Structure):
    """llama_batch: of tokens, at the positions that follow those that were decoded."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
# function -> what it gives, and what it takes
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, ctypes.c_void_p]),
    "llama_model_default_params": (_Structure, []),
    "llama_context_default_params": (_Structure, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Structure]),
    "llama_model_free": (None, [ctypes.c_void_p]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Structure]),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    "llama_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
}


class LlamaModel:
    """A model that llama.cpp has loaded."""

    def __init__(self, library: Any, model: int, context: int) -> None:
        self._library, self._context = library, context
        self.vocabulary_size = int(library.llama_vocab_n_tokens(library.llama_model_get_vocab(model)))

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Logits [len(tokens) - first, vocabulary] after each token from the `first` on, of tokens that nothing stands
        before. Raises `UserError` where it has no memory for them."""
        library, tokens = self._library, np.ascontiguousarray(tokens, np.int32)
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        wanted = (np.arange(len(tokens)) >= first).astype(np.int8)
        batch = _Batch(len(tokens), tokens.ctypes.data, None, None, None, None, wanted.ctypes.data)
        if (status := library.llama_decode(self._context, batch)) != 0:
            raise UserError(f"llama.cpp could not run {len(tokens)} tokens (llama_decode: {status})")
        shape = len(tokens) - first, self.vocabulary_size
        return np.ctypeslib.as_array(library.llama_get_logits(self._context), shape).copy()


@contextmanager
def loaded(path: Path, tokens: int, threads: int) -> Iterator[LlamaModel]:
    """The model of a GGUF file, with room for so many tokens at once. Raises `LibraryMissing` without the library,
    `UserError` for a file that it does not load."""
    library = _library()
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise UserError(f"llama.cpp cannot load {path}")
    try:
        room = library.llama_context_default_params()
        numbers = ctypes.cast(ctypes.byref(room), ctypes.POINTER(ctypes.c_uint32))
        if tuple(numbers[at] for at in range(len(_DEFAULTS))) != _DEFAULTS:
            raise UserError("this build of libllama has other context parameters than are known here")
        numbers[0] = numbers[1] = numbers[2] = tokens
        context = library.llama_init_from_model(model, room)
        if not context:
            raise UserError(f"llama.cpp has no memory for {tokens} tokens of {path}")
        library.llama_set_n_threads(context, threads, threads)
        try:
            yield LlamaModel(library, model, context)
        finally:
            library.llama_free(context)
    finally:
        library.llama_model_free(model)


def check_installed() -> None:
    """Raises `LibraryMissing` where libllama is not beside the quantizer."""
    _path("llama")


def _path(name: str) -> Path:
    folder = gguf_types.ggml().path.absolute().parent
    found = next((p for p in sorted(folder.iterdir()) if re.fullmatch(_FILE.format(name), p.name)), None)
    if found is None:
        raise LibraryMissing(
            f"there is no lib{name} beside {gguf_types.ggml().path}, which llama.cpp's own logits need: pip install "
            f"llama-cpp-python, or name the folder of a build of llama.cpp by {gguf_types.VARIABLE}"
        )
    return found


# In the place of llama.cpp's many lines.
_say_nothing = _LOG(lambda level, text, data: None)


@lru_cache(maxsize=1)
def _library() -> Any:
    """libllama, with what it computes by. Raises `LibraryMissing`."""
    paths = _path("ggml"), _path("llama")
    try:
        ctypes.CDLL(str(gguf_types.ggml().path), mode=ctypes.RTLD_GLOBAL)
        ggml, library = (ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise LibraryMissing(f"{paths[1]} is no build of llama.cpp that is known here: {error}") from None
    library.llama_log_set(_say_nothing, None)
    if hasattr(ggml, "ggml_backend_load_all_from_path"):  # of builds that choose their kernels by the machine
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path(str(paths[0].parent).encode())
    library.llama_backend_init()
    return library
