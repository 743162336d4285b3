"""Weights on their way from a checkpoint's files, or the host's memory, to where they are needed: by several threads,
in chunks, and for a GPU through pinned memory, which is as fast as files that the system holds in memory can be copied.
"""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

# Of an H200's host one thread copies 5 GB a second from the page cache, four 16 and eight 20.
_MOST_THREADS = {"cuda": 16, "cpu": 2}
_CHUNK_BYTES = 32 << 20
# Values by which tensors are compared that are too many to be read whole.
_SAMPLED = 10_000


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in a file."""

    path: Path
    start: int
    length: int


def spans(path: Path) -> dict[str, Span]:
    """Where the tensors of a safetensors file lie, by name. The file is one that `read_header` takes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = Span(path, 8 + size + start, end - start)
    return found


def located(model: nn.Module, files: Mapping[str, Path]) -> tuple[dict[str, Span], set[str]]:
    """Where the parameters of a model in the host's memory lie as they are there, by name, of `files` that hold tensors
    by name; and the names of what the loader has made something else of, by samples of their values."""
    spans_in = {path: spans(path) for path in set(files.values())}
    found: dict[str, Span] = {}
    other: set[str] = set()
    for name, parameter in model.named_parameters():
        if name not in files or parameter.device.type != "cpu":
            continue
        with safe_open(files[name], framework="pt") as file:
            own = file.get_tensor(name)
        if own.dtype != parameter.dtype:
            continue
        if own.shape == parameter.shape and torch.equal(_sample(own), _sample(parameter.data)):
            found[name] = spans_in[files[name]][name]
        else:
            other.add(name)
    return found, other


def _sample(tensor: Tensor) -> Tensor:
    """Some of a tensor's values, from all over it."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLED)]


def move_to_devices(model: nn.Module, found: Mapping[str, Span], device_of: Callable[[str], torch.device]) -> None:
    """Move a model from the host's memory to GPUs, `device_of` by the names of parameters and buffers; what was found
    in files is read from there. Raises `OSError`."""
    readers: dict[torch.device, WeightReader] = {}
    fetched: list[Fetched] = []
    try:
        for name, parameter in model.named_parameters():
            device = device_of(name)
            if name in found:
                there = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if device not in readers:
                    readers[device] = WeightReader(device)
                fetched.append(readers[device].begin([(found[name], bytes_of(there))]))
                parameter.data = there
            else:
                parameter.data = parameter.data.to(device)
        move_buffers(model, device_of)
        for part in fetched:
            part.wait()
    finally:
        for reader in readers.values():
            reader.close()  # which waits for what is still on its way


def move_buffers(module: nn.Module, device_of: Callable[[str], torch.device], recurse: bool = True) -> None:
    """Move the buffers of a module and (`recurse`) all below it, `device_of` by their names."""
    for name, buffer in list(module.named_buffers(recurse=recurse)):
        owner, _, leaf = name.rpartition(".")
        if buffer.device != device_of(name):
            setattr(module.get_submodule(owner), leaf, buffer.to(device_of(name)))


Source = Span | Tensor


class Fetched:
    """Tensors on their way. `wait` returns when what comes next on the device finds them there, and raises what went
    wrong in reading."""

    def __init__(self, parts: list[Future[None]], arrived: torch.cuda.Event | None, stream: torch.cuda.Stream | None):
        self._parts, self._arrived, self._stream = parts, arrived, stream

    def wait(self) -> None:
        futures.wait(self._parts)  # all, for what is still on its way would be written later
        if self._arrived is not None and self._stream is not None:  # of parts that are there though another failed, too
            self._arrived.record(self._stream)
            torch.cuda.current_stream(self._stream.device).wait_event(self._arrived)
        for part in self._parts:
            part.result()


class WeightReader:
    """Copies bytes to a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        count = min(_MOST_THREADS[device.type], os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="weights")
        self._staging: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            for _ in range(count):
                with torch.inference_mode(False):  # the threads that copy are in none
                    buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
                self._staging.put((buffer, torch.cuda.Event()))

    def begin(self, parts: Iterable[tuple[Source, Tensor]]) -> Fetched:
        """Begin to copy sources to destinations: bytes [length] on the device, which what is launched later does not
        read or write until then."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        begun = [
            self._threads.submit(self._copy, source, start, destination[start : start + _CHUNK_BYTES])
            for source, destination in parts
            for start in range(0, len(destination), _CHUNK_BYTES)
        ]
        return Fetched(begun, None if self._stream is None else torch.cuda.Event(), self._stream)

    def _copy(self, source: Source, start: int, destination: Tensor) -> None:
        if self._stream is None:
            _fill(destination, source, start)
            return
        buffer, copied = self._staging.get()
        try:
            copied.synchronize()
            part = buffer[: len(destination)]
            _fill(part, source, start)
            with torch.cuda.stream(self._stream):
                destination.copy_(part, non_blocking=True)
                copied.record(self._stream)
        finally:
            self._staging.put((buffer, copied))

    def close(self) -> None:
        self._threads.shutdown()


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's bytes [length]: itself where it is contiguous, else a copy's."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _fill(destination: Tensor, source: Source, start: int) -> None:
    """Bytes of a source from `start` on, as many as the destination takes. Raises `OSError`."""
    if isinstance(source, Tensor):
        destination.copy_(bytes_of(source)[start : start + len(destination)])
        return
    view = memoryview(destination.numpy())  # type: ignore[arg-type]
    with source.path.open("rb", buffering=0) as file:
        file.seek(source.start + start)
        while view:
            count = file.readinto(view)
            if not count:
                raise OSError(f"{source.path} ended before its tensors did: it was changed while it was read")
            view = view[count:]
