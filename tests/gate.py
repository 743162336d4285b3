"""How far a process under test may go, and how fast it is: its side and the test's. No torch, for replicas on Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "DTMSEARCH_TEST_GATE"
# The speed of what evaluates and trains, in parts of what it is here: a machine of another speed, under which tests
# must hold as well. See docs/reliability.md.
SPEED_VARIABLE = "DTMSEARCH_TEST_SPEED"


class Gate:
    """How far the process under test may go: evaluate plans of so many components, so many evaluations, train so many
    steps. What no file bounds goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        return {VARIABLE: str(self.folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def bound(self, what: str, value: int) -> None:
        """`what`: components (of the plans that are evaluated), evaluations (of a process; of those that it begins at
        once a few more) or steps (of a training)."""
        partial = self.folder / f"{what}.new"
        partial.write_text(str(value))
        partial.replace(self.folder / what)

    def open(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def allows(self, what: str, value: int) -> bool:
        try:
            return value <= int((self.folder / what).read_text())
        except FileNotFoundError:
            return True


def gate_here() -> Gate | None:
    return Gate(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None


@contextmanager
def at_speed(least_seconds: float = 0.0) -> Iterator[None]:
    """The block takes its own time, at least so many seconds, divided by the speed; it gets no faster than it is."""
    speed, began = float(os.environ.get(SPEED_VARIABLE, "1")), time.perf_counter()
    yield
    spent = time.perf_counter() - began
    time.sleep(max(0.0, max(spent, least_seconds) / speed - spent))
