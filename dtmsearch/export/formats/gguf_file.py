"""`gguf`: a plan of llama.cpp's types as the file that it loads: the base model by its own converter, the plan's
tensors quantized by its own quantizer with the importance that they were measured by, all others as they are."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtmsearch.core import gguf_types
from dtmsearch.core.components import Component
from dtmsearch.core.gguf_presets import heads_of
from dtmsearch.errors import ExportFailed, UserError
from dtmsearch.export.formats.gguf import tensor_names
from dtmsearch.export.formats.gguf_base import check_converter, convert
from dtmsearch.export.job import Job, Written, refuse
from dtmsearch.export.writer import ShardWriter, copy_other_files

NAME = "gguf"
FILE = "model.gguf"
OUTTYPES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}
# Which the base model's file says of itself.
_OWN_FIELDS = ["general.architecture", "general.quantization_version"]
_FILE_TYPE = "general.file_type"
# By ggml.h: of the layout of blocks.
_QUANTIZATION_VERSION = 2


def check_installed() -> None:
    """Raises `LibraryMissing` where something is missing that the file is made by."""
    gguf_types.ggml()
    check_converter()


def base_beside(folder: Path) -> Path:
    """Where the base model's file lies while an export is written into `folder` and checked."""
    return folder.with_name(f"{folder.name}.base.gguf")


def write_gguf(job: Job, folder: Path) -> Written:
    """Write the file, and the base model's beside the folder (`base_beside`). Raises `UserError` for what llama.cpp
    does not hold, `ExportFailed` where tensors take other bytes than the plan's arithmetic gives them."""
    _check_plan(job)
    names = tensor_names(job, NAME)
    held: dict[str, list[Component]] = {}
    for component, tensors in names.items():
        for tensor in tensors:
            held.setdefault(tensor, []).append(job.manifest.by_name[component])
    held = {tensor: parts for tensor, parts in held.items() if any(c.name in job.plan.schemes for c in parts)}
    mixed = [tensor for tensor, parts in held.items() if len({job.plan.scheme(c.name).name for c in parts}) > 1]
    if mixed:
        raise refuse(
            NAME,
            "a tensor of llama.cpp, such as a stack of all experts, has one type, and the plan gives its parts several "
            "or leaves some as they are:",
            mixed,
        )
    base, path = base_beside(folder), folder / FILE
    outtype = OUTTYPES[str(job.dtype).removeprefix("torch.")]
    convert(job.folder, base, outtype)
    try:
        if job.trained is None:
            types = _rewrite(job, base, path, held)
        else:
            with _with_trained(job, folder, outtype) as trained:
                types = _rewrite(job, trained, path, held)
    except BaseException:
        base.unlink(missing_ok=True)
        raise
    return Written((path,), notes=_notes(job, types))


@contextmanager
def _with_trained(job: Job, beside: Path, outtype: str) -> Iterator[Path]:
    """The base model's file with trained weights in the place of its own, converted from a folder that has them."""
    with tempfile.TemporaryDirectory(prefix=f"{beside.name}-trained-", dir=beside.parent) as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        writer = ShardWriter(folder, job)
        for name, tensor in job.tensors():
            writer.add(name, tensor)
        writer.close()
        copy_other_files(job, folder)
        found = Path(scratch) / FILE
        convert(folder, found, outtype)
        shutil.rmtree(folder)
        yield found


def _check_plan(job: Job) -> None:
    foreign = [f"{n}: {s.name}" for n, s in job.plan.parsed.items() if not s.name.startswith(gguf_types.PREFIX)]
    if foreign:
        raise refuse(NAME, "it has types of its own; `gguf-recipe` names the nearest:", foreign)


def _rewrite(job: Job, base: Path, path: Path, held: Mapping[str, Sequence[Component]]) -> dict[str, str]:
    """Write the base model's file with the plan's tensors quantized, one at a time: tensor -> its type."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

    reader = GGUFReader(base)
    absent = [tensor for tensor in held if tensor not in {own.name for own in reader.tensors}]
    if absent:
        raise refuse(NAME, "llama.cpp's converter makes no tensor of these names, which the plan has:", absent)
    architecture = str(reader.fields["general.architecture"].contents())
    writer: Any = GGUFWriter(path, architecture)
    mostly = _mostly(job, held, {tensor.name: int(tensor.n_elements) for tensor in reader.tensors})
    left_out = _OWN_FIELDS if mostly is None else [*_OWN_FIELDS, _FILE_TYPE]
    for field in reader.fields.values():
        if field.name in left_out or field.name.startswith("GGUF."):
            continue
        first, *rest = field.types
        writer.add_key_value(field.name, field.contents(), first, rest[-1] if first == GGUFValueType.ARRAY else None)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    if mostly is not None:
        writer.add_file_type(LlamaFileType[mostly])
    types: dict[str, str] = {}
    for tensor in reader.tensors:
        shape, kind = [int(n) for n in reversed(tensor.shape)], tensor.tensor_type
        found = _type_in_file(job, held.get(tensor.name, ()))
        if found is not None:
            types[tensor.name] = found.name
            shape, kind = [*shape[:-1], shape[-1] // found.block * found.block_bytes], GGMLQuantizationType[found.name]
        is_bytes = found is not None or tensor.data.dtype == np.uint8
        stored = shape if found is not None else list(tensor.data.shape)
        nbytes = int(np.prod(stored)) * (1 if is_bytes else tensor.data.dtype.itemsize)
        writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8) if is_bytes else tensor.data.dtype, nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            components = held.get(tensor.name, ())
            found = _type_in_file(job, components)
            writer.write_tensor_data(tensor.data if found is None else _blocks(job, tensor, found, components))
    finally:
        writer.close()
    return types


def _mostly(job: Job, held: Mapping[str, Sequence[Component]], sizes: Mapping[str, int]) -> str | None:
    """What people are told that a file holds: the type of most of its weights, of tensors of such sizes, by llama.cpp's
    name of it; None where most are the base model's own."""
    weights: Counter[str] = Counter()
    for tensor, size in sizes.items():
        kind = _type_in_file(job, held.get(tensor, ()))
        weights["" if kind is None else kind.name] += size
    name = weights.most_common(1)[0][0]
    if not name:
        return None
    return f"MOSTLY_{name}_S" if name in ("Q3_K", "Q4_K", "Q5_K") else f"MOSTLY_{name}"


def _type_in_file(job: Job, components: Sequence[Component]) -> gguf_types.GgufType | None:
    """The type of a tensor that these components lie in; None for one that stays as it is."""
    if not components:
        return None
    return gguf_types.held_type(job.plan.scheme(components[0].name).name, components[0].shape[1])


def _blocks(job: Job, tensor: Any, kind: gguf_types.GgufType, components: Sequence[Component]) -> NDArray[np.uint8]:
    """A tensor's blocks; of a stack of experts each by its own inputs. The converter may have put rows in another
    order, which no block knows of."""
    from gguf.quants import dequantize

    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    parts = values.reshape(-1, *values.shape[-2:])
    if len(components) not in (1, len(parts)):
        raise UserError(
            f"{NAME}: {tensor.name} has {len(parts)} matrices, the plan {len(components)} components for it"
        )
    found = []
    for at, part in enumerate(parts):
        component = components[at if len(components) > 1 else 0]
        importance = None
        if job.plan.scheme(component.name).needs_calibration:
            squares = job.compressor.mean_squares(component.name).float().cpu().numpy()
            importance = gguf_types.importance_of(squares)
        found.append(gguf_types.quantized(np.ascontiguousarray(part), kind, importance))
    blocks = np.stack(found).reshape(*values.shape[:-1], -1)
    stored = sum(job.plan.scheme(c.name).stored_bits(c.shape, 16) for c in components)
    if len(components) == 1 and 8 * blocks.nbytes != stored:
        raise ExportFailed(f"{tensor.name} takes {blocks.nbytes} bytes, where the plan counts {stored / 8:g}")
    return blocks


def _notes(job: Job, types: Mapping[str, str]) -> list[str]:
    counts = ", ".join(f"{number} {kind}" for kind, number in Counter(types.values()).most_common())
    dense = str(job.dtype).removeprefix("torch.")
    notes = [
        f"{FILE} holds {counts} tensors; all others, embeddings and output among them where the search left them out, "
        f"are {dense} as converted.",
        f"Quantized by {gguf_types.build()} with the search's own importance matrix.",
    ]
    tied = [
        c for c in job.manifest.others if c.layer < 0 and c.name in heads_of(job.manifest) & job.plan.schemes.keys()
    ]
    if tied:
        notes.append(
            f"{tied[0].name} is the head too, and llama.cpp rounds what a quantized head reads to 8 bits. The search "
            "measured its weights alone, so llama.cpp's logits differ by that more than of other plans."
        )
    return notes
