"""`gguf-recipe`: a plan in llama.cpp's words, a type for each of its tensors, for its own quantizer to apply.

The rounding is llama.cpp's then, not the search's: types are the nearest in bits, and what they do to the model is for
`dtmsearch` to measure only after a conversion back. Names come from the `gguf` package's own tables.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    names = _tensor_names(job)
    missing = [name for name, tensors in names.items() if not tensors and name in job.plan.schemes]
    if missing:
        raise refuse(NAME, "llama.cpp has no tensor for", missing)
    held: dict[str, list[Component]] = {}
    for name, tensors in names.items():
        for tensor in tensors:
            held.setdefault(tensor, []).append(job.manifest.by_name[name])
    types = {tensor: _type_of_stack(job, components) for tensor, components in held.items()}
    path = folder / "tensor-types.txt"
    # llama.cpp reads each name as a regular expression to be found in a tensor's name.
    path.write_text("".join(f"{t.replace('.', chr(92) + '.')}={kind.lower()}\n" for t, kind in types.items()))
    return Written((path,), notes=_notes(job, held, types))


def _tensor_names(job: Job) -> dict[str, tuple[str, ...]]:
    """The tensors of llama.cpp that hold each component of the model."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    config = json.loads((job.folder / "config.json").read_text(encoding="utf-8"))
    wanted = _ARCHITECTURES.get(config["model_type"], config["model_type"])
    by_name = {_bare(name): architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    if _bare(wanted) not in by_name:
        raise UserError(f"{NAME}: llama.cpp has no architecture for models of type {config['model_type']!r}")
    table = get_tensor_name_map(by_name[_bare(wanted)], job.manifest.num_layers)
    return {c.name: _names_in(table, c.name) for c in job.manifest.components}


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

    wanted = float(_DENSE_BITS)
    if scheme.bits:
        codes = component.num_weights * scheme.bits + 16 * scheme.num_scales(component.shape)
        wanted = codes / component.num_weights
    cols = component.shape[1]
    fitting = [kind for kind in _TYPES if cols % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0]
    return min(fitting, key=lambda kind: abs(_bits_of(kind) - wanted))


def _bits_of(kind: str) -> float:
    """Bits a weight of a type, scales included."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8.0 * int(size) / int(weights)


def _notes(job: Job, held: dict[str, list[Component]], types: dict[str, str]) -> list[str]:
    weights = {tensor: sum(c.num_weights for c in components) for tensor, components in held.items()}
    for tensor, components in held.items():  # half of a stacked matrix lies in another tensor
        if any("gate_up" in c.name and ".experts." in c.name for c in components):
            weights[tensor] //= 2
    size = sum(weights[tensor] * _bits_of(kind) / 8 for tensor, kind in types.items())
    default = Counter(kind for kind in types.values() if kind != "F16").most_common(1)
    kind = default[0][0] if default else "Q8_0"
    notes = [
        f"The tensors listed will take {size:,.0f} bytes in GGUF, by the types' blocks; nothing was quantized here.",
        "Apply it with llama.cpp: `python convert_hf_to_gguf.py BASE --outtype f16 --outfile base-f16.gguf`, then "
        "`llama-quantize --imatrix imatrix.gguf --tensor-type-file tensor-types.txt --token-embedding-type f16 "
        f"--output-tensor-type f16 base-f16.gguf compressed.gguf {kind}`.",
        "The importance matrix says which inputs matter, as calibrated schemes know here: `llama-imatrix -m "
        "base-f16.gguf -f calibration.txt -o imatrix.gguf`, over the search's calibration text."
        + (" Types below 4 bits need it." if any(_bits_of(k) < _IMATRIX_BITS for k in types.values()) else ""),
    ]
    coarse = sum(c.shape[1] % 256 != 0 for c in job.manifest.components if c.name in job.plan.schemes)
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
