"""Original weights on their way from files to GPUs before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor

from dtmsearch.model.forward.activation_cache import LEAST_FREE_BYTES, free_bytes
from dtmsearch.model.modules.weight_reading import Fetched, WeightReader, bytes_of

# What is on its way at a time: at least two matrices, and others as far as this goes.
_MOST_BYTES = 1 << 30
# From which on threads pay, and the memory that they copy through.
LEAST_BYTES = 1 << 30


@dataclass(frozen=True)
class Wanted:
    """A component's weights that will be asked for: `read` maps them from their file, `device` is where they go."""

    component: str
    read: Callable[[], Tensor]
    device: torch.device


class ReadAhead:
    """Reads by several threads what is wanted next, while what came before is worked on. Of one thread that copies a
    matrix when it is asked for a GPU gets a quarter of what the host's memory gives."""

    def __init__(self) -> None:
        self._readers: dict[torch.device, WeightReader] = {}
        self._coming: deque[Wanted] = deque()
        self._begun: dict[str, tuple[Tensor, Fetched]] = {}

    @contextmanager
    def of(self, wanted: Iterable[Wanted]) -> Iterator[None]:
        """Within, `take` gives what is wanted, best in this order."""
        self._coming = deque(wanted)
        try:
            self._begin()
            yield
        finally:
            self._coming.clear()
            begun, self._begun = self._begun, {}
            for _, fetched in begun.values():
                with suppress(Exception):  # each is waited for: nothing is to be written into memory that is let go
                    fetched.wait()

    def take(self, component: str) -> Tensor | None:
        """A component's weights as the file has them, on its device; None for one that is not on its way. Raises
        `OSError`."""
        if component not in self._begun:
            return None
        there, fetched = self._begun.pop(component)
        fetched.wait()
        self._begin()
        return there

    def _begin(self) -> None:
        """Begin what there is room for. What goes to a GPU that has none, and all once a file cannot be read, is read
        when it is asked for, and what is wrong is said there."""
        while self._coming:
            under_way = sum(there.nbytes for there, _ in self._begun.values())
            wanted = self._coming[0]
            try:
                here = wanted.read()
                if len(self._begun) >= 2 and under_way + here.nbytes > _MOST_BYTES:
                    return
                on_gpu = wanted.device.type == "cuda"
                if on_gpu and free_bytes(wanted.device) < LEAST_FREE_BYTES + here.nbytes:
                    self._coming = deque(other for other in self._coming if other.device != wanted.device)
                    continue
                with torch.inference_mode(False):  # the threads that copy are in none
                    there = torch.empty(here.shape, dtype=here.dtype, device=wanted.device)
                    destination = bytes_of(there)
                if wanted.device not in self._readers:
                    self._readers[wanted.device] = WeightReader(wanted.device)
            except (OSError, RuntimeError, SafetensorError):  # of memory, too
                self._coming.clear()
                return
            self._coming.popleft()
            fetched = self._readers[wanted.device].begin([(here, destination)])
            self._begun[wanted.component] = there, fetched
