"""What this machine has and lacks for a search: each check is a `Finding` that says what to do about it.

Knows this machine only, never a cluster. Loads torch and bitsandbytes inside the checks that need them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warning", "missing"]

_GIB = 1 << 30
_ENOUGH_MEMORY_GIB = 4.0
_ENOUGH_DISK_GIB = 5.0
_ENOUGH_SHARED_MEMORY_GIB = 1.0
_ENOUGH_OPEN_FILES = 4096
# A Unix socket's path may take 107 bytes; Ray's longest below its folder is
# ray/session_YYYY-MM-DD_HH-MM-SS_UUUUUU_PPPPPPP/sockets/plasma_store.
_LONGEST_RAY_FOLDER = 107 - 68
_PYTHONS = ((3, 11), (3, 14))


@dataclass(frozen=True)
class Finding:
    """What a check found. `missing` stops a search, a `warning` only slows or limits it; `remedy` is what to do."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def examine(store: str) -> list[Finding]:
    """Every check of this machine; `store` is where results are to be kept, a folder or a bucket's URL."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        check_python,
        check_packages,
        check_cpus,
        check_memory,
        check_gpus,
        check_bitsandbytes,
        check_shared_memory,
        check_disk,
        check_sockets,
        check_open_files,
        lambda: check_store(store),
    )
    return [finding for check in checks for finding in check()]


def check_python() -> Iterator[Finding]:
    """Whether Python is of a version that is supported."""
    found = ".".join(map(str, sys.version_info[:3]))
    oldest, newest = _PYTHONS
    if oldest <= sys.version_info[:2] < newest:
        yield Finding("python", "ok", found)
    else:
        yield Finding("python", "missing", found, "make the virtual environment with Python 3.11, 3.12 or 3.13")


def check_packages() -> Iterator[Finding]:
    """Whether what the package needs is installed, in versions that it takes."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("dtmsearch") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield package(requirement.name, str(requirement.specifier))


def package(name: str, wanted: str) -> Finding:
    """Whether a package is installed in a version that meets `wanted`, such as `>=2.10`."""
    from packaging.specifiers import SpecifierSet

    remedy = f"pip install '{name}{wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", remedy)
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(name, "missing", f"{version}, but {wanted} is needed", remedy)
    return Finding(name, "ok", version)


def num_cpus() -> int:
    """Cores that processes here may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_cpus() -> Iterator[Finding]:
    """How many CPU cores may be used."""
    cores = num_cpus()
    if cores > 1:
        yield Finding("CPU cores", "ok", str(cores))
    else:
        yield Finding("CPU cores", "warning", str(cores), "the driver and a replica share one core: expect waits")


def check_memory() -> Iterator[Finding]:
    """How much memory is free."""
    available = available_memory()
    if available is None:
        yield Finding("memory", "warning", "unknown on this system", "see that the model fits twice")
        return
    found = f"{available / _GIB:.1f} GiB available"
    if available >= _ENOUGH_MEMORY_GIB * _GIB:
        yield Finding("memory", "ok", found)
    else:
        remedy = "a replica takes about 1.2 times the model's weights and Ray about 1 GiB: use fewer --replicas"
        yield Finding("memory", "warning", found, remedy)


def available_memory() -> int | None:
    """Bytes that processes can still take here, a container's limit included; None where the system does not say."""
    amounts = [_free_by_kernel(), _free_by_container()]
    return min((a for a in amounts if a is not None), default=None)


def _free_by_kernel() -> int | None:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    kilobytes = [line.split()[1] for line in info.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _free_by_container() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def check_gpus() -> Iterator[Finding]:
    """Which GPUs torch sees, and what hinders it."""
    try:
        import torch
    except Exception as error:  # a broken installation raises whatever it likes, and this is where to say so
        yield Finding("GPUs", "missing", f"torch does not load: {error}", "install torch again")
        return
    with warnings.catch_warnings():
        # torch warns of an unusable driver, which the finding says in our words.
        warnings.simplefilter("ignore")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(num_gpus):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"GPU {index}", "ok", f"{name}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free")
    if num_gpus == 0:
        yield no_gpu(has_driver=shutil.which("nvidia-smi") is not None, built_for=torch.version.cuda)


def no_gpu(has_driver: bool, built_for: str | None) -> Finding:
    """Why there is no GPU."""
    if has_driver and built_for is None:
        return Finding("GPUs", "warning", "a driver, but torch is built without CUDA", "install torch's CUDA build")
    if has_driver:
        remedy = f"run nvidia-smi: no GPU is visible, or its driver is too old for CUDA {built_for}"
        return Finding("GPUs", "warning", "a driver, but torch sees no GPU", remedy)
    return Finding("GPUs", "warning", "none", "searches run on the CPU: fine for small models, slow for others")


def check_bitsandbytes() -> Iterator[Finding]:
    """Really rounds a block: the package can be installed with a native library that does not load."""
    try:
        import torch

        # It logs which optional kernels it does not have.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bitsandbytes.functional import quantize_4bit

            quantize_4bit(torch.ones(64), quant_type="nf4")
    except Exception as error:  # as above: whatever a broken installation raises
        said = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "w8a8, llm-int8, nf4 and fp4 cannot run; python -m bitsandbytes says what it wants"
        yield Finding("bitsandbytes works", "missing", said, remedy)
    else:
        yield Finding("bitsandbytes works", "ok", "rounds a block to nf4")


def check_shared_memory() -> Iterator[Finding]:
    """Whether there is room where Ray keeps its objects."""
    folder = Path("/dev/shm")  # noqa: S108 - where Ray keeps its objects, not a file of ours
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free / _GIB
    if free >= _ENOUGH_SHARED_MEMORY_GIB:
        yield Finding("shared memory", "ok", f"{free:.1f} GiB free in {folder}")
    else:
        remedy = "Ray falls back to slower files; in a container, start it with --shm-size=4g"
        yield Finding("shared memory", "warning", f"{free:.2f} GiB free in {folder}", remedy)


def check_disk() -> Iterator[Finding]:
    """Whether there is room for Ray's files."""
    folder = ray_folder()
    usage = shutil.disk_usage(nearest_folder(folder))
    free = usage.free / _GIB
    # Ray itself refuses to spill on a disk that is over 95% full.
    if free >= _ENOUGH_DISK_GIB and usage.free >= 0.05 * usage.total:
        yield Finding("disk for Ray", "ok", f"{free:.0f} GiB free at {folder}")
    else:
        remedy = "free some space, or set RAY_TMPDIR to a folder on a larger disk"
        yield Finding("disk for Ray", "warning", f"{free:.1f} GiB free at {folder}", remedy)


def ray_folder() -> Path:
    """The folder below which Ray makes its sessions."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")  # noqa: S108 - Ray's default


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def check_sockets() -> Iterator[Finding]:
    """A local Ray cluster listens on ports of this machine and on Unix sockets in its folder."""
    folder = ray_folder()
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
    except OSError as error:
        yield Finding("ports", "missing", str(error), "a local Ray cluster must open ports on 127.0.0.1: allow it")
        return
    if len(os.fsencode(folder)) > _LONGEST_RAY_FOLDER:
        found = f"{folder} is too long for Ray's sockets ({_LONGEST_RAY_FOLDER} bytes at most)"
        yield Finding("ports", "missing", found, "set RAY_TMPDIR to a folder with a shorter path")
        return
    yield Finding("ports", "ok", "a port can be opened on 127.0.0.1")


def check_open_files() -> Iterator[Finding]:
    """Whether as many files may be open as Ray wants."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= _ENOUGH_OPEN_FILES:
        yield Finding("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else f"up to {limit}")
    else:
        yield Finding("open files", "warning", f"up to {limit}", f"Ray opens many: ulimit -n {_ENOUGH_OPEN_FILES}")


def check_store(url: str) -> Iterator[Finding]:
    """Whether a store can be written to."""
    try:
        where = _probe_bucket(url) if "://" in url else _probe_folder(Path(url))
    except Exception as error:  # each file system has errors of its own
        remedy = "choose another --store, or get the right to write there"
        yield Finding("store", "missing", f"cannot write to {url}: {error}", remedy)
    else:
        yield Finding("store", "ok", where)


def _probe_folder(path: Path) -> str:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError("it is a file")
    folder = nearest_folder(path)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"dtmsearch")
    free = shutil.disk_usage(folder).free / _GIB
    made = "" if path.is_dir() else ", which the first run will make"
    return f"{path} can be written{made}; {free:.0f} GiB free"


def _probe_bucket(url: str) -> str:
    from pyarrow import fs

    files, path = fs.FileSystem.from_uri(url)
    probe = f"{path.rstrip('/')}/doctor-probe"
    with files.open_output_stream(probe) as stream:
        stream.write(b"dtmsearch")
    files.delete_file(probe)
    return f"{url} can be written"
