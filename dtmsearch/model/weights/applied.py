"""The weights of a loaded model under a plan: applied by difference, restored by pointer.

Holds one copy of the model: the current plan's. A component's original weights, once replaced for good, are read
again from the checkpoint (a memory map, so usually the page cache) when they are next needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dtmsearch.core.checkpoint_files import read_header
from dtmsearch.core.components import Component
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import Scheme
from dtmsearch.core.widths import side_of
from dtmsearch.errors import UserError
from dtmsearch.model.compress.bitsandbytes_layers import compressed_module
from dtmsearch.model.compress.compressor import Compressor
from dtmsearch.model.compress.number_rounding import RoundsInputs, calibrated_scale, inputs_rounding, largest_of
from dtmsearch.model.compress.width import indices
from dtmsearch.model.modules.blocks import is_taken_out, take_out
from dtmsearch.model.modules.compat import Conv1D
from dtmsearch.model.modules.fewer_experts import FewerExperts, MixtureParts, fewer_experts, parts_of, run_with
from dtmsearch.model.modules.kv_caches import CachedPart
from dtmsearch.model.modules.matrices import read, write
from dtmsearch.model.modules.slots import Places
from dtmsearch.model.weights import read_ahead
from dtmsearch.model.weights.checkpoint import Checkpoint
from dtmsearch.model.weights.read_ahead import ReadAhead, Wanted

# Replaced weights in the CPU's memory after which the heap is trimmed, which takes milliseconds.
_MOST_UNTRIMMED_BYTES = 1 << 25


@dataclass(frozen=True)
class _Installed:
    """What stands in a component's place: a module, and its dense weights if it has any, of one in a block that is cut
    its `bias` as well; whether a block is `out`, or by what it runs with `fewer` experts."""

    module: nn.Module
    weight: Tensor | None
    out: bool = False
    bias: Tensor | None = None
    fewer: FewerExperts | None = None


class Passing(Protocol):
    """Weights that pass through the device: `need` has those of a component there until the next one's are needed;
    what was `written` into them for good is not to be lost. `check_together` refuses, by an `AssertionError`,
    components that are not there at once."""

    def need(self, component: str) -> None: ...

    def check_together(self, components: Iterable[str]) -> None: ...

    def written(self, component: str) -> None: ...


class Weights:
    """A model's components under a plan, `Plan()` to begin with; scales of rounded ones as `scale_dtype` holds them.

    Where weights pass through the device, `passing` has those of a component there until the next one's are asked for:
    what is handed out is a copy then, and plans that stand within a `with` statement change one layer."""

    # Kinds of devices for which replaced weights are read ahead; in the host's memory files are mapped.
    reads_ahead = frozenset({"cuda"})

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, places: Places, scale_dtype: torch.dtype = torch.float32,
        passing: Passing | None = None, blocks: Iterable[Component] = (), matrices: Iterable[Component] = (),
    ) -> None:  # fmt: skip
        self._model = model
        self._places = places
        self._checkpoint = checkpoint
        self._passing = passing
        self._blocks = {block.name: block for block in blocks}
        self._inside: dict[str, list[Component]] = {}
        for matrix in matrices if self._blocks else ():
            self._inside.setdefault(matrix.block, []).append(matrix)
        self._matrices = {c.name: c for inside in self._inside.values() for c in inside}
        # Matrices that stand cut, and the width's scheme; biases of those that ever did.
        self._cut_by: dict[str, str] = {}
        self._biases: dict[str, Tensor] = {}
        self._mixtures: dict[str, MixtureParts] = {}
        self._dense_modules: dict[str, nn.Module] = {}
        self._kept: dict[str, Tensor] = {}
        self._base: Checkpoint | None = None
        self._trained_names: set[str] = set()
        self._unnamed: dict[str, Tensor] = {}
        self.compressor = Compressor(scale_dtype)
        self._untrimmed_bytes = 0
        self._ahead = ReadAhead()
        self.plan = Plan()

    def share_scales(self, partners: Mapping[str, Sequence[str]]) -> None:
        """Let components share the scale of a whole tensor with their partners, whatever scheme these have."""
        self.compressor.share_scales(
            lambda component: max(largest_of(self.original(name)) for name in partners.get(component, (component,)))
        )

    def share_inputs(self, readers: Mapping[str, Sequence[str]]) -> None:
        """Let components share the scales of their columns with those that read the same (`fusion.input_readers`)."""
        self.compressor.share_inputs(
            lambda component: {name: self.original(name) for name in readers.get(component, ())}
        )

    def become(self, plan: Plan) -> None:
        """Apply `plan` for good; what it replaces is let go."""
        changes = self._changes(plan)
        # A plan names nothing in a block that it drops: what has to stand in one as it was goes first.
        order = sorted(changes, key=lambda name: not changes[name].is_unquantized)
        with self._ahead.of(self._to_read(order)):
            for component in order:
                scheme = changes[component]
                replaced = self._replace(component, scheme, plan)
                if component not in self._blocks:
                    if self._passing is not None:
                        self._passing.written(component)
                    self._let_go(component, replaced)
                    self._note_cut(component, plan)
                changed = self.plan.schemes | {component: scheme.name}
                self.plan = Plan.of(changed)  # after each component, so that a failure in between leaves a true state

    def _to_read(self, components: Iterable[str]) -> list[Wanted]:
        """Those whose original weights were replaced on a GPU for good and have to be read again, if they are many."""
        found, size = list[Wanted](), 0
        for component in components if self._passing is None else ():
            replaced = component in self.plan.schemes or component in self._cut_by
            if not replaced or component in self._kept or not self._checkpoint.holds(component):
                continue
            weight = next(self._places.get(component).parameters())
            if weight.device.type in self.reads_ahead:
                found.append(Wanted(component, partial(self._checkpoint.read, component), weight.device))
                size += weight.nbytes
        return found if size >= read_ahead.LEAST_BYTES else []

    def _changes(self, plan: Plan) -> dict[str, Scheme]:
        """What a plan has otherwise than the current one, with what lies in blocks that it cuts otherwise."""
        changes = plan.changes(self.plan)
        for block in plan.widths.keys() | {self._matrices[name].block for name in self._cut_by}:
            width = _over_matrices(plan, block)
            scheme = "" if width is None else width.name
            for matrix in self._inside.get(block, ()):
                if self._cut_by.get(matrix.name, "") != scheme and not plan.drops(matrix.name):
                    changes.setdefault(matrix.name, plan.scheme(matrix.name))
        return changes

    def _note_cut(self, component: str, plan: Plan) -> None:
        """Note how a component stands cut now."""
        self._cut_by.pop(component, None)
        matrix = self._matrices.get(component)
        width = None if matrix is None else _over_matrices(plan, matrix.block)
        if width is not None:
            self._cut_by[component] = width.name

    @contextmanager
    def perturbed(self, plan: Plan) -> Iterator[None]:
        """`plan` within, the current plan again after it, by pointer."""
        replaced: list[tuple[str, _Installed]] = []
        if self._passing is not None:  # what is put back must lie where it was taken from
            self._passing.check_together(plan.changes(self.plan))
        changes = self._changes(plan)
        try:
            self.compressor.note_shared(changes)
            for component, scheme in changes.items():
                replaced.append((component, self._replace(component, scheme, plan)))
            yield
        finally:
            for component, installed in reversed(replaced):
                self._install(component, installed)

    @contextmanager
    def with_original(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, components are the model's own modules with these weights, as `original` gave them, whatever plan
        stands; by pointer."""
        before = {component: self._installed(component) for component in weights}
        dense = {component: self._dense_modules.get(component, now.module) for component, now in before.items()}
        held = {component: read(module) for component, module in dense.items()}
        try:
            for component, weight in weights.items():
                self._install(component, _Installed(dense[component], weight))
            yield
        finally:
            for component, now in before.items():
                write(dense[component], held[component])
                self._install(component, now)

    def rest_on(self, trained: Path | None) -> None:
        """Let the model's own weights be those of a file of trained ones, or the base model's again. No plan stands."""
        assert self.plan == Plan(), "the plan of the weights before is taken back first"
        base = self._base or self._checkpoint
        self._checkpoint = base if trained is None else base.with_file(trained)
        names = set() if trained is None else set(read_header(trained))
        for name in sorted(names | self._trained_names):
            component, _, leaf = name.rpartition(".")
            parameter = getattr(self._places.get(component), leaf)
            if parameter.is_meta:
                continue  # of a layer that another process holds
            if name not in self._trained_names and not base.has(name):
                self._unnamed[name] = parameter.data.cpu()  # the checkpoint has it under another name
            value = self._checkpoint.parameter(name) if self._checkpoint.has(name) else self._unnamed[name]
            parameter.data = value.to(parameter.device, parameter.dtype)
        self._base = base
        self._trained_names |= names
        self._kept.clear()
        self._biases.clear()
        self.compressor.forget_weights()

    @property
    def pass_through(self) -> bool:
        """Whether weights are on the device layer by layer, each only until the next one's are."""
        return self._passing is not None

    def need(self, component: str) -> None:
        """Have a component's weights on the device, for one who runs its module alone."""
        if self._passing is not None:
            self._passing.need(component)

    def standing(self, component: str) -> Tensor:
        """A component's weights as the plan has made them."""
        weight = self._installed(component).weight
        assert weight is not None, f"{component} is no plain matrix under this plan"
        return self._to_keep(weight)

    def standing_whole(self, component: str) -> Tensor:
        """As `standing`; of a component that is cut with zeros for what is not there."""
        now = self.standing(component)
        if component not in self._cut_by:
            return now
        matrix, scheme = self._matrices[component], self.plan.widths[self._matrices[component].block]
        assert scheme.width is not None
        units = scheme.width.units(matrix)
        at = indices(matrix, self.compressor.cut(matrix.block, scheme, units, now.device).kept, units)
        found = now.new_zeros(matrix.shape)
        found[(at,) if side_of(matrix) == "rows" else (slice(None), at)] = now
        return found

    def dense_standing(self, component: str) -> Tensor | None:
        """As `standing`; None where the component is no plain matrix under this plan."""
        weight = self._installed(component).weight
        return None if weight is None else self._to_keep(weight)

    def module(self, component: str) -> nn.Module:
        """What stands in a component's place."""
        return self._places.get(component)

    def made(self, component: str, scheme: Scheme) -> nn.Module:
        """A module that computes what the component does under a scheme that is more than other weights."""
        dense = self._dense_modules.get(component, self._places.get(component))
        if isinstance(dense, CachedPart):
            return _cached(dense, scheme)
        made = self._make(component, scheme, self._installed(component))
        assert made.weight is None, f"{scheme.name} is no more than other weights"
        return made.module

    def let_gradients_through(self) -> None:
        """Make weights that came to be in inference mode ones that a backward pass may be taken through."""
        for parameter in self._model.parameters():
            if parameter.is_inference() or parameter.data.is_inference():
                parameter.data = parameter.data.clone()
            parameter.requires_grad_(False)

    def original(self, component: str) -> Tensor:
        """A component's own weights, whatever the plan makes of it, on its device."""
        return self._to_keep(self._original(component, self._installed(component)))

    def _to_keep(self, weight: Tensor) -> Tensor:
        """Weights that stay what they are when another layer's take their place."""
        return weight if self._passing is None else weight.clone()

    def _replace(self, component: str, scheme: Scheme, plan: Plan) -> _Installed:
        if component in self._blocks:
            block = self._places.block(component)
            now = _Installed(block, None, is_taken_out(block), fewer=fewer_experts(block))
            self._install(component, _Installed(block, None, scheme.is_dropped, fewer=self._fewer(component, scheme)))
            return now
        shaped = scheme.width is not None or (scheme.is_dropped and any(self._places.get(component).children()))
        if shaped:
            done = "dropped" if scheme.is_dropped else "cut"
            raise UserError(
                f"{component} cannot be {done} here: blocks are {done} in models that one process holds whole (without "
                "--nodes-per-replica; --gpus-per-replica spreads a model over several GPUs, and --weights streamed has "
                "it pass through one)"
            )
        now = self._installed(component)
        matrix = self._matrices.get(component)
        width = None if matrix is None else _over_matrices(plan, matrix.block)
        self._install(component, self._make(component, scheme, now, width))
        return now

    def _fewer(self, component: str, scheme: Scheme) -> FewerExperts | None:
        """By what a block runs under a scheme that leaves it some of its experts; None for another scheme."""
        if scheme.width is None or not scheme.width.takes_experts:
            return None
        block, module = self._blocks[component], self._places.block(component)
        if component not in self._mixtures:
            self._mixtures[component] = parts_of(self._model, block, self._inside[component])
        device = next(module.parameters()).device
        kept = self.compressor.cut(component, scheme, block.num_experts, device).kept
        return FewerExperts(module, self._mixtures[component], kept)

    def _make(self, component: str, scheme: Scheme, now: _Installed, width: Scheme | None = None) -> _Installed:
        dense = self._dense_modules.setdefault(component, now.module)
        weight = self._original(component, now, self._ahead.take(component))
        bias = self._biases.get(component)
        if width is not None:
            component, weight, bias = self._as_cut(self._matrices[component], width, weight, dense)
        made = self._made_of(component, scheme, dense, weight)
        if made.weight is None and width is not None and bias is not None:
            raise UserError(f"{component}: {scheme.name} is not there beside a width where matrices have biases")
        return replace(made, bias=bias)

    def _as_cut(
        self, matrix: Component, scheme: Scheme, weight: Tensor, dense: nn.Module
    ) -> tuple[str, Tensor, Tensor | None]:
        """A matrix of a block that a width cuts: the name by which it is compressed, its weights, its bias. Raises
        `ValueError` where the cut is not solved for."""
        width = scheme.width
        assert width is not None
        cut = self.compressor.cut(matrix.block, scheme, width.units(matrix), weight.device)
        bias: Tensor | None = getattr(dense, "bias", None)
        if bias is not None and matrix.name not in self._biases:
            self._biases[matrix.name] = self._to_keep(bias.data)
        bias = self._biases.get(matrix.name)
        at = indices(matrix, cut.kept, width.units(matrix)).to(weight.device)
        if side_of(matrix) == "rows":
            name = self.compressor.as_cut(matrix.name, scheme.name, None)
            return name, weight[at], None if bias is None else bias[at]
        name = self.compressor.as_cut(matrix.name, scheme.name, at)
        return name, weight[:, at].contiguous() if cut.last is None else cut.last.to(weight), bias

    def _made_of(self, component: str, scheme: Scheme, dense: nn.Module, weight: Tensor) -> _Installed:
        """A component of such weights under a scheme."""
        if scheme.is_unquantized:
            return _Installed(dense, weight)
        if isinstance(dense, CachedPart):
            return _Installed(_cached(dense, scheme), None)
        if scheme.kind.as_module:
            if not isinstance(dense, nn.Linear):
                raise UserError(f"{scheme.name} needs a linear layer; {component} is {type(dense).__name__}")
            return _Installed(compressed_module(dense, weight, scheme), None)
        matrix = weight if weight.ndim == 2 else weight.unsqueeze(0)
        made = self.compressor.compress(component, matrix, scheme).reshape(weight.shape)
        rounding = inputs_rounding(component, dense, scheme, matrix.shape[1])
        if rounding is None:
            return _Installed(dense, made)
        scale = None
        if rounding.static:
            scale = calibrated_scale(self.compressor.largest_input(component).to(made.device), rounding)
        columns = self.compressor.column_scales(component, scheme)
        return _Installed(RoundsInputs(dense, made, rounding, scale, columns).eval(), None)

    def rounds_inputs(self, component: str, scheme: Scheme, cols: int) -> bool:
        """Whether what a component of `cols` inputs reads is rounded under a scheme, so that it changes more than
        weights."""
        dense = self._dense_modules.get(component, self._places.get(component))
        if isinstance(dense, CachedPart):
            return True
        if scheme.kind.as_module:
            return scheme.rounds_activations
        return inputs_rounding(component, dense, scheme, cols) is not None

    def _original(self, component: str, now: _Installed, read: Tensor | None = None) -> Tensor:
        """The component's own weights, on its device; where they were replaced, what was `read` of the checkpoint, or
        is read of it here."""
        if component not in self.plan.schemes and component not in self._cut_by:
            assert now.weight is not None
            return now.weight
        if component in self._kept:
            return self._kept[component].to(next(now.module.parameters()).device)
        here = next(now.module.parameters())
        weight = self._checkpoint.read(component) if read is None else read
        weight = weight.to(here.device, self._dtype)
        return weight.t() if isinstance(self._dense_modules[component], Conv1D) else weight

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype  # type: ignore[assignment]
        return dtype

    def _installed(self, component: str) -> _Installed:
        self.need(component)
        module = self._places.get(component)
        dense = self._dense_modules.get(component, module)
        bias = getattr(module, "bias", None) if component in self._matrices and module is dense else None
        return _Installed(module, read(module) if module is dense else None, bias=None if bias is None else bias.data)

    def _install(self, component: str, installed: _Installed) -> None:
        if component in self._blocks:
            if installed.fewer is None:  # before it is taken out, and after it is in again
                run_with(installed.module, None)
            take_out(installed.module, self._blocks[component], installed.out)
            if installed.fewer is not None:
                run_with(installed.module, installed.fewer)
            return
        self._places.put(component, installed.module)
        if installed.weight is not None:
            write(installed.module, installed.weight)
            if installed.bias is not None:
                installed.module.bias.data = installed.bias

    def _let_go(self, component: str, replaced: _Installed) -> None:
        """Drop what was replaced, but keep original weights that the checkpoint does not hold under this name."""
        original = component not in self.plan.schemes and component not in self._cut_by
        if original and not self._checkpoint.holds(component):
            assert replaced.weight is not None
            self._kept[component] = replaced.weight if self._passing is None else replaced.weight.cpu().clone()
        dense = self._dense_modules[component]
        if self._places.get(component) is not dense:
            dense.weight.data = torch.empty(0, device=replaced.module.weight.device)  # type: ignore[arg-type]
        parts = self._places.get(component).parameters()
        self._untrimmed_bytes += sum(part.nbytes for part in parts if part.device.type == "cpu")
        if self._untrimmed_bytes > _MOST_UNTRIMMED_BYTES:
            self._untrimmed_bytes = 0
            _trim_heap()


def _over_matrices(plan: Plan, block: str) -> Scheme | None:
    """The width by which a plan cuts the matrices of a block; None where they stay whole, or go whole."""
    found = plan.widths.get(block)
    return None if found is None or found.width is None or found.width.takes_experts else found


def _cached(part: CachedPart, scheme: Scheme) -> CachedPart:
    """Keys or values under a scheme; those of weights leave them as they are, as theirs leave weights."""
    return CachedPart(part.head_dim, scheme if scheme.is_of_cache else None)


def _trim_heap() -> None:
    """Give freed memory back to the system. The C library's heap would keep it for matrices to come, and where those
    are larger, grow beyond it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
