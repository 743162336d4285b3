"""How long an export takes, and how much memory: of a model of a given shape, written with random weights to a disk.

    PYTHONPATH=benchmarks python benchmarks/export.py llama2-7b FOLDER

Each format is written by a process of its own, which says what it held at most: of its own memory (RssAnon), of the
GPU's, and with the pages of files that it had mapped (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from dtmsearch.core.components import Component, ModelManifest
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.export.formats.format_registry import FORMATS
from dtmsearch.export.job import Job
from dtmsearch.model.modules.discovery import components_of

SCHEMES = {"dense": "int4-g128", "compressed-tensors": "int4-g128", "bitsandbytes": "nf4"}


def write_model(shape: str, folder: Path) -> None:
    """A checkpoint of random bfloat16 weights, a file for each layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**SHAPES[shape], dtype="bfloat16", tie_word_embeddings=False)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    by_file: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.state_dict().items():
        numbers = [part for part in name.split(".") if part.isdigit()]
        by_file.setdefault(f"layer-{numbers[0]}" if numbers else name, {})[name] = parameter.shape
    weight_map = {}
    for stem, shapes in by_file.items():
        tensors = {name: (torch.randn(size, device=device) * 0.02).bfloat16().cpu() for name, size in shapes.items()}
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{stem}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


class Watched:
    """The largest RssAnon while in a `with` statement, as looked at every 10 ms."""

    def __enter__(self) -> Watched:
        self.at_first = self.most = status("RssAnon")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.most = max(self.most, status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _plan(components: Sequence[Component], scheme: str) -> Plan:
    """One scheme for all; a scale for each row where the scheme's groups do not divide the inputs."""
    group = parse_scheme(scheme).group_size
    uneven = {c.name: "int4-channel" for c in components if scheme != "nf4" and c.shape[1] % group}
    return Plan.of({c.name: scheme for c in components} | uneven)


def export(to: str, model: Path, out: Path) -> dict[str, float]:
    config = LlamaConfig.from_pretrained(model)
    with torch.device("meta"):
        tree = LlamaForCausalLM(config)
    components = components_of(tree)
    manifest = ModelManifest(str(model), None, "bfloat16", config.num_hidden_layers, "random", components)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    job = Job(model, manifest, _plan(components, SCHEMES[to]), torch.bfloat16, device, torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    with Watched() as watched:
        started_at = time.perf_counter()
        written = FORMATS[to].write(job, out)
        seconds = time.perf_counter() - started_at
    assert 8 * written.tensor_bytes == job.plan_bits + sum(written.extra_bits.values())
    return {
        "seconds": seconds,
        "file_bytes": sum(path.stat().st_size for path in written.files),
        "layer_bytes": job.largest_layer_bytes,
        "own_bytes": watched.most - watched.at_first,
        "with_files_bytes": status("VmHWM"),
        "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only", choices=sorted(SCHEMES), help="write this format here, and print what it took as JSON"
    )
    arguments = parser.parse_args()
    model = arguments.folder / "model"
    if arguments.only:
        print(json.dumps(export(arguments.only, model, arguments.folder / arguments.only)))
        return
    started_at = time.perf_counter()
    write_model(arguments.shape, model)
    print(f"{arguments.shape}, random weights written in {time.perf_counter() - started_at:.1f} s")
    mib = 1 << 20
    print("| format | seconds | files, MiB | largest layer, MiB | own memory, MiB | with file pages, MiB | GPU, MiB |")
    print("|---|---|---|---|---|---|---|")
    for to in SCHEMES:
        command = [sys.executable, __file__, arguments.shape, str(arguments.folder), "--only", to]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - itself
        if done.returncode:
            print(f"| {to} | failed: {done.stderr.strip().splitlines()[-1][:150]} |")
            continue
        took = json.loads(done.stdout.splitlines()[-1])
        sizes = [took[f"{name}_bytes"] / mib for name in ("file", "layer", "own", "with_files", "gpu")]
        print(f"| {to} | {took['seconds']:.1f} | " + " | ".join(f"{size:,.0f}" for size in sizes) + " |")


if __name__ == "__main__":
    main()
