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
# The part of a GPU's free memory for states, and for outputs of one layer's components; the part of the host's.
_STATES_SHARE, _OUTPUTS_SHARE, _HOST_SHARE = 0.6, 0.25, 0.5
# What part of the positions must be spared for the last layer to run in part.
_LEAST_SPARED = 0.1


@dataclass(frozen=True)
class CacheMemory:
    """Memory, in bytes, for what is kept of a parent's pass: states beside the model, states in the host's memory,
    and outputs of one layer's components."""

    states: float
    host: float
    outputs: float

    @staticmethod
    def none() -> CacheMemory:
        return CacheMemory(0.0, 0.0, 0.0)

    @staticmethod
    def on(device: torch.device, weight_bytes: int) -> CacheMemory:
        """What a replica may take now, beyond weights and activations."""
        if device.type != "cuda":
            room = max(_CPU_BYTES, _CPU_SHARE * weight_bytes)
            return CacheMemory(room, 0.0, room)
        free = free_bytes(device)
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
        self._outputs: list[Outputs | None] = []
        self._state_bytes = tokens.numel() * body.hidden_bytes
        self.kept: StatesKept = self._fitting() if kept == "auto" else kept

    def _fitting(self) -> StatesKept:
        everything = self._state_bytes * (self._body.num_layers - 1)
        return "device" if everything <= self._room.states else "host" if everything <= self._room.host else "sweep"

    def forget(self, above: int = 0) -> None:
        """The parent has changed from layer `above` upward: what was kept above that boundary is no longer its own."""
        self._states = {boundary: states for boundary, states in self._states.items() if boundary <= above}
        self._outputs = []

    def carry(self, boundary: int) -> None:
        """Have the parent's states at `boundary`."""
        if boundary == 0 or boundary in self._states:
            return
        start = max((b for b in self._states if b < boundary), default=0)
        # Over several devices requests come in no order of their layers: one pass has to leave the states for all.
        step = 1 if self._body.num_devices > 1 and self.kept == "device" else boundary - start
        for stop in range(start + step, boundary + 1, step):
            before = self._at(stop - step)
            states = [self._body.advance(*own, stop - step, stop) for own in zip(self.batches, before, strict=True)]
            self._keep(stop, states)

    def look_ahead(self, boundary: int) -> None:
        """Have what the components of the layer above `boundary` make in the parent's pass, as far as memory goes.

        The pass leaves the states at the next boundary, where a sweep goes next.
        """
        if self._outputs and (self._outputs[0] is None or self._outputs[0].layer == boundary):
            return
        self.carry(boundary)
        if not (self._body.is_cut(boundary) and self._body.is_cut(boundary + 1)):
            self._outputs = []
            return
        left = self._room.outputs
        states = []
        self._outputs = []
        for batch, before in zip(self.batches, self._at(boundary), strict=True):
            outputs = Outputs(boundary)
            left -= self._reuse.bytes_of(boundary, batch.numel(), self._body.itemsize)
            last = boundary + 1 == self._body.num_layers
            with ExitStack() as stack:
                if last:
                    self._enter_part(stack)
                if left >= 0:
                    stack.enter_context(self._reuse.recording(outputs))
                if last:
                    self._body.finish(batch, before, boundary)
                else:
                    states.append(self._body.advance(batch, before, boundary, boundary + 1))
            self._outputs.append(outputs if left >= 0 else None)
        if states:
            self._keep(boundary + 1, states, sweeping_from=boundary)

    def head_inputs(self, boundary: int, changed: Collection[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, head inputs [rows, targets, hidden]) of each batch, for a model that has left the parent in the
        components `changed`, none of them in a layer below `boundary`."""
        self.carry(boundary)
        recorded = self._outputs if self._outputs else [None] * len(self.batches)
        begun: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()
        for batch, state, outputs in zip(self.batches, self._at(boundary), recorded, strict=True):
            with ExitStack() as stack:
                self._enter_part(stack)
                stack.enter_context(self._reuse.serving(_of_layer(outputs, boundary), changed))
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


def _of_layer(outputs: Outputs | None, layer: int) -> Outputs | None:
    return outputs if outputs is not None and outputs.layer == layer else None


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
