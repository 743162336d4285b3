"""Token rows that evaluations run over, and what is kept of the parent's pass over them.

A candidate leaves its parent at one layer, so the parent's states at that layer's boundary are all it needs. How many
boundaries are kept follows from the memory there is: all of them beside the model, all of them in the host's memory,
or one, which is carried upward as candidates come in order of their layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from dtmsearch.core.evaluation import StatesKept
from dtmsearch.model.forward.boundary_states import Below, State
from dtmsearch.model.forward.layer_reuse import Outputs, Reuse
from dtmsearch.model.forward.partial import Body

# On a CPU what is kept may take this part of the model's weights, but need not be less than some megabytes.
_CPU_SHARE, _CPU_BYTES = 0.02, 48 << 20
# The part of a GPU's free memory for states, and for outputs of components; the part of the host's.
_STATES_SHARE, _OUTPUTS_SHARE, _HOST_SHARE = 0.6, 0.25, 0.5
# What outputs of all layers leave free of a GPU for a pass: a part of its memory, and no less than these bytes.
_LEAST_FREE_SHARE, LEAST_FREE_BYTES = 0.1, 4 << 30
# What part of the positions must be spared for the last layer to run in part.
_LEAST_SPARED = 0.1


@dataclass(frozen=True)
class CacheMemory:
    """Memory, in bytes, for what is kept of a parent's pass: states beside the model, states in the host's memory,
    and outputs of components, of one layer or of those that lie on one GPU."""

    states: float
    host: float
    outputs: float

    @staticmethod
    def none() -> CacheMemory:
        return CacheMemory(0.0, 0.0, 0.0)

    @staticmethod
    def on(devices: Collection[torch.device], weight_bytes: int) -> CacheMemory:
        """What a cache may take now, beyond weights and activations, of the device that has least."""
        if any(device.type != "cuda" for device in devices):
            room = max(_CPU_BYTES, _CPU_SHARE * weight_bytes)
            return CacheMemory(room, 0.0, room)
        free = min(free_bytes(device) for device in devices)
        return CacheMemory(_STATES_SHARE * free, _HOST_SHARE * psutil.virtual_memory().available, _OUTPUTS_SHARE * free)


def free_bytes(device: torch.device) -> float:
    """Memory of a device that this process may still take: of a GPU within the share of it that torch may use, what
    torch's allocator holds and nothing uses included."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    free = torch.cuda.mem_get_info(device)[0]
    used = torch.cuda.memory_allocated(device)
    return float(min(free + torch.cuda.memory_reserved(device) - used, most_bytes(device) - used))


def most_bytes(device: torch.device) -> float:
    """Memory of a GPU that this process may take at most, whoever has it now."""
    device = torch.empty(0, device=device).device  # with its number
    return torch.cuda.mem_get_info(device)[1] * torch.cuda.get_per_process_memory_fraction(device)


class ActivationCache:
    """Rows [prompts, tokens] in batches of `rows_in_batch`, whose head inputs are wanted from position
    `targets_from` - 1 up to the last but one.

    `kept` says where the parent's states are kept. The parent is whatever plan the model has when states are carried.
    """

    def __init__(
        self, body: Body, reuse: Reuse, tokens: Tensor, targets_from: int, rows_in_batch: int, room: CacheMemory,
        kept: StatesKept = "auto",
    ) -> None:  # fmt: skip
        self.tokens, self.targets_from = tokens, targets_from
        self.batches: tuple[Tensor, ...] = tokens.split(rows_in_batch)
        self._body, self._reuse, self._room = body, reuse, room
        self._wanted = slice(targets_from - 1, tokens.shape[1] - 1)
        spared = 1 - (self._wanted.stop - self._wanted.start) / tokens.shape[1]
        self._in_part = spared >= _LEAST_SPARED
        self._states: dict[int, list[State]] = {}
        # By layer: of the one that is swept over, or of all.
        self._outputs: dict[int, list[Outputs | None]] = {}
        self._output_bytes: dict[int, int] = {}
        self._state_bytes = tokens.numel() * body.hidden_bytes
        self.kept: StatesKept = self._fitting() if kept == "auto" else kept

    def _fitting(self) -> StatesKept:
        everything = self._state_bytes * (self._body.num_layers - 1)
        return "device" if everything <= self._room.states else "host" if everything <= self._room.host else "sweep"

    def forget(self, above: int = 0) -> None:
        """The parent has changed from layer `above` upward: what was kept above that boundary is no longer its own."""
        self._states = {boundary: states for boundary, states in self._states.items() if boundary <= above}
        self._drop_outputs(above)

    def carry(self, boundary: int) -> None:
        """Have the parent's states at `boundary`."""
        if boundary == 0 or boundary in self._states:
            return
        start = max((b for b in self._states if b < boundary), default=0)
        if self._keeps_all_layers:
            for layer in range(start, boundary):
                self._pass_over(layer)
            return
        states = [self._body.advance(*own, start, boundary) for own in zip(self.batches, self._at(start), strict=True)]
        self._keep(boundary, states)

    def look_ahead(self, boundary: int) -> None:
        """Have what the components of the layer above `boundary` make in the parent's pass, as far as memory goes.

        The pass leaves the states at the next boundary, where a sweep goes next.
        """
        if boundary in self._outputs:
            return
        self.carry(boundary)
        if not self._keeps_all_layers:
            self._drop_outputs(0)
        if self._records(boundary):
            self._pass_over(boundary)

    @property
    def _keeps_all_layers(self) -> bool:
        """Whether requests come in no order of their layers, so that one pass has to leave what those of all need."""
        return self._body.num_devices > 1 and self.kept == "device"

    def _drop_outputs(self, above: int) -> None:
        for layer in [layer for layer in self._outputs if layer >= above]:
            del self._outputs[layer], self._output_bytes[layer]

    def _records(self, layer: int) -> bool:
        return self._body.is_cut(layer) and self._body.is_cut(layer + 1)

    def _pass_over(self, layer: int) -> None:
        """Run the parent's layer, and keep its states and, where there is room, what its components make."""
        last, left = layer + 1 == self._body.num_layers, self._room_for_outputs(layer)
        size = 0
        states: list[State] = []
        recorded: list[Outputs | None] = []
        for batch, before in zip(self.batches, self._at(layer), strict=True):
            outputs = Outputs(layer)
            needed = self._reuse.bytes_of(layer, batch.numel(), self._body.itemsize)
            fits = needed <= left and self._records(layer)
            left, size = left - needed, size + needed * fits
            with ExitStack() as stack:
                if last:
                    self._enter_part(stack)
                if fits:
                    stack.enter_context(self._reuse.recording(outputs))
                if last:
                    self._body.finish(batch, before, layer)
                else:
                    states.append(self._body.advance(batch, before, layer, layer + 1))
            recorded.append(outputs if fits else None)
        self._outputs[layer], self._output_bytes[layer] = recorded, size
        if states:
            self._keep(layer + 1, states, sweeping_from=layer)

    def _room_for_outputs(self, layer: int) -> float:
        """Memory for what a layer's components make, beside that of other layers on its device."""
        here = self._body.device_of(layer)
        beside = sum(size for other, size in self._output_bytes.items() if self._body.device_of(other) == here)
        left = self._room.outputs - beside
        if here.type == "cuda" and self._keeps_all_layers:  # other caches may have taken theirs since
            left = min(left, free_bytes(here) - max(_LEAST_FREE_SHARE * most_bytes(here), LEAST_FREE_BYTES))
        return left

    def head_inputs(self, boundary: int, changed: Collection[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, head inputs [rows, targets, hidden]) of each batch, for a model that has left the parent in the
        components `changed`, none of them in a layer below `boundary`."""
        self.carry(boundary)
        recorded = self._outputs.get(boundary) or [None] * len(self.batches)
        begun: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()
        for batch, state, outputs in zip(self.batches, self._at(boundary), recorded, strict=True):
            with ExitStack() as stack:
                self._enter_part(stack)
                stack.enter_context(self._reuse.serving(outputs, changed))
                begun.append((batch, self._body.begin(batch, state, boundary)))
            while len(begun) > self._body.passes_ahead:
                yield self._ended(*begun.popleft())
        while begun:
            yield self._ended(*begun.popleft())

    def ended(self, index: int, state: State | None) -> tuple[Tensor, Tensor]:
        """(tokens, head inputs [rows, targets, hidden]) of a batch from its state at the last layer's boundary, by the
        model as it stands there and above."""
        batch = self.batches[index]
        with ExitStack() as stack:
            self._enter_part(stack)
            return self._ended(batch, self._body.begin(batch, state, self._body.num_layers - 1))

    def _ended(self, batch: Tensor, finish: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        return batch, finish()[:, self._wanted]

    def _enter_part(self, stack: ExitStack) -> None:
        if self._in_part:
            stack.enter_context(self._reuse.predicting(self._wanted))

    def _at(self, boundary: int) -> list[State | None]:
        if boundary == 0:
            return [None] * len(self.batches)
        device = self._body.device_of(boundary)
        return [_from_host(state, device) for state in self._states[boundary]]

    def _keep(self, boundary: int, states: list[State], sweeping_from: int | None = None) -> None:
        if self.kept == "sweep":
            self._states = {b: kept for b, kept in self._states.items() if b == sweeping_from}
        elif self.kept == "host":
            made_on = {state.device for state in map(_tensor_of, states) if state is not None and state.is_cuda}
            states = [_to_host(state) for state in states]
            # Copies are ordered with what their own GPU does next, but these are read by the next layer's.
            for device in made_on - {self._body.device_of(boundary)}:
                torch.cuda.current_stream(device).synchronize()
        self._states[boundary] = states


def _tensor_of(state: State) -> Tensor | None:
    held = state.state if isinstance(state, Below) else state
    return held if isinstance(held, Tensor) else None


def _from_host(state: State, device: torch.device) -> State:
    held = _tensor_of(state)
    return state if held is None or held.is_cuda else state.to(device, non_blocking=True)


def _to_host(state: State) -> State:
    if isinstance(state, Below):
        return state if state.state is None else replace(state, state=_host_copy(state.state))
    return _host_copy(state) if isinstance(state, Tensor) else state


def _host_copy(state: Tensor) -> Tensor:
    host = torch.empty(state.shape, dtype=state.dtype, pin_memory=state.is_cuda)
    return host.copy_(state, non_blocking=True)
