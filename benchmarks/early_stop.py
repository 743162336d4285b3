"""Does it pay to stop at the first divergence? One pass over all positions, against blocks of positions with a cache.

    python benchmarks/early_stop.py MODEL TEXT [--prompts 64] [--schemes int8-channel,int4-g32,int3-g32,int2-g32]

FDT needs nothing after a sequence's first divergent token. So the prompts are read into a cache, the continuation is
fed a block of positions at a time, and sequences that have diverged are dropped. Everything is compressed with the
scheme, and both ways start from the tokens: a prefix that is shared with a parent's evaluation saves either of them
the same layers. The two take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import click
import numpy as np
import torch
from inprocess import load, reference
from torch import Tensor
from transformers import DynamicCache

from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import Variant

TOKENS = 100
_ROUNDS = 3


@click.command()
@click.argument("model")
@click.argument("text")
@click.option("--prompts", default=64)
@click.option("--batch", default=16)
@click.option("--schemes", default="int8-channel,int6-g32,int4-g32,int3-g32,int2-g32")
@click.option("--blocks", default="8,16,32", help="positions of the blocks; the last size repeats")
@click.option("--dtype", default="float32")
def main(model: str, text: str, prompts: int, batch: int, schemes: str, blocks: str, dtype: str) -> None:
    replica = load(model, dtype)
    made = reference(replica, text, prompts, TOKENS, TOKENS)
    body = replica.model
    device = replica._body.input_device
    rows = np.concatenate([made.text[:, :TOKENS], made.continuation], axis=1)
    batches = torch.from_numpy(rows).long().to(device).split(batch)
    allowed = torch.zeros(body.get_output_embeddings().weight.shape[0], device=device)
    allowed[list(made.suppressed)] = -torch.inf
    sizes = [int(size) for size in blocks.split(",")]
    click.echo(f"{model} on {device}, {prompts} prompts of {TOKENS} + {TOKENS} tokens in batches of {batch}, best of 3")
    click.echo("scheme          FDT  positions read  one pass s  in blocks s  ratio  FDT differs on")
    for scheme in schemes.split(","):
        replica._bench.become(Variant(Plan.uniform(replica.manifest().components, scheme)))
        with torch.inference_mode():
            (whole, whole_seconds, _), (stepped, stepped_seconds, read) = best_of(
                lambda: at_once(body, batches, allowed), lambda: in_blocks(body, batches, allowed, sizes)
            )
        columns = f"{scheme:<14} {whole.mean():>5.1f} {read / prompts:>15.1f}  {whole_seconds:>10.2f}"
        ratio = f"{stepped_seconds / whole_seconds:>5.2f}"
        click.echo(f"{columns}  {stepped_seconds:>11.2f}  {ratio}  {(whole != stepped).sum()} of {prompts}")


Measured = tuple[np.ndarray, float, int]


def best_of(*ways: Callable[[], tuple[Tensor, int]]) -> Iterator[Measured]:
    """FDT, the shortest time and the positions of the continuation that were read, of each way; they take turns."""
    found: list[tuple[np.ndarray, int]] = [(np.empty(0), 0)] * len(ways)
    seconds = [np.inf] * len(ways)
    for _ in range(_ROUNDS):
        for number, way in enumerate(ways):
            started_at = time.perf_counter()
            fdt, read = way()
            found[number] = fdt.cpu().numpy(), read
            seconds[number] = min(seconds[number], time.perf_counter() - started_at)
    return ((fdt, time_taken, read) for (fdt, read), time_taken in zip(found, seconds, strict=True))


def diverged(model: torch.nn.Module, hidden: Tensor, targets: Tensor, allowed: Tensor) -> Tensor:
    choices = (model.lm_head(hidden) + allowed).argmax(dim=-1)
    return choices != targets


def first(found: Tensor, length: int) -> Tensor:
    return torch.where(found.any(dim=1), found.int().argmax(dim=1), length)


def at_once(model: torch.nn.Module, batches: tuple[Tensor, ...], allowed: Tensor) -> tuple[Tensor, int]:
    parts = []
    for batch in batches:
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, TOKENS - 1 : -1]
        parts.append(first(diverged(model, hidden, batch[:, TOKENS:], allowed), TOKENS))
    return torch.cat(parts), sum(len(batch) for batch in batches) * TOKENS


def in_blocks(
    model: torch.nn.Module, batches: tuple[Tensor, ...], allowed: Tensor, sizes: list[int]
) -> tuple[Tensor, int]:
    parts, read = [], 0
    for batch in batches:
        fdt = torch.full((len(batch),), TOKENS, device=batch.device)
        alive = torch.arange(len(batch), device=batch.device)
        cache = DynamicCache()
        # The last token of the prompt predicts the first of the continuation: it goes with the first block.
        model.model(input_ids=batch[:, : TOKENS - 1], past_key_values=cache, use_cache=True)
        at, remaining = 0, list(sizes)
        while at < TOKENS and len(alive):
            size = min(remaining.pop(0) if len(remaining) > 1 else remaining[0], TOKENS - at)
            tokens = batch[alive, TOKENS - 1 + at : TOKENS - 1 + at + size]
            hidden = model.model(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
            found = diverged(model, hidden, batch[alive, TOKENS + at : TOKENS + at + size], allowed)
            read += tokens.numel()
            here = first(found, size)
            fdt[alive] = torch.where(here < size, at + here, fdt[alive])
            going = (here == size).nonzero().squeeze(1)
            if len(going) < len(alive):
                cache.batch_select_indices(going)
                alive = alive[going]
            at += size
        parts.append(fdt)
    return torch.cat(parts), read


if __name__ == "__main__":
    main()
