"""Ray with a virtual clock, for `utilisation.py`: actors whose calls take no time here, and what they say there.

Only what the pool and its parts use. Time goes on when somebody waits: to the next call that ends, or to the end of
the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from dtmsearch.cluster.placement import Share


class Clock:
    """In the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic
    perf_counter = monotonic


class Answer:
    """In the place of an object reference: a value that is there from `at` on."""

    def __init__(self, value: Any, at: float) -> None:
        self.value, self.at = value, at


class VirtualRay:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def wait(self, answers: Sequence[Answer], num_returns: int = 1, timeout: float | None = None) -> tuple[Any, Any]:
        clock = self._clock
        first = sorted(answer.at for answer in answers)[num_returns - 1]
        if first > clock.now and timeout:
            clock.now = min(first, clock.now + timeout)
        return [answer for answer in answers if answer.at <= clock.now], []

    def get(self, answers: Answer | Sequence[Answer]) -> Any:
        return answers.value if isinstance(answers, Answer) else [answer.value for answer in answers]

    def put(self, value: Any) -> Any:
        return value


class VirtualActor:
    """Does its calls one after the other. `seconds_of(method, arguments)` is how long one takes."""

    def __init__(self, clock: Clock, replica: Any, seconds_of: Callable[[str, tuple[Any, ...]], float]) -> None:
        self._clock, self._replica, self._seconds_of = clock, replica, seconds_of
        self._free_at = 0.0
        self.evaluating = 0.0
        self.checking = 0.0
        for method in ("load", "take", "call"):
            setattr(self, method, SimpleNamespace(remote=getattr(self, f"_{method}")))

    def _answer(self, value: Any, seconds: float) -> Answer:
        self._free_at = max(self._free_at, self._clock.now) + seconds
        return Answer(value, self._free_at)

    def _load(self, *_: Any) -> Answer:
        return self._answer(("virtual", 0), 0.0)

    def _take(self, *_: Any) -> Answer:
        return self._answer(0.0, 0.0)

    def _call(self, method: str, *arguments: Any) -> Answer:
        seconds = self._seconds_of(method, arguments)
        self.evaluating += seconds if method == "evaluate" else 0.0
        self.checking += seconds if method == "check" else 0.0
        return self._answer(getattr(self._replica, method)(*arguments), seconds)


@contextmanager
def virtual_pool(
    clock: Clock, actors: list[VirtualActor], start: Callable[[], VirtualActor], replicas: int
) -> Iterator[None]:
    """Within the block a pool runs in virtual time; `actors` collects those that it starts."""

    def start_host(*_: Any) -> Any:
        actor = start()
        actors.append(actor)
        return SimpleNamespace(actor=actor, placed=Answer(None, 0.0), group=None, end=lambda: None, leave=lambda: None)

    doubles: dict[str, dict[str, Any]] = {
        "pool": {
            "ray": VirtualRay(clock),
            "time": clock,
            "connect": lambda _: False,
            "_share": lambda _: Share(num_gpus=0.0, num_cpus=1.0),
        },
        "crew": {
            "ray": VirtualRay(clock),
            "time": clock,
            "start_host": start_host,
            "WantedReplicas": lambda *_: SimpleNamespace(wanted=replicas, count_again=lambda: None),
            "Patience": lambda _: SimpleNamespace(note=lambda *_: None),
        },
        "services": {"ray": VirtualRay(clock)},
        "canaries": {"time": clock},
    }
    with ExitStack() as patches:
        for module, names in doubles.items():
            patches.enter_context(patch.multiple(f"dtmsearch.cluster.{module}", **names))
        yield
