"""A run as it goes, seen from any machine that reads its store: live in a terminal, a line now and then elsewhere.

Reads the store alone, so it shows what is recorded, and changes nothing. Knows nothing of drivers or replicas.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import pyarrow.compute as pc
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from dtmsearch.analysis.format import duration, number
from dtmsearch.analysis.metric_text import metric_value
from dtmsearch.analysis.summary import record_of
from dtmsearch.config.recorded_text import section_of
from dtmsearch.console.printing import print_shown, styled
from dtmsearch.console.progress import pace
from dtmsearch.core.records import RunRecord, StepRecord
from dtmsearch.store.codecs.tables import step_records
from dtmsearch.store.store import ResultStore

_RECENT_DECISIONS = 6
# The rate is that of the evaluations of this long.
_RATE_SECONDS = 30.0
_BAR_WIDTH = 40
_MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class Glance:
    """What the store shows of a run at a moment. `rate` in evaluations per second of late, `reached` the part of the
    way to the rule that ends the search, None where size does not tell. `is_over`: nobody works on the run any more."""

    run: str
    status: str
    rank_by: str
    evaluations: int
    failures: int
    replicas: int
    rate: float
    last_at: float | None
    steps: tuple[StepRecord, ...]
    reached: float | None
    is_over: bool


def glance(store: ResultStore, run: str) -> Glance:
    """How far a run is. Raises `UserError` when the store has none of that name."""
    record = record_of(store, run)
    of_search = pc.field("purpose").isin(["search", "race"])
    rows = store.table("evaluations", ["status", "finished_at", "replica"], run, of_search)
    statuses = Counter(rows["status"].to_pylist())
    times = rows["finished_at"].cast("int64").to_numpy()
    last_at = float(times.max()) / _MICROSECONDS if len(times) else None
    of_late = int((times > times.max() - _RATE_SECONDS * _MICROSECONDS).sum()) if len(times) else 0
    span = (
        (times.max() - max(times.min(), times.max() - _RATE_SECONDS * _MICROSECONDS)) / _MICROSECONDS if of_late else 0
    )
    steps = tuple(step_records(store.table("steps", run=run)))
    is_running = store.is_running(run)
    interrupted = record.status == "running" and not is_running
    return Glance(
        run=run,
        status="interrupted" if interrupted else "incomplete" if store.missing(record) else record.status,
        rank_by=str(section_of(record.config, "search").get("rank_by", "score")).upper(),
        evaluations=rows.num_rows,
        failures=rows.num_rows - statuses["ok"],
        replicas=len(pc.unique(rows["replica"])),
        rate=of_late / span if span > 0 else 0.0,
        last_at=last_at,
        steps=steps,
        reached=_reached(record, steps, _unquantized(store, record)),
        is_over=not is_running,
    )


def _unquantized(store: ResultStore, record: RunRecord) -> tuple[int, int]:
    """How many weights the searched components have, and their bits in all before anything is compressed."""
    of_model = pc.field("manifest_id") == (record.manifest_id or "")
    rows = store.table("components", ["num_weights", "dense_bits"], record.run, of_model).to_pylist()
    return sum(r["num_weights"] for r in rows), sum(r["num_weights"] * r["dense_bits"] for r in rows)


def _reached(record: RunRecord, steps: tuple[StepRecord, ...], unquantized: tuple[int, int]) -> float | None:
    """The part of the way from the unquantized model to the stop rule that the leader has come, by the rule that is
    nearest. `unquantized`: its weights, and their bits."""
    stop = section_of(record.config, "search").get("stop") or {}
    num_weights, num_bits = unquantized
    if not steps:
        return None
    last = steps[-1]
    parts = []
    for rule, value in (
        ("share", last.share),
        ("components", last.num_compressed),
        ("sparsity", last.sparsity),
    ):
        if stop.get(rule):
            parts.append(value / stop[rule])
    for rule, bits in (("bits_per_weight", num_weights), ("size_mb", 8e6)):
        if stop.get(rule) and num_bits > stop[rule] * bits:
            gone = num_bits - last.bits_per_weight * num_weights
            parts.append(gone / (num_bits - stop[rule] * bits))
    wanted = stop.get("active_bits_per_weight")
    if wanted and last.active_bits_per_weight is not None and num_bits > wanted * num_weights:
        own = num_bits / num_weights
        parts.append((own - last.active_bits_per_weight) / (own - wanted))
    return min(1.0, max(parts)) if parts else None


def watch(
    store: ResultStore,
    run: str,
    interval_seconds: float = 2.0,
    stream: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Glance:
    """Show a run until nobody works on it any more; the last glance. Raises `UserError` for an unknown run."""
    stream = stream or sys.stdout
    console = Console(file=stream)
    glances = _glances(store, run, interval_seconds, sleep)
    if not stream.isatty() or console.is_dumb_terminal:
        return _as_lines(glances, stream)
    found = next(glances)
    with Live(render(found), console=console, refresh_per_second=4, transient=False) as live:
        for found in glances:
            live.update(render(found))
    return found


def _glances(store: ResultStore, run: str, interval_seconds: float, sleep: Callable[[float], None]) -> Iterator[Glance]:
    while True:
        found = glance(store, run)
        yield found
        if found.is_over:
            return
        sleep(interval_seconds)


def _as_lines(glances: Iterator[Glance], stream: TextIO) -> Glance:
    """A line for each glance that shows anything new."""
    said = ""
    for found in glances:
        line = line_of(found)
        if line != said:
            print_shown(line, stream)
            said = line
    return found


def line_of(found: Glance) -> str:
    """A run in one line."""
    failed = f" ({found.failures} failed)" if found.failures else ""
    if not found.steps:
        return f"{found.run}: {found.status}, {found.evaluations} evaluations{failed}, no decision yet"
    step = found.steps[-1]
    value = metric_value(found.rank_by.lower(), step.score)
    return (
        f"{found.run}: {found.status}, step {step.step}, {found.evaluations} evaluations{failed}, "
        f"{step.share:.1%} of weights, {step.bits_per_weight:.2f} bits per weight, {value} on the search's prompts"
    )


def render(found: Glance) -> Group:
    """A run as a terminal shows it."""
    head = styled(found.run, "bold").append(f"  {found.status}", "not bold")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("step", "choice", "components", "share", "bits", found.rank_by):
        table.add_column(column, justify="left" if column == "choice" else "right", no_wrap=True, overflow="ellipsis")
    for step in found.steps[-_RECENT_DECISIONS:]:
        table.add_row(*map(styled, _cells(step)))
    parts: list[Any] = [head, table] if found.steps else [head, styled("no decision yet", "dim")]
    if found.reached is not None:
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            ProgressBar(total=1.0, completed=found.reached, width=_BAR_WIDTH), f"{found.reached:.0%} of the way"
        )
        parts.append(grid)
    return Group(*parts, styled(_effort(found), "dim"))


def _cells(step: StepRecord) -> list[str]:
    choice = step.perturbation or "chosen as a whole"
    size = [str(step.num_compressed), f"{step.share:.1%}", f"{step.bits_per_weight:.2f}"]
    return [str(step.step), choice, *size, number(step.score)]


def _effort(found: Glance) -> str:
    failed = f", {found.failures} failed" if found.failures else ""
    since = "" if found.last_at is None else f", the last {duration(time.time() - found.last_at)} ago"
    replicas = f"{found.replicas} replica{'' if found.replicas == 1 else 's'}"
    return f"{found.evaluations} evaluations{failed} on {replicas}{pace(found.rate)}{since}"
