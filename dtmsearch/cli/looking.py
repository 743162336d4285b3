"""The verbs that look at a store: `ls`, `status`, `watch`, `query`, `pareto`, `solve`, `report`, and `stop`."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dtmsearch.cli.options import NewPath, complete_run, examples, format_option, open_store, store_option
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import print_text, resume_command, say, show


@cli.command("ls", epilog=examples("dtmsearch ls", "dtmsearch ls --store s3://bucket/store --format json"))
@store_option
@format_option("table", "json")
def ls_verb(store: str, form: str) -> None:
    """List the runs of a store."""
    from dtmsearch.analysis.summary import runs_overview
    from dtmsearch.console.run_text import overview_text

    runs = runs_overview(open_store(store))
    show(runs, form, overview_text)
    if not runs:
        say(f"no run in {store} yet")


@cli.command("status", epilog=examples("dtmsearch status my-run", "dtmsearch status my-run --format json"))
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@store_option
@click.option("--long", "long", is_flag=True, help="All that there is to say of the plan: FDT beside, and noise.")
@format_option("table", "json")
def status_verb(name: str, store: str, form: str, long: bool) -> None:
    """Say how far a run is and what it found."""
    from dtmsearch.analysis.summary import summarize_run
    from dtmsearch.console.run_text import run_text, run_values

    show(summarize_run(open_store(store), name), form, lambda found: run_text(found, long), run_values)


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
    from dtmsearch.console.watch import watch

    watch(open_store(store), name, interval)


@cli.command("stop", epilog=examples("dtmsearch stop my-run", "dtmsearch stop my-run --store s3://bucket/store"))
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@store_option
def stop_verb(name: str, store: str) -> None:
    """Stop a running search; it can be resumed."""
    from dtmsearch.workflows.run import stop

    submitted = stop(name, store)
    if submitted is None:
        say(f"asked {name} to stop; to continue it: {resume_command(name, store)}")
    else:
        say(f"asked {name} to stop; to continue it, where it was submitted: {submitted}")


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
@click.option(
    "--out",
    type=NewPath(dir_okay=False),
    help="File to write instead of stdout; .json, .csv and .parquet say the form where --format is not given.",
)
@click.option("--list", "listed", is_flag=True, help="The questions that have names, and what they ask.")
def query_verb(sql: str | None, name: str | None, store: str, form: str, out: Path | None, listed: bool) -> None:
    """Answer one SQL SELECT, or a question by its name about a RUN, over the store.

    Its tables are runs, components, prompts, evaluations, plans, steps and continuations.
    """
    form = _form_of_file(form, out)
    if form == "parquet" and out is None and sys.stdout.isatty():
        raise click.UsageError("parquet is no text for a terminal: give a file with --out, or a pipe")
    answer = _answer(store, sql, name, listed)
    if listed and form == "table":
        say("to ask one of them about a run: dtmsearch query NAME RUN")
    if form == "parquet":
        from pyarrow import parquet

        parquet.write_table(answer, sys.stdout.buffer if out is None else out)
    elif out is None:
        print_text(_query_text(answer, form))
    else:
        out.write_text(_query_text(answer, form) + "\n", encoding="utf-8")


def _form_of_file(form: str, out: Path | None) -> str:
    """The form of an answer: as asked, else as the file's extension says."""
    asked = click.get_current_context().get_parameter_source("form") is ParameterSource.COMMANDLINE
    extension = "" if out is None or asked else out.suffix.removeprefix(".").lower()
    return extension if extension in ("json", "csv", "parquet") else form


def _answer(store: str, sql: str | None, run: str | None, listed: bool) -> Any:
    """The rows that `query` was asked for: a SELECT's, a named question's, or the list of these."""
    from dtmsearch.analysis.named_queries import ask, list_of_questions
    from dtmsearch.analysis.sql import query

    if listed:
        return list_of_questions()
    if sql is None:
        raise click.UsageError("give a SELECT or the name of a question (`dtmsearch query --list` shows the names)")
    if not any(character.isspace() for character in sql):
        if run is None:
            raise click.UsageError(f"give the run that {sql!r} asks about: dtmsearch query {sql} RUN")
        return ask(open_store(store), sql, run)
    if run is not None:
        raise click.UsageError(f"a SELECT names its runs itself (WHERE run = '{run}'); RUN goes with a question's name")
    return query(open_store(store), sql)


def _query_text(answer: Any, form: str) -> str:
    from dtmsearch.analysis.format import csv_text, json_text, values_of
    from dtmsearch.console.terminal_tables import table

    # By column, because two columns of an answer may bear one name.
    columns = [values_of(column) for column in answer.columns]
    rows = list(zip(*columns, strict=True))
    if form == "json":
        return json_text([dict(zip(answer.column_names, row, strict=True)) for row in rows])
    return csv_text(answer.column_names, rows) if form == "csv" else table(answer.column_names, rows)


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
    from dtmsearch.analysis.pareto_runs import candidates
    from dtmsearch.console.plan_text import front_text

    found = candidates(open_store(store), pattern)
    show([c for c in found if everything or c.fronts], form, front_text)
    if not found:
        say(f"no run {pattern} of {store} has a plan that was measured on held-out prompts")


@cli.command(
    "solve",
    epilog=examples(
        "dtmsearch solve my-run --bits 3.5,4,4.5",
        "dtmsearch solve my-run --bits 4 --format json",
        "dtmsearch solve my-run --bits 3,4 --out plans/",
    ),
)
@click.argument("name", metavar="RUN", shell_complete=complete_run)
@click.option("--bits", required=True, help="Stored bits per weight, one budget or several: 3.5,4,4.5.")
@click.option("--out", type=NewPath(file_okay=False), help="A folder for the plan files.")
@store_option
@format_option("table", "json")
def solve_verb(name: str, bits: str, out: Path | None, store: str, form: str) -> None:
    """Find plans for further budgets from the prices that a run has taken.

    Nothing is measured: KL is predicted, with a 95% interval.
    """
    from dtmsearch.console.plan_text import solved_text
    from dtmsearch.errors import UserError
    from dtmsearch.workflows.solve_budgets import solve_budgets

    try:
        budgets = [float(part) for part in bits.split(",")]
    except ValueError:
        raise UserError(f"--bits: got {bits!r}; numbers of stored bits per weight are wanted, such as 3.5,4") from None
    found = solve_budgets(open_store(store), name, budgets)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for solved in found:
            (out / f"{name}-{solved.bits_asked:g}.json").write_text(solved.plan, encoding="utf-8")
    show(found, form, solved_text)


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
@click.option("--out", type=NewPath(dir_okay=False), help="The page's file  [default: RUN.html]")
@click.option("--figures", type=NewPath(file_okay=False), help="Folder for each figure as SVG and PNG.")
def report_verb(name: str, other: str | None, store: str, out: Path | None, figures: Path | None) -> None:
    """Write a run, or two compared, as one page of HTML.

    It needs no network, and works for a run that is still going on.
    """
    if other is None:
        from dtmsearch.report.writing import write_report

        written = write_report(open_store(store), name, out or Path(f"{name}.html"), figures)
    else:
        from dtmsearch.report.comparison import write_comparison

        path = out or Path(f"{name}-and-{other}.html")
        written = write_comparison(open_store(store), name, other, path, figures)
    for path in written:
        print_text(str(path))


@cli.command("ui", epilog=examples("dtmsearch ui", "dtmsearch ui --store s3://bucket/store --port 8080 --open"))
@store_option
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, show_default="one that is free", help="Port of this machine."
)
@click.option("--open", "opens", is_flag=True, help="Open the pages in a browser.")
def ui_verb(store: str, port: int, opens: bool) -> None:
    """Show a store in a browser: runs as they go, plans side by side, reports.

    Serves pages on this machine only, to who has the printed address, until Ctrl-C. Needs the extra `ui`.
    """
    from dtmsearch.ui.server import serve

    def ready(address: str) -> None:
        print_text(address)
        say("Ctrl-C ends it")
        if opens:
            import webbrowser

            webbrowser.open(address)

    with suppress(KeyboardInterrupt):
        serve(open_store(store), port, ready)
