"""The command line: one verb of `dtmsearch` to one function. Data goes to stdout, everything else to stderr.

Knows words, options and exit codes, and nothing of how a search works. What a verb needs is imported inside it, so
that `--help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dtmsearch import __version__

if TYPE_CHECKING:
    from dtmsearch.results.store import ResultStore
    from dtmsearch.results.summary import RunSummary
    from dtmsearch.run import Where

_DEFAULT_STORE = "dtm-store"
_FAILED, _USAGE, _STOPPED, _STORE_UNREADABLE, _CLUSTER_UNREACHABLE = 1, 2, 3, 4, 5
# Exceptions of ours (and Python's own) that say all a user needs, by name, because naming them must not import their
# modules; the nearest class counts. Any other exception is a fault of ours, whose traceback is kept.
_EXIT_CODES = {
    "ValueError": _USAGE,
    "ClusterLost": _STOPPED,
    "ClusterUnreachable": _CLUSTER_UNREACHABLE,
    "ExportFailed": _FAILED,
    "JobEnded": _STOPPED,
    "RecoveryDiverged": _STOPPED,
    "ReplicasFailed": _FAILED,
    "RunLocked": _FAILED,
    "SearchFailed": _FAILED,
    "SearchStopped": _STOPPED,
    "StoreError": _STORE_UNREADABLE,
    "StoreFull": _STOPPED,
}

# What `dtmsearch.export.formats` can write, by name, because naming them must not load torch; a test holds them equal.
EXPORT_FORMATS = ("json", "dense", "bitsandbytes", "compressed-tensors", "gguf-recipe", "evopress")

_LOG_FORMAT: ContextVar[str] = ContextVar("log_format", default="text")
Verb = TypeVar("Verb", bound=Callable[..., Any])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done or already complete, 1 failed, 2 usage, 3 stopped and
    resumable, 4 store unreadable, 5 cluster unreachable."""
    _LOG_FORMAT.set("text")
    try:
        return cli.main(arguments, prog_name="dtmsearch", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        return _FAILED
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    code = next((_EXIT_CODES[cls.__name__] for cls in type(error).__mro__ if _is_ours(cls)), None)
    if code is not None:
        say(f"error: {error}")
        return code
    with tempfile.NamedTemporaryFile("w", prefix="dtmsearch-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    first_line = next(iter(str(error).splitlines()), "")
    say(f"error: {type(error).__name__}: {first_line}\nthe traceback is in {log.name}")
    return _FAILED


def _is_ours(cls: type) -> bool:
    return cls.__name__ in _EXIT_CODES and cls.__module__.partition(".")[0] in ("builtins", "dtmsearch")


def say(text: str) -> None:
    """A line for the person, never for a program that reads our output."""
    if _LOG_FORMAT.get() == "json":
        import logging

        from dtmsearch.logs import json_lines

        with json_lines(sys.stderr):
            logging.getLogger("dtmsearch").warning(text)
    else:
        click.echo(text, err=True)


def store_option(verb: Verb) -> Verb:
    return click.option(
        "--store",
        default=_DEFAULT_STORE,
        show_default=True,
        envvar="DTMSEARCH_STORE",
        show_envvar=True,
        help="Folder or bucket URL (s3://, gs://) that holds runs and evaluations.",
    )(verb)


def complete_run(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of the store's runs, for a shell that completes RUN."""
    try:
        runs = _open(context.params.get("store") or os.environ.get("DTMSEARCH_STORE", _DEFAULT_STORE)).runs()
    except Exception:  # a shell asks in the middle of a word: nobody reads errors there
        return []
    return [record.run for record in runs if record.run.startswith(incomplete)]


def format_option(*choices: str) -> Callable[[Verb], Verb]:
    return click.option(
        "--format",
        "form",
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        help="Form of the output.",
    )


def where_options(verb: Verb) -> Verb:
    """Where a search runs; none of it changes what the search finds."""
    options = (
        click.option("--address", help="Address of a Ray cluster; without it, Ray starts on this machine."),
        click.option("--replicas", type=click.IntRange(min=1), help="Copies of the model that measure side by side."),
        click.option("--gpus-per-replica", type=click.FloatRange(min=0), help="GPUs of each, such as 0.5, 1 or 4."),
        click.option("--cpus-per-replica", type=click.FloatRange(min=0.01), help="Processors of each."),
        click.option("--batch-tokens", type=click.IntRange(min=1), help="Most tokens of one forward batch."),
        click.option("--quiet", is_flag=True, help="No progress."),
        click.option(
            "--log-format",
            type=click.Choice(("text", "json")),
            default="text",
            show_default=True,
            expose_value=False,
            callback=lambda _context, _option, value: _LOG_FORMAT.set(value),
            help="Form of stderr: for a person, or a JSON object a line that names run and request.",
        ),
    )
    for option in reversed(options):
        verb = option(verb)
    return verb


def set_option(verb: Verb) -> Verb:
    return click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the search file; repeatable."
    )(verb)


def examples(*lines: str) -> str:
    """The end of a verb's help: commands to paste, each on its own line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=examples(
        "dtmsearch demo",
        "dtmsearch run search.yaml --set search.width=4",
        "dtmsearch resume my-run",
        'dtmsearch query "SELECT run, status FROM runs"',
    ),
)
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """Search for what a language model can spare, judged by where its text first diverges."""


@cli.command("demo", epilog=examples("dtmsearch demo", "dtmsearch demo --store /tmp/store --replicas 2"))
@store_option
@where_options
@format_option("table", "json")
def demo_verb(store: str, form: str, quiet: bool, **where: Any) -> None:
    """Search the small model in the package.

    From start to validated plan, in about a minute.
    """
    from dtmsearch.run import demo
    from dtmsearch.summaries import DEMO_QUERIES

    with _resumable("dtmsearch demo" + _store_argument(store)), _watching(quiet) as observer:
        summary = demo(store, _where(**where), observer)
    _show_run(summary, store, form)
    if form == "table":
        _print("\nAsk its tables:")
        for query in DEMO_QUERIES:
            _print("  " + _query_command(query.format(run=summary.run), store))
        _print(f"\nThe store is {_absolute(store)}")


@cli.command(
    "run",
    epilog=examples(
        "dtmsearch run search.yaml",
        "dtmsearch run search.yaml --dry-run",
        "dtmsearch run search.yaml --set search.width=4 --set run=wider",
        "dtmsearch run search.yaml --address 10.0.0.5:6379 --replicas 8 --store s3://bucket/store",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@store_option
@where_options
@click.option("--fused", is_flag=True, help="Tie q, k, v and gate, up, as fused runtimes demand: search.fused=true.")
@click.option("--dry-run", is_flag=True, help="Say what the search will cost, and run nothing.")
@format_option("table", "json")
def run_verb(
    file: Path, overrides: tuple[str, ...], store: str, fused: bool, dry_run: bool, form: str, quiet: bool, **where: Any
) -> None:
    """Start or continue the search in FILE."""
    from dtmsearch.config import load
    from dtmsearch.run import run

    search_file = load(file, (*overrides, "search.fused=true") if fused else overrides)
    if dry_run:
        from dtmsearch.estimate import estimate
        from dtmsearch.summaries import estimate_text

        _show(estimate(search_file, _where(**where)), form, estimate_text)
        return
    with _resumable(_resume_command(search_file.run, store)), _watching(quiet) as observer:
        summary = run(search_file, store, _where(**where), observer)
    _show_run(summary, store, form)


@cli.command(
    "init",
    epilog=examples(
        "dtmsearch init models/llama --prompts calibration.txt --validation validation.txt",
        "dtmsearch init meta-llama/Llama-2-7b-hf --out search.yaml",
    ),
)
@click.argument("model")
@click.option("--prompts", default="calibration.txt", show_default=True, help="Text to search with.")
@click.option("--validation", default="validation.txt", show_default=True, help="Other text, to judge the plan by.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The search file  [default: MODEL.yaml]")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def init_verb(model: str, prompts: str, validation: str, out: Path | None, force: bool) -> None:
    """Write a commented search file for MODEL, a folder or a hub id.

    It fits the model and this machine, and says what the search will cost if its texts are there.
    """
    from dtmsearch.proposal import propose, read_model, run_name, this_machine

    facts, machine = read_model(model), this_machine()
    path = out or Path(f"{run_name(facts.path)}.yaml")
    if path.exists() and not force:
        raise click.UsageError(f"{path} is there already; give another --out, or --force")
    text = propose(facts, machine, prompts, validation)
    if Path(prompts).is_file() and Path(validation).is_file():
        text = propose(facts, machine, prompts, validation, _cost_of(text))
    path.write_text(text, encoding="utf-8")
    _print(str(path))


def _cost_of(text: str) -> str | None:
    """What a search will cost, or None where it cannot be told, which is said."""
    from dtmsearch.config import parse
    from dtmsearch.estimate import estimate
    from dtmsearch.summaries import estimate_text

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

    Exits 2 and says what is wrong if anything is.
    """
    from dtmsearch.config import load
    from dtmsearch.texts import check_model, check_readable

    search_file = load(file, overrides)
    check_readable(search_file)
    check_model(search_file)
    _print(
        f"{file} is a search file: run {search_file.run}, {search_file.search.strategy} by {search_file.search.rank_by}"
    )


@cli.command("schema", epilog=examples("dtmsearch schema > search-file.schema.json"))
def schema_verb() -> None:
    """Print the JSON schema of the search file.

    For editors: put "# yaml-language-server: $schema=search-file.schema.json" on the first line of a search file.
    """
    from dtmsearch.config import json_schema

    _print(json_schema().rstrip("\n"))


@cli.command("completion", epilog=examples('eval "$(dtmsearch completion bash)"', "dtmsearch completion fish | source"))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_verb(shell: str) -> None:
    """Print the script that completes this command's words in a SHELL."""
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    assert completion is not None
    _print(completion(cli, {}, "dtmsearch", "_DTMSEARCH_COMPLETE").source())


@cli.command("resume", epilog=examples("dtmsearch resume my-run", "dtmsearch resume my-run --replicas 4"))
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@store_option
@where_options
@format_option("table", "json")
def resume_verb(name: str, store: str, form: str, quiet: bool, **where: Any) -> None:
    """Continue a stopped or killed run.

    Nothing that is recorded is measured again.
    """
    from dtmsearch.run import resume

    with _resumable(_resume_command(name, store)), _watching(quiet) as observer:
        summary = resume(name, store, _where(**where), observer)
    _show_run(summary, store, form)


@cli.command(
    "submit",
    epilog=examples(
        "dtmsearch submit search.yaml --address http://127.0.0.1:8265 --store s3://bucket/store --follow",
        "dtmsearch submit search.yaml --address http://127.0.0.1:8265 --replicas 8 --gpus-per-replica 1",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--address",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    show_envvar=True,
    help="The cluster's dashboard, such as http://127.0.0.1:8265.",
)
@set_option
@store_option
@click.option("--follow/--detach", default=False, help="Show what the search says until it ends, or return at once.")
@click.option(
    "--pins",
    type=click.Choice(("check", "install", "none")),
    default="check",
    show_default=True,
    help="This machine's package versions: demand them of the nodes, have them installed there, or neither.",
)
@click.option("--replicas", type=click.IntRange(min=1), help="Copies of the model that measure side by side.")
@click.option("--gpus-per-replica", type=click.FloatRange(min=0), help="GPUs of each, such as 0.5, 1 or 4.")
@click.option("--cpus-per-replica", type=click.FloatRange(min=0.01), help="Processors of each.")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Most tokens of one forward batch.")
@format_option("table", "json")
def submit_verb(
    file: Path, overrides: tuple[str, ...], address: str, store: str, follow: bool, pins: Any, form: str, **where: Any
) -> int:
    """Run the search in FILE as a job of a Ray cluster.

    Attaches to the run's job if one is at work; continues the run if it ended anywhere. Weights are not sent.
    """
    from dtmsearch.submission import submit

    options = [part for name, value in where.items() if value for part in (_option(name), f"{value:g}")]
    submission = submit(file, overrides, address, store, options, pins)
    for note in submission.notes:
        say(f"note: {note}")
    job, run = submission.job, submission.run
    say(f"{'attached to' if job.attached else 'submitted'} job {job.id}; it goes on without this command")
    if follow:
        return _follow(address, job.id)
    if form == "json":
        _show({"run": run, "job": job.id, "attached": job.attached, "store": submission.store}, form, str)
    else:
        _print(job.id)
        argument = _store_argument(submission.store)
        say(f"to see how far it is: dtmsearch status {run}{argument}\nto stop it: dtmsearch stop {run}{argument}")
    return 0


def _follow(address: str, job_id: str) -> int:
    from dtmsearch.cluster.submit import Jobs

    try:
        return Jobs(address).follow(job_id, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        say(f"no longer following; job {job_id} goes on")
        return 0


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@cli.command(
    "sweep",
    epilog=examples(
        "dtmsearch sweep configs/llama-demo-sweep.yaml",
        "dtmsearch sweep sweep.yaml --dry-run",
        "dtmsearch sweep sweep.yaml --address 10.0.0.5:6379 --replicas 4 --store s3://bucket/store",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@store_option
@where_options
@click.option("--dry-run", is_flag=True, help="List the searches, and run nothing.")
@format_option("table", "json")
def sweep_verb(
    file: Path, overrides: tuple[str, ...], store: str, dry_run: bool, form: str, quiet: bool, **where: Any
) -> int:
    """Run the many searches of a sweep FILE side by side.

    Run it again and it goes on where it was; --replicas is for each search.
    """
    from dtmsearch.sweepfile import load_sweep

    plan, files = load_sweep(file, overrides)
    if dry_run:
        _show({"sweep": plan.sweep, "runs": [f.run for f in files]}, form, lambda v: "\n".join(v["runs"]))
        return 0
    from dtmsearch.cluster.sweep import sweep
    from dtmsearch.plans.pareto import Race
    from dtmsearch.summaries import sweep_text

    rules = plan.stop_dominated
    race = None if rules is None else Race(rules.margin, rules.patience)
    with _resumable("run the same command again"):
        outcome = sweep(files, store, _where(**where), race, (lambda text: None) if quiet else say)
    _show(outcome, form, sweep_text)
    if form == "table":
        say(f"the plans that count: dtmsearch pareto '{plan.sweep}*'{_store_argument(store)}")
    if outcome.is_complete:
        return 0
    return _FAILED if "failed" in outcome.statuses.values() else _STOPPED


@cli.command(
    "pareto",
    epilog=examples("dtmsearch pareto", "dtmsearch pareto 'my-sweep*' --all --format json"),
)
@click.argument("pattern", default="*")
@click.option("--all", "everything", is_flag=True, help="Also the plans than which others are smaller and better.")
@store_option
@format_option("table", "json")
def pareto_verb(pattern: str, everything: bool, store: str, form: str) -> None:
    """Show the validated plans that no other beats in size and quality.

    PATTERN chooses runs by name. Plans are compared on the same held-out prompts, by FDT, SDT and KL.
    """
    from dtmsearch.results.pareto import candidates
    from dtmsearch.summaries import front_text

    found = candidates(_open(store), pattern)
    _show([c for c in found if everything or c.fronts], form, front_text)
    if not found:
        say(f"no run {pattern} of {store} has a plan that was measured on held-out prompts")


@cli.command("ls", epilog=examples("dtmsearch ls", "dtmsearch ls --store s3://bucket/store --format json"))
@store_option
@format_option("table", "json")
def ls_verb(store: str, form: str) -> None:
    """List the runs of a store."""
    from dtmsearch.results.summary import runs_overview
    from dtmsearch.summaries import overview_text

    runs = runs_overview(_open(store))
    _show(runs, form, overview_text)
    if not runs:
        say(f"no run in {store} yet")


@cli.command("status", epilog=examples("dtmsearch status my-run", "dtmsearch status my-run --format json"))
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@store_option
@format_option("table", "json")
def status_verb(name: str, store: str, form: str) -> None:
    """Say how far a run is and what it found."""
    from dtmsearch.results.summary import summarize_run
    from dtmsearch.summaries import run_text, run_values

    _show(summarize_run(_open(store), name), form, run_text, run_values)


@cli.command("watch", epilog=examples("dtmsearch watch my-run", "dtmsearch watch my-run --store s3://bucket/store"))
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@store_option
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between two looks."
)
def watch_verb(name: str, store: str, interval: float) -> None:
    """Show a run as it goes, from any machine that reads the store.

    Ends when nobody works on the run any more; Ctrl-C stops watching, not the run.
    """
    from dtmsearch.watch import watch

    watch(_open(store), name, interval)


@cli.command("stop", epilog=examples("dtmsearch stop my-run", "dtmsearch stop my-run --store s3://bucket/store"))
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@store_option
def stop_verb(name: str, store: str) -> None:
    """Stop a running search; it can be resumed."""
    from dtmsearch.run import stop

    stop(name, store)
    say(f"asked {name} to stop; to continue it: {_resume_command(name, store)}")


@cli.command(
    "query",
    epilog=examples(
        'dtmsearch query "SELECT run, status, created_at FROM runs"',
        "dtmsearch query \"SELECT step, perturbation, score FROM steps WHERE run = 'my-run' ORDER BY step\"",
        'dtmsearch query "SELECT * FROM evaluations" --format parquet --out evaluations.parquet',
        "dtmsearch query --list",
        "dtmsearch query sensitivity my-run --format csv",
    ),
)
@click.argument("sql", metavar="SQL|QUESTION", required=False)
@click.argument("name", metavar="[RUN]", required=False)
@store_option
@format_option("table", "json", "csv", "parquet")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write instead of stdout.")
@click.option("--list", "listed", is_flag=True, help="The questions that have names, and what they ask.")
def query_verb(sql: str | None, name: str | None, store: str, form: str, out: Path | None, listed: bool) -> None:
    """Answer one SQL SELECT, or a question by its name about a RUN, over the store.

    Its tables are runs, components, prompts, evaluations, plans, steps and continuations.
    """
    if form == "parquet" and out is None:
        raise click.UsageError("parquet is no text for a terminal: give a file with --out")
    answer = _answer(store, sql, name, listed)
    if form == "parquet":
        from pyarrow import parquet

        parquet.write_table(answer, out)
    elif out is None:
        _print(_query_text(answer, form))
    else:
        out.write_text(_query_text(answer, form) + "\n", encoding="utf-8")


@cli.command(
    "evaluate",
    epilog=examples(
        "dtmsearch evaluate search.yaml --plan uniform:int8-channel",
        "dtmsearch evaluate search.yaml --plan my-run --format json",
        "dtmsearch evaluate search.yaml --plan plan.json --set prompts.count=500",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--plan", required=True, help="A plan file (JSON), the name of a run, or uniform:SCHEME.")
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
    from dtmsearch.run import evaluate
    from dtmsearch.summaries import measurement_text, measurement_values

    search_file = load(file, overrides)
    with _resumable("run the same command again"), _watching(quiet) as observer:
        measurement = evaluate(search_file, plan, store, _where(**where), observer)
    _show(measurement, form, measurement_text, measurement_values)
    return _FAILED if measurement.summary is None else 0


@cli.command(
    "export",
    epilog=examples(
        "dtmsearch export my-run --to dense --out my-model",
        "dtmsearch export plan.json --to json --out recipe --store s3://bucket/store",
        "dtmsearch export my-run --to dense --out my-model --model /mnt/models/llama --no-check",
    ),
)
@click.argument("source", metavar="RUN|PLAN")
@click.option("--to", required=True, type=click.Choice(EXPORT_FORMATS), help="Format to write.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--runtime",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What shall load a compressed-tensors folder; vllm takes less, and fuses q, k, v and gate, up.",
)
@click.option("--model", help="Where the base model lies now, if not where the search found it.")
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
    check: bool,
    batch_tokens: int | None,
    store: str,
    form: str,
) -> None:
    """Write the plan of a run, or a plan file, in a format that others load.

    A model is loaded again in a fresh process and measured: FDT and SDT as recorded, or the export fails.
    """
    from dtmsearch.exporting import export
    from dtmsearch.summaries import exported_text, exported_values

    result = export(
        source, to, out, store, check=check, model=model, runtime=runtime, batch_tokens=batch_tokens or 0, say=say
    )
    _show(result, form, exported_text, exported_values)


@cli.command(
    "report",
    epilog=examples(
        "dtmsearch report my-run",
        "dtmsearch report my-run --out report.html --figures figures/",
        "dtmsearch report my-run another-run",
        "dtmsearch report my-run --store s3://bucket/store",
    ),
)
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@click.argument("other", metavar="[OTHER]", required=False, shell_complete=complete_run)
@store_option
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The page's file  [default: RUN.html]")
@click.option(
    "--figures", type=click.Path(path_type=Path, file_okay=False), help="Folder for each figure as SVG and PNG."
)
def report_verb(name: str, other: str | None, store: str, out: Path | None, figures: Path | None) -> None:
    """Write a run, or two compared, as one page of HTML.

    It needs no network, and works for a run that is still going on.
    """
    if other is None:
        from dtmsearch.report.writing import write_report

        written = write_report(_open(store), name, out or Path(f"{name}.html"), figures)
    else:
        from dtmsearch.report.comparison import write_comparison

        path = out or Path(f"{name}-and-{other}.html")
        written = write_comparison(_open(store), name, other, path, figures)
    for path in written:
        _print(str(path))


@cli.command(
    "recover",
    epilog=examples(
        "dtmsearch recover my-run --set 'files=[train.txt]' --set masked_steps=500",
        "dtmsearch recover my-run --set lr=0.0003 --format json",
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
    """Train a run's pruned model.

    What the plan prunes stays zero. The same command goes on with a training that was stopped.
    """
    from dtmsearch.run import recover
    from dtmsearch.summaries import recovered_text

    with _resumable("run the same command again"), _watching(quiet) as observer:
        recovered = recover(name, store, overrides, _where(**where), observer)
    _show(recovered, form, recovered_text)


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
    from dtmsearch.scoring import Asked, score
    from dtmsearch.summaries import scores_text

    asked = Asked(tuple(task.strip() for task in tasks.split(",")), include, limit, fewshot, batch_size)
    _show(score(source, asked, store, base=base, say=say), form, scores_text)


@cli.command("doctor", epilog=examples("dtmsearch doctor", "dtmsearch doctor --store s3://bucket/store --format json"))
@store_option
@format_option("table", "json")
def doctor_verb(store: str, form: str) -> int:
    """Say what this machine has and lacks.

    Exits 1 if something that a search needs is missing.
    """
    from dtmsearch.doctor import examine
    from dtmsearch.summaries import findings_text

    findings = examine(store)
    _show(findings, form, findings_text)
    return _FAILED if any(f.status == "missing" for f in findings) else 0


def _where(
    address: str | None,
    replicas: int | None,
    gpus_per_replica: float | None,
    cpus_per_replica: float | None,
    batch_tokens: int | None,
) -> Where:
    from dtmsearch.run import Where

    return Where(address, replicas or 0, gpus_per_replica, batch_tokens or 0, cpus_per_replica)


def _open(store: str) -> ResultStore:
    # Not through dtmsearch.run, which loads Ray: reading a store takes no cluster.
    from dtmsearch.results.store import ResultStore

    return ResultStore(store, on_note=say)


@contextmanager
def _watching(quiet: bool) -> Iterator[Any]:
    from dtmsearch.terminal import LoggedProgress, watching

    if _LOG_FORMAT.get() == "json":
        from dtmsearch.logs import json_lines

        with json_lines(sys.stderr):
            yield LoggedProgress()
        return
    with watching(quiet) as observer:
        yield observer


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    """Turn a stop into exit code 3 and a word on how to go on."""
    from dtmsearch.search.scheduler import SearchStopped

    # `kill` is as good a wish to stop as Ctrl-C, also before the search has begun to listen.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (SearchStopped, KeyboardInterrupt):
        say(f"stopped; nothing recorded is lost. To continue: {command}")
        raise click.exceptions.Exit(_STOPPED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_run(summary: RunSummary, store: str, form: str) -> None:
    from dtmsearch.summaries import PLAN_QUERY, run_text, run_values

    _show(summary, form, run_text, run_values)
    if form == "table" and summary.final_plan_id is not None:
        _print("\nIts plan, component by component:")
        _print("  " + _query_command(PLAN_QUERY.format(plan_id=summary.final_plan_id), store))


def _show(value: Any, form: str, as_text: Callable[[Any], str], as_values: Callable[[Any], Any] | None = None) -> None:
    from dtmsearch.output import json_text

    if form == "json":
        _print(json_text(value if as_values is None else as_values(value)))
    else:
        _print(as_text(value))


def _answer(store: str, sql: str | None, run: str | None, listed: bool) -> Any:
    """The rows that `query` was asked for: a SELECT's, a named question's, or the list of these."""
    from dtmsearch.results.query import query
    from dtmsearch.results.questions import ask, list_of_questions

    if listed:
        return list_of_questions()
    if sql is None:
        raise click.UsageError("give a SELECT or the name of a question (`dtmsearch query --list` shows the names)")
    if not any(character.isspace() for character in sql):
        if run is None:
            raise click.UsageError(f"give the run that {sql!r} asks about: dtmsearch query {sql} RUN")
        return ask(_open(store), sql, run)
    if run is not None:
        raise click.UsageError(f"a SELECT names its runs itself (WHERE run = '{run}'); RUN goes with a question's name")
    return query(_open(store), sql)


def _query_text(answer: Any, form: str) -> str:
    from dtmsearch.output import csv_text, json_text
    from dtmsearch.terminal import table

    if form == "json":
        return json_text(answer.to_pylist())
    # By column, because two columns of an answer may bear one name.
    columns = [column.to_pylist() for column in answer.columns]
    rows = list(zip(*columns, strict=True))
    return csv_text(answer.column_names, rows) if form == "csv" else table(answer.column_names, rows)


def _print(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:
        # The reader (`head`, a pager) has seen enough. Python would complain once more while it closes stdout.
        sys.stdout = None
        raise click.exceptions.Exit(_FAILED) from None


def _resume_command(run: str, store: str) -> str:
    submitted = os.environ.get("DTMSEARCH_RESUME_COMMAND")  # set by `dtmsearch submit` for the driver that it sends
    return submitted or f"dtmsearch resume {run}{_store_argument(store)}"


def _query_command(sql: str, store: str) -> str:
    return f'dtmsearch query "{sql}"{_store_argument(store)}'


def _store_argument(store: str) -> str:
    return "" if store == _DEFAULT_STORE else f" --store {shlex.quote(store)}"


def _absolute(store: str) -> str:
    return store if "://" in store else str(Path(store).absolute())
