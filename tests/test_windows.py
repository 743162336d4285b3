"""Which windows repeat each other, and what of a text other windows hold."""

from __future__ import annotations

import numpy as np
import pytest

from dtmsearch.core.windows import SHARED_RUN, Tokens, num_repeats, num_touching, stretches, taken


def tokens(start: int, stop: int) -> Tokens:
    return np.arange(start, stop, dtype=np.int32)


def held(document: Tokens, *windows: Tokens, length: int = 100) -> list[int]:
    return document[taken([document], list(windows), length)[0]].tolist()


def test_what_a_window_was_cut_from_is_taken_to_its_last_token() -> None:
    assert held(tokens(0, 1000), tokens(200, 400)) == list(range(200, 400))


def test_a_copy_within_other_text_is_found_wherever_it_stands() -> None:
    other = np.concatenate([tokens(5000, 5037), tokens(200, 300), tokens(7000, 7200)])
    assert held(other, tokens(150, 400)) == list(range(200, 300))


@pytest.mark.parametrize(("run", "found"), [(SHARED_RUN - 1, 0), (SHARED_RUN, SHARED_RUN)])
def test_texts_are_the_same_from_so_many_tokens_in_a_row_on(run: int, found: int) -> None:
    document = np.concatenate([tokens(5000, 5100), tokens(200, 200 + run), tokens(7000, 7100)])
    assert len(held(document, tokens(150, 400))) == found


@pytest.mark.parametrize(("window", "length"), [(22, 100), (100, 22)])
def test_shorter_windows_are_the_same_as_a_whole(window: int, length: int) -> None:
    document = np.concatenate([tokens(5000, 5100), tokens(200, 222), tokens(7000, 7100)])
    assert held(document, tokens(200, 200 + window), length=length) == list(range(200, 222))


def test_no_run_spans_two_documents() -> None:
    found = taken([tokens(0, 30), tokens(30, 60)], [tokens(0, 60)], 100)
    assert [mask.tolist() for mask in found] == [[False] * 30] * 2


def test_nothing_is_taken_where_there_are_no_other_windows() -> None:
    assert held(tokens(0, 100)) == []


def test_stretches_are_what_lies_between() -> None:
    assert stretches(np.array([0, 0, 1, 1, 0, 1, 0, 0], np.bool_)) == [(0, 2), (4, 5), (6, 8)]


def test_stretches_of_a_mask_that_is_all_taken_or_empty_are_none() -> None:
    assert (stretches(np.ones(5, np.bool_)), stretches(np.zeros(0, np.bool_))) == ([], [])


def test_repeats_are_windows_that_stand_there_already() -> None:
    windows = np.stack([tokens(0, 9), tokens(1, 10), tokens(0, 9), tokens(0, 9)])
    assert num_repeats(windows) == 2


def test_windows_touch_where_they_share_text() -> None:
    windows = np.stack([tokens(at, at + 100) for at in (0, 140, 300)])
    assert num_touching(windows, np.stack([tokens(0, 200)])) == 2
