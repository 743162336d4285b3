"""A component's own weights -> its weights under a scheme. Remembers what makes doing so again cheap: thresholds, and
what took solving for, packed.

One calibration at a time. Knows nothing of plans or of where weights stand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dtmsearch.core.calibration import InputStatistics, PackedMatrix
from dtmsearch.core.schemes import Scheme
from dtmsearch.errors import UserError
from dtmsearch.model.compress.column_scales import awq_scales, smooth_scales
from dtmsearch.model.compress.gptq import Job
from dtmsearch.model.compress.number_rounding import NumberCodes, largest_of, weight_codes
from dtmsearch.model.compress.packing import unpack
from dtmsearch.model.compress.pruning import Pruner
from dtmsearch.model.compress.rounding import round_weight
from dtmsearch.model.compress.width import Cut, unpacked_cut

# Bytes of solved matrices that are kept at hand, and of those that a family packs.
_KEPT_BYTES = 2 << 30
# Blocks that are kept cut, as they are used.
_MOST_CUTS = 64
# Between a component and the width that it is cut by.
_CUT_BY = " as in "
Fetch = Callable[[str, str], PackedMatrix | None]


class Compressor:
    """Compresses components; scales are held in `scale_dtype`, those that an engine keeps in 32 bits beside 16-bit
    weights (of FP8, and of integers beside rounded activations) in `number_scale_dtype`. Calibrated schemes need
    `calibrate` first, solved ones `keep` or `fetch_from`."""

    def __init__(self, scale_dtype: torch.dtype = torch.float32, number_scale_dtype: torch.dtype | None = None) -> None:
        self._scale_dtype, self._number_scale_dtype = scale_dtype, number_scale_dtype or scale_dtype
        self._pruner = Pruner()
        self._calibrated: str | None = None
        self._mean_squares: dict[str, Tensor] = {}
        self._largest_inputs: dict[str, Tensor] = {}
        self._shared: Callable[[str], Tensor] | None = None
        self._largest: dict[str, Tensor] = {}
        self._readers: Callable[[str], Mapping[str, Tensor]] | None = None
        self._columns: dict[tuple[str, str], Tensor] = {}
        self._solved: OrderedDict[tuple[str, str], PackedMatrix] = OrderedDict()
        self._fetch: Fetch | None = None
        self._packed: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._alone: frozenset[str] = frozenset()
        self._cuts: OrderedDict[tuple[str, str], Cut] = OrderedDict()

    def share_scales(self, largest: Callable[[str], Tensor]) -> None:
        """Take what gives the largest absolute weight among those that share the scale of a tensor with a component;
        without it each component has its own."""
        self._shared = largest

    def share_inputs(self, readers: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Take what gives the weights of those that read the same as a component, by name, itself among them; none of
        a component whose inputs nothing before it can scale. Without it no columns are scaled."""
        self._readers = readers

    def calibrate(self, calibration_id: str, statistics: InputStatistics, device: torch.device) -> None:
        """Take the statistics of a calibration; what followed from another's is forgotten."""
        self._pruner = Pruner()
        self._solved.clear()
        self._packed.clear()
        self._cuts.clear()
        self._columns.clear()
        self._fetch = None
        self._calibrated = calibration_id
        squares = statistics.mean_squares
        self._mean_squares = {name: torch.from_numpy(values.copy()).to(device) for name, values in squares.items()}
        self._largest_inputs = {name: torch.tensor(size, device=device) for name, size in statistics.largest.items()}

    def forget_weights(self) -> None:
        """The components have other weights from now on: thresholds and solved matrices were of those before."""
        self._pruner = Pruner()
        self._largest.clear()
        self._columns.clear()
        self._solved.clear()
        self._packed.clear()
        self._cuts.clear()
        self._fetch = None

    def fetch_from(self, fetch: Fetch | None) -> None:
        """Where solved matrices may be had that are not at hand."""
        self._fetch = fetch

    def keep(self, packed: PackedMatrix) -> None:
        """Have a solved matrix at hand."""
        self._solved[packed.component, packed.scheme] = packed

    def trim(self, needed: Collection[tuple[str, str]]) -> None:
        """Let go of matrices that were not asked for lately, while there are too many, but of none that is needed:
        (component, scheme's name)."""
        held = sum(packed.num_bytes for packed in self._solved.values())
        for pair in [pair for pair in self._solved if pair not in needed]:
            if held <= _KEPT_BYTES:
                return
            held -= self._solved.pop(pair).num_bytes

    def cut(self, block: str, scheme: Scheme, units: int, device: torch.device) -> Cut:
        """What stays of a block of so many units under a width. Raises `ValueError` where it is not solved for."""
        if (block, scheme.name) not in self._cuts:
            packed = self.solved(block, scheme)
            if packed is None:
                raise ValueError(f"{block} has not been solved for {scheme.name}")
            while len(self._cuts) >= _MOST_CUTS:
                self._cuts.popitem(last=False)
            self._cuts[block, scheme.name] = unpacked_cut(packed, units, device)
        self._cuts.move_to_end((block, scheme.name))
        return self._cuts[block, scheme.name]

    def as_cut(self, component: str, scheme: str, columns: Tensor | None) -> str:
        """The name by which a component that is cut by a width is compressed: what is known of its inputs is known of
        those of its `columns` that stay, all where None."""
        name = f"{component}{_CUT_BY}{scheme}"
        if component in self._mean_squares:  # every time: over other weights other columns stay
            own = self._mean_squares[component]
            self._mean_squares[name] = own if columns is None else own[columns.to(own.device)]
        if component in self._largest_inputs:
            self._largest_inputs[name] = self._largest_inputs[component]
        return name

    def solved(self, component: str, scheme: Scheme) -> PackedMatrix | None:
        """A solved matrix, if it is at hand or can be fetched."""
        found = self._solved.get((component, scheme.name))
        if found is not None:
            self._solved.move_to_end((component, scheme.name))
            return found
        return None if self._fetch is None else self._fetch(component, scheme.name)

    def mean_squares(self, component: str) -> Tensor:
        """Mean squares [cols] of a component's inputs. Raises `ValueError` where there are none."""
        if self._calibrated is None:
            raise ValueError(f"{component} cannot be calibrated: this replica was given no calibration text")
        if component not in self._mean_squares:
            raise UserError(
                f"{component} cannot be calibrated: no token of the calibration text reached it as a module of its own"
            )
        return self._mean_squares[component]

    def largest_input(self, component: str) -> Tensor:
        """The largest absolute value that a component reads of the calibration text. Raises `ValueError` where there is
        no calibration, `UserError` where it does not tell."""
        if self._calibrated is None:
            raise ValueError(f"{component} cannot be calibrated: this replica was given no calibration text")
        if component not in self._largest_inputs:
            raise UserError(
                f"the largest input of {component} is not known: no token of the calibration text reached it, or the "
                "store's statistics are of an earlier version, which kept none (search with another calibration text, "
                "or in another store)"
            )
        return self._largest_inputs[component]

    def number_codes(self, component: str, weight: Tensor, scheme: Scheme) -> NumberCodes:
        """The codes of a component under a scheme that says how it rounds weights. Raises `UserError` for a matrix that
        it does not fit."""
        assert scheme.weights is not None
        misfit = scheme.misfit((weight.shape[0], weight.shape[1]))
        if misfit is not None:
            raise UserError(f"{component} cannot be {scheme.name}: {misfit}; leave it out or give it another scheme")
        scales = self.column_scales(component, scheme)
        weight = weight if scales is None else weight * scales.to(weight)
        shares = scheme.weights.shares_scale
        largest = self._shared_largest(component, weight) if shares else weight.new_ones(())
        return weight_codes(weight, scheme.weights, largest, self._number_scale_dtype)

    def note_shared(self, schemes: Mapping[str, Scheme]) -> None:
        """Note the largest weights that components share, and the scales of columns, as long as all of these stand as
        they are."""
        for component, scheme in schemes.items():
            self.column_scales(component, scheme)
            shares = scheme.weights is not None and scheme.weights.shares_scale
            if not shares or self._shared is None or self._has_own_scale(component):
                continue
            if component not in self._largest:
                self._largest[component] = self._shared(component)

    def column_scales(self, component: str, scheme: Scheme) -> Tensor | None:
        """The powers of two [cols] that a component's columns are multiplied by before they are rounded, float32; None
        where they are not."""
        if not scheme.scaled or self._readers is None:
            return None
        if (component, scheme.name) not in self._columns:
            readers = self._readers(component)
            weights = list(readers.values())
            if not weights:
                return None
            if scheme.weights is None:
                squares = self.mean_squares(next(iter(readers)))
                found = awq_scales(weights, squares, lambda weight: round_weight(weight, scheme, self._scale_dtype))
            elif len(weights) > 1:
                found = smooth_scales(weights, self.mean_squares(next(iter(readers))))
            else:  # behind products of gate and up, whose outliers are of few tokens, it does harm (docs/formats.md)
                return None
            self._columns |= {(reader, scheme.name): found for reader in readers}
        return self._columns[component, scheme.name]

    def _has_own_scale(self, component: str) -> bool:
        """Whether a matrix, as one that is cut, shares the scale of a tensor with none."""
        return _CUT_BY in component or component in self._alone

    def _shared_largest(self, component: str, weight: Tensor) -> Tensor:
        if self._shared is None or self._has_own_scale(component):
            return largest_of(weight)
        if component not in self._largest:
            self._largest[component] = self._shared(component)
        return self._largest[component]

    def compress(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor:
        """`weight` [rows, cols] under any scheme but bitsandbytes', in its own dtype; never `weight` itself, which what
        is made of it may be written over.

        Raises `ValueError` for what is not calibrated, or not solved.
        """
        found = self._compressed(component, weight, scheme)
        return found.clone() if found.data_ptr() == weight.data_ptr() else found

    def _compressed(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor:
        if scheme.own is not None and scheme.own.make is not None:
            return self._made(component, weight, scheme, scheme.own.make)
        if scheme.is_of_cache:
            return weight
        if scheme.scaled:
            return self._scaled(component, weight, scheme)
        if scheme.weights is not None:
            return self.number_codes(component, weight, scheme).dense(weight.dtype)
        if scheme.is_dropped:
            return torch.zeros_like(weight)
        if scheme.solved is not None:
            packed = self.solved(component, scheme.solved)
            if packed is None:
                raise ValueError(f"{component} has not been solved for {scheme.solved.name}")
            found = unpack(packed, weight.dtype, weight.device)
            return found if scheme.solved == scheme else round_weight(found, scheme, self._scale_dtype)
        pruned = weight if scheme.pruning is None else self._pruned(component, weight, scheme)
        return round_weight(pruned, scheme, self._scale_dtype) if scheme.bits else pruned

    def _scaled(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor:
        """Rounded columns, each over the power of two by which it was scaled."""
        scales = self.column_scales(component, scheme)
        if scheme.weights is not None:
            rounded = self.number_codes(component, weight, scheme).dense(weight.dtype)
        else:
            scaled = weight if scales is None else weight * scales.to(weight)
            rounded = round_weight(scaled, scheme, self._scale_dtype)
        return rounded if scales is None else rounded.div_(scales.to(rounded))

    def _made(self, component: str, weight: Tensor, scheme: Scheme, make: Callable[..., object]) -> Tensor:
        """What a family of its own arithmetic makes of a matrix."""
        if scheme.kind.pack is not None and scheme.kind.unpack is not None:
            made = scheme.kind.unpack(self.packed(component, weight, scheme), scheme, weight)
        else:
            made = make(weight, scheme, lambda: self.mean_squares(component).to(weight.device))
        if not isinstance(made, Tensor) or made.shape != weight.shape:
            got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise UserError(f"{scheme.name} made {got} of {component}, wanted a tensor of {list(weight.shape)}")
        return made.to(weight.dtype)

    def packed(self, component: str, weight: Tensor, scheme: Scheme) -> Any:
        """What a family keeps of a component's own weights, made once: what was asked for longest ago is let go where
        there is too much."""
        assert scheme.kind.pack is not None
        key = component, scheme.name
        if key in self._packed:
            self._packed.move_to_end(key)
            return self._packed[key]
        found = scheme.kind.pack(weight, scheme, lambda: self.mean_squares(component).to(weight.device))
        self._packed[key] = found
        held = sum(_bytes_of(packed) for packed in self._packed.values())
        while held > _KEPT_BYTES and len(self._packed) > 1:
            held -= _bytes_of(self._packed.popitem(last=False)[1])
        return found

    def _pruned(self, component: str, weight: Tensor, scheme: Scheme) -> Tensor:
        assert scheme.pruning is not None
        wanda = scheme.pruning.saliency == "wanda"
        squares = self.mean_squares(component).to(weight.device) if wanda else None
        return self._pruner.prune(component, weight, scheme.pruning, squares)

    def job(self, component: str, weight: Tensor, scheme: Scheme) -> Job:
        """What is to be solved for a scheme that is another's `solved`, or its own."""
        quantizer = scheme.rounded_by
        if scheme.pruning is None:
            return Job(weight, quantizer)
        if scheme.pruning.saliency == "sparsegpt":
            return Job(weight, quantizer, pruning=scheme.pruning)
        return Job(weight, quantizer, kept=self._pruned(component, weight, scheme) != 0)


def _bytes_of(packed: Any) -> int:
    return int(getattr(packed, "nbytes", 0))
