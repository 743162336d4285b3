"""Layers of a model that does not fit a device: their weights stay in files or in the host's memory, and each layer's
are on the device while it runs.

The first layers stay on the device as far as memory goes; two places are for all others, of which one is filled while
the layer in the other runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from dtmsearch.errors import UserError
from dtmsearch.model.modules.blocks import needs_no_weights
from dtmsearch.model.modules.compat import precede
from dtmsearch.model.modules.compiled import parts_of
from dtmsearch.model.modules.matrices import StackedMatrix
from dtmsearch.model.modules.weight_reading import Fetched, Source, Span, WeightReader, move_buffers

# Where a tensor may begin within a place.
_ALIGNED = 256
# Places that layers take in turn.
_IN_TURN = 2


@dataclass
class _Moved:
    """A parameter on the device: `there`, a part of a place; `here`, what it is when it is not there."""

    parameter: nn.Parameter
    there: Tensor
    here: Tensor


@dataclass
class _Place:
    """Memory on the device for the weights of one layer: its bytes, and which layer's they are."""

    memory: Tensor
    layer: int | None = None
    moved: list[_Moved] = field(default_factory=list)
    fetched: Fetched | None = None


@dataclass(frozen=True)
class _Rehearsed:
    """Whose weights a layer has in a rehearsal, and its parameters with those of that layer."""

    first: int
    pairs: list[tuple[nn.Parameter, nn.Parameter]]


class StreamedLayers:
    """Brings each layer to a device before it runs, compiled or not.

    `located` says where in files a parameter lies, by its name in a layer's list ("3.mlp.up_proj.weight"); what it does
    not name is read from the host's memory. `most_bytes` is what weights of layers may take on the device: at least
    two layers, whatever it says. Raises `UserError` for layers that share weights.
    """

    def __init__(
        self, layers: Iterable[nn.Module], device: torch.device, located: Mapping[str, Span], most_bytes: float
    ) -> None:
        # As they are now: others may stand in their places in a list of the model's.
        self._layers = layers = list(layers)
        self._device = torch.empty(0, device=device).device  # with its number
        self._reader = WeightReader(device)
        # With the tensors as they are now, so that no other ever lies where they do.
        self._in_files: dict[nn.Parameter, tuple[Tensor, Span]] = {}
        seen: set[nn.Parameter] = set()
        for index, layer in enumerate(layers):
            own = dict(layer.named_parameters())
            if seen & set(own.values()):
                raise UserError("weights that several layers share cannot pass through a GPU: give it all of them")
            seen.update(own.values())
            for name, parameter in own.items():
                if f"{index}.{name}" in located:
                    self._in_files[parameter] = parameter.data, located[f"{index}.{name}"]
        self.layer_bytes = max(sum(_aligned(p.nbytes) for p in layer.parameters()) for layer in layers)
        count = min(len(layers), max(_IN_TURN, int(most_bytes // self.layer_bytes)))
        self.num_resident = count - _IN_TURN if count < len(layers) else count
        with torch.inference_mode(False):
            places = [_Place(torch.empty(self.layer_bytes, dtype=torch.uint8, device=device)) for _ in range(count)]
        self._fixed, self._in_turn = places[: self.num_resident], places[self.num_resident :]
        self._written: set[nn.Parameter] = set()
        self._last, self._step = -1, 1
        self._rehearsed: list[_Rehearsed] = []  # by layer, while rehearsing
        self._passed_by: frozenset[int] = frozenset()
        for index, layer in enumerate(layers):
            precede(layer, partial(self._before, index))

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Within, all layers of the same kind and shapes run with the weights of the first of them: what the model's
        code does with a pass is found out without reading all of its weights for each pass. Before any layer is needed;
        what such a pass gives is of no model, and may overflow where the model does not."""
        assert all(place.layer is None for place in (*self._fixed, *self._in_turn)), "layers are there already"
        first_of: dict[object, int] = {}
        for index, layer in enumerate(self._layers):
            shapes = tuple((name, own.shape, own.dtype) for name, own in layer.named_parameters())
            first = first_of.setdefault((type(layer), shapes), index)
            pairs = zip(layer.parameters(), self._layers[first].parameters(), strict=True)
            self._rehearsed.append(_Rehearsed(first, list(pairs)))
        lent = [(own, own.data) for index, each in enumerate(self._rehearsed) if each.first != index
                for own, _ in each.pairs]  # fmt: skip
        try:
            yield
        finally:
            self._rehearsed.clear()
            for parameter, here in lent:
                parameter.data = here

    @contextmanager
    def passing_by(self, layers: Iterable[int]) -> Iterator[None]:
        """Within, some layers are not fetched ahead: a pass takes them out of the model."""
        self._passed_by = frozenset(layers)
        try:
            yield
        finally:
            self._passed_by = frozenset()

    def _is_passed_by(self, index: int) -> bool:
        return index in self._passed_by or needs_no_weights(self._layers[index])

    def _before(self, index: int) -> None:
        """Have a layer ready to be run. One that is out of the model needs no weights."""
        if needs_no_weights(self._layers[index]):
            return
        if not self._rehearsed or self._rehearsed[index].first == index:
            self.need(index)
            return
        self.need(self._rehearsed[index].first)
        for own, other in self._rehearsed[index].pairs:
            own.data = other.data
        for part in parts_of(self._layers[index]):
            move_buffers(part, lambda _: self._device, recurse=False)

    def need(self, index: int) -> None:
        """Have a layer's weights on the device, for what is launched from now on until another layer is needed; begin
        to fetch the next one in the direction in which layers are asked for. Raises `OSError`."""
        if index != self._last:
            self._step = -1 if index == self._last - 1 else 1
            self._last = index
        place = self._holding(index) or self._begin(index, self._place_for(index))
        if place.fetched is not None:
            self._arrive(place)
        if self._rehearsed:
            return
        coming = self._coming(index)
        missing = (other for other in coming if self._holding(other) is None)
        ahead = next((other for other in missing if not self._is_passed_by(other)), None)
        if ahead is not None:
            for_it = self._place_for(ahead)
            if for_it.layer is None or coming.index(for_it.layer) > coming.index(ahead):
                self._begin(ahead, for_it)

    def written(self, module: nn.Module) -> None:
        """The weights of a module were changed for good. Of what is one matrix its pointer tells, of one among others
        nothing would."""
        if isinstance(module, StackedMatrix):
            self._written.update(module.parameters())

    def _coming(self, index: int) -> list[int]:
        """All layers but one, in the order in which they are asked for if it goes on as it has."""
        count = len(self._layers)
        return [(index + self._step * far) % count for far in range(1, count)]

    def _place_for(self, index: int) -> _Place:
        """Its own; else one of those that are taken in turn: an empty one or what is needed last."""
        if index < len(self._fixed):
            return self._fixed[index]
        coming = [*self._coming(self._last), self._last]
        others = [place for place in self._in_turn if place.layer != self._last]
        return max(others, key=lambda place: len(coming) if place.layer is None else coming.index(place.layer))

    def _holding(self, index: int) -> _Place | None:
        if index < len(self._fixed):
            return self._fixed[index] if self._fixed[index].layer == index else None
        return next((place for place in self._in_turn if place.layer == index), None)

    def _begin(self, index: int, place: _Place) -> _Place:
        self._leave(place)
        place.layer, place.moved = index, []
        parts: list[tuple[Source, Tensor]] = []
        at = 0
        for parameter in _parameters(self._layers[index]):
            here, size = parameter.data, parameter.nbytes
            # One that was made in inference mode takes no part of a place, which is an ordinary tensor.
            if parameter.is_inference() or not size or at + size > len(place.memory):
                continue
            with torch.inference_mode(False):
                part = place.memory[at : at + size]
                there = part.view(here.dtype).view(here.shape)
            known = self._in_files.get(parameter)
            in_file = known is not None and known[0].data_ptr() == here.data_ptr()
            parts.append((known[1] if known is not None and in_file else here, part))
            place.moved.append(_Moved(parameter, there, here))
            at += _aligned(size)
        place.fetched = self._reader.begin(parts)
        return place

    def _arrive(self, place: _Place) -> None:
        assert place.fetched is not None and place.layer is not None
        try:
            place.fetched.wait()
        except OSError as error:
            said = f"the weights of layer {place.layer} cannot be read: {error}"
            place.layer, place.moved, place.fetched = None, [], None  # it may be asked for again
            raise OSError(said) from error
        place.fetched = None
        for moved in place.moved:
            if moved.parameter.data_ptr() != moved.here.data_ptr():
                moved.here = moved.parameter.data  # it was replaced meanwhile
                moved.there.copy_(moved.here)
            moved.parameter.data = moved.there
        layer = self._layers[place.layer]
        for part in parts_of(layer):  # of modules that came since
            move_buffers(part, lambda _: self._device, recurse=False)
        _move_others(layer, place, self._device)

    def _leave(self, place: _Place) -> None:
        """Let go of a place. Weights that were replaced for good on the device go to the host's memory."""
        if place.fetched is not None:
            with suppress(OSError):  # nobody needs them any more
                place.fetched.wait()
        else:
            for moved in place.moved:
                unchanged = (
                    moved.parameter.data_ptr() == moved.there.data_ptr() and moved.parameter not in self._written
                )
                moved.parameter.data = moved.here if unchanged else _on_host(moved.parameter.data)
            self._written -= {moved.parameter for moved in place.moved}
            if place.layer is not None:
                _move_others(self._layers[place.layer], place, torch.device("cpu"))
        place.layer, place.moved, place.fetched = None, [], None


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, as an ordinary tensor."""
    with torch.inference_mode(False):
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _move_others(layer: nn.Module, place: _Place, device: torch.device) -> None:
    """Move weights of a layer that have no part in its place."""
    placed = {moved.parameter for moved in place.moved}
    for parameter in _parameters(layer):
        if parameter not in placed and parameter.device != device:
            parameter.data = parameter.data.to(device)


def _parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Those of a layer and of what is in its slots, each once."""
    return list(dict.fromkeys(own for part in parts_of(layer) for own in part.parameters(recurse=False)))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
