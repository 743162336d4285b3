"""What an export starts from and what it leaves: a base checkpoint with a plan over it, and a folder of known bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dtmsearch.plans.components import DTYPE_BITS, Component, ModelManifest, read_header, weight_files
from dtmsearch.plans.plan import Plan
from dtmsearch.plans.schemes import DENSE, parse_scheme


@dataclass(frozen=True)
class Job:
    """A plan over the checkpoint in `folder`, as it was measured: weights in `dtype`, scales in `scale_dtype`.

    `runtime` is what shall load it, where a format has several.
    """

    folder: Path
    manifest: ModelManifest
    plan: Plan
    dtype: torch.dtype
    device: torch.device
    scale_dtype: torch.dtype = torch.float32
    runtime: str = "transformers"

    def __post_init__(self) -> None:
        missing = [name for name in self.plan.schemes if f"{name}.weight" not in self.shapes]
        if missing:
            raise ValueError(
                f"the files of {self.manifest.model} hold no tensor {missing[0]}.weight (nor {len(missing) - 1} more): "
                "transformers puts it together when it loads the model, and such a checkpoint cannot be exported "
                "tensor by tensor"
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, by name."""
        return {name: shape for path in weight_files(self.folder) for name, (_, shape) in read_header(path).items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        return {name: dtype for path in weight_files(self.folder) for name, (dtype, _) in read_header(path).items()}

    @cached_property
    def linear(self) -> tuple[str, ...]:
        """The linear layers of the model: its components and an untied head."""
        after = [c for c in self.manifest.others if c.layer == self.manifest.num_layers and min(c.shape) > 1]
        return tuple(c.name for c in (*self.manifest.components, *after))

    def component(self, tensor: str) -> Component | None:
        """The component whose weights a tensor holds, if the plan compresses it."""
        name = tensor.removesuffix(".weight")
        return self.manifest.by_name[name] if name != tensor and name in self.plan.schemes else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors, one at a time, on the job's device; floating-point ones in the measured dtype."""
        for path in weight_files(self.folder):
            for name in read_header(path):
                # A file stays mapped, and its pages in memory, as long as it is open: so it is opened for each.
                with safe_open(path, framework="pt") as file:
                    tensor: Tensor = file.get_tensor(name)
                yield name, tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    @property
    def plan_bits(self) -> int:
        """Bits of all tensors by the plan's arithmetic: components under their schemes, the rest in the dtype."""
        bits = 0
        width = self.dtype.itemsize * 8
        for name, shape in self.shapes.items():
            component = self.component(name)
            if component is not None:
                bits += parse_scheme(self.plan.scheme_of(component.name)).stored_bits(component.shape, width)
            else:
                stored = width if self.dtypes[name] in DTYPE_BITS else _INTEGER_BITS[self.dtypes[name]]
                bits += stored * _count(shape)
        return bits

    @property
    def largest_layer_bytes(self) -> int:
        """Bytes of the largest layer, or of the largest tensor outside the layers, uncompressed."""
        sizes: dict[object, int] = {}
        for name, shape in self.shapes.items():
            numbers = [part for part in name.split(".") if part.isdigit()]
            key = numbers[0] if numbers else name
            sizes[key] = sizes.get(key, 0) + _count(shape) * self.dtype.itemsize
        return max(sizes.values())


@dataclass(frozen=True)
class Written:
    """What an exporter has written: its files, the bytes of their tensors, and what the format stores beyond the plan's
    arithmetic, in bits by what it is (negative where it stores less)."""

    files: tuple[Path, ...]
    tensor_bytes: int = 0
    extra_bits: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


def refuse(format_name: str, reason: str, offending: Sequence[str]) -> ValueError:
    """The error of a plan that a format cannot hold, with every component in its way."""
    lines = "".join(f"\n  {line}" for line in offending)
    return ValueError(f"{format_name} cannot hold this plan: {reason}{lines}")


def compressed_schemes(plan: Plan) -> dict[str, str]:
    return {name: scheme for name, scheme in plan.schemes.items() if scheme != DENSE}


_INTEGER_BITS = {"I8": 8, "U8": 8, "BOOL": 8, "I16": 16, "I32": 32, "I64": 64}


def _count(shape: Sequence[int]) -> int:
    number = 1
    for size in shape:
        number *= size
    return number
