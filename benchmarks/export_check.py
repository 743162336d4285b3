"""Exports of a small trained model, each measured by a fresh process against what was recorded, in the numeric mode of
this machine.

    python benchmarks/export_check.py MODEL TEXT FOLDER --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

COMMAND = "import sys; from dtmsearch.cli import main; sys.exit(main(sys.argv[1:]))"
# what is exported: format, the scheme of attention, the scheme of the rest, options
EXPORTS = (
    ("dense", "int4-g32", "int8-channel", ()),
    ("dense", "magnitude-0.5", "nf4", ()),
    ("compressed-tensors", "int4-g32", "int8-channel", ("--runtime", "vllm")),
    ("compressed-tensors", "int4-g32-asym", "int4-g64", ("--runtime", "vllm")),
    ("compressed-tensors", "int3-g32", "int5-channel-asym", ()),
    ("bitsandbytes", "nf4", "fp4", ()),
    ("bitsandbytes", "w8a8", "w8a8", ()),
    ("bitsandbytes", "llm-int8", "llm-int8", ()),
)


def dtmsearch(*arguments: str) -> str:
    command = [sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if done.returncode:
        raise SystemExit(f"dtmsearch {' '.join(arguments)}:\n{done.stderr[-1500:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    arguments = parser.parse_args()
    folder, store = arguments.folder, str(arguments.folder / "store")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "search.yaml"
    file.write_text(
        f"run: checks\nmodel: {{path: {Path(arguments.model).absolute()}, dtype: {arguments.dtype}, "
        f"scale_dtype: bfloat16}}\nprompts: {{files: [{Path(arguments.text).absolute()}], count: {arguments.prompts}, "
        f"prompt_tokens: {arguments.tokens}, continuation_tokens: {arguments.tokens}}}\n"
        "search: {strategy: probe, schemes: [int8-channel], components: {include: [q]}}\n"
    )
    print("| format | attention | the rest | FDT | SDT | prompts that differ | bytes of files |")
    print("|---|---|---|---|---|---|---|")
    from dtmsearch.model.discovery import read_manifest
    from dtmsearch.plans.evaluation import ModelSpec
    from dtmsearch.plans.plan import Plan, plan_to_json

    manifest = read_manifest(ModelSpec(str(Path(arguments.model).absolute())))
    for number, (to, attention, rest, options) in enumerate(EXPORTS):
        names = {c.name: attention if "attn" in c.name else rest for c in manifest.components}
        plan = folder / f"plan-{number}.json"
        plan.write_text(plan_to_json(Plan.of(names), manifest))
        dtmsearch("evaluate", str(file), "--plan", str(plan), "--store", store, "--quiet")
        out = str(folder / f"out-{number}")
        try:
            said = dtmsearch(
                "export", str(plan), "--to", to, "--out", out, "--store", store, "--format", "json", *options
            )
        except SystemExit as failed:
            print(f"| {to} | {attention} | {rest} | {str(failed).strip().splitlines()[-1][:300]} |")
            continue
        result = json.loads(said)
        check = result["check"]
        weights = sum(size for name, size in result["files"].items() if name.endswith(".safetensors"))
        values = [f"{check['fdt_measured']:.2f}", f"{check['sdt_measured']:.3f}"]
        differing = f"{check['differing']} of {check['num_prompts']}"
        print(f"| {to} | {attention} | {rest} | {' | '.join(values)} | {differing} | {weights:,} |")


if __name__ == "__main__":
    main()
