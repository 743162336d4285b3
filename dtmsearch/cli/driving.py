"""What the verbs share that drive replicas: where they work, who watches, and how a stop is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from dtmsearch.cli.speech import LOG_FORMAT, say
from dtmsearch.errors import STOPPED, SearchStopped

if TYPE_CHECKING:
    from dtmsearch.core.evaluation import WeightsKept
    from dtmsearch.workflows.run import Where


def where_of(
    address: str | None,
    replicas: int | None,
    gpus_per_replica: float | None,
    cpus_per_replica: float | None,
    batch_tokens: int | None,
    nodes_per_replica: int | None,
    in_process: bool = False,
    weights: WeightsKept = "auto",
    retry_out_of_memory: bool = False,
) -> Where:
    """Where replicas run, from the command line's options."""
    from dtmsearch.workflows.run import Where

    if in_process and (address or replicas or gpus_per_replica or cpus_per_replica or nodes_per_replica):
        raise click.UsageError("--in-process is one replica in this process: it takes no --address and no shares")
    return Where(
        address,
        replicas or 0,
        gpus_per_replica,
        batch_tokens or 0,
        cpus_per_replica,
        nodes_per_replica=nodes_per_replica or 1,
        in_process=in_process,
        weights=weights,
        retry_out_of_memory=retry_out_of_memory,
    )


@contextmanager
def observing(quiet: bool) -> Iterator[Any]:
    """Within this block a search is watched: lines or a progress bar on stderr, or JSON lines; nothing where
    `quiet`."""
    from dtmsearch.console.progress import LoggedProgress, watching

    if LOG_FORMAT.get() == "json":
        from dtmsearch.logs import json_lines

        with json_lines(sys.stderr):
            yield LoggedProgress()
        return
    with watching(quiet) as observer:
        yield observer


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Turn a stop into exit code 3 and a word on how to go on."""
    from dtmsearch.workflows.interrupts import interruptible

    try:
        with interruptible():  # also before the search has begun to listen
            yield
    except (SearchStopped, KeyboardInterrupt):
        say(f"stopped; nothing recorded is lost. To continue: {command}")
        raise click.exceptions.Exit(STOPPED) from None
