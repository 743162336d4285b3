"""What exchanges of dropped blocks gain: `floating` with and without them, on the prompts by which blocks are chosen.

    PYTHONPATH=benchmarks python benchmarks/exchanges.py MODEL TEXT HELD_OUT --blocks 12 --seeds 0,1,2 --prompts 8

For each number of blocks one search ends at so many, the other at the size of as many attention as MLP blocks (half of
them each). KL on the search's own prompts and on 32 held-out ones, against the base model's continuations; evaluations,
each on all of the search's prompts.
"""

from __future__ import annotations

from pathlib import Path

import click
from structured import ROW, Measuring, kl_of, searched

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, ReplicaSettings
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.floating import Floating
from dtmsearch.search.strategies.task import Task

HELD_OUT = 32


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, path_type=Path))
@click.option("--blocks", default="4,6,8", show_default=True)
@click.option("--seeds", default="0,1", show_default=True)
@click.option("--prompts", default=16, show_default=True)
@click.option("--tokens", default=50, show_default=True, help="Of a prompt, and of its continuation.")
def main(model: str, text: Path, held_out: Path, blocks: str, seeds: str, prompts: int, tokens: int) -> None:
    """Compare what is dropped of MODEL with exchanges and without."""
    replica = Replica(ModelSpec(model, dtype="float32", compile="never"), ReplicaSettings())
    manifest = replica.manifest()
    parts = manifest.droppable(("attention", "mlp"), manifest.components)
    whole = sum(component.num_weights for component in manifest.components)
    pair = sum({block.kind: block.num_weights for block in parts}.values())
    cut, _ = replica.cut_prompts([held_out.read_text()], HELD_OUT, tokens, tokens, 0)
    judge = replica.make_reference(cut)
    replica.use(judge)
    click.echo("| seed | budget | exchanges | KL | held out | evaluations | dropped |\n|---|---|---|---|---|---|---|")
    for seed in map(int, seeds.split(",")):
        cut, _ = replica.cut_prompts([text.read_text()], prompts, tokens, tokens, seed)
        reference = replica.make_reference(cut)
        replica.use(reference)

        def request_for(plan: Plan, parent: Plan, name: str = reference.id) -> EvalRequest:
            return EvalRequest(plan, name, (0, prompts), ("kl",), parent)

        measuring = Measuring(replica)
        for count in map(int, blocks.split(",")):
            budgets = {str(count): Budget(blocks=count)}
            budgets[f"size of {count}"] = Budget(parameters=1.0 - count // 2 * pair / whole)
            for name, budget in budgets.items():
                space = SearchSpace(
                    manifest.components, (), dense_bits=manifest.dense_bits, budget=budget, blocks=parts
                )
                for patience in (0, FloatingSettings().patience):
                    settings = FloatingSettings(prompts=prompts, first_prompts=0, patience=patience)
                    plan, spent = searched(Floating(Task(space, request_for, "kl"), settings), measuring)
                    own, other = (kl_of(measuring, plan, by).mean() for by in (reference, judge))
                    click.echo(
                        f"| {seed} | {name} | {'yes' if patience else 'no'} | {own:.4f} | {other:.4f} "
                        f"| {spent // (prompts * ROW)} | {' '.join(sorted(plan.dropped))} |"
                    )


if __name__ == "__main__":
    main()
