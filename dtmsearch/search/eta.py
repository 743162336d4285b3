"""What evaluations cost, and how a session gets on with them: the time that is left.

By cost and not by count: candidates come in order of their layers, so that the first cost the most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from dtmsearch.core.evaluation import EvalRequest


class Workload:
    """Costs, in the units of `cost_of`, of all that a search asked for, of what is under way, and of what was measured
    in this session, which begins now. Of its requests, as many were asked for, measured in this session, and put
    together by the strategy from others' answers, as `num_asked`, `num_measured` and `num_put_together` say;
    `prompts_asked` are those that it asked for, each as often as it is run over."""

    def __init__(self, cost_of: Callable[[EvalRequest], float]) -> None:
        self._cost_of = cost_of
        self._asked = self._under_way = self._measured = 0.0
        self.prompts_asked = self.num_asked = self.num_measured = self.num_put_together = 0
        self._began_at = time.monotonic()
        self._measured_until = 0.0  # seconds from the beginning to the latest outcomes

    @property
    def seconds(self) -> float:
        """Of this session."""
        return time.monotonic() - self._began_at

    def ask(self, requests: Iterable[EvalRequest]) -> None:
        for request in requests:
            self._asked += self._cost_of(request)
            self.prompts_asked += request.prompts[1] - request.prompts[0]

    def put_together(self, num_asked: int, num_put_together: int) -> None:
        """So many requests came from the strategy, some of them with an answer that is recorded by it alone."""
        self.num_asked += num_asked
        self.num_put_together += num_put_together

    def begin(self, requests: Iterable[EvalRequest]) -> None:
        self._under_way += sum(self._cost_of(request) for request in requests)

    def drop(self, request: EvalRequest) -> None:
        """What is under way is waited for no more."""
        self._under_way -= self._cost_of(request)

    def measure(self, requests: Sequence[EvalRequest]) -> None:
        """What was under way is measured."""
        self.num_measured += len(requests)
        cost = sum(self._cost_of(request) for request in requests)
        self._measured += cost
        self._under_way -= cost
        if cost:
            self._measured_until = self.seconds

    def seconds_left(self, share_to_come: float) -> float | None:
        """For what is under way and `share_to_come` as much as was asked for; None before anything was measured. As of
        the latest outcomes: they come many at a time, and what was done since is still under way."""
        if not self._measured:
            return None
        left = self._under_way + max(share_to_come, 0.0) * self._asked
        return max(left * self._measured_until / self._measured - (self.seconds - self._measured_until), 0.0)
