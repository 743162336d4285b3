"""The verbs before a search: `init`, `validate`, `components`, `schemes`, `schema`, `doctor`, `completion`."""

from __future__ import annotations

from pathlib import Path

import click

from dtmsearch.cli.options import NewPath, examples, format_option, set_option, store_option
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import print_text, say, show
from dtmsearch.errors import FAILED


@cli.command(
    "init",
    epilog=examples(
        "dtmsearch init models/llama > search.yaml",
        "dtmsearch init meta-llama/Llama-2-7b-hf --prompts mine.txt --validation held-out.txt --out search.yaml",
    ),
)
@click.argument("model")
@click.option("--prompts", default="calibration.txt", show_default=True, help="Text to search with.")
@click.option("--validation", default="validation.txt", show_default=True, help="Other text, to judge the plan by.")
@click.option("--out", type=NewPath(dir_okay=False), help="File to write instead of stdout.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def init_verb(model: str, prompts: str, validation: str, out: Path | None, force: bool) -> None:
    """Write a commented search file for MODEL, a folder or a hub id.

    It fits the model and this machine, and says what the search will cost if its texts are there.
    """
    from dtmsearch.workflows.init_config import propose, read_model, this_machine

    if out is not None and out.exists() and not force:
        raise click.UsageError(f"{out} is there already; give another --out, or --force")
    facts, machine = read_model(model), this_machine()
    if Path(facts.path).is_dir():
        from dtmsearch.core.evaluation import ModelSpec
        from dtmsearch.errors import UserError
        from dtmsearch.workflows.check_search import model_lines

        try:
            lines = model_lines(ModelSpec(facts.path))
        except UserError as error:  # such as code of its own, which the search file must allow first
            lines = [f"the model was not looked into: {error}"]
        for line in lines:
            say(line)
    texts = {"--prompts": prompts, "--validation": validation}
    missing = {option: path for option, path in texts.items() if not Path(path).is_file()}
    if out is not None and out.absolute().parent != Path.cwd():
        # A search file's paths start at its own folder, those of a command line where the command is given.
        prompts, validation = (str(Path(path).expanduser().absolute()) for path in (prompts, validation))
    text = propose(facts, machine, prompts, validation)
    if not missing:
        text = propose(facts, machine, prompts, validation, _cost_of(text))
    if out is None:
        print_text(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        print_text(str(out))
    for option, path in missing.items():
        say(f"there is no text {path!r} yet, which the search file names: bring it, or give another {option}")


def _cost_of(text: str) -> str | None:
    """What a search will cost, or None where it cannot be told, which is said."""
    from dtmsearch.config import parse
    from dtmsearch.console.text import estimate_text
    from dtmsearch.workflows.estimate import estimate

    say("timing a replica of the model ...")
    try:
        return estimate_text(estimate(parse(text, "the new search file", Path.cwd())))
    except (ValueError, RuntimeError) as error:
        say(f"its cost could not be told: {error}")
        return None


@cli.command(
    "validate", epilog=examples("dtmsearch validate search.yaml", "dtmsearch validate search.yaml --set seed=2")
)
@click.argument("file", type=click.Path(path_type=Path))
@set_option
def validate_verb(file: Path, overrides: tuple[str, ...]) -> None:
    """Check a search FILE, its texts and its model's folder, and run nothing.

    Reads the texts and the headers of the weights, and says where its prompts come from, and how many of them repeat a
    text. Exits 2 and says what is wrong if anything is.
    """
    from dtmsearch.config import load
    from dtmsearch.workflows.check_search import check_search

    search_file = load(file, overrides)
    lines = check_search(search_file)
    print_text(
        f"{file} is a search file: run {search_file.run}, {search_file.search.strategy} by {search_file.search.rank_by}"
    )
    for line in lines:
        print_text(line)


@cli.command(
    "components",
    epilog=examples(
        "dtmsearch components models/llama",
        "dtmsearch components Qwen3-30B/config.json --format json",
    ),
)
@click.argument("model")
@click.option("--trust-remote-code", is_flag=True, help="Let Python code that comes with the model run here.")
@format_option("table", "json")
def components_verb(model: str, trust_remote_code: bool, form: str) -> None:
    """Say what a search of MODEL chooses among, what it leaves out, and why.

    MODEL is a folder, a config.json alone, or a hub id; weights are not needed. The model's own code is run without
    values to see what it multiplies tokens with.
    """
    from dtmsearch.console.text import model_components_text
    from dtmsearch.workflows.list_components import list_components

    show(list_components(model, trust_remote_code), form, model_components_text)


@cli.command(
    "schemes",
    epilog=examples(
        "dtmsearch schemes",
        "dtmsearch schemes int3-g64-asym gptq-int4-g128 --format json",
        "dtmsearch schemes nf4 --shape 576x1536",
    ),
)
@click.argument("names", metavar="[SCHEME]...", nargs=-1)
@click.option(
    "--shape", metavar="ROWSxCOLS", default="4096x4096", show_default=True, help="The matrix that is counted."
)
@format_option("table", "json")
def schemes_verb(names: tuple[str, ...], shape: str, form: str) -> None:
    """List schemes: bits per weight, what they need, and which export and engine holds them.

    One of each family, or those named. Bits count codes, scales, zero points and masks, in a model of 16 bits whose
    scales have 16, too.
    """
    from dtmsearch.console.text import schemes_text
    from dtmsearch.core.holders import examples as known
    from dtmsearch.core.holders import scheme_facts

    rows, times, cols = shape.partition("x")
    if not (times and rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise click.UsageError(f"--shape {shape!r}: give rows and columns, such as 4096x4096")
    facts = [scheme_facts(name, (int(rows), int(cols))) for name in names or known()]
    show(facts, form, schemes_text)


@cli.command("schema", epilog=examples("dtmsearch schema > search-file.schema.json"))
def schema_verb() -> None:
    """Print the JSON schema of the search file.

    For editors: put "# yaml-language-server: $schema=search-file.schema.json" on the first line of a search file.
    """
    from dtmsearch.config import json_schema

    print_text(json_schema().rstrip("\n"))


@cli.command("completion", epilog=examples('eval "$(dtmsearch completion bash)"', "dtmsearch completion fish | source"))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_verb(shell: str) -> None:
    """Print the script that completes this command's words in a SHELL."""
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    assert completion is not None
    print_text(completion(cli, {}, "dtmsearch", "_DTMSEARCH_COMPLETE").source())


@cli.command("doctor", epilog=examples("dtmsearch doctor", "dtmsearch doctor --store s3://bucket/store --format json"))
@store_option
@format_option("table", "json")
def doctor_verb(store: str, form: str) -> int:
    """Say what this machine has and lacks.

    Exits 1 if something that a search needs is missing.
    """
    from dtmsearch.console.text import findings_text
    from dtmsearch.workflows.doctor import examine

    findings = examine(store)
    show(findings, form, findings_text)
    return FAILED if any(f.status == "missing" for f in findings) else 0
