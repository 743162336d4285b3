"""Windows of documents, drawn by seed."""

from __future__ import annotations

from typing import Any

import pytest

from dtmsearch.model.replica.prompts import cut_prompts


class Words:
    """A tokenizer whose tokens are numbers in the text; `opening` starts every text."""

    def __init__(self, opening: tuple[int, ...] = ()) -> None:
        self.opening = list(opening)

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        return {"input_ids": (self.opening if add_special_tokens else []) + [int(w) for w in text.split()]}


def numbers(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


def test_windows_do_not_overlap() -> None:
    prompts = cut_prompts([numbers(0, 100)], Words(), 10, 6, 4, 0)
    assert sorted(prompts.tokens.reshape(-1).tolist()) == list(range(100))


def test_no_window_spans_two_documents() -> None:
    prompts = cut_prompts([numbers(0, 15), numbers(100, 115)], Words(), 2, 6, 4, 0)
    assert sorted(prompts.tokens[:, 0].tolist()) == [0, 100]


def test_the_seed_draws() -> None:
    first, second = (cut_prompts([numbers(0, 1000)], Words(), 5, 6, 4, seed) for seed in (0, 1))
    assert first.tokens.tolist() != second.tokens.tolist()


def test_more_prompts_extend_fewer() -> None:
    few, many = (cut_prompts([numbers(0, 1000)], Words(), count, 6, 4, 0) for count in (5, 9))
    assert many.tokens[:5].tolist() == few.tokens.tolist()


def test_a_tokenizers_opening_token_opens_every_window() -> None:
    prompts = cut_prompts([numbers(0, 90)], Words((7777,)), 10, 6, 4, 0)
    assert set(prompts.tokens[:, 0].tolist()) == {7777}


def test_too_little_text_says_how_many_prompts_there_are() -> None:
    with pytest.raises(ValueError, match="asks for 11 prompts of 6 \\+ 4 tokens, but the text holds 10"):
        cut_prompts([numbers(0, 109)], Words(), 11, 6, 4, 0)
