"""What the search has asked for and not got: guesses that are asked for, and requests that replicas are lost over."""

from __future__ import annotations

from fakes import evaluate, request_for, toy_components, toy_manifest

from dtmsearch.cluster.outstanding import MAX_ATTEMPTS, Work
from dtmsearch.core.evaluation import EvalRequest
from dtmsearch.core.plan import Plan

REQUESTS = [request_for(Plan.of({c.name: "int4-g32"}), Plan()) for c in toy_components()]


def taken(work: Work) -> list[EvalRequest]:
    """Everything real that waits, taken out."""
    requests: list[EvalRequest] = []
    while len(work.real):
        requests += work.real.take(0.0, None)[0]
    return requests


def test_a_guess_that_is_asked_for_waits_no_longer_than_others() -> None:
    work = Work(toy_manifest())
    work.add_guesses(REQUESTS[:2])
    work.add(REQUESTS[1:3])
    assert ({r.id for r in taken(work)}, len(work.guesses)) == ({r.id for r in REQUESTS[1:3]}, 1)


def test_a_guess_under_way_that_is_asked_for_is_sent_no_second_time() -> None:
    work = Work(toy_manifest())
    work.add_guesses(REQUESTS[:1])
    work.guesses.take(1e9, None)
    work.add(REQUESTS[:1])
    assert (taken(work), work.is_waited_for(REQUESTS[:1])) == ([], True)


def test_a_guess_whose_replica_is_lost_is_a_guess_again() -> None:
    work = Work(toy_manifest())
    work.add_guesses(REQUESTS[:1])
    work.again(work.guesses.take(1e9, None)[0], charged=False)
    assert (len(work.real), len(work.guesses)) == (0, 1)


def test_what_replicas_are_lost_over_is_given_up_after_so_many() -> None:
    work = Work(toy_manifest())
    work.add(REQUESTS[:1])
    given_up = [work.again(taken(work), charged=True) for _ in range(MAX_ATTEMPTS)]
    assert [[each.attempts for each in lost] for lost in given_up] == [[], [], [MAX_ATTEMPTS]]


def test_what_nobody_blames_is_sent_again_for_ever() -> None:
    work = Work(toy_manifest())
    work.add(REQUESTS[:1])
    assert [work.again(taken(work), charged=False) for _ in range(2 * MAX_ATTEMPTS)] == [[]] * (2 * MAX_ATTEMPTS)


def test_an_outcome_says_how_many_attempts_it_took() -> None:
    work = Work(toy_manifest())
    work.add(REQUESTS[:1])
    work.again(taken(work), charged=True)
    assert work.finished(evaluate(REQUESTS[0])).provenance.attempts == 2
