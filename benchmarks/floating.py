"""What parts of `floating` gain: blocks that a model drops, found with and without them, and for how many tokens.

    PYTHONPATH=benchmarks python benchmarks/floating.py MODEL TEXT HELD_OUT --compare stages --blocks 2,4

`exchanges`: without and with exchanges of dropped blocks, all plans measured on all of the search's prompts. `stages`:
all plans measured on 24 prompts, and as `floating` does by default. `lengths`: by default, by KL at all positions, the
prompt's too, and with 16 tokens of a prompt and 32 of its continuation, so many times as many prompts that there are as
many tokens. For each number of blocks one search ends at so many, the other at the size of as many attention as MLP
blocks (half of them each). KL on the search's own prompts and on held-out ones, against the base model's continuations;
evaluations, in units of one on all of the search's prompts, and the tokens that they forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from structured import Measuring, budgets_of, floating, kl_of, rows_of

from dtmsearch.core.evaluation import ModelSpec, Outcome, Reference, ReplicaSettings
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.model.replica.replica import Replica

SHORT_PROMPT, SHORT_CONTINUATION = 16, 32


@dataclass(frozen=True)
class Way:
    """Settings, and what is searched by: so many prompts of so many tokens, continued by so many; KL at the
    continuations' positions, or `everywhere`."""

    settings: FloatingSettings
    prompts: int
    prompt_tokens: int
    continuation_tokens: int
    everywhere: bool = False

    @property
    def row(self) -> int:
        return self.prompt_tokens + self.continuation_tokens


def ways(compare: str, prompts: int, tokens: int) -> dict[str, Way]:
    """What is compared, by name."""

    def way(**settings: int) -> Way:
        return Way(FloatingSettings(**settings), prompts, tokens, tokens)

    if compare == "exchanges":
        return {"no": way(prompts=prompts, first_prompts=0, patience=0), "yes": way(prompts=prompts, first_prompts=0)}
    if compare == "stages":
        return {"no": way(first_prompts=0, exchange_prompts=1), "yes": way()}
    by, times = FloatingSettings(), 2 * tokens // (SHORT_PROMPT + SHORT_CONTINUATION)
    more = FloatingSettings(
        first_prompts=times * by.first_prompts,
        prompts=times * by.prompts,
        exchange_prompts=times * by.exchange_prompts,
    )
    return {
        "continuations": way(),
        "all positions": replace(way(), everywhere=True),
        "short": Way(more, times * prompts, SHORT_PROMPT, SHORT_CONTINUATION),
    }


def everywhere(reference: Reference) -> Reference:
    """One of the same rows that takes all but the first token for what continues it."""
    own = np.concatenate([reference.text[:, 1 : reference.prompt_tokens], reference.continuation], axis=1)
    return replace(
        reference, id=f"{reference.id}-everywhere", continuation=own, agrees=np.ones(own.shape, dtype=np.bool_)
    )


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--compare", type=click.Choice(["exchanges", "stages", "lengths"]), default="exchanges", show_default=True
)
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
    judge, _ = rows_of(replica, [held_out.read_text()], (held_out_prompts, tokens, tokens), 0)
    click.echo(f"| seed | budget | {compare} | KL | held out | evaluations | Mtokens | dropped |\n|{'---|' * 8}")
    for seed in map(int, seeds.split(",")):
        references: dict[tuple[int, int, int], Reference] = {}
        known: dict[str, Outcome] = {}
        for count in map(int, blocks.split(",")):
            for name, budget in zip((str(count), f"size of {count}"), budgets_of(manifest, count), strict=True):
                for label, way in ways(compare, prompts, tokens).items():
                    by = way.prompts, way.prompt_tokens, way.continuation_tokens
                    if by not in references:
                        references[by], _ = rows_of(replica, [text.read_text()], by, seed)
                    measuring = Measuring(replica, known, row=way.row)
                    reference = references[by]
                    if way.everywhere:
                        reference = everywhere(reference)
                        replica.use(reference)
                    plan, spent = floating(measuring, manifest, reference, budget, way.prompts, way.settings)
                    own, other = (kl_of(measuring, plan, each).mean() for each in (reference, judge))
                    click.echo(
                        f"| {seed} | {name} | {label} | {own:.4f} | {other:.4f} "
                        f"| {spent / (way.prompts * way.row):.0f} | {spent / 1e6:.3f} "
                        f"| {' '.join(sorted(plan.dropped))} |"
                    )


if __name__ == "__main__":
    main()
