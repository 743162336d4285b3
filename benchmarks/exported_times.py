"""Whether an exported model of a smaller shape is as fast as a table of products foretells.

    dtmsearch profile MODEL --schemes int8-channel --dtype float32 --out times.json
    python benchmarks/exported_times.py MODEL EXPORT times.json [--dtype float32] [--device cuda]

Both are run by transformers, taking turns; on a GPU as CUDA graphs, so that kernels are timed and not the launching of
each. The table knows products and blocks, not norms and the head; so what is foretold of the export is what MODEL
takes, less the difference that the table has. `--cut` and `--trust-remote-code` of `dtmsearch profile` bring the shapes
of smaller matrices.
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
from dtmsearch.core.times import PICOSECONDS
from dtmsearch.export.smaller_code import CODE_FILE
from dtmsearch.model.modules.block_times import captured, decoding
from dtmsearch.model.modules.discovery import components_of

# Tokens that stand before a decoded one.
BEFORE = 64


def loaded(folder: Path, dtype: str, device: str) -> Any:
    ours = (folder / CODE_FILE).exists()  # code that comes with an export; no other is run
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=ours)
    return model.to(device).eval()


def by_table(model: Any, section: TimesSection) -> tuple[float, float]:
    """Milliseconds of decoding a token and of a prompt that the table has for all layers."""
    table, components = section.table, components_of(model)
    table.require(components, ())
    taken = table.total(components, {})
    assert taken is not None and taken[1] is not None, "models without experts"
    return taken[0] / PICOSECONDS, taken[1] / PICOSECONDS


def timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


class Runs:
    """A model that decodes tokens and reads a prompt, again and again."""

    def __init__(self, model: Any, prompt: torch.Tensor, tokens: int, eager: bool) -> None:
        self._model, self._prompt, self._tokens = model, prompt, tokens
        self._eager = eager or prompt.device.type != "cuda"
        if not self._eager:
            self._prefill = captured(lambda: model(prompt, use_cache=False, logits_to_keep=1), prompt.device)
            self._decode = captured(decoding(model, BEFORE, prompt.device), prompt.device)
            self.once()  # the first run of a graph sends it to the GPU

    def once(self) -> tuple[float, float]:
        """Milliseconds of a token, after the first 64, and of the whole prompt."""
        model, prompt, device = self._model, self._prompt, self._prompt.device
        if not self._eager:
            prefill = timed(self._prefill, device)
            return statistics.median(timed(self._decode, device) for _ in range(self._tokens)), prefill
        prefill = timed(lambda: model(prompt, use_cache=False, logits_to_keep=1), device)
        decode = decoding(model, BEFORE, device)
        return statistics.median(timed(decode, device) for _ in range(self._tokens)), prefill


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("export", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("times", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--eager", is_flag=True, help="on a GPU, too")
@click.option("--rounds", default=9, show_default=True)
@click.option("--tokens", default=32, show_default=True)
@torch.inference_mode()
def main(
    model: Path, export: Path, times: Path, dtype: str, device: str, eager: bool, rounds: int, tokens: int
) -> None:
    section = TimesSection.model_validate(json.loads(times.read_text()))
    both = [loaded(folder, dtype, device) for folder in (model, export)]
    prompt = torch.randint(5, both[0].config.vocab_size, (1, section.prefill_tokens), device=device)
    runs = [Runs(each, prompt, tokens, eager) for each in both]
    found: list[list[tuple[float, float]]] = [[], []]
    for number in range(rounds + 1):
        for at, each in enumerate(runs):
            taken = each.once()
            if number:  # the first is a warm-up
                found[at].append(taken)
    tables = [by_table(each, section) for each in both]
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
