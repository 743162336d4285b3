"""Training under masks against a plain accelerate loop on the same model, rows and optimiser: speed and memory.

`python benchmarks/training.py MODEL TEXT [--precision float32] [--random LAYERSxWIDTH] [--pairs N] [--steps N]`

Both loops stand in one process and take turns, a few steps each, so that whatever else the machine does meets both;
the figure is the median of the ratios of neighbouring turns. The plain loop is the leanest that trains alike: rows that
lie ready on the host, loss, backward, clipping, fused AdamW, the loss read every ten steps. Ours is `Loop.advance`
whole. Half of every component is pruned. `--random` puts a model of that shape and random weights in MODEL's place,
with its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_BATCH, _SEQUENCE = {"cuda": 32_768, "cpu": 1_024}, {"cuda": 512, "cpu": 128}
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_TEXT_CHARACTERS = 2_000_000
_STEPS_BETWEEN_LOOKS = 10
_LR = 1e-4

Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """One comparison: a model, a text, a precision, and a scratch folder with masks of half the model."""

    model: Path
    text: Path
    precision: str
    batch_tokens: int
    scratch: Path

    @property
    def rows(self) -> int:
        return self.batch_tokens // _SEQUENCE[_DEVICE]

    def text_read(self) -> str:
        return self.text.read_text(encoding="utf-8", errors="replace")[:_TEXT_CHARACTERS]


def write_random(model: Path, shape: str, folder: Path) -> Path:
    """A model of so many layers, so wide, with MODEL's tokenizer and family."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    layers, width = (int(part) for part in shape.split("x"))
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = layers, width, 4 * width
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = 128, width // 128, width // 128
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * layers
    with torch.device(_DEVICE):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def prepare(setting: Setting) -> None:
    """What a training starts from: half of every component pruned, by magnitude."""
    from safetensors.torch import save_file

    from dtmsearch.core.evaluation import ModelSpec
    from dtmsearch.model.modules.discovery import read_manifest
    from dtmsearch.model.modules.loading import load_model
    from dtmsearch.model.weights.trained import MASKS_FILE, START_FILE, pack_masks

    folder = setting.scratch / "training"
    folder.mkdir()
    spec = ModelSpec(str(setting.model))
    own = dict(load_model(setting.model, spec, torch.device(_DEVICE)).named_parameters())
    weights = {f"{c.name}.weight": own[f"{c.name}.weight"].detach() for c in read_manifest(spec).components}
    kept = {name.removesuffix(".weight"): w.abs() > w.abs().flatten()[:100_000].median() for name, w in weights.items()}
    save_file({n: (w * kept[n.removesuffix(".weight")]).cpu() for n, w in weights.items()}, folder / START_FILE)
    pack_masks(kept, folder / MASKS_FILE)


def ours(setting: Setting) -> Step:
    """The loop of `dtmsearch recover`, a step of it."""
    from dtmsearch.core.evaluation import ModelSpec
    from dtmsearch.model.training.recipe import Recipe
    from dtmsearch.model.training.train_loop import Loop, Training

    recipe = Recipe(
        files=("text.txt",),
        masked_steps=10**6,
        unmasked_steps=0,
        batch_tokens=setting.batch_tokens,
        sequence_tokens=_SEQUENCE[_DEVICE],
        lr=_LR,
        precision="bfloat16" if setting.precision == "bfloat16" else "float32",
        checkpoint_steps=10**6,
    )
    training = Training(ModelSpec(str(setting.model)), setting.scratch / "training", setting.scratch / "weights")
    loop = Loop(training, [setting.text_read()], recipe)
    return lambda: loop.advance(lambda: False)


def plain(setting: Setting) -> Step:
    """A step of the leanest loop that trains alike, without masks."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dtmsearch.model.training.batches import read_rows

    accelerator = Accelerator(mixed_precision="bf16" if setting.precision == "bfloat16" else "no")
    network = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32, attn_implementation="sdpa")
    network.train()
    for module in (network.get_input_embeddings(), network.get_output_embeddings()):
        module.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LR, weight_decay=0.01, fused=True)
    network, optimizer = accelerator.prepare(network, optimizer)
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    found = read_rows([setting.text_read()], tokenizer, _SEQUENCE[_DEVICE], setting.scratch / "texts")
    rows = torch.from_numpy(found.astype("int64"))
    rows = rows.pin_memory() if _DEVICE == "cuda" else rows
    at, losses = [0], []

    def step() -> None:
        at[0] = (at[0] + setting.rows) % max(1, len(rows) - setting.rows)
        batch = rows[at[0] : at[0] + setting.rows].to(accelerator.device, non_blocking=True)
        loss = network(input_ids=batch, labels=batch, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if len(losses) == _STEPS_BETWEEN_LOOKS:
            torch.stack(losses).tolist()
            losses.clear()

    return step


LOOPS = {"plain": plain, "ours": ours}


def wait() -> None:
    if _DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Step, steps: int) -> float:
    """Seconds of a step, over several."""
    wait()
    started_at = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - started_at) / steps


@contextmanager
def counted_waits() -> Iterator[list[int]]:
    """How often the host waited for the device within; known when it is over."""
    found: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.append(sum("synchroniz" in str(warning.message) for warning in caught))


def waits_of(step: Step) -> str:
    """Waits of the host for the device in as many steps as lie between two looks at the loss."""
    if _DEVICE == "cpu":
        return ""
    with counted_waits() as found:
        for _ in range(_STEPS_BETWEEN_LOOKS):
            step()
    return str(found[0])


def built(name: str, setting: Setting) -> tuple[Step, float]:
    """A loop that has warmed up, and on a GPU its peak of allocated memory in MiB, beyond what was there before."""
    if _DEVICE == "cpu":
        step = LOOPS[name](setting)
        step()
        return step, memory_apart(name, setting)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = LOOPS[name](setting)
    for _ in range(3):
        step()
    wait()
    return step, (torch.cuda.max_memory_allocated() - before) / 2**20


def memory_apart(name: str, setting: Setting) -> float:
    """The peak of a process of its own in MiB, beyond what it holds before it has a model.

    Its allocator gives back what is freed, so that the peak is that of what is in use.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    fields = [str(getattr(setting, field)) for field in Setting.__dataclass_fields__]
    done = subprocess.run(  # noqa: S603 - ourselves
        [sys.executable, __file__, "--memory-of", name, *fields],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def tell_memory(name: str, fields: list[str]) -> None:
    import psutil

    import dtmsearch.model.training.train_loop  # noqa: F401 - code is loaded before the count begins

    model, text, precision, batch_tokens, scratch = fields
    setting = Setting(Path(model), Path(text), precision, int(batch_tokens), Path(scratch))
    before = psutil.Process().memory_info().rss / 2**20
    step = LOOPS[name](setting)
    for _ in range(2):
        step()
    # What getrusage calls the peak is also that of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert peak is not None
    print(int(peak[1]) / 2**10 - before)


def compare(setting: Setting, pairs: int, steps: int) -> dict[str, object]:
    """Both loops in turns: seconds of a step of each turn, memory, waits."""
    prepare(setting)
    loops = {name: built(name, setting) for name in LOOPS}
    waits = {name: waits_of(step) for name, (step, _) in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for pair in range(pairs):
        for name in list(loops) if pair % 2 else list(loops)[::-1]:
            seconds[name].append(seconds_of(loops[name][0], steps))
    return {"seconds": seconds, "memory": {name: memory for name, (_, memory) in loops.items()}, "waits": waits}


def table(label: str, setting: Setting, found: dict) -> list[str]:
    """A row for each loop, and what they are to each other."""
    lines = []
    for name in LOOPS:
        rate = setting.batch_tokens / statistics.median(found["seconds"][name])
        memory, waits = found["memory"][name], found["waits"][name]
        lines.append(f"| {label}, {setting.precision} | {name} | {rate:,.0f} | {memory:,.0f} | {waits} |")
    ratios = sorted(p / o for p, o in zip(found["seconds"]["plain"], found["seconds"]["ours"], strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    memory = found["memory"]["ours"] / found["memory"]["plain"]
    middle = f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
    return [*lines, f"| | ours / plain | {middle} | {memory:.3f} | |"]


def main() -> None:
    if sys.argv[1:2] == ["--memory-of"]:
        tell_memory(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--random", metavar="LAYERSxWIDTH")
    parser.add_argument("--batch-tokens", type=int, default=_BATCH[_DEVICE])
    parser.add_argument("--pairs", type=int, default=20 if _DEVICE == "cuda" else 12)
    parser.add_argument("--steps", type=int, default=10 if _DEVICE == "cuda" else 1)
    parser.add_argument("--json", type=Path, help="write all that was measured here, too")
    given = parser.parse_args()
    lines, everything = [], {}
    for precision in given.precision or (["bfloat16", "float32"] if _DEVICE == "cuda" else ["float32"]):
        with tempfile.TemporaryDirectory() as scratch:
            model = given.model
            if given.random:
                model = write_random(model, given.random, Path(scratch) / "model")
            setting = Setting(model, given.text, precision, given.batch_tokens, Path(scratch))
            found = compare(setting, given.pairs, given.steps)
            label = f"random {given.random}" if given.random else given.model.name
            lines += table(label, setting, found)
            everything[f"{label} {precision}"] = found
        if _DEVICE == "cuda":
            torch.cuda.empty_cache()
    if given.json:
        given.json.write_text(json.dumps(everything))
    device = torch.cuda.get_device_name() if _DEVICE == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    print(
        f"\n{given.batch_tokens:,} tokens a step in rows of {_SEQUENCE[_DEVICE]}, {device}, torch {torch.__version__}"
    )
    print(f"| model | loop | tokens per second | peak memory, MiB | waits in {_STEPS_BETWEEN_LOOKS} steps |")
    print("|---|---|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
