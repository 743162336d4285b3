"""What `dtmsearch run --dry-run` foretells and what then happens: evaluations, seconds of search, and the time left
that is shown half-way.

    python benchmarks/dry_run.py [FILE ...] [--strategy probe,greedy,beam,auto] [--set key=value]

FILE is a search file; without one, the packaged model's and, where there is one, that of stories-260k. Each search is
estimated and then run, in a store of its own. Time left is held against the time that the search then still took, and
both together against the estimate.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import ray

from dtmsearch.cluster.connect import connect
from dtmsearch.config import SearchFile, load
from dtmsearch.search.protocols import Decision, Progress
from dtmsearch.workflows.estimate import estimate
from dtmsearch.workflows.run import run

CONFIGS = Path(__file__).parent.parent / "configs"


class Clock:
    """An observer that notes when it was told what, in seconds from the first word."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, Progress]] = []

    def on_progress(self, progress: Progress) -> None:
        self.heard.append((time.monotonic(), progress))

    def on_decision(self, decision: Decision, replayed: bool) -> None: ...

    def on_note(self, text: str) -> None:
        click.echo(text, err=True)

    @property
    def seconds(self) -> float:
        return self.heard[-1][0] - self.heard[0][0]

    def half_way(self) -> tuple[float, float]:
        """(seconds since the search began, seconds that were said to be left), at the first word after its half."""
        began_at = self.heard[0][0]
        at, progress = next((at, p) for at, p in self.heard if at - began_at >= self.seconds / 2)
        return at - began_at, float("nan") if progress.seconds_left is None else progress.seconds_left


def foretold_and_found(file: SearchFile) -> str:
    foretold = estimate(file)
    clock = Clock()
    with tempfile.TemporaryDirectory() as store:
        began_at = time.monotonic()
        run(file, store, observer=clock)
        whole = time.monotonic() - began_at
    since, left = clock.half_way()
    evaluations = clock.heard[-1][1].evaluations
    return (
        f"{Path(file.model.path).name:<14}{file.search.strategy:<9}"
        f"{foretold.evaluations:>9}{evaluations:>7}"
        f"{foretold.search_seconds:>10.1f}{clock.seconds:>8.1f}{foretold.search_seconds / clock.seconds:>7.2f}"
        f"{left:>11.1f}{clock.seconds - since:>8.1f}{(since + left) / clock.seconds:>7.2f}"
        f"{(since + left) / foretold.search_seconds:>9.2f}"
        f"{foretold.other_seconds:>9.1f}{whole - clock.seconds:>7.1f}"
    )


@click.command(help=__doc__)
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@click.option("--strategy", "strategies", default="probe,greedy,beam,auto", show_default=True)
@click.option("--set", "overrides", multiple=True, help="As of `dtmsearch run`.")
def main(files: tuple[str, ...], strategies: str, overrides: tuple[str, ...]) -> None:
    own = [str(CONFIGS / "llama-demo.yaml"), str(CONFIGS / "stories-260k.yaml")]
    connect(None)
    click.echo(
        f"{'model':<14}{'strategy':<9}{'foretold':>9}{'made':>7}{'foretold':>10}{'seconds':>8}{'ratio':>7}"
        f"{'said left':>11}{'left':>8}{'ratio':>7}{'to both':>9}{'other':>9}{'rest':>7}"
    )
    for path in files or own:
        for strategy in strategies.split(","):
            file = load(path, (*overrides, f"search.strategy={strategy}"), strategies.split(","))
            click.echo(foretold_and_found(file))
    ray.shutdown()


if __name__ == "__main__":
    main()
