"""Which experts of a mixture go: the rules, the same number in all layers, beside what `auto` finds.

    python benchmarks/fewer_experts.py TRAIN SEARCH JUDGE --tokenizer FOLDER --out FOLDER [--train-seconds 240]

Trains a small Qwen3-MoE (4 layers, 16 experts each, of which a token is given to 2) on TRAIN (.zst is unpacked) and
saves it to OUT/model; what is there already is taken. Rules see the text of SEARCH, as do searches; KL is that of
prompts of JUDGE, against the model's own continuations. `auto` gives every layer a number of experts of its own, by the
rules of `--search-rules`, of at most as many weights as the share leaves of every layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
from mixture import Shape, train
from structured import CONTINUATION, PROMPT, Measuring, kl_of
from widths import found_by, space_of_cuts

from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Budget, Plan, plan_size
from dtmsearch.core.statistics import paired_difference
from dtmsearch.core.widths import RULES_OF_EXPERTS
from dtmsearch.model.replica.replica import Replica

SMALL = Shape(hidden=128, layers=4, heads=4, experts=16, chosen=2, inner=96)
# Shares of a layer's experts that a search chooses among: two of sixteen each.
STEPS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)


@click.command()
@click.argument("train_text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("search", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("judge", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--train-seconds", default=240.0, show_default=True)
@click.option("--shares", default="0.25,0.5", show_default=True, help="Of the experts of every layer.")
@click.option("--rules", default=",".join(RULES_OF_EXPERTS), show_default=True)
@click.option("--search-rules", default="reap", show_default=True, help="Of auto; empty: no search.")
@click.option("--rows", default=64, show_default=True, help="Of 200 tokens, to calibrate by.")
@click.option("--prompts", default=32, show_default=True, help="To search by.")
@click.option("--held-out-prompts", default=64, show_default=True)
def main(
    train_text: Path, search: Path, judge: Path, tokenizer: Path, out: Path, train_seconds: float, shares: str,
    rules: str, search_rules: str, rows: int, prompts: int, held_out_prompts: int,
) -> None:  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "model"
    if not (folder / "config.json").exists():
        train(train_text, tokenizer, folder, SMALL, train_seconds, 20_000, 16, 128)
    replica = Replica(ModelSpec(str(folder), dtype="float32"), ReplicaSettings(num_threads=torch.get_num_threads()))
    manifest = replica.manifest()
    text = replica.cut_calibration([search.read_text()], rows, PROMPT + CONTINUATION, 0)
    replica.use_calibration(text)
    references = []
    for each, count in ((search, prompts), (judge, held_out_prompts)):
        tokens, _ = replica.cut_prompts([each.read_text()], count, PROMPT, CONTINUATION, 0)
        references.append(replica.make_reference(tokens))
        replica.use(references[-1])
    asked, told = references

    def parameters(plan: Plan) -> float:
        return plan_size(plan, manifest.components, manifest.dense_bits).parameters

    found: dict[tuple[float, str], np.ndarray] = {}
    left: dict[tuple[float, str], float] = {}
    for share in map(float, shares.split(",")):
        plans = {}
        for rule in rules.split(","):
            name = f"experts-{share:g}-{rule}"
            plans[rule] = Plan.of({block.name: name for block in manifest.cuttable([name], manifest.components)})
        if search_rules:
            cuts = [f"experts-{step:g}-{rule}" for step in STEPS for rule in search_rules.split(",")]
            budget = Budget(parameters=parameters(next(iter(plans.values()))))
            asking = space_of_cuts(manifest, budget, cuts)
            plans["auto"], _ = found_by("auto", Measuring(replica), asking, asked, prompts, prompts // 2, text.id, {})
        for label, plan in plans.items():
            found[share, label] = kl_of(Measuring(replica), plan, told, text.id)
            left[share, label] = parameters(plan)
            gap = paired_difference(found[share, label], found[share, next(iter(plans))], seed=0)
            click.echo(
                f"{share:>6} {label:<10} KL {found[share, label].mean():.4f}  left {left[share, label]:.2%}  "
                f"to the first {gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
            )
    table = [{"share": s, "plan": p, "kl": float(v.mean()), "left": left[s, p]} for (s, p), v in found.items()]
    (out / "fewer_experts.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
