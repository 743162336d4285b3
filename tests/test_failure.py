"""Why a run failed, as its user says it."""

from __future__ import annotations

from dtmsearch.analysis.failure import failed_evaluations, headline

NODE = "c8f8e3b1a2d4c8f8e3b1a2d4c8f8e3b1a2d4c8f8e3b1a2d4c8f8e3b1"
DIED = (
    "5 replicas in a row did not start; the last: The actor died unexpectedly before finishing this task.\n"
    f"\tclass_name: Host\n\tactor_id: {NODE}\n\tpid: 4711\n\tip: 10.0.0.7\n"
    f"The actor died because its node has died. Node Id: {NODE}"
)


def test_a_lost_machine_is_said_in_words_and_without_ids() -> None:
    assert headline(DIED) == "5 replicas in a row did not start; the last: the machine was lost"


def test_too_little_memory_is_said_as_such() -> None:
    said = headline("3 replicas in a row did not start; the last: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert said.endswith("the last: a GPU had not enough memory for the model and a batch")


def test_of_a_traceback_its_last_line_tells() -> None:
    message = (
        "3 replicas in a row did not start; the last: Traceback (most recent call last):\n  x\nKeyError: 'model.norm'"
    )
    assert headline(message) == "3 replicas in a row did not start; the last: KeyError: 'model.norm'"


def test_a_message_of_ours_stays_as_it_is() -> None:
    message = "every candidate of round 3 failed: nonfinite"
    assert headline(message) == message


def test_ids_of_nodes_are_left_out_of_any_message_and_addresses_stay() -> None:
    assert headline(f"no answer from 10.0.0.7:6379 (node {NODE}) in 60 s") == "no answer from 10.0.0.7:6379 in 60 s"


def test_words_that_hold_oom_are_no_lack_of_memory_and_ids_of_ours_stay() -> None:
    message = f"run 'b' began with another model: manifest {'0eb5' * 8}, now at models/bloom-560m"
    assert headline(message) == message


def test_kinds_of_failed_evaluations_have_words() -> None:
    assert failed_evaluations({"replica_lost": 1, "nonfinite": 2}) == [
        "1 plan given up, since replica after replica was lost over it",
        "2 plans without finite numbers (the plan breaks the model)",
    ]
