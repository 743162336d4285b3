"""Whether an exported model of a smaller shape is as fast as a table of products foretells.

    dtmsearch profile MODEL --schemes int8-channel --dtype float32 --out times.json
    python benchmarks/exported_times.py MODEL EXPORT times.json [--dtype float32] [--device cuda]

Both are run by transformers, taking turns. The table knows products alone, not norms, attention, or the head; so what
is foretold of the export is what MODEL takes, less the difference of their products.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM

from dtmsearch.config.stop_section import TimesSection
from dtmsearch.export.smaller_code import CODE_FILE


def loaded(folder: Path, dtype: str, device: str) -> Any:
    ours = (folder / CODE_FILE).exists()  # code that comes with an export; no other is run
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=ours)
    return model.to(device).eval()


def products(model: Any, section: TimesSection) -> tuple[float, float]:
    """Milliseconds of decoding a token and of a prompt that the table has for the matrices of all layers."""
    known = {(r.outputs, r.inputs): (r.decode_ms, r.prefill_ms) for r in section.rows if r.scheme == "dense"}
    shapes = [
        tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    if missing := sorted({shape for shape in shapes if shape not in known}):
        raise click.ClickException(f"the table has no dense row for {missing[0]}: profile a model of such shapes, too")
    return sum(known[shape][0] for shape in shapes), sum(known[shape][1] for shape in shapes)


def timed(work: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


@torch.inference_mode()
def once(model: Any, prompt: torch.Tensor, tokens: int, device: str) -> tuple[float, float]:
    """Milliseconds of a token, after the first 64, and of the whole prompt."""
    prefill = timed(lambda: model(prompt, use_cache=False, logits_to_keep=1), device)
    state = model(prompt[:, :64], use_cache=True, logits_to_keep=1)
    token, cache = state.logits[:, -1].argmax(-1, keepdim=True), state.past_key_values
    taken = []
    for _ in range(tokens):
        taken.append(timed(lambda: model(token, past_key_values=cache, use_cache=True), device))
    return statistics.median(taken), prefill


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("export", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("times", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--tokens", default=32, show_default=True)
def main(model: Path, export: Path, times: Path, dtype: str, device: str, rounds: int, tokens: int) -> None:
    section = TimesSection.model_validate(json.loads(times.read_text()))
    both = [loaded(folder, dtype, device) for folder in (model, export)]
    prompt = torch.randint(5, both[0].config.vocab_size, (1, section.prefill_tokens), device=device)
    found: list[list[tuple[float, float]]] = [[], []]
    for number in range(rounds + 1):
        for at, each in enumerate(both):
            taken = once(each, prompt, tokens, device)
            if number:  # the first is a warm-up
                found[at].append(taken)
    tables = [products(each, section) for each in both]
    for at, what in enumerate(("decode, ms a token", f"prefill, ms of {section.prefill_tokens} tokens")):
        base, ours = (statistics.median(round_[at] for round_ in each) for each in found)
        saved = tables[0][at] - tables[1][at]
        foretold = base - saved
        click.echo(
            f"{what:28} model {base:8.3f}  export {ours:8.3f}  foretold {foretold:8.3f}  measured/foretold "
            f"{ours / foretold:.3f}   by the table {tables[0][at]:.3f} and {tables[1][at]:.3f}"
        )


if __name__ == "__main__":
    main()
