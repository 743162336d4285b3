"""What the search has asked for and has not got yet: what waits, what is only guessed, and over what replicas were
lost. Pure; knows nothing of replicas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dtmsearch.cluster.queue import RequestQueue
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import EvalRequest, Outcome

# So many replicas are lost over a request before it counts as failed.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class GivenUp:
    """A request over which too many replicas were lost."""

    request: EvalRequest
    attempts: int


class Work:
    """`real` and `guesses` are what waits; everything else that was asked for is under way on some replica."""

    def __init__(self, manifest: ModelManifest) -> None:
        self.real, self.guesses = RequestQueue(manifest), RequestQueue(manifest)
        self._guessed: set[str] = set()  # not answered, submitted as guesses only
        self._attempts: dict[str, int] = {}

    def add(self, requests: Sequence[EvalRequest]) -> None:
        """Requests that somebody waits for; a guess among them is a guess no longer, wherever it is."""
        ids = self._guessed.intersection(request.id for request in requests)
        self._guessed -= ids
        self.real.add([request for request in requests if request.id not in ids])
        self.real.add(self.guesses.remove(ids))

    def add_guesses(self, requests: Sequence[EvalRequest]) -> None:
        self._guessed |= {request.id for request in requests}
        self.guesses.add(requests)

    def has_suspect(self, requests: Iterable[EvalRequest]) -> bool:
        """Whether one of these may have killed replicas."""
        return any(request.id in self._attempts for request in requests)

    def is_waited_for(self, requests: Iterable[EvalRequest]) -> bool:
        """Whether one of these is more than a guess."""
        return any(request.id not in self._guessed for request in requests)

    def finished(self, outcome: Outcome) -> Outcome:
        """The outcome of a request, with the attempts that it took."""
        self._guessed.discard(outcome.request_id)
        attempts = self._attempts.pop(outcome.request_id, 0) + 1
        if attempts == outcome.provenance.attempts:
            return outcome
        return replace(outcome, provenance=replace(outcome.provenance, attempts=attempts))

    def again(self, requests: Iterable[EvalRequest], charged: bool) -> list[GivenUp]:
        """Requests whose replica was lost; those `charged` may be to blame, so they go out one by one from now on, and
        are given up after too many attempts."""
        given_up = []
        for request in requests:
            if charged:
                self._attempts[request.id] = self._attempts.get(request.id, 0) + 1
            if self._attempts.get(request.id, 0) < MAX_ATTEMPTS:
                queue = self.guesses if request.id in self._guessed else self.real
                queue.add([request], alone=charged)
                continue
            self._guessed.discard(request.id)
            given_up.append(GivenUp(request, self._attempts.pop(request.id)))
        return given_up
