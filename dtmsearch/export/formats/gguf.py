"""`gguf-recipe`: a plan in llama.cpp's words, a type for each of its tensors, for its own quantizer to apply.

Schemes of llama.cpp's own types keep them, with the importance matrix that they were measured by: its quantizer makes
the same weights then. Of other schemes the rounding is llama.cpp's, not the search's: types are the nearest in bits,
and what they do to the model is for `dtmsearch` to measure only after a conversion back. Names come from the `gguf`
package's own tables.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtmsearch.core import gguf_types
from dtmsearch.core.components import Component
from dtmsearch.core.schemes import Scheme
from dtmsearch.errors import UserError
from dtmsearch.export.job import Job, Written, refuse

NAME = "gguf-recipe"
# Types that a weight may get, the better of equal sizes first.
_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q4_0", "Q4_1", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0", "F16")
# Model types of transformers whose architecture has another name in llama.cpp; others differ in punctuation at most.
_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama"}
_STACKS = {"gate_up_proj": ("gate_proj", "up_proj")}
_DENSE_BITS = 16
# From here down, llama.cpp's types need to know which inputs matter.
_IMATRIX_BITS = 4


def write_recipe(job: Job, folder: Path) -> Written:
    """Raises `UserError` for an architecture that llama.cpp does not have, and for components it has no tensor for."""
    names = tensor_names(job, NAME)
    held: dict[str, list[Component]] = {}
    for name, tensors in names.items():
        for tensor in tensors:
            held.setdefault(tensor, []).append(job.manifest.by_name[name])
    types = {tensor: _type_of_stack(job, components) for tensor, components in held.items()}
    path = folder / "tensor-types.txt"
    # llama.cpp reads each name as a regular expression to be found in a tensor's name.
    path.write_text("".join(f"{t.replace('.', chr(92) + '.')}={kind.lower()}\n" for t, kind in types.items()))
    matrix = _write_importance(job, held, folder / "imatrix.gguf")
    return Written((path, *matrix), notes=_notes(job, held, types, bool(matrix)))


def _is_own(scheme: Scheme) -> bool:
    """Whether a scheme is one of llama.cpp's types."""
    return scheme.name.startswith(gguf_types.PREFIX)


def _write_importance(job: Job, held: dict[str, list[Component]], path: Path) -> tuple[Path, ...]:
    """The mean squares of inputs that the plan's types were made by, as llama.cpp's importance matrix; nothing where
    none of them depends on any."""
    from gguf import GGUFWriter

    parsed = job.plan.parsed
    wanted = {
        tensor: components
        for tensor, components in held.items()
        if any(c.name in parsed and _is_own(parsed[c.name]) and parsed[c.name].needs_calibration for c in components)
    }
    if not wanted:
        return ()
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration text of dtmsearch"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for tensor, components in wanted.items():
        rows = np.stack([job.compressor.mean_squares(c.name).float().cpu().numpy() for c in components])
        # A count of one, so that llama.cpp's quotient is the mean square itself.
        writer.add_tensor(f"{tensor}.in_sum2", np.ascontiguousarray(rows, np.float32))
        writer.add_tensor(f"{tensor}.counts", np.ones((len(components), 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (path,)


def tensor_names(job: Job, form: str) -> dict[str, tuple[str, ...]]:
    """The tensors of llama.cpp that hold each component of the model, for a format. Raises `UserError` for an
    architecture that llama.cpp does not have, and for components of the plan that it has no tensor for."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    config = json.loads((job.folder / "config.json").read_text(encoding="utf-8"))
    wanted = _ARCHITECTURES.get(config["model_type"], config["model_type"])
    by_name = {_bare(name): architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    if _bare(wanted) not in by_name:
        raise UserError(f"{form}: llama.cpp has no architecture for models of type {config['model_type']!r}")
    table = get_tensor_name_map(by_name[_bare(wanted)], job.manifest.num_layers)
    names = {c.name: _names_in(table, c.name) for c in job.manifest.in_plans(job.plan.schemes)}
    missing = [name for name, tensors in names.items() if not tensors and name in job.plan.schemes]
    if missing:
        raise refuse(form, "llama.cpp has no tensor for", missing)
    return names


def _bare(name: str) -> str:
    return name.replace("_", "").replace("-", "")


def _names_in(table: Any, component: str) -> tuple[str, ...]:
    experts, _, rest = component.rpartition(".experts.")
    _, dot, stack = rest.partition(".")
    parts = [f"{experts}.experts.{part}" for part in _STACKS.get(stack, (stack,))] if dot and experts else [component]
    names = [table.get_name(part) for part in parts]
    return tuple(f"{name}.weight" for name in names if name is not None)


def _type_of_stack(job: Job, components: Sequence[Component]) -> str:
    """One type for all that a tensor of llama.cpp holds: the largest that any of them should have."""
    types = {_nearest_type(job.plan.scheme(c.name), c) for c in components}
    return max(types, key=_bits_of)


def _nearest_type(scheme: Scheme, component: Component) -> str:
    """The type nearest in bits per weight, of those whose blocks divide the rows."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if _is_own(scheme):
        own = gguf_types.held_type(scheme.name, component.shape[1])
        return "F16" if own is None else own.name
    wanted = float(_DENSE_BITS)
    if scheme.bits:
        codes = component.num_weights * scheme.bits + 16 * scheme.num_scales(component.shape)
        wanted = codes / component.num_weights
    cols = component.shape[1]
    fitting = [kind for kind in _TYPES if cols % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0]
    return min(fitting, key=lambda kind: abs(_bits_of(kind) - wanted))


def _bits_of(kind: str) -> float:
    """Bits per weight of a type, scales included."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8.0 * int(size) / int(weights)


def _notes(job: Job, held: dict[str, list[Component]], types: dict[str, str], has_matrix: bool) -> list[str]:
    weights = {tensor: sum(c.num_weights for c in components) for tensor, components in held.items()}
    for tensor, components in held.items():  # half of a stacked matrix lies in another tensor
        if any("gate_up" in c.name and ".experts." in c.name for c in components):
            weights[tensor] //= 2
    size = sum(weights[tensor] * _bits_of(kind) / 8 for tensor, kind in types.items())
    default = Counter(kind for kind in types.values() if kind != "F16").most_common(1)
    kind = default[0][0] if default else "Q8_0"
    own = all(_is_own(scheme) for scheme in job.plan.parsed.values())
    dense = str(job.dtype).removeprefix("torch.")
    outtype = {"bfloat16": "bf16", "float32": "f32"}.get(dense, "f16") if own else "f16"
    notes = [
        f"The tensors listed will take {size:,.0f} bytes in GGUF, by the types' blocks; nothing was quantized here.",
        f"Apply it with llama.cpp: `python convert_hf_to_gguf.py BASE --outtype {outtype} --outfile base.gguf`, then "
        "`llama-quantize --imatrix imatrix.gguf --tensor-type-file tensor-types.txt --token-embedding-type f16 "
        f"--output-tensor-type f16 base.gguf compressed.gguf {kind}`.",
    ]
    if has_matrix:
        notes.append(
            "imatrix.gguf holds the mean squares of inputs by which the plan was measured: the quantizer makes the "
            "same weights by it. With another one it would make others."
        )
    else:
        notes.append(
            "The importance matrix says which inputs matter, as calibrated schemes know here: `llama-imatrix -m "
            "base.gguf -f calibration.txt -o imatrix.gguf`, over the search's calibration text."
            + (" Types below 4 bits need it." if any(_bits_of(k) < _IMATRIX_BITS for k in types.values()) else "")
        )
    stand_in = sorted(
        {
            f"{scheme.name.removeprefix(gguf_types.PREFIX)} by {found.name if found else 'F16'}"
            for name, scheme in job.plan.parsed.items()
            if _is_own(scheme)
            and (found := gguf_types.held_type(scheme.name, job.manifest.by_name[name].shape[1]))
            != gguf_types.type_of(scheme.name)
        }
    )
    if stand_in:
        notes.append(
            f"Blocks of 256 do not divide all rows: there llama.cpp replaces {', '.join(stand_in)}, as was measured."
        )
    parsed = job.plan.parsed
    coarse = sum(
        c.shape[1] % 256 != 0 for c in job.manifest.components if c.name in parsed and not _is_own(parsed[c.name])
    )
    if coarse:
        notes.append(
            f"{coarse} components have rows that blocks of 256 do not divide: they get types of blocks of 32, or F16."
        )
    if job.trained is not None:
        notes.append("The weights were trained: convert a `dense` export of this plan instead of BASE.")
    if any(scheme.pruning is not None or scheme.is_dropped for scheme in job.plan.parsed.values()):
        notes.append(
            "GGUF has no sparse types: convert a `dense` export of this plan instead of BASE, so that zeros stay zero."
        )
    return notes
