"""The verb `study`: a question about metrics and models, answered by measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dtmsearch.cli.driving import observing, resumable, where_of
from dtmsearch.cli.options import (
    NewPath,
    examples,
    format_option,
    retry_option,
    set_option,
    store_option,
    where_options,
)
from dtmsearch.cli.root import cli
from dtmsearch.cli.speech import say, show


@cli.command(
    "study",
    epilog=examples(
        "dtmsearch study --list",
        "dtmsearch study discriminability my-model --text validation.txt",
        "dtmsearch study discriminability my-model --text validation.txt --set prompts.count=64 --in-process",
        "dtmsearch study discriminability my-model --text validation.txt --figures figures/ --replicas 4",
    ),
)
@click.argument("name", required=False)
@click.argument("model", required=False)
@click.option("--text", "texts", multiple=True, metavar="FILE", help="Text that prompts are cut from; repeatable.")
@click.option(
    "--held-out", multiple=True, metavar="FILE", help="Text on which plans are judged, where a study finds plans."
)
@click.option("--part", "only", multiple=True, metavar="LABEL", help="Of a study's searches only these; repeatable.")
@set_option
@store_option
@where_options
@retry_option
@click.option("--dry-run", is_flag=True, help="Say what the searches will cost, and run nothing.")
@click.option("--out", type=NewPath(dir_okay=False), help="The page's file  [default: STUDY-MODEL.html]")
@click.option("--figures", type=NewPath(file_okay=False), help="Folder for each figure as SVG and PNG.")
@click.option("--list", "listed", is_flag=True, help="The studies, and what each asks.")
@format_option("table", "json")
def study_verb(
    name: str | None,
    model: str | None,
    texts: tuple[str, ...],
    held_out: tuple[str, ...],
    only: tuple[str, ...],
    overrides: tuple[str, ...],
    store: str,
    dry_run: bool,
    out: Path | None,
    figures: Path | None,
    listed: bool,
    form: str,
    quiet: bool,
    **where: Any,
) -> None:
    """Answer a question about metrics on a MODEL.

    Runs the searches of the study, each as `run` would: started again, they go on where they were. Writes a page.
    """
    from dtmsearch.console.terminal_tables import table
    from dtmsearch.studies.catalogue import STUDIES, make, study_of
    from dtmsearch.studies.study import search_files

    if listed:
        found = [(study.name, study.asks) for study in STUDIES.values()]
        show([{"name": n, "asks": a} for n, a in found], form, lambda _: table(["study", "asks"], found))
        return
    if name is None or model is None:
        raise click.UsageError("give a study and a MODEL (`dtmsearch study --list` shows the studies)")
    study = study_of(name)
    if not texts:
        raise click.UsageError("give the text that prompts are cut from: --text FILE")
    searches = search_files(study, model, texts, held_out, overrides, only)
    if dry_run:
        from dtmsearch.console.model_text import estimate_text
        from dtmsearch.workflows.estimate import estimate

        for label, file in searches:
            if label:
                say(f"{label}:")
            show(estimate(file, where_of(**where)), form, estimate_text)
        return
    with resumable("run the same command again"), observing(quiet) as observer:
        answer = make(study, searches, store, where_of(**where), observer)
    show(answer.findings, form, findings_text)
    from dtmsearch.report.study_page import write_study

    target = out or Path(f"{searches[0][1].run}.html")
    for path in write_study(target, figures, study.title, study.asks, answer.findings, answer.runs, store):
        say(str(path))


def findings_text(findings: Any) -> str:
    """What a study found, for a terminal."""
    from dtmsearch.console.terminal_tables import table

    parts = list(findings.said)
    for found in findings.tables:
        parts.append(f"{found.title}\n{table(list(found.columns), [list(row) for row in found.rows])}")
    return "\n\n".join(parts)
