"""The command itself, to which the modules of verbs add theirs."""

from __future__ import annotations

import click

from dtmsearch import __version__
from dtmsearch.cli.options import examples


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
