"""What a person sees: live progress in a terminal, plain lines elsewhere, and tables.

Progress goes to stderr, tables are text for stdout. Knows the types that an `Observer` is shown and nothing of
where they come from.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dtmsearch.analysis.format import components, duration, plain
from dtmsearch.console.printing import print_shown, styled
from dtmsearch.core.plan import Perturbation
from dtmsearch.search.protocols import Decision, Observer, Progress

log = logging.getLogger(__name__)

# Elsewhere than in a terminal: at most one progress line in this time.
_PLAIN_SECONDS = 5.0
_RECENT_DECISIONS = 5
_REFRESHES_PER_SECOND = 4
_BAR_WIDTH = 40
# So many tied components are named, and of more, as of a mixture's experts, how many there are.
_MOST_NAMED = 6


@contextmanager
def watching(quiet: bool = False, stream: TextIO | None = None) -> Iterator[Observer]:
    """An observer for the length of one search: live in a terminal, a line now and then elsewhere, notes alone if
    `quiet`."""
    stream = stream or sys.stderr
    console = Console(file=stream)
    if quiet:
        yield QuietProgress(stream)
    elif stream.isatty() and not console.is_dumb_terminal:
        live = LiveProgress()
        # Leaves nothing behind: what the search came to is printed after it.
        with Live(
            console=console, get_renderable=live.render, refresh_per_second=_REFRESHES_PER_SECOND, transient=True
        ):
            live.say = lambda text: console.print(*map(styled, text.split("\n")), sep="\n")
            yield live
    else:
        yield PlainProgress(stream)


class QuietProgress:
    """Says nothing but the notes, which a person has to know."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def on_progress(self, progress: Progress) -> None:
        pass

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        pass

    def on_note(self, text: str) -> None:
        print_shown(text, self.stream)


class LoggedProgress:
    """Tells Python's logging instead of a person: a record for each decision and note, at times for progress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.last_at = -_PLAIN_SECONDS

    def on_progress(self, progress: Progress) -> None:
        if self.clock() - self.last_at >= _PLAIN_SECONDS:
            self.last_at = self.clock()
            values = {key: value for key, value in vars(progress).items() if key != "decision"}
            log.info("progress", extra=values)

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        edge = None if decision.perturbation is None else str(decision.perturbation)
        values = {"step": decision.step, "plan": decision.plan.id, "perturbation": edge, "score": decision.score}
        measured = {"size": plain(decision.size), "summary": plain(decision.summary)}
        log.info("decision", extra=values | measured | {"replayed": replayed})

    def on_note(self, text: str) -> None:
        log.warning(text)


class PlainProgress(QuietProgress):
    """A line for each new decision, one for all replayed ones together, and a progress line now and then."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self.clock = clock
        self.last_line_at = clock()
        self.last_replayed: Decision | None = None

    def on_progress(self, progress: Progress) -> None:
        self._say_replayed()
        if self.clock() - self.last_line_at >= _PLAIN_SECONDS:
            self._say(progress_line(progress))

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        if replayed:
            self.last_replayed = decision
            return
        self._say_replayed()
        self._say(decision_line(decision))

    def _say_replayed(self) -> None:
        if self.last_replayed is not None:
            decision, self.last_replayed = self.last_replayed, None
            self._say(f"continued after {decision_line(decision)}")

    def _say(self, line: str) -> None:
        self.last_line_at = self.clock()
        self.on_note(line)


class LiveProgress:
    """The state that the live view draws; `say` prints a line above it."""

    def __init__(self) -> None:
        self.say: Callable[[str], None] = lambda text: None
        self.progress: Progress | None = None
        self.started_at = time.monotonic()
        self.recent: deque[Decision] = deque(maxlen=_RECENT_DECISIONS)

    def on_progress(self, progress: Progress) -> None:
        self.progress = progress

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        self.recent.append(decision)

    def on_note(self, text: str) -> None:
        self.say(text)

    def render(self) -> Group | Text:
        if self.progress is None:
            return styled(f"starting: loading the model, {duration(time.monotonic() - self.started_at)} so far")
        lines = [styled(decision_line(d), style="dim", no_wrap=True, overflow="ellipsis") for d in self.recent]
        done = done_share(self.progress)
        bar = ProgressBar(total=1.0, completed=done or 0.0, width=_BAR_WIDTH, pulse=done is None)
        status = styled(progress_line(self.progress), no_wrap=True, overflow="ellipsis")
        return Group(*lines, _side_by_side(bar, share_of_weights(self.progress.decision)), status)


def _side_by_side(bar: ProgressBar, text: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(bar, styled(text))
    return grid


def done_share(progress: Progress) -> float | None:
    """The part of the expected evaluations that is answered, from 0 to 1; None while nothing is known of the rest."""
    if progress.seconds_left is None:
        return None
    expected = progress.evaluations + max(progress.seconds_left, 0.0) * progress.evaluations_per_second
    return progress.evaluations / expected if expected else None


def share_of_weights(decision: Decision | None) -> str:
    if decision is None:
        return "nothing compressed yet"
    return (
        f"{decision.size.share:.1%} of weights compressed, FDT {decision.summary.fdt_mean:.1f}, "
        f"{decision.size.bits_per_weight:.2f} bits per weight"
    )


def _edge(perturbation: Perturbation) -> str:
    if len(perturbation.tied) < _MOST_NAMED:
        return str(perturbation)
    return f"{perturbation.component} and {len(perturbation.tied)} tied to it={perturbation.scheme}"


def decision_line(decision: Decision) -> str:
    """One line for a decision: its depth, the edge, and what the plan amounts to."""
    edge = "chosen as a whole" if decision.perturbation is None else _edge(decision.perturbation)
    size = decision.size
    return (
        f"step {decision.step}: {edge}  [{components(size.num_compressed)}, {size.share:.1%} of weights, "
        f"{size.bits_per_weight:.2f} bits per weight, FDT {decision.summary.fdt_mean:.1f}]"
    )


def progress_line(progress: Progress) -> str:
    recorded = f" ({progress.replayed} from the store)" if progress.replayed else ""
    left = "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"
    if progress.evaluations == progress.replayed and progress.in_flight:
        return f"step {progress.step}: {progress.in_flight} evaluations under way{recorded}, none has arrived yet"
    return (
        f"step {progress.step}: {progress.evaluations} evaluations{recorded}, {progress.in_flight} in flight, "
        f"{progress.evaluations_per_second:.1f} per second{left}"
    )
