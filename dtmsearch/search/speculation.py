"""Speculation at a round's end: an evaluator around another, which has replicas that would idle measure what the next
round will probably ask for. Results are keyed by content, so that a wrong guess costs only time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from dtmsearch.core.evaluation import EvalRequest, Outcome
from dtmsearch.search.eta import Workload
from dtmsearch.search.memory import Memory, record_of
from dtmsearch.search.protocols import Ask, Evaluator, Guessing, Offering, ResultLog, Strategy


class Speculating:
    """An `Evaluator` that guesses, where its strategy and the evaluator around which it stands know how; elsewhere it
    passes everything on.

    As many guesses as nobody has asked for yet can have been in vain: never more than `share` of the evaluations that
    the search will ask for in all, as it looks now. A guess that arrives before it is asked for is written, and held in
    the search's memory like any other result.
    """

    def __init__(
        self, evaluator: Evaluator, strategy: Strategy, log: ResultLog, memory: Memory, work: Workload, share: float
    ) -> None:
        self._evaluator, self._strategy, self._log = evaluator, strategy, log
        self._guessing = strategy if isinstance(strategy, Guessing) else None
        self._offering = evaluator if isinstance(evaluator, Offering) else None
        self._memory, self._work, self._share = memory, work, share
        self._guesses: dict[str, tuple[Ask, int]] = {}  # under way, asked for by nobody yet
        self._elsewhere: set[str] = set()  # what need not be guessed, for other runs have measured it

    def __len__(self) -> int:
        """Guesses under way."""
        return len(self._guesses)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._guesses

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        """Requests that somebody waits for from now on; a guess among them is none any longer."""
        self.withdraw([request.id for request in requests])
        self._evaluator.submit(requests)

    def withdraw(self, request_ids: Sequence[str]) -> None:
        """These are asked for, or answered by somebody else: what becomes of them as guesses is of no interest."""
        for request_id in request_ids:
            if request_id in self._guesses:
                self._work.drop(self._guesses.pop(request_id)[0].request)

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        """Outcomes that somebody waits for."""
        self._guess()
        arrived = {outcome.request_id: outcome for outcome in self._evaluator.poll(timeout_seconds)}
        guessed = [(*self._guesses.pop(i), outcome) for i, outcome in arrived.items() if i in self._guesses]
        self._memory.write([record_of(ask, outcome, ask.purpose, step) for ask, step, outcome in guessed])
        self._work.measure([ask.request for ask, _, _ in guessed])
        held = {ask.request.id for ask, _, _ in guessed}
        return [outcome for request_id, outcome in arrived.items() if request_id not in held]

    def _guess(self) -> None:
        if not self._share or self._guessing is None or self._offering is None:
            return
        to_be_asked = max(self._work.num_asked, self._strategy.expected_evaluations() or 0)
        allowed = int(self._share * to_be_asked) - len(self._memory) - len(self._guesses)
        most = min(allowed, self._offering.num_idle())
        if most <= 0:
            return
        new = (ask for ask in self._guessing.guesses() if not self._is_known(ask.request.id))
        guesses = {ask.request.id: ask for ask in islice(new, most)}
        self._elsewhere |= self._log.recorded_elsewhere(list(guesses)).keys()
        fresh = [ask for request_id, ask in guesses.items() if request_id not in self._elsewhere]
        self._guesses |= {ask.request.id: (ask, self._strategy.step + 1) for ask in fresh}
        self._work.begin([ask.request for ask in fresh])
        self._offering.submit_guesses([ask.request for ask in fresh])

    def _is_known(self, request_id: str) -> bool:
        return request_id in self._memory or request_id in self._guesses or request_id in self._elsewhere
