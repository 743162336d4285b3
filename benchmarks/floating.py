"""What parts of `floating` gain: blocks that a model drops, found with and without them, and for how many tokens.

    PYTHONPATH=benchmarks python benchmarks/floating.py MODEL TEXT HELD_OUT --compare stages --blocks 2,4

`exchanges`: without and with exchanges of dropped blocks, all plans measured on all of the search's prompts. `stages`:
all plans measured on 24 prompts, and as `floating` does by default. For each number of blocks one search ends at so
many, the other at the size of as many attention as MLP blocks (half of them each). KL on the search's own prompts and
on held-out ones, against the base model's continuations; evaluations, in units of one on all of the search's prompts,
and the tokens that they forward.
"""

from __future__ import annotations

from pathlib import Path

import click
from structured import ROW, Measuring, floating, kl_of

from dtmsearch.core.evaluation import ModelSpec, Outcome, ReplicaSettings
from dtmsearch.core.plan import Budget
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.model.replica.replica import Replica


def settings(compare: str, prompts: int) -> dict[str, FloatingSettings]:
    """What is compared, by name."""
    if compare == "exchanges":
        whole = FloatingSettings(prompts=prompts, first_prompts=0)
        return {"no": FloatingSettings(prompts=prompts, first_prompts=0, patience=0), "yes": whole}
    return {"no": FloatingSettings(first_prompts=0, exchange_prompts=1), "yes": FloatingSettings()}


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, path_type=Path))
@click.option("--compare", type=click.Choice(["exchanges", "stages"]), default="exchanges", show_default=True)
@click.option("--blocks", default="4,6,8", show_default=True)
@click.option("--seeds", default="0,1", show_default=True)
@click.option("--prompts", default=16, show_default=True)
@click.option("--held-out-prompts", default=32, show_default=True)
@click.option("--tokens", default=50, show_default=True, help="Of a prompt, and of its continuation.")
def main(
    model: str, text: Path, held_out: Path, compare: str, blocks: str, seeds: str, prompts: int, held_out_prompts: int,
    tokens: int,
) -> None:  # fmt: skip
    """Compare what is dropped of MODEL."""
    replica = Replica(ModelSpec(model, dtype="float32", compile="never"), ReplicaSettings())
    manifest = replica.manifest()
    parts = manifest.droppable(("attention", "mlp"), manifest.components)
    whole = sum(component.num_weights for component in manifest.components)
    pair = sum({block.kind: block.num_weights for block in parts}.values())
    cut, _ = replica.cut_prompts([held_out.read_text()], held_out_prompts, tokens, tokens, 0)
    judge = replica.make_reference(cut)
    replica.use(judge)
    click.echo(f"| seed | budget | {compare} | KL | held out | evaluations | Mtokens | dropped |\n|{'---|' * 8}")
    for seed in map(int, seeds.split(",")):
        cut, _ = replica.cut_prompts([text.read_text()], prompts, tokens, tokens, seed)
        reference = replica.make_reference(cut)
        replica.use(reference)
        known: dict[str, Outcome] = {}
        for count in map(int, blocks.split(",")):
            budgets = {str(count): Budget(blocks=count)}
            budgets[f"size of {count}"] = Budget(parameters=1.0 - count // 2 * pair / whole)
            for name, budget in budgets.items():
                for label, how in settings(compare, prompts).items():
                    measuring = Measuring(replica, known)
                    plan, spent = floating(measuring, manifest, reference, budget, prompts, how)
                    own, other = (kl_of(measuring, plan, by).mean() for by in (reference, judge))
                    click.echo(
                        f"| {seed} | {name} | {label} | {own:.4f} | {other:.4f} | {spent / (prompts * ROW):.0f} "
                        f"| {spent / ROW * 2 * tokens / 1e6:.3f} | {' '.join(sorted(plan.dropped))} |"
                    )


if __name__ == "__main__":
    main()
