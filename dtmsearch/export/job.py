"""What an export starts from and what it leaves: a base checkpoint, perhaps with trained weights in the place of its
own, a plan over it, and a folder of known bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dtmsearch.core.checkpoint_files import DTYPE_BITS, read_header, weight_files
from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.engine_rules import ENGINES
from dtmsearch.core.evaluation import ModelSpec
from dtmsearch.core.fusion import input_readers, scale_partners
from dtmsearch.core.plan import Plan
from dtmsearch.errors import UserError
from dtmsearch.model.compress.compressor import Compressor
from dtmsearch.model.compress.number_rounding import largest_of
from dtmsearch.model.modules.compat import is_ignored, kept_in_float32, tied_parameters
from dtmsearch.model.modules.loading import empty_model
from dtmsearch.model.modules.matrices import sliced_matrices
from dtmsearch.model.modules.tensor_names import tensor_of, tensors_of
from dtmsearch.model.sources.unquantized import StoredCheckpoint, record_of


@dataclass(frozen=True)
class Job:
    """A plan over the checkpoint in `folder`, as it was measured: weights in `dtype`, scales in `scale_dtype`.

    `runtime` is what shall load it, where a format has several. `compressor` makes a component's weights out of its
    own; it has what calibrated schemes need. `schemes` are those of the search, beyond the plan's. `trained` is a file
    of weights that stand in the place of the checkpoint's own, `weights_id` names them. `trust_remote_code` runs code
    that comes with the model. `cache_scheme` is that of the keys and values of all layers, where they are kept rounded.
    """

    folder: Path
    manifest: ModelManifest
    plan: Plan
    dtype: torch.dtype
    device: torch.device
    scale_dtype: torch.dtype = torch.float32
    runtime: str = "transformers"
    compressor: Compressor = field(default_factory=Compressor)
    schemes: tuple[str, ...] = ()
    trust_remote_code: bool = ModelSpec.trust_remote_code
    trained: Path | None = None
    weights_id: str = ""
    cache_scheme: str = ""

    def __post_init__(self) -> None:
        partners = scale_partners(self.manifest.components)
        self.compressor.share_scales(
            lambda name: max(
                largest_of(self.matrix(self.manifest.by_name[other])) for other in partners.get(name, (name,))
            )
        )
        readers = input_readers(self.manifest.components)
        self.compressor.share_inputs(
            lambda name: {other: self.matrix(self.manifest.by_name[other]) for other in readers.get(name, ())}
        )
        if not self.unplaced:
            self._check_trained()

    @property
    def fuses(self) -> bool:
        """Whether what shall load it runs q, k, v and gate, up as one matrix each."""
        return self.runtime in ENGINES and ENGINES[self.runtime].fuses

    @cached_property
    def unplaced(self) -> tuple[str, ...]:
        """Components of the plan that no tensor of the files holds as it is, for transformers puts them together in a
        way of its own when it loads them."""
        return tuple(name for name in self.plan.schemes if name not in self._places)

    def require_places(self) -> None:
        """Raises `UserError` for a plan with such components."""
        if self.unplaced:
            raise UserError(
                f"the files of {self.manifest.model} hold no tensor for {self.unplaced[0]} and "
                f"{len(self.unplaced) - 1} others: transformers puts them together when it loads them, and this "
                "format is written from the files. `dense` holds them"
            )

    @cached_property
    def empty(self) -> Any:
        """The model without weights, as transformers builds it."""
        spec = ModelSpec(str(self.folder), dtype="float32", trust_remote_code=self.trust_remote_code)
        return empty_model(self.folder, spec)

    @cached_property
    def embedding(self) -> str:
        """The name of the tokens' embedding."""
        embedding = self.empty.get_input_embeddings()
        return next((name for name, module in self.empty.named_modules() if module is embedding), "")

    @cached_property
    def is_tied(self) -> bool:
        """Whether the head's weights are the embedding's."""
        head = self.empty.get_output_embeddings()
        return head is not None and head.weight is self.empty.get_input_embeddings().weight

    @cached_property
    def stored(self) -> StoredCheckpoint | None:
        """The base model's own files, where it comes quantized in safetensors."""
        record = record_of(self.folder) if self.manifest.source else None
        return None if record is None or record.method == "gguf" else StoredCheckpoint(Path(record.path))

    @cached_property
    def _float32(self) -> frozenset[str]:
        return kept_in_float32(self.empty, self.dtype) if self.dtype.itemsize < 4 else frozenset()

    def dtype_of(self, tensor: str) -> torch.dtype:
        """The dtype of a floating-point tensor in the model that was measured: of some, 32 bits."""
        return torch.float32 if any(part in tensor for part in self._float32) else self.dtype

    def _check_trained(self) -> None:
        shapes = self._trained_shapes
        wrong = [own for tensor, own in self._trained.items() if self.shapes.get(tensor) != shapes[own]]
        if wrong:
            raise UserError(
                f"the trained weights {self.weights_id} cannot be put into the files of {self.manifest.model}: "
                f"{wrong[0]} and {len(wrong) - 1} others stand there in no tensor of that shape. They are of another "
                "model, or transformers puts these tensors together when it loads them"
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, by name."""
        return {name: shape for path in weight_files(self.folder) for name, (_, shape) in read_header(path).items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        return {name: dtype for path in weight_files(self.folder) for name, (dtype, _) in read_header(path).items()}

    @cached_property
    def _merged(self) -> frozenset[str]:
        """Experts that transformers keeps in stacks, though the files may hold each by itself."""
        return frozenset() if self.fuses else frozenset(sliced_matrices(self.empty))

    @cached_property
    def linear(self) -> tuple[str, ...]:
        """The linear layers of the model that are tensors of their own: its components, routers, and an untied head."""
        after = [c for c in self.manifest.others if c.layer == self.manifest.num_layers and min(c.shape) > 1]
        routers = [self.manifest.by_name[name] for name in self.manifest.routers]
        own = [
            c
            for c in (*self.manifest.components, *routers)
            if f"{c.name}.weight" in self.shapes and not c.transposed and c.name not in self._merged
        ]
        return tuple(c.name for c in (*own, *after))

    @cached_property
    def unquantized(self) -> tuple[str, ...]:
        """All linear layers that the plan leaves as they are, by the names that a loader sees: those of the model, its
        towers and its head included, what routes tokens, and layers in the files that the model's class leaves out."""
        model = [name for name, module in self.empty.named_modules() if isinstance(module, nn.Linear)]
        further = [
            name.removesuffix(".weight")
            for name, shape in self.shapes.items()
            if len(shape) == 2 and name.endswith(".weight") and is_ignored(self.empty, name)
        ]
        tied = {name.removesuffix(".weight") for name in tied_parameters(self.empty)}
        names = dict.fromkeys((*self.linear, *(name for name in model if name not in tied), *further))
        return tuple(name for name in names if name not in self.plan.schemes)

    @cached_property
    def _places(self) -> dict[str, tuple[str, ...]]:
        """The tensors that hold a component of the plan, by its name; several are one above the other."""
        found = {name: self.tensors_of(name) for name in self.plan.schemes}
        return {name: tensors for name, tensors in found.items() if tensors}

    @cached_property
    def _trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters of the model that were trained."""
        if self.trained is None:
            return {}
        return {name: shape for name, (_, shape) in read_header(self.trained).items()}

    @cached_property
    def _trained(self) -> dict[str, str]:
        """The trained parameter that stands in the place of a tensor of the checkpoint, by the tensor's name."""
        return {self.tensor_of(parameter): parameter for parameter in self._trained_shapes}

    def tensor_of(self, parameter: str) -> str:
        """The tensor of the folder that a parameter is; its own name where there is none."""
        return tensor_of(parameter, self.shapes)

    def tensors_of(self, component: str) -> tuple[str, ...]:
        """The tensors of the folder that hold a component; none where they hold it in another form."""
        return tensors_of(component, self.shapes)

    @cached_property
    def _components(self) -> dict[str, list[str]]:
        """The components of the plan that each tensor holds, or a part of."""
        held: dict[str, list[str]] = {}
        for name, tensors in self._places.items():
            for tensor in tensors:
                held.setdefault(tensor, []).append(name)
        return held

    def component(self, tensor: str) -> Component | None:
        """The component of the plan that a tensor is, neither more of it nor less."""
        names = self._components.get(tensor, [])
        return self.manifest.by_name[names[0]] if tensor.removesuffix(".weight") in names else None

    def rewritten(self, rewrite: Callable[[Component, Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All tensors, with what `rewrite` makes of each of the plan's components [outputs, inputs] in its place."""
        ahead: dict[str, Tensor] = {}  # parts of a component whose own turn comes later
        for name, tensor in self.tensors():
            if name in ahead:
                yield name, ahead.pop(name)
                continue
            if tensor.ndim == 3 and name in self._components:
                tensor = tensor.clone()  # it is written into
            for component in (self.manifest.by_name[c] for c in self._components.get(name, ())):
                parts = self._places[component.name]
                if len(parts) > 1:
                    matrix = torch.cat([tensor if part == name else self.read(part) for part in parts])
                    rows = [self.shapes[part][0] for part in parts]
                    ahead |= dict(zip(parts, torch.split_with_sizes(rewrite(component, matrix), rows), strict=True))
                    tensor = ahead.pop(name)
                else:
                    tensor = _with_matrix(tensor, component, rewrite)
            yield name, tensor

    def matrix(self, component: Component) -> Tensor:
        """A component's own weights [outputs, inputs]."""
        matrix = torch.cat([self.read(part) for part in self.tensors_of(component.name)])
        if matrix.ndim == 3:
            matrix = matrix[int(component.name.split(".")[-2])]
        return matrix.t().contiguous() if component.transposed else matrix

    def read(self, tensor: str) -> Tensor:
        """One tensor, on the job's device; a floating-point one in the measured dtype."""
        path, name = self._files[tensor], tensor
        if tensor in self._trained:
            assert self.trained is not None
            path, name = self.trained, self._trained[tensor]
        # A file stays mapped, and its pages in memory, as long as it is open: so it is opened for each.
        with safe_open(path, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found.to(self.device, self.dtype_of(tensor) if found.is_floating_point() else None)

    @cached_property
    def _files(self) -> dict[str, Path]:
        return {name: path for path in weight_files(self.folder) for name in read_header(path)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors, one at a time."""
        return ((name, self.read(name)) for name in self._files)

    @property
    def plan_bits(self) -> int:
        """Bits of all tensors by the plan's arithmetic: components under their schemes, the rest in the dtype."""
        width = self.dtype.itemsize * 8
        bits = sum(
            prod(shape)
            * (
                8 * self.dtype_of(name).itemsize
                if self.dtypes[name] in DTYPE_BITS
                else _INTEGER_BITS[self.dtypes[name]]
            )
            for name, shape in self.shapes.items()
        )
        for name, scheme in self.plan.parsed.items():
            component = self.manifest.by_name[name]
            bits += scheme.bits_of(component, width) - component.num_weights * width
        return bits

    @property
    def largest_layer_bytes(self) -> int:
        """Bytes of the largest layer, or of the largest tensor outside the layers, uncompressed."""
        sizes: dict[object, int] = {}
        for name, shape in self.shapes.items():
            numbers = [part for part in name.split(".") if part.isdigit()]
            key = numbers[0] if numbers else name
            sizes[key] = sizes.get(key, 0) + prod(shape) * self.dtype.itemsize
        return max(sizes.values())


@dataclass(frozen=True)
class Written:
    """What an exporter has written: its files, the bytes of their tensors, and what the format stores beyond the plan's
    arithmetic, in bits by what it is (negative where it stores less)."""

    files: tuple[Path, ...]
    tensor_bytes: int = 0
    extra_bits: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


def refuse(format_name: str, reason: str, offending: Sequence[str]) -> UserError:
    """The error of a plan that a format cannot hold, with the first few components in its way."""
    more = len(offending) - _MOST_NAMED
    lines = [*offending[:_MOST_NAMED], *([f"and {more} more"] if more > 0 else [])]
    return UserError(f"{format_name} cannot hold this plan: {reason}" + "".join(f"\n  {line}" for line in lines))


def _with_matrix(tensor: Tensor, component: Component, rewrite: Callable[[Component, Tensor], Tensor]) -> Tensor:
    """`tensor` with a component's matrix rewritten, which it is, or is the transpose of, or a stack of."""
    matrix = tensor
    if tensor.ndim == 3:
        matrix = tensor[int(component.name.split(".")[-2])]
    rewritten = rewrite(component, matrix.t().contiguous() if component.transposed else matrix)
    rewritten = rewritten.t().contiguous() if component.transposed else rewritten
    if tensor.ndim < 3:
        return rewritten
    matrix.copy_(rewritten)
    return tensor


# Components that the error of a refused plan names.
_MOST_NAMED = 5
_INTEGER_BITS = {"I8": 8, "U8": 8, "BOOL": 8, "I16": 16, "I32": 32, "I64": 64}
