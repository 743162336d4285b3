"""The verbs `compare` and `serve-check`: two models, whatever holds them; a folder in the engine that serves it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from dtmsearch.cli.driving import observing
from dtmsearch.cli.options import NewPath, check_store, examples, format_option, store_option
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import say, show
from dtmsearch.errors import FAILED, STOPPED


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
            from dtmsearch.workflows.compare import compare_by  # which loads torch
            from dtmsearch.workflows.compared_sides import CompareSettings

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


@cli.command(
    "serve-check",
    epilog=examples(
        "dtmsearch serve-check my-model-int4 --engine vllm --python ~/vllm-env/bin/python",
        "dtmsearch serve-check my-model-int4 --text validation.txt --count 32",
        "dtmsearch serve-check my-model-fp8 --dtype bfloat16 --engine-args '--gpu-memory-utilization 0.5'",
        "dtmsearch serve-check my-model-gguf --engine llama.cpp --program ~/llama.cpp/build/bin/llama-server",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    *("--engine", "engine"),
    type=click.Choice(("vllm", "sglang", "llama.cpp")),
    default="vllm",
    show_default=True,
    help="What serves it.",
)
@click.option(
    "--python",
    metavar="PATH",
    help="Python of the environment that has the engine, if not this one.",
)
@click.option("--program", metavar="PATH", default="", help="llama.cpp's llama-server, if not the one on the PATH.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE",
    help="Measure both models by transformers on windows of this text, in the place of what is recorded; repeatable.",
)
@click.option("--base", help="The base model, if not the one that the folder's README names.")
@click.option("--count", type=click.IntRange(min=1), default=64, show_default=True, help="Prompts at most.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=100, show_default=True, help="Of --text.")
@click.option("--continuation-tokens", type=click.IntRange(min=1), default=100, show_default=True, help="Of --text.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the windows of --text.")
@click.option(
    "--dtype",
    type=click.Choice(("auto", "bfloat16", "float16", "float32")),
    default="auto",
    show_default=True,
    help="What the engine computes in; auto: the folder's dtype, bfloat16 where that has 32 bits; of llama.cpp, what "
    "the base model's file holds (auto: the measurement's).",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the engine, if not one that is free.")
@click.option(
    "--engine-args", metavar="TEXT", help="Options of the engine's own, in the place of the usual (--enforce-eager)."
)
@click.option(
    "--start-timeout", type=click.FloatRange(min=1), default=900.0, show_default=True, help="Seconds until it answers."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=300.0, show_default=True, help="Seconds for one answer."
)
@click.option("--threads", type=click.IntRange(1, 256), default=4, show_default=True, help="Questions at a time.")
@click.option("--examples", type=click.IntRange(min=0), default=4, show_default=True, help="Prompts to write out.")
@click.option("--quiet", is_flag=True, help="No progress.")
@store_option
@format_option("table", "json")
def serve_check_verb(
    folder: Path,
    texts: tuple[str, ...],
    base: str | None,
    dtype: str,
    python: str | None,
    program: str,
    port: int | None,
    engine_args: str | None,
    start_timeout: float,
    timeout: float,
    quiet: bool,
    store: str,
    form: str,
    **settings: Any,
) -> int:
    """Start an engine on the exported folder DIR, and see whether it serves what was measured.

    Its greedy continuations of the recorded prompts, and its choice at each of their tokens, are held against what the
    store has recorded of the plan, and against how far the same engine moves the base model. The engine is ended in
    every case. Exits 1 unless the folder is served as measured.
    """
    from dtmsearch.config.texts import documents_of
    from dtmsearch.console.comparison_text import serve_check_text, serve_check_values
    from dtmsearch.workflows.interrupts import interruptible

    os.environ.setdefault("TQDM_DISABLE", "1")
    if not texts:
        check_store(store)
    options = None if engine_args is None else tuple(shlex.split(engine_args))
    documents = [document for path in texts for document in documents_of(Path(path))] if texts else None
    try:
        with interruptible(), observing(quiet) as observer:
            observer.on_stage("starting")
            from dtmsearch.workflows.engine_process import EngineSettings
            from dtmsearch.workflows.serve_check import ServeSettings, serve_check_by  # which loads torch

            start = EngineSettings(python or sys.executable, port or 0, start_timeout, options, program)
            own = "" if dtype == "auto" else dtype
            asked = ServeSettings(start=start, dtype=own, timeout_seconds=timeout, **settings)
            found = serve_check_by(folder, store, documents, base, asked, observer.on_stage)
    except KeyboardInterrupt:
        say("stopped; the engine was ended")
        raise click.exceptions.Exit(STOPPED) from None
    show(found, form, serve_check_text, serve_check_values)
    return 0 if found.outcome == "served as measured" else FAILED
