"""Which positions tell plans apart for the fewest tokens: plans that drop other blocks, one of them exchanged.

    PYTHONPATH=benchmarks python benchmarks/positions.py MODEL TEXT HELD_OUT --blocks 6 [--dropped NAME,NAME,...]

The plans are one that drops blocks (those named, or as many as are asked for by the rule of cosine) and others that
have one of these exchanged: of 60 those that are best by 8 rows. Rows are prompts and the base model's continuations;
KL to the base model is taken at every position. For ranges of positions, of a row that ends where the range does: the
mean KL; the noise of a difference of two plans between rows, over the mean KL and times the root of a row's tokens (of
half as much noise a quarter of the tokens does); how differences agree with those at the continuations of held-out
rows; and how much more than the best plan's the held-out KL is of the plan that is chosen by a number of tokens, in the
mean over draws of rows.
"""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import click
import numpy as np
from floating import everywhere
from numpy.typing import NDArray
from structured import by_rules, dropping, likeness, rows_of

from dtmsearch.core.evaluation import EvalRequest, ModelSpec, Reference, ReplicaSettings
from dtmsearch.core.plan import Plan
from dtmsearch.model.replica.replica import Replica

DRAWS = 400
# Plans that are tried on a few rows, for those that are like the best of them.
TRIED, FEW = 60, 8


def exchanged(dropped: list[str], names: list[str]) -> list[Plan]:
    """The plan that drops some blocks, and all others with one of these exchanged, shuffled."""
    others = [name for name in names if name not in dropped]
    plans = [dropping([new if name == out else name for name in dropped]) for out in dropped for new in others]
    random.Random(0).shuffle(plans)  # noqa: S311  (no secret)
    return [dropping(dropped), *plans]


def kl_by_position(
    replica: Replica, reference: Reference, plans: list[Plan], rows: int | None = None
) -> NDArray[np.float64]:
    """[plans, rows, tokens - 1]: KL of the predictions of all tokens but the first."""
    whole = everywhere(reference)
    replica.use(whole)
    found = []
    for plan in plans:
        request = EvalRequest(plan, whole.id, (0, rows or whole.num_prompts), ("kl",), plans[0])
        values = replica._evaluator.positions(request)["continuation"].kl
        assert values is not None
        found.append(values)
    return np.stack(found).astype(np.float64)


def regret(chosen_by: NDArray[np.float64], truth: NDArray[np.float64], rows: int) -> float:
    """By how much the truth of the plan that is chosen by so many rows, drawn anew, is more than the least, in the
    mean and over the least. `chosen_by` [plans, rows], `truth` [plans]."""
    numbers = np.random.default_rng(0)
    drawn = numbers.integers(0, chosen_by.shape[1], (DRAWS, rows))
    chosen = chosen_by[:, drawn].mean(axis=2).argmin(axis=0)
    return float(truth[chosen].mean() / truth.min() - 1.0)


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, path_type=Path))
@click.option("--blocks", default=6, show_default=True, help="Dropped, if they are not named.")
@click.option("--dropped", default="", help="Names of blocks, with commas.")
@click.option("--plans", "num_plans", default=12, show_default=True)
@click.option("--rows", default=96, show_default=True, help="Of each text.")
@click.option("--tokens", default=100, show_default=True, help="Of a prompt, and of its continuation.")
@click.option("--chosen-by", default=4_800, show_default=True, help="Tokens by which a plan is chosen.")
def main(
    model: str, text: Path, held_out: Path, blocks: int, dropped: str, num_plans: int, rows: int, tokens: int,
    chosen_by: int,
) -> None:  # fmt: skip
    """Which positions of MODEL's rows tell plans apart."""
    replica = Replica(ModelSpec(model, dtype="float32", compile="never"), ReplicaSettings())
    manifest = replica.manifest()
    lengths = rows, tokens, tokens
    reference, own = rows_of(replica, [text.read_text()], lengths, 0)
    judge, _ = rows_of(replica, [held_out.read_text()], lengths, 0)
    names = [block.name for block in manifest.blocks if block.kind != "layer"]
    likes = likeness(replica.model, manifest.blocks, own)
    gone = dropped.split(",") if dropped else by_rules(likes, manifest, own, blocks)["cosine, blocks"][0]
    plans = exchanged(gone, names)[:TRIED]
    tried = kl_by_position(replica, reference, plans, FEW).mean(axis=(1, 2))
    plans = [plans[at] for at in np.argsort(tried)[:num_plans]]
    found, judged = (kl_by_position(replica, each, plans) for each in (reference, judge))
    truth = judged[:, :, tokens - 1 :].mean(axis=(1, 2))
    pairs = list(combinations(range(len(plans)), 2))
    true = np.array([truth[i] - truth[j] for i, j in pairs])
    click.echo(f"held-out KL of the plans: {' '.join(f'{value:.4f}' for value in truth)}")
    click.echo(f"| positions | KL | noise | agreement | chosen by {chosen_by} tokens |\n|{'---|' * 5}")
    half = tokens // 2
    ends = {
        "continuations": (tokens, 2 * tokens), "their first half": (tokens, tokens + half),
        "prompts": (1, tokens), "first half of prompts": (1, half), "all": (1, 2 * tokens),
        "all but the first half of prompts": (half, 2 * tokens),
    }  # fmt: skip
    for name, (first, last) in ends.items():
        values = found[:, :, first - 1 : last - 1].mean(axis=2)
        differences = np.array([values[i] - values[j] for i, j in pairs])
        noise = float(np.median(differences.std(axis=1, ddof=1))) / values.mean() * last**0.5
        agreement = float(np.corrcoef(differences.mean(axis=1), true)[0, 1])
        more = regret(values, truth, max(1, chosen_by // last))
        click.echo(f"| {name} | {values.mean():.3f} | {noise:.2f} | {agreement:.2f} | {more:.1%} |")


if __name__ == "__main__":
    main()
