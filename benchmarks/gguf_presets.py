"""A plan's GGUF file beside llama.cpp's own mixture of the same bytes, made by llama.cpp's own quantizer with the same
importance matrix; both run by llama.cpp itself on the run's held-out prompts.

    DTMSEARCH_GGML=FOLDER python benchmarks/gguf_presets.py STORE RUN Q4_K_M [--plan PLAN.json] [--prompts 64]

Embeddings and output stay as they are converted, in both. Says also how many tensors of one type in both files have
the same bytes, which the search's quantizer and llama.cpp's tool have made apart from each other.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from dtmsearch.core import llama_library
from dtmsearch.core.evaluation import Reference
from dtmsearch.core.statistics import paired_difference
from dtmsearch.export.formats import gguf_file
from dtmsearch.export.formats.gguf import tensor_names
from dtmsearch.export.job import Job
from dtmsearch.model.replica.by_llama_cpp import measured
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows.export import resolve

# By llama.h, enum llama_ftype: all of `core.gguf_presets`.
_FTYPES = {
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "IQ4_XS": 30,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
}
_F32 = 0


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Parameters(ctypes.Structure):
    """llama_model_quantize_params of release 0.5.0, and room for what others have behind it."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "ftype", "output_type", "embedding_type")),
        *((f"flag{at}", ctypes.c_bool) for at in range(6)),
        ("imatrix", ctypes.c_void_p),
        ("rest", ctypes.c_uint8 * 256),
    )


def quantize(
    base: Path, out: Path, preset: str, importance: Mapping[str, NDArray[np.float32]], outside: bool = False
) -> None:
    """llama-quantize, by the function that it calls; `outside`: the embedding and the output too."""
    library: Any = llama_library._library()
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    library.llama_model_quantize.restype = ctypes.c_uint32
    parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.ftype = 1, _FTYPES[preset]
    if not outside:
        parameters.output_type = parameters.embedding_type = _F32
    entries = (_Importance * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data, values.size
    parameters.imatrix = ctypes.cast(entries, ctypes.c_void_p)
    assert library.llama_model_quantize(str(base).encode(), str(out).encode(), ctypes.byref(parameters)) == 0


def importance_of(job: Job) -> dict[str, NDArray[np.float32]]:
    return {
        tensor: np.ascontiguousarray(job.compressor.mean_squares(name).float().numpy())
        for name, tensors in tensor_names(job, "gguf").items()
        for tensor in tensors
    }


def tensor_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}


def held_out(store: str, run: str) -> Reference:
    """The reference of a run's held-out prompts; ends where it has none, as a run that was cut short."""
    results = ResultStore(store)
    record = results.run(run)
    known = None if record is None else record.validation_reference_id
    reference = None if known is None else results.reference(known)
    if reference is None:
        raise SystemExit(f"run {run!r} of {store} has no held-out prompts: finish it (dtmsearch resume)")
    return reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("run")
    parser.add_argument("preset", choices=_FTYPES)
    parser.add_argument("--plan", help="another plan that the store holds a measurement of")
    parser.add_argument("--prompts", type=int, default=64)
    given = parser.parse_args()
    reference = held_out(given.store, given.run)
    with tempfile.TemporaryDirectory() as scratch:
        own_folder, theirs = Path(scratch) / "own", Path(scratch) / f"{given.preset}.gguf"
        own_folder.mkdir()
        order = resolve(given.plan or given.run, "gguf", Path(scratch) / "out", given.store)
        gguf_file.write_gguf(order.job, own_folder)
        base, own = gguf_file.base_beside(own_folder), own_folder / gguf_file.FILE
        quantize(base, theirs, given.preset, importance_of(order.job))
        rows = slice(0, given.prompts)
        arguments = reference.text[rows, : reference.prompt_tokens], reference.continuation[rows]
        suppressed = np.array(reference.suppressed, np.int64)
        found = {path: measured(base, path, *arguments, suppressed) for path in (own, theirs)}
        left, right = tensor_bytes(own), tensor_bytes(theirs)
        alike = [name for name in left if left[name][0] == right[name][0] and left[name][0] not in ("F32", "F16")]
        same = sum(left[name][1] == right[name][1] for name in alike)
        kl = {path: values["kl"] for path, values in found.items()}
        difference = paired_difference(kl[own], kl[theirs], 0)
        for name, path in (("plan", own), (given.preset, theirs)):
            print(
                f"{name}: {path.stat().st_size:,} bytes, KL {kl[path].mean():.5f} on {len(kl[path])} held-out prompts"
            )
        print(f"difference {difference.mean:+.5f} ({difference.low:+.5f} to {difference.high:+.5f})")
        print(f"{same} of {len(alike)} tensors of one type in both files have the same bytes")


if __name__ == "__main__":
    main()
