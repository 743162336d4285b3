"""Recipes for other quantizers, each carried out by its own library.

    python -m venv TOOLS && TOOLS/bin/pip install torch transformers llmcompressor nvidia-modelopt auto-round "mlx[cpu]" mlx-lm
    python benchmarks/recipes.py MODEL --python TOOLS/bin/python --out FOLDER [--tools llm-compressor,mlx-lm]

Makes a plan of mixed widths for a Llama-like MODEL, exports it as every recipe, lets the library quantize by it, and
compares what each linear layer came to (bits, group) with the plan. Last, one table: right, wrong, seconds.
"""  # noqa: E501 - one command

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM

from dtmsearch.core.plan import Plan
from dtmsearch.export.formats.recipes import RECIPES
from dtmsearch.export.job import Job
from dtmsearch.model.replica.in_memory import manifest_of

# In the order of the components, over and over; what each tool has.
_SYMMETRIC = ("int4-g64", "int8-channel", "dense", "int3-g32", "int8-g64")
SCHEMES = {
    "llm-compressor": ("int4-g64", "int8-channel", "dense", "int4-g32-asym"),
    "model-optimizer": _SYMMETRIC,
    "auto-round": ("int4-g64", "int8-channel", "dense", "int4-g32-asym"),
    "mlx-lm": ("int4-g64-asym", "int3-g32-asym", "dense", "int8-g128-asym"),
}


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--python", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--tools", default=",".join(SCHEMES), show_default=True)
def main(model: Path, python: Path, out: Path, tools: str) -> None:
    manifest = manifest_of(AutoModelForCausalLM.from_pretrained(model))
    table = []
    for tool in tools.split(","):
        schemes = SCHEMES[tool]
        names = [component.name for component in manifest.components]
        plan = Plan.of({name: schemes[place % len(schemes)] for place, name in enumerate(names)})
        folder = out / tool
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(model.resolve(), manifest, plan, torch.bfloat16, torch.device("cpu"))
        RECIPES[tool].write(job, folder)
        started_at = time.perf_counter()
        script = Path(__file__).with_name("recipes_apply.py")
        command = [python, script, tool, model, folder / RECIPES[tool].file, folder / "found.json"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)  # noqa: S603
        (folder / "output.txt").write_text(done.stdout + done.stderr)
        if done.returncode != 0:
            print(f"{tool} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        found = json.loads((folder / "found.json").read_text())
        wanted = {n: [s.bits, s.group_size] for n, s in ((n, plan.scheme(n)) for n in names) if not s.is_unquantized}
        wrong = {n: (found["layers"].get(n), wanted.get(n)) for n in names if found["layers"].get(n) != wanted.get(n)}
        print(tool, "wrong:", dict(list(wrong.items())[:3])) if wrong else None
        table.append((tool, found["version"], len(names) - len(wrong), len(wrong), time.perf_counter() - started_at))
    print(f"{'tool':16s} {'version':12s} {'right':>5s} {'wrong':>5s} {'seconds':>8s}")
    for tool, version, right, bad, seconds in table:
        print(f"{tool:16s} {version:12s} {right:5d} {bad:5d} {seconds:8.1f}")


if __name__ == "__main__":
    main()
