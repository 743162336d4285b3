"""Options that several verbs have, and how a shell completes the names of runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dtmsearch.cli.speech import DEFAULT_STORE, LOG_FORMAT, say
from dtmsearch.errors import UserError

if TYPE_CHECKING:
    from dtmsearch.store.store import ResultStore


Verb = TypeVar("Verb", bound=Callable[..., Any])


class NewPath(click.Path):
    """A file to write, in a folder that is there; or, with `file_okay=False` or both, a folder that can be made."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, parameter, context)))
        parent = path.parent
        try:
            if not (parent.exists() or self.dir_okay):
                self.fail(f"{str(path)!r} cannot be written: there is no folder {str(parent)!r}", parameter, context)
            while not parent.exists():
                parent = parent.parent
            if not parent.is_dir():
                self.fail(f"{str(path)!r} cannot be written: {str(parent)!r} is no folder", parameter, context)
            if not os.access(path if path.exists() else parent, os.W_OK):
                self.fail(f"{str(path)!r} cannot be written: you have no right to", parameter, context)
        except (OSError, ValueError) as error:
            self.fail(f"{str(path)!r} cannot be written: {error}", parameter, context)
        return path


def store_option(verb: Verb) -> Verb:
    """`--store`, of every verb that reads or writes one."""
    return click.option(
        "--store",
        default=DEFAULT_STORE,
        show_default=True,
        envvar="DTMSEARCH_STORE",
        show_envvar=True,
        help="Folder or bucket URL (s3://, gs://) that holds runs and evaluations.",
    )(verb)


def complete_run(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of the store's runs, for a shell that completes RUN."""
    try:
        runs = open_store(context.params.get("store") or os.environ.get("DTMSEARCH_STORE", DEFAULT_STORE)).runs()
    except Exception:  # a shell asks in the middle of a word: nobody reads errors there
        return []
    return [record.run for record in runs if record.run.startswith(incomplete)]


def format_option(*choices: str) -> Callable[[Verb], Verb]:
    """`--format`, with the forms that a verb has."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        help="Form of the output.",
    )


def replica_options(verb: Verb) -> Verb:
    """How many replicas a search has, and what each of them gets."""
    return _with(
        verb,
        click.option("--replicas", type=click.IntRange(min=1), help="Copies of the model that measure side by side."),
        click.option("--gpus-per-replica", type=click.FloatRange(min=0), help="GPUs of each, such as 0.5, 1 or 4."),
        click.option("--cpus-per-replica", type=click.FloatRange(min=0.01), help="CPUs of each."),
        click.option(
            "--nodes-per-replica",
            type=click.IntRange(min=1),
            help="Nodes of each, for a model too large for one; GPUs and CPUs are then of each node.",
        ),
        click.option("--batch-tokens", type=click.IntRange(min=1), help="Most tokens of one forward batch."),
        click.option(
            "--weights",
            type=click.Choice(("auto", "device", "streamed")),
            default="auto",
            show_default=True,
            help="Whether weights stay on the device or pass through it layer by layer; auto: by the GPU's memory.",
        ),
    )


def where_options(verb: Verb) -> Verb:
    """Where a search runs; none of it changes what the search finds."""
    address = click.option("--address", help="Address of a Ray cluster; without it, Ray starts on this machine.")
    in_process = click.option(
        "--in-process", is_flag=True, help="Measure in this process, without Ray: for small models; starts at once."
    )
    quiet = click.option("--quiet", is_flag=True, help="No progress.")
    log_format = click.option(
        "--log-format",
        type=click.Choice(("text", "json")),
        default="text",
        show_default=True,
        expose_value=False,
        callback=lambda _context, _option, value: LOG_FORMAT.set(value),
        help="Form of stderr: for a person, or a JSON object a line that names run and request.",
    )
    return _with(verb, address, in_process, replica_options, quiet, log_format)


def retry_option(verb: Verb) -> Verb:
    """`--retry-out-of-memory`."""
    return click.option(
        "--retry-out-of-memory",
        is_flag=True,
        help="Measure again what ran out of memory before: for a machine that has more. What the run has decided on "
        "stays; under another run name everything else is found, and all of it asked again.",
    )(verb)


def log_option(verb: Verb) -> Verb:
    """Where a search's numbers go beside its store."""
    return click.option(
        "--log-to",
        multiple=True,
        metavar="NAME[:WHERE]",
        help="Log decisions and held-out values also to tensorboard[:FOLDER], mlflow[:URI] or wandb[:PROJECT]; "
        "repeatable.",
    )(verb)


def _with(verb: Verb, *options: Callable[[Verb], Verb]) -> Verb:
    """A verb under options that its help lists in this order."""
    for option in reversed(options):
        verb = option(verb)
    return verb


def set_option(verb: Verb) -> Verb:
    """`--set KEY=VALUE`, repeatable."""
    return click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the search file; repeatable."
    )(verb)


def examples(*lines: str) -> str:
    """The end of a verb's help: commands to paste, each on its own line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def open_store(store: str) -> ResultStore:
    """The store that a verb reads. Raises `UserError` as `check_store` does."""
    # Not through dtmsearch.workflows.run, which loads Ray: reading a store takes no cluster.
    from dtmsearch.store.store import ResultStore

    check_store(store)
    return ResultStore(store, on_note=say)


def check_store(store: str) -> None:
    """Raises `UserError` for a folder that was named as a store that there should be, and is not there: it is
    mistyped."""
    try:
        is_there = store == DEFAULT_STORE or "://" in store or Path(store).exists()
    except (OSError, ValueError) as error:
        raise UserError(f"--store {store}: {error}") from None
    if not is_there:
        raise UserError(f"there is no store {store}; --store names the folder or bucket that the search was run with")
