"""What a repair of what is left gains, by the tokens that it is fitted to.

    python benchmarks/repaired.py MODEL --search TEXT --judge TEXT --drop model.layers.6.self_attn,model.layers.7.mlp

Each `--drop` is a plan, the blocks that it drops. KL on held-out prompts, mean over draws of the rows that are fitted
to; the share of prompts that have more KL than before; seconds of one repair, with the loading of both models.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
from structured import CONTINUATION, PROMPT, Measuring, dropping, kl_of, repaired, take_share

from dtmsearch.core.evaluation import ModelSpec, ReplicaSettings
from dtmsearch.model.replica.replica import Replica


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--search", "search_text", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--judge", "judge_text", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--drop", "drops", multiple=True, required=True, help="blocks of a plan, by commas; repeatable")
@click.option("--tokens", default="4096,8192,16384,32768,65536,131072,230000")
@click.option("--draws", default=2)
@click.option("--held-out", default=512)
def main(
    model: str, search_text: Path, judge_text: Path, drops: tuple[str, ...], tokens: str, draws: int, held_out: int
) -> None:
    """Repair plans of MODEL."""
    take_share()
    spec = ModelSpec(model, dtype="float32", compile="never")
    folder = Path(click.get_current_context().with_resource(tempfile.TemporaryDirectory()))
    replica = Replica(spec, ReplicaSettings(weights_folder=str(folder)))
    held, _ = replica.cut_prompts([judge_text.read_text()], held_out, PROMPT, CONTINUATION, 0)
    judge = replica.make_reference(held)
    replica.use(judge)
    measuring, text = Measuring(replica), [search_text.read_text()]
    for names in drops:
        plan = dropping(names.split(","))
        before = kl_of(measuring, plan, judge)
        click.echo(f"{names}\n  not repaired {before.mean():.4f}")
        for count in map(int, tokens.split(",")):
            began, seconds, found = time.perf_counter(), 0.0, list[np.ndarray]()
            for draw in range(draws):
                # Its folder is named by plan and seed.
                weights = repaired(replica, spec, plan, text, count, draw + 100 * count, folder)
                seconds = seconds or time.perf_counter() - began
                found.append(kl_of(measuring, plan, judge, weights=weights))
            kls = np.stack(found)
            click.echo(f"  {count:>7} {kls.mean():.4f}, more in {(kls > before).mean():.1%}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
