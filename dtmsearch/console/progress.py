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
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dtmsearch.analysis.format import components, counted, duration, edge_in_words, plain
from dtmsearch.analysis.metric_text import metric_number, metric_value
from dtmsearch.console.printing import print_shown, styled
from dtmsearch.search.protocols import Decision, Observer, Progress

log = logging.getLogger(__name__)

# Elsewhere than in a terminal: at most one progress line in this time.
_PLAIN_SECONDS = 5.0
_RECENT_DECISIONS = 5
_REFRESHES_PER_SECOND = 4
_BAR_WIDTH = 40


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

    def on_stage(self, text: str, done: str = "") -> None:
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

    def on_stage(self, text: str, done: str = "") -> None:
        log.info("stage", extra={"stage": text, "done": done})

    def on_note(self, text: str) -> None:
        log.warning(text)


class PlainProgress(QuietProgress):
    """A line for each stage and each new decision, one for all replayed decisions together, and a line now and then
    that says how far it is."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self.clock = clock
        self.started_at = self.last_line_at = clock()
        self.stage = ""
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

    def on_stage(self, text: str, done: str = "") -> None:
        if text != self.stage or self.clock() - self.last_line_at >= _PLAIN_SECONDS:
            self.stage = text
            after = duration(self.clock() - self.started_at)
            self._say(f"after {after}: {text}{f', {done}' if done else ''}")

    def _say_replayed(self) -> None:
        if self.last_replayed is not None:
            decision, self.last_replayed = self.last_replayed, None
            self._say(f"continued after {decision_line(decision)}")

    def _say(self, line: str) -> None:
        self.last_line_at = self.clock()
        self.on_note(line)


@dataclass(frozen=True)
class _Stage:
    """What goes on beside evaluations, how far it is, and since when."""

    text: str
    done: str
    since: float


class LiveProgress:
    """The state that the live view draws; `say` prints a line above it."""

    def __init__(self) -> None:
        self.say: Callable[[str], None] = lambda text: None
        self.progress: Progress | None = None
        self.started_at = time.monotonic()
        self.stage: _Stage | None = None
        self.recent: deque[Decision] = deque(maxlen=_RECENT_DECISIONS)

    def on_progress(self, progress: Progress) -> None:
        self.progress, self.stage = progress, None

    def on_stage(self, text: str, done: str = "") -> None:
        goes_on = self.stage is not None and self.stage.text == text
        self.stage = _Stage(text, done, self.stage.since if self.stage and goes_on else time.monotonic())

    def on_decision(self, decision: Decision, replayed: bool) -> None:
        self.recent.append(decision)

    def on_note(self, text: str) -> None:
        self.say(text)

    def render(self) -> Group | Text:
        now = time.monotonic()
        begun = self.stage or _Stage("starting", "", self.started_at)
        said = [begun.text, *([begun.done] if begun.done else []), f"{duration(now - begun.since)} so far"]
        stage = styled(", ".join(said), no_wrap=True, overflow="ellipsis")
        if self.progress is None:
            return stage
        lines = [styled(decision_line(d), style="dim", no_wrap=True, overflow="ellipsis") for d in self.recent]
        if self.stage is not None:
            return Group(*lines, stage)
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
    """How far a search is: what its last decision compresses, scores and takes."""
    if decision is None:
        return "nothing compressed yet"
    return (
        f"{decision.size.share:.1%} of weights compressed, {_score(decision)}, "
        f"{decision.size.bits_per_weight:.2f} bits per weight"
    )


def decision_line(decision: Decision) -> str:
    """One line for a decision: its depth, the edge, and what the plan amounts to, the end of which a narrow window
    cuts."""
    edge = "chosen as a whole" if decision.perturbation is None else edge_in_words(str(decision.perturbation))
    size = decision.size
    return (
        f"step {decision.step}: {edge}  [{_score(decision)}, {size.bits_per_weight:.2f} bits per weight, "
        f"{size.share:.1%} of weights, {components(size.num_compressed)}]"
    )


def _score(decision: Decision) -> str:
    """A decision's value in the metric that its search ranks by."""
    return metric_value(decision.metric, decision.score)


def progress_line(progress: Progress) -> str:
    """The state of a search in one line."""
    recorded = f" ({progress.replayed} from the store)" if progress.replayed else ""
    stage = progress.stage or f"step {progress.step}"
    left = "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"
    if progress.evaluations == progress.replayed and progress.in_flight:
        begun = counted(progress.in_flight, "evaluation")
        return f"{stage}: {begun} under way{recorded}, none has arrived yet{_compared(progress)}"
    return (
        f"{stage}: {counted(progress.evaluations, 'evaluation')}{recorded}, {progress.in_flight} in flight"
        f"{pace(progress.evaluations_per_second)}{left}{_compared(progress)}"
    )


def pace(per_second: float) -> str:
    """How quickly evaluations come, in the unit in which that is a number above one; empty where none has come."""
    if per_second <= 0.0:
        return ""
    return f", {per_second:.1f} per second" if per_second >= 1.0 else f", {duration(1.0 / per_second)} each"


def _compared(progress: Progress) -> str:
    """The best so far against uniform, in the metric that ranks."""
    found = progress.against_uniform
    if found is None:
        return ""
    plan, uniform = metric_value(found.metric, found.plan), metric_number(found.metric, found.uniform)
    return f"; {plan} on the search's prompts, {found.scheme} everywhere {uniform}"
