"""The verb `compare`: two models, whatever holds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from dtmsearch.cli.driving import observing
from dtmsearch.cli.options import NewPath, examples, format_option
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import say, show
from dtmsearch.errors import STOPPED


@cli.command(
    "compare",
    epilog=examples(
        "dtmsearch compare my-model my-model-int4 --text validation.txt",
        "dtmsearch compare my-model my-model.Q4_K_M.gguf --text validation.txt --out compared.html",
        "dtmsearch compare my-model http://localhost:8000 --text validation.txt",
        "dtmsearch compare http://localhost:8000 http://localhost:8001 --text chat.txt --tokenizer my-model",
    ),
)
@click.argument("base")
@click.argument("other")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Text that prompts are cut from: plain, .jsonl or .parquet; repeatable.",
)
@click.option("--count", type=click.IntRange(min=1), default=64, show_default=True, help="Prompts.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=100, show_default=True, help="Tokens of each prompt."
)
@click.option(
    "--continuation-tokens",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Tokens that BASE goes on with, at each of which OTHER is looked at.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the prompts.")
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    default="bfloat16",
    show_default=True,
    help="What models on this machine compute in.",
)
@click.option("--attention", default="sdpa", show_default=True, help="transformers' attention implementation.")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Most tokens of one forward batch.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that comes with a model, with all your rights."
)
@click.option("--tokenizer", metavar="DIR", help="Folder of the tokenizer, where both models are served.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds for a server's answer."
)
@click.option(
    "--top",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="Likeliest tokens that a server is asked for at each position; most give 20 at most.",
)
@click.option(
    "--threads", type=click.IntRange(1, 256), default=4, show_default=True, help="Questions to a server at a time."
)
@click.option(
    "--examples", type=click.IntRange(min=0), default=4, show_default=True, help="Most divergent prompts to write out."
)
@click.option("--out", type=NewPath(dir_okay=False), help="Write a page of HTML there, too.")
@click.option("--quiet", is_flag=True, help="No progress.")
@format_option("table", "json")
def compare_verb(
    base: str,
    other: str,
    texts: tuple[str, ...],
    timeout: float,
    batch_tokens: int | None,
    out: Path | None,
    quiet: bool,
    form: str,
    **settings: Any,
) -> None:
    """Compare OTHER with BASE: FDT, SDT, DPPL, PPL, KL.

    Each is a folder that transformers loads, quantized or not, a hub id, a GGUF file, or the URL of a server of the
    OpenAI kind (URL#MODEL where it has several; OPENAI_API_KEY lets us in). BASE's greedy continuations are what OTHER
    is measured against. No search, no store.
    """
    from dtmsearch.config.texts import documents_of
    from dtmsearch.console.comparison_text import comparison_text, comparison_values
    from dtmsearch.workflows.interrupts import interruptible

    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries would stand among our own lines
    if out is not None:  # before anything is measured, as it needs packages of its own
        from dtmsearch.report.model_page import write_model_comparison

    documents = [document for path in texts for document in documents_of(Path(path))]
    try:
        with interruptible(), observing(quiet) as observer:
            observer.on_stage("starting")
            from dtmsearch.workflows.compare import CompareSettings, compare_by  # which loads torch

            asked = CompareSettings(timeout_seconds=timeout, batch_tokens=batch_tokens or 0, **settings)
            found = compare_by(base, other, documents, asked, observer.on_stage)
    except KeyboardInterrupt:
        say("stopped; nothing was written")
        raise click.exceptions.Exit(STOPPED) from None
    if out is not None:
        write_model_comparison(found, out)
    show(found, form, comparison_text, comparison_values)
    if out is not None:
        say(f"the page is {out}")
