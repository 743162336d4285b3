"""What stands between the loop and its log."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes import Killed, KilledAfter, MemoryLog, evaluate, request_for, toy_components

from dtmsearch.core.evaluation import EvalRequest, Outcome
from dtmsearch.core.plan import Plan
from dtmsearch.search.memory import Memory, record_of
from dtmsearch.search.protocols import Ask

REQUESTS = [request_for(Plan.of({component.name: "nf4"}), Plan()) for component in toy_components()]


def recorded(*requests: EvalRequest) -> MemoryLog:
    log = MemoryLog()
    log.append([record_of(Ask(request), evaluate(request), "search") for request in requests])
    return log


class Counted(MemoryLog):
    """Counts the outcomes that are read."""

    read = 0

    def replay(self) -> Iterator[Outcome]:
        for record in self.records:
            self.read += 1
            yield record.outcome


def test_records_are_read_as_far_as_what_is_asked_for() -> None:
    log = Counted()
    log.records = recorded(*REQUESTS).records
    memory = Memory(log)
    memory.recall([REQUESTS[1].id])
    assert (log.read, REQUESTS[0].id in memory, REQUESTS[1].id in memory, len(memory)) == (2, True, True, 2)


def test_what_is_taken_is_held_no_longer() -> None:
    memory = Memory(recorded(REQUESTS[0]))
    memory.recall([REQUESTS[0].id])
    assert (memory.take(REQUESTS[0].id).request_id, len(memory)) == (REQUESTS[0].id, 0)


def test_what_the_log_did_not_take_is_not_known() -> None:
    memory = Memory(KilledAfter(MemoryLog(), 0))
    with pytest.raises(Killed):
        memory.write([record_of(Ask(REQUESTS[0]), evaluate(REQUESTS[0]), "search")])
    assert len(memory) == 0
