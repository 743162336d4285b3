"""The verbs that search: `demo`, `run`, `resume`, `sweep`, and `submit` for a cluster's job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtmsearch.cli.driving import observing, resumable, where_of
from dtmsearch.cli.options import (
    check_store,
    complete_run,
    examples,
    format_option,
    log_option,
    open_store,
    replica_options,
    retry_option,
    set_option,
    store_option,
    where_options,
)
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import print_text, query_command, resume_command, say, show, store_argument
from dtmsearch.errors import FAILED, STOPPED

if TYPE_CHECKING:
    from dtmsearch.analysis.summary import RunSummary


@cli.command("demo", epilog=examples("dtmsearch demo", "dtmsearch demo --store /tmp/store --replicas 2"))
@store_option
@where_options
@format_option("table", "json")
def demo_verb(store: str, form: str, quiet: bool, **where: Any) -> None:
    """Search the small model in the package, in this process.

    From start to a plan that is measured on held-out text, in about a minute. With --replicas or --address on Ray.
    """
    from dtmsearch.workflows.run import demo

    where["in_process"] = not any(
        where[name] for name in ("address", "replicas", "gpus_per_replica", "cpus_per_replica", "nodes_per_replica")
    )
    with resumable("dtmsearch demo" + store_argument(store)), observing(quiet) as observer:
        summary = demo(store, where_of(**where), observer)
    _show_run(summary, store, form)
    if form == "table":
        argument = store_argument(store)
        print_text("\nNext:")
        print_text(f"  dtmsearch report {summary.run}{argument}                 # the search on one page")
        print_text("  dtmsearch init YOUR_MODEL --out search.yaml  # a search file for a model of yours")
        print_text(
            f"  dtmsearch export {summary.run}{argument} --to compressed-tensors --out demo-model"
            "  # what transformers loads"
        )
        print_text(f"\nThe store is {_absolute(store)}")


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
@retry_option
@log_option
@click.option("--fused", is_flag=True, help="Tie q, k, v and gate, up, as fused runtimes demand: search.fused=true.")
@click.option("--dry-run", is_flag=True, help="Say what the search will cost, and run nothing.")
@format_option("table", "json")
def run_verb(
    file: Path,
    overrides: tuple[str, ...],
    store: str,
    fused: bool,
    dry_run: bool,
    form: str,
    quiet: bool,
    log_to: tuple[str, ...],
    **where: Any,
) -> None:
    """Start or continue the search in FILE."""
    from dtmsearch.config import load
    from dtmsearch.workflows.loggers import logged_to
    from dtmsearch.workflows.run import run

    search_file = load(file, (*overrides, "search.fused=true") if fused else overrides)
    if dry_run:
        from dtmsearch.console.model_text import estimate_text
        from dtmsearch.workflows.estimate import estimate

        show(estimate(search_file, where_of(**where)), form, estimate_text)
        return
    with (
        resumable(resume_command(search_file.run, store)),
        observing(quiet) as observer,
        logged_to(log_to, search_file, observer) as (logged, ended),
    ):
        summary = run(search_file, store, where_of(**where), logged)
        ended(summary)
    _show_run(summary, store, form)


@cli.command("resume", epilog=examples("dtmsearch resume my-run", "dtmsearch resume my-run --replicas 4"))
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@store_option
@where_options
@retry_option
@log_option
@format_option("table", "json")
def resume_verb(name: str, store: str, form: str, quiet: bool, log_to: tuple[str, ...], **where: Any) -> None:
    """Continue a stopped or killed run.

    Nothing that is recorded is measured again.
    """
    check_store(store)
    from dtmsearch.workflows.loggers import logged_to
    from dtmsearch.workflows.lookup import stored_file
    from dtmsearch.workflows.run import resume

    file = stored_file(open_store(store), name) if log_to else None
    with (
        resumable(resume_command(name, store)),
        observing(quiet) as observer,
        logged_to(log_to, file, observer) as (logged, ended),
    ):
        summary = resume(name, store, where_of(**where), logged)
        ended(summary)
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
@click.option(
    "--any-file", is_flag=True, help="Send hidden files, keys, and links that lead elsewhere too, if FILE names them."
)
@replica_options
@log_option
@format_option("table", "json")
def submit_verb(
    file: Path,
    overrides: tuple[str, ...],
    address: str,
    store: str,
    follow: bool,
    pins: Any,
    any_file: bool,
    form: str,
    log_to: tuple[str, ...],
    **where: Any,
) -> int:
    """Run the search in FILE as a job of a Ray cluster.

    Attaches to the run's job if one is at work; continues the run if it ended anywhere. Weights are not sent.
    """
    from dtmsearch.workflows.loggers import in_any_folder
    from dtmsearch.workflows.submit import submit

    options = [part for name, value in where.items() if value for part in (_option(name), _written(value))]
    options += [part for name in in_any_folder(log_to) for part in ("--log-to", name)]
    submission = submit(file, overrides, address, store, options, pins, any_file)
    for note in submission.notes:
        say(f"note: {note}")
    job, run = submission.job, submission.run
    say(f"{'attached to' if job.attached else 'submitted'} job {job.id}; it goes on without this command")
    if follow:
        return _follow(address, job.id)
    if form == "json":
        show({"run": run, "job": job.id, "attached": job.attached, "store": submission.store}, form, str)
    else:
        print_text(job.id)
        argument = store_argument(submission.store)
        say(f"to see how far it is: dtmsearch status {run}{argument}\nto stop it: dtmsearch stop {run}{argument}")
    return 0


def _follow(address: str, job_id: str) -> int:
    from dtmsearch.cluster.jobs import Jobs

    try:
        return Jobs(address).follow(job_id, lambda text: print_text(text, end=""))
    except KeyboardInterrupt:
        say(f"no longer following; job {job_id} goes on")
        return 0


def _written(value: float | str) -> str:
    """A value as an option takes it: a number with all its digits."""
    if isinstance(value, str):
        return value
    return str(int(value)) if value == int(value) else repr(value)


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
@log_option
@click.option("--dry-run", is_flag=True, help="List the searches, and run nothing.")
@format_option("table", "json")
def sweep_verb(
    file: Path,
    overrides: tuple[str, ...],
    store: str,
    dry_run: bool,
    form: str,
    quiet: bool,
    log_to: tuple[str, ...],
    **where: Any,
) -> int:
    """Run the many searches of a sweep FILE side by side.

    Run it again and it goes on where it was; --replicas is for each search.
    """
    from dtmsearch.config.sweep_file import load_sweep

    plan, files = load_sweep(file, overrides)
    if dry_run:
        show({"sweep": plan.sweep, "runs": [f.run for f in files]}, form, lambda v: "\n".join(v["runs"]))
        return 0
    from dtmsearch.console.run_text import sweep_text
    from dtmsearch.core.pareto import Race
    from dtmsearch.workflows.sweep import sweep

    rules = plan.stop_dominated
    race = None if rules is None else Race(rules.margin, rules.patience)
    with resumable("run the same command again"):
        outcome = sweep(files, store, where_of(**where), race, (lambda text: None) if quiet else say, log_to)
    show(outcome, form, sweep_text)
    if form == "table":
        say(f"the plans that count: dtmsearch pareto '{plan.sweep}*'{store_argument(store)}")
    if outcome.is_complete:
        return 0
    return FAILED if "failed" in outcome.statuses.values() else STOPPED


def _show_run(summary: RunSummary, store: str, form: str) -> None:
    from dtmsearch.console.run_text import PLAN_QUERY, run_text, run_values

    show(summary, form, run_text, run_values)
    if form == "table" and summary.final_plan_id is not None:
        print_text("\nIts plan, component by component:")
        print_text("  " + query_command(PLAN_QUERY.format(plan_id=summary.final_plan_id), store))


def _absolute(store: str) -> str:
    return store if "://" in store else str(Path(store).absolute())
