"""Training under masks against a plain accelerate loop on the same model, rows and optimiser: tokens a second, memory.

`python benchmarks/training.py MODEL TEXT [STEPS]`. The two take turns, three times, in processes of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_BATCH, _SEQUENCE = {"cuda": 32_768, "cpu": 1_024}, {"cuda": 512, "cpu": 128}


def peak_mib() -> float:
    """The device's peak of allocated memory or, on a processor, the process's."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def ours(model: str, text: str, steps: int) -> float:
    """Seconds of a step of `recover.train` with half of all components pruned."""
    import torch
    from safetensors.torch import save_file

    from dtmsearch.model.discovery import read_manifest
    from dtmsearch.model.loading import load_model
    from dtmsearch.model.recover import Recipe, Training, _Loop
    from dtmsearch.model.trained import MASKS_FILE, START_FILE, pack_masks
    from dtmsearch.plans.evaluation import ModelSpec

    spec = ModelSpec(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "training"
        folder.mkdir()
        weights = dict(load_model(Path(model), spec, torch.device("cpu"), 1).named_parameters())
        names = [component.name for component in read_manifest(spec).components]
        sizes = {name: weights[f"{name}.weight"].detach().abs() for name in names}
        kept = {name: size > size.median() for name, size in sizes.items()}
        save_file(
            {f"{n}.weight": (weights[f"{n}.weight"].detach() * m).contiguous() for n, m in kept.items()},
            folder / START_FILE,
        )
        pack_masks(kept, folder / MASKS_FILE)
        recipe = Recipe(steps, 0, _BATCH[device], _SEQUENCE[device], 1e-4, checkpoint_steps=10**6)
        loop = _Loop(Training(spec, folder, folder / "weights"), [text], recipe)
        return timed(loop._take_step, steps)


def plain(model: str, text: str, steps: int) -> float:
    """Seconds of a step of a plain loop: the same rows, loss, clipping and optimiser, no masks."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dtmsearch.model.recover import tokenized

    cuda = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if cuda else "no")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.train()
    for module in (network.get_input_embeddings(), network.get_output_embeddings()):
        module.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=cuda)
    network, optimizer = accelerator.prepare(network, optimizer)
    device = "cuda" if cuda else "cpu"
    rows = torch.from_numpy(tokenized([text], AutoTokenizer.from_pretrained(model), _SEQUENCE[device])).long()
    count, at = _BATCH[device] // _SEQUENCE[device], [0]

    def step() -> None:
        at[0] = (at[0] + count) % max(1, len(rows) - count)
        batch = rows[at[0] : at[0] + count].to(accelerator.device)
        accelerator.backward(network(input_ids=batch, labels=batch, use_cache=False).loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, steps)


def timed(step, steps: int) -> float:
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    started_at = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - started_at) / steps


def main() -> None:
    model, text_file, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 30
    if len(sys.argv) > 4:
        import torch

        text = Path(text_file).read_text(encoding="utf-8", errors="replace")[:2_000_000]
        seconds = {"ours": ours, "plain": plain}[sys.argv[4]](model, text, steps)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(json.dumps({"tokens": _BATCH[device] / seconds, "mib": peak_mib()}))
        return
    found: dict[str, list[dict]] = {"plain": [], "ours": []}
    for _ in range(3):
        for name, results in found.items():
            command = [sys.executable, __file__, model, text_file, str(steps), name]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - ourselves
            results.append(json.loads(out.strip().splitlines()[-1]))
    best = {name: max(r["tokens"] for r in results) for name, results in found.items()}
    most = {name: max(r["mib"] for r in results) for name, results in found.items()}
    print("| loop | tokens a second | memory, MiB |\n|---|---|---|")
    for name in found:
        print(f"| {name} | {best[name]:,.0f} | {most[name]:,.0f} |")
    print(f"ours / plain: throughput {best['ours'] / best['plain']:.3f}, memory {most['ours'] / most['plain']:.3f}")


if __name__ == "__main__":
    main()
