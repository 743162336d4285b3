"""The verbs before a search: `init`, `validate`, `components`, `schemes`, `schema`, `doctor`, `cache`, `completion`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtmsearch.cli.options import NewPath, examples, format_option, set_option, store_option
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import print_text, say, show
from dtmsearch.errors import FAILED

if TYPE_CHECKING:
    from dtmsearch.workflows.engines import EngineName


@cli.command(
    "init",
    epilog=examples(
        "dtmsearch init models/llama > search.yaml",
        "dtmsearch init models/llama --for vllm --bits 5 --out search.yaml",
        "dtmsearch init meta-llama/Llama-2-7b-hf --prompts mine.txt --validation held-out.txt --out search.yaml",
    ),
)
@click.argument("model")
@click.option(
    "--for",
    "engine",
    type=click.Choice(["transformers", "vllm", "llama.cpp"]),
    default="transformers",
    show_default=True,
    help="What shall run the compressed model: decides schemes, ties, and the export.",
)
@click.option(
    "--bits",
    type=click.FloatRange(2, 8),
    help="Most bits per weight on average, scales included; as suits the engine if not given (4.5, for vllm 5).",
)
@click.option("--prompts", help="Text to search with, if not calibration.txt, .jsonl or .parquet, or train.*.")
@click.option("--validation", help="Other text, to judge the plan by, if not validation.* or test.*")
@click.option("--out", type=NewPath(dir_okay=False), help="File to write instead of stdout.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@click.option("--quick", is_flag=True, help="Read headers alone: the model's code is not run, nor the model.")
@click.option("--time", "timed", is_flag=True, help="Time the model, as a dry run does, and write what it will cost.")
def init_verb(
    model: str,
    engine: EngineName,
    bits: float | None,
    prompts: str | None,
    validation: str | None,
    out: Path | None,
    force: bool,
    quick: bool,
    timed: bool,
) -> None:
    """Write a commented search file for MODEL, a folder or a hub id.

    It fits the model, this machine and the engine that shall run the plan. Ends with the commands to go on with.
    """
    from dtmsearch.workflows.engines import WANTED
    from dtmsearch.workflows.init_config import find_texts, propose, proposed_dtype, read_model, this_machine

    if out is not None and out.exists() and not force:
        raise click.UsageError(f"{out} is there already; give another --out, or --force")
    if quick and timed:
        raise click.UsageError("--quick reads headers alone, so it cannot --time the model")
    facts, machine = read_model(model), this_machine()
    if not quick and machine.is_busy:
        say("this machine is busy, so only headers are read; `dtmsearch validate` runs the model's code")
    elif Path(facts.path).is_dir() and not quick:
        say("running the model's code without its weights, some seconds (--quick leaves this out) ...")
        from dtmsearch.core.evaluation import ModelSpec
        from dtmsearch.errors import UserError
        from dtmsearch.workflows.check_search import model_lines, trial_line

        try:
            lines = model_lines(ModelSpec(facts.path))
            lines.append(trial_line(ModelSpec(facts.path, dtype=proposed_dtype(facts, machine)), say))
        except UserError as error:  # such as code of its own, which the search file must allow first
            lines = [f"the model was not looked into: {error}"]
        for line in lines:
            say(line)
    texts = find_texts(prompts, validation, Path.cwd())
    if out is not None and out.absolute().parent != Path.cwd():
        # A search file's paths start at its own folder, those of a command line where the command is given.
        search_text, held_out = (replace(text, name=str(Path(text.name).expanduser().absolute())) for text in texts)
    else:
        search_text, held_out = texts
    file = "search.yaml" if out is None else shlex.quote(str(out))
    proposal = propose(facts, machine, search_text, held_out, engine, bits, None, file)
    missing = {o: t.name for o, t in zip(("--prompts", "--validation"), texts, strict=True) if not t.is_there}
    if timed and missing:
        say("it is not timed, since its texts are not there")
    elif timed:
        cost = _cost_of(proposal.text)
        proposal = propose(facts, machine, search_text, held_out, engine, bits, cost, file)
    if out is None:
        print_text(proposal.text, end="")
    else:
        out.write_text(proposal.text, encoding="utf-8")
        print_text(str(out))
    if proposal.note:
        say(f"note: {proposal.note}")
    for option, path in missing.items():
        say(
            f"there is no text {path!r} yet, which the search file names: bring it, give another {option}, or put a "
            "data set section in its place, of which the file has an example"
        )
    say(f"next:\n  dtmsearch validate {file}\n  dtmsearch run {file}{proposal.options}")
    say(f"  dtmsearch export {proposal.run} {WANTED[engine].export} --out {proposal.run}-{engine}")


def _cost_of(text: str) -> str | None:
    """What a search will cost, or None where it cannot be told, which is said."""
    from dtmsearch.config import parse
    from dtmsearch.console.model_text import estimate_text
    from dtmsearch.workflows.estimate import estimate

    say("timing a replica of the model, which takes a minute or more where others use the machine ...")
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
@click.option("--quick", is_flag=True, help="Do not load the model and run it over a few tokens.")
def validate_verb(file: Path, overrides: tuple[str, ...], quick: bool) -> None:
    """Check a search FILE, its texts and its model, and search nothing.

    Reads the texts and the headers of the weights, and says where its prompts come from, and how many of them repeat a
    text. Last, a model that fits into this machine's free memory is loaded and run over 16 tokens. Exits 2 and says
    what is wrong if anything is.
    """
    from dtmsearch.config import load
    from dtmsearch.workflows.check_search import check_search, trial_line

    search_file = load(file, overrides)
    lines = check_search(search_file)
    print_text(
        f"{file} is a search file: run {search_file.run}, {search_file.search.strategy} by {search_file.search.rank_by}"
    )
    for line in lines:
        print_text(line)
    if not quick:
        print_text(trial_line(search_file.model_spec, say))


@cli.command(
    "components",
    epilog=examples(
        "dtmsearch components models/llama",
        "dtmsearch components Qwen3-30B/config.json --format json",
        "dtmsearch components model.Q8_0.gguf --tflops 30 --gpu-gb 24",
        "dtmsearch components Llama-70B/config.json --as 8xH100",
    ),
)
@click.argument("model")
@click.option("--trust-remote-code", is_flag=True, help="Let Python code that comes with the model run here.")
@click.option(
    "--as",
    "name",
    metavar="NxGPU",
    help="A machine, such as 8xH100: its GPUs, their memory and a rate by their peak.",
)
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    show_default="240",
    help="10^12 operations a second of the machine that a search is to run on, in forward and backward passes; in "
    "forward passes alone of dense models 2.5 times as many. 240: one H200, as measured on a Llama-2-7B shape.",
)
@click.option(
    "--gpu-gb",
    type=click.FloatRange(min=0, min_open=True),
    show_default="80",
    help="Memory of one of its GPUs, in GB.",
)
@format_option("table", "json")
def components_verb(
    model: str, trust_remote_code: bool, name: str | None, tflops: float | None, gpu_gb: float | None, form: str
) -> None:
    """Say what a search of MODEL chooses among, what it leaves out, and why.

    MODEL is a folder, a config.json alone, or a hub id; weights are not needed. The model's own code is run without
    values to see what it multiplies tokens with.
    """
    from dtmsearch.console.model_text import model_components_text
    from dtmsearch.workflows.list_components import Machine, list_components

    machine = Machine.named(name) if name else Machine()
    machine = replace(machine, gpu_gb=gpu_gb or machine.gpu_gb, tflops=tflops or machine.tflops)
    show(list_components(model, trust_remote_code, machine), form, model_components_text)


@cli.command(
    "profile",
    epilog=examples(
        "dtmsearch profile models/llama --schemes int8-channel,int4-g128 --out times.json",
        "dtmsearch profile models/llama --schemes dense --cut channels-0.25-wanda,channels-0.5-wanda --out times.json",
        "dtmsearch profile config.json --schemes w8a8,nf4 --device cuda --prefill-tokens 2048 --out times.json",
    ),
)
@click.argument("model")
@click.option("--schemes", required=True, metavar="A,B,...", help="The schemes to time, beside dense.")
@click.option("--cut", default="", metavar="A,B,...", help="Widths whose smaller matrices are timed, too (search.cut).")
@click.option("--out", type=NewPath(dir_okay=False), required=True, help="File to write: what search.times reads.")
@click.option("--device", default="", help="cpu, cuda, ...  [default: a GPU where there is one]")
@click.option(
    "--dtype", type=click.Choice(("bfloat16", "float16", "float32")), default="bfloat16", show_default=True,
    help="Of inputs, and of weights that stay as they are."
)  # fmt: skip
@click.option(
    "--prefill-tokens", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of the prompt."
)
@click.option("--trust-remote-code", is_flag=True, help="Let Python code that comes with the model run here.")
@format_option("table", "json")
def profile_verb(
    model: str,
    schemes: str,
    cut: str,
    out: Path,
    device: str,
    dtype: str,
    prefill_tokens: int,
    trust_remote_code: bool,
    form: str,
) -> None:
    """Time MODEL's matrices under schemes, and its blocks, for budgets in milliseconds.

    By PyTorch's own kernels and bitsandbytes' on this machine; weights are not read. A serving engine has kernels of
    its own: where you serve with one, put its figures into the file.
    """
    import json

    from dtmsearch.console.model_text import profile_text
    from dtmsearch.workflows.profile import profile

    names = [name.strip() for name in schemes.split(",")]
    cuts = [name.strip() for name in cut.split(",") if name.strip()]
    found = profile(model, names, device, dtype, prefill_tokens, trust_remote_code, say, cuts)
    out.write_text(json.dumps(found.content(), indent=1) + "\n", encoding="utf-8")
    show(found, form, profile_text)


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
    from dtmsearch.console.model_text import schemes_text
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
    from dtmsearch.console.model_text import findings_text
    from dtmsearch.workflows.doctor import examine

    findings = examine(store)
    show(findings, form, findings_text)
    return FAILED if any(f.status == "missing" for f in findings) else 0


@cli.command(
    "cache", epilog=examples("dtmsearch cache", "dtmsearch cache --remove", "dtmsearch cache --remove --older-than 7")
)
@click.option("--remove", "removes", is_flag=True, help="Remove what is listed, but for models that are in use.")
@click.option(
    "--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Only models that were not used for so long."
)
@format_option("table", "json")
def cache_verb(removes: bool, older_than: float | None, form: str) -> None:
    """List the models that this machine keeps unquantized, or remove them.

    A search of a model that comes quantized writes it once in 16 or 32 bits. What is not used for 30 days is removed
    when another is written (DTMSEARCH_CACHE_DAYS), and what was not used for longest where DTMSEARCH_CACHE_GB says how
    much may be kept. DTMSEARCH_CACHE says where.
    """
    from dtmsearch.console.model_text import cache_text
    from dtmsearch.workflows.kept_models import kept_models, remove_kept

    kept = kept_models(older_than or 0.0)
    if removes:
        removed = remove_kept(kept)
        say(f"removed {len(removed)} of {len(kept.models)}, {sum(m.num_bytes for m in removed) / 1e9:.2f} GB")
        kept = kept_models()
    show(kept, form, cache_text, lambda found: found.models)
