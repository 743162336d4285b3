"""What a model takes that is as large as the GPU or larger: a probe of some components against the floor of the matrix
products, over several GPUs, with weights that pass through one GPU, or with a part of its memory.

    PYTHONPATH=benchmarks python benchmarks/large.py 34b --folder FOLDER --run gpus=1 --run gpus=2 --run streamed,cap=24

Writes a Llama of random weights into FOLDER unless it is there. A run is `gpus=N`, `streamed`, or with `,cap=GB` either
with so much of the GPU's memory. Continuations are the text's own: the same work as with the model's, without
generating them. The floor is the products of the unquantized model's pass, of every candidate from its layer upward,
and of the heads, at the rate of a large product on the GPUs of the run, measured in the same process: once in a burst
of 20, and once as it is kept up for two seconds, which is less where a GPU has to slow down. Each run is a process of
its own, or with `,replicas=N` so many, on a GPU each, that share the components out; `,compile` compiles layers. With
`--repeat N` the fastest of N passes counts: the first one also takes memory from the driver. The last column counts
evaluations with any other bit than the first run's.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from replica import make_reference
from transformers import AutoTokenizer, LlamaConfig

import dtmsearch
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.model.replica.replica import Replica

# Layers, width, inner width, heads, heads of keys.
SHAPES = {
    "7b": (32, 4_096, 11_008, 32, 32),
    "34b": (48, 8_192, 22_016, 64, 8),
    "70b": (80, 8_192, 28_672, 64, 8),
    "small": (6, 256, 688, 4, 2),
}
_VOCABULARY = 8_192
_PRODUCT = 8_192


def write(folder: Path, shape: str, layers: int) -> None:
    """A Llama of random weights with the demo's tokenizer, a file for each layer."""
    _, width, inner, heads, groups = SHAPES[shape]
    folder.mkdir(parents=True)
    AutoTokenizer.from_pretrained(Path(dtmsearch.__file__).parent / "demo" / "model").save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=_VOCABULARY, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups, dtype="bfloat16",
        tie_word_embeddings=False, eos_token_id=2, bos_token_id=1, max_position_embeddings=4_096,
    ).save_pretrained(folder)  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * (0.7 / columns**0.5)).cpu()

    def save(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        """As safetensors does, of which only one thread can at a time."""
        ends = np.cumsum([0, *(tensor.nbytes for tensor in tensors.values())]).tolist()
        header: dict[str, object] = {
            key: {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
            for (key, tensor), start, end in zip(tensors.items(), ends, ends[1:], strict=False)
        }
        text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return dict.fromkeys(tensors, name)

    def layer(number: int) -> dict[str, str]:
        start, keys = f"model.layers.{number}.", width // heads * groups
        matrices = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }  # fmt: skip
        tensors = {f"{start}{name}.weight": random(*sides) for name, sides in matrices.items()}
        ones = torch.ones(width, dtype=torch.bfloat16)
        norms = {f"{start}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        return save(f"model-{number:03d}.safetensors", tensors | norms)

    torch.manual_seed(0)
    around = {"model.embed_tokens.weight": random(_VOCABULARY, width) * width**0.5}
    around |= {"lm_head.weight": random(_VOCABULARY, width), "model.norm.weight": torch.ones(width).bfloat16()}
    index = save("model-embed.safetensors", around)
    with ThreadPoolExecutor(8) as threads:
        for names in threads.map(layer, range(layers)):
            index |= names
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def rates(devices: Sequence[torch.device]) -> tuple[float, float]:
    """Operations a second of large products on all devices together: in a burst, and kept up."""
    burst = kept_up = 0.0
    for device in devices:
        size = _PRODUCT if device.type == "cuda" else _PRODUCT // 16
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        _seconds(a, b, 3)
        time.sleep(1.0)
        burst += 2.0 * size**3 / _seconds(a, b, 20)
        before = max(1, round(1.5 / _seconds(a, b, 20)))
        _seconds(a, b, before)
        kept_up += 2.0 * size**3 / _seconds(a, b, max(1, before // 3))
    return burst, kept_up


def _seconds(a: torch.Tensor, b: torch.Tensor, count: int) -> float:
    """Of a product, of so many in a row."""
    _wait(a.device)
    started_at = time.perf_counter()
    for _ in range(count):
        a @ b
    _wait(a.device)
    return (time.perf_counter() - started_at) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    folder: Path, run: str, prompts: int, tokens: int, num_components: int, repeat: int, share: int
) -> dict[str, object]:
    """One run, in this process: of several replicas what one of them, `share`, takes. It begins when a line comes."""
    words = _words(run)
    on_gpu, gpus = torch.cuda.is_available(), int(words.get("gpus", "1"))
    devices = [torch.device("cuda", index) for index in range(gpus)] if on_gpu else [torch.device("cpu")]
    burst, kept_up = rates(devices)
    if "cap" in words:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(float(words["cap"]) * 1e9 / total)
    started_at = time.perf_counter()
    replica = Replica(
        ModelSpec(str(folder), dtype="bfloat16", compile="always" if "compile" in words else "never"),
        ReplicaSettings(num_devices=gpus, weights="streamed" if "streamed" in words else "device"),
    )
    loaded = time.perf_counter() - started_at
    reference = make_reference(replica, None, prompts, tokens // 2, tokens // 2)
    components = replica.manifest().components
    chosen = components[:: max(1, len(components) // num_components)][:num_components]
    chosen = shared_out(chosen, replica.manifest().num_layers, int(words.get("replicas", "1")))[share]
    plans = [Plan(), *(Plan.of({component.name: "int4-g128"}) for component in chosen)]
    requests = [EvalRequest(plan, reference.id, (0, prompts), ("kl",)) for plan in plans]
    seconds, values = [], []
    if "compile" in words:  # which the first pass does
        replica.evaluate(requests[:2])
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(repeat):
        replica.forget()  # memory that the last one took stays the process's, as in a search
        for device in devices:
            _wait(device)
        started_at = time.perf_counter()
        outcomes = replica.evaluate(requests)
        for device in devices:
            _wait(device)
        seconds.append(time.perf_counter() - started_at)
        bad = [outcome for outcome in outcomes if not isinstance(outcome, EvalResult)]
        assert not bad, bad[0]
        results = [outcome for outcome in outcomes if isinstance(outcome, EvalResult)]
        values.append([[np.asarray(x).tolist() for x in (r.fdt, r.sdt, r.dppl, r.kl)] for r in results])
    above = sum(sum(c.num_weights for c in components if c.layer >= own.layer) for own in chosen)
    whole = sum(component.num_weights for component in components)
    head = replica.model.get_output_embeddings().weight.numel()
    base = 0 if share else 1
    work = 2.0 * prompts * ((above + base * whole) * tokens + head * (tokens // 2) * (len(chosen) + base))
    peak = [torch.cuda.max_memory_allocated(device) / 1e9 for device in devices] if on_gpu else []
    return {
        "loaded": loaded, "seconds": min(seconds), "work": work, "rate": burst, "kept_up": kept_up, "peak_gb": peak,
        "repeats": all(value == values[0] for value in values),
        "values": dict(zip(["", *(component.name for component in chosen)], values[0], strict=True)),
    }  # fmt: skip


def shared_out(components: Sequence[Any], num_layers: int, replicas: int) -> list[list[Any]]:
    """Components for each replica, so that all have as many layers to run."""
    shares: list[list[Any]] = [[] for _ in range(replicas)]
    work = [0] * replicas
    for component in components:  # those with most layers first
        least = work.index(min(work))
        shares[least].append(component)
        work[least] += num_layers - component.layer
    return shares


def _words(run: str) -> dict[str, str]:
    return {word.partition("=")[0]: word.partition("=")[2] for word in run.split(",")}


def together(command: Sequence[str], run: str) -> list[Any]:
    """What the replicas of a run measured, each in a process; they begin when all of them are ready."""
    count = int(_words(run).get("replicas", "1"))
    started = [
        subprocess.Popen(  # noqa: S603 - ourselves
            [*command, "--run", run, "--share", str(share)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": str(share)} if count > 1 else {}),
        )
        for share in range(count)
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None
        while process.stdout.readline() not in {"ready\n", ""}:
            pass
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in started]
    return (
        [] if any(process.returncode for process in started) else [json.loads(each.splitlines()[-1]) for each in said]
    )


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--layers", type=int, help="Fewer than the shape has.")
@click.option("--run", "runs", multiple=True, required=True)
@click.option("--prompts", default=64, show_default=True)
@click.option("--tokens", default=200, show_default=True, help="Of a prompt and its continuation together.")
@click.option("--components", default=35, show_default=True)
@click.option("--repeat", default=1, show_default=True)
@click.option("--share", type=int, hidden=True, help="One replica of one run, in this process, as JSON.")
def main(
    shape: str, folder: Path, layers: int | None, runs: tuple[str, ...], prompts: int, tokens: int, components: int,
    repeat: int, share: int | None,
) -> None:  # fmt: skip
    if share is not None:
        click.echo(json.dumps(measure(folder, runs[0], prompts, tokens, components, repeat, share)))
        return
    if not folder.exists():
        started_at = time.perf_counter()
        write(folder, shape, layers or SHAPES[shape][0])
        click.echo(f"written in {time.perf_counter() - started_at:.0f} s", err=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    click.echo(
        f"{'run':28s} {'loaded':>7s} {'probe s':>8s} {'floor s':>8s} {'ratio':>6s} {'TFLOP/s':>8s} {'kept up':>8s}"
        f" {'ratio':>6s}  peak GB, differing"
    )
    first: dict[str, object] | None = None
    same = ["--folder", str(folder), "--prompts", str(prompts), "--tokens", str(tokens)]
    same += ["--components", str(components), "--repeat", str(repeat)]
    for run in runs:
        found = together([sys.executable, __file__, shape, *same], run)
        if not found:
            click.echo(f"{run:28s} ended with an error")
            continue
        values = {name: value for each in reversed(found) for name, value in each["values"].items()}
        first = values if first is None else first
        differing = sum(values[name] != first[name] for name in values)
        seconds, work = max(each["seconds"] for each in found), sum(each["work"] for each in found)
        burst, kept_up = (sum(each[name] for each in found) for name in ("rate", "kept_up"))
        floor = work / burst
        peak = ", ".join(f"{value:.1f}" for each in found for value in each["peak_gb"])
        loaded = max(each["loaded"] for each in found)
        click.echo(
            f"{run:28s} {loaded:7.1f} {seconds:8.1f} {floor:8.1f} {seconds / floor:6.2f} {burst / 1e12:8.0f} "
            f"{kept_up / 1e12:8.0f} {seconds * kept_up / work:6.2f}  {peak}, {differing} of {len(values)}"
            f"{'' if all(each['repeats'] for each in found) else ', DOES NOT REPEAT'}"
        )


if __name__ == "__main__":
    main()
