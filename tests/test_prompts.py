"""Windows of documents, drawn by seed."""

from __future__ import annotations

from typing import Any

import pytest

from dtmsearch.core.evaluation import PromptTokens
from dtmsearch.core.windows import Supply, TooLittleText, num_repeats
from dtmsearch.model.replica.prompts import Cutter


class Words:
    """A tokenizer whose tokens are numbers in the text; `opening` starts every text."""

    def __init__(self, opening: tuple[int, ...] = ()) -> None:
        self.opening = list(opening)

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        return {"input_ids": (self.opening if add_special_tokens else []) + [int(w) for w in text.split()]}


def numbers(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


def cut_prompts(
    texts: list[str], tokenizer: Any, count: int, prompt: int, continuation: int, seed: int,
    num_embeddings: int | None = None, *further: Any,
) -> PromptTokens:  # fmt: skip
    return Cutter(tokenizer, "a model", None, num_embeddings).prompts(
        texts, count, prompt, continuation, seed, *further
    )


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


def test_windows_are_cut_from_what_others_leave() -> None:
    text = [numbers(0, 5000)]
    search = cut_prompts(text, Words(), 15, 120, 80, 0)
    held_out = cut_prompts(text, Words(), 6, 100, 50, 0, None, [search.tokens])
    assert set(search.tokens.reshape(-1).tolist()) & set(held_out.tokens.reshape(-1).tolist()) == set()


def test_a_text_under_another_name_with_a_line_more_is_the_same_text() -> None:
    search = cut_prompts([numbers(0, 5000)], Words(), 15, 120, 80, 0)
    held_out = cut_prompts(
        [numbers(90_000, 90_033) + " " + numbers(0, 5000)], Words(), 6, 120, 80, 0, None, [search.tokens]
    )
    assert set(search.tokens.reshape(-1).tolist()) & set(held_out.tokens.reshape(-1).tolist()) == set()


def test_begin_tokens_do_not_hide_that_windows_are_the_same() -> None:
    text = [numbers(0, 400)]
    search = cut_prompts(text, Words((7777,)), 20, 6, 4, 0)
    held_out = cut_prompts(text, Words((7777,)), 20, 6, 4, 0, None, [search.tokens])
    assert {int(t) for t in search.tokens.reshape(-1)} & {int(t) for t in held_out.tokens.reshape(-1)} == {7777}


def test_other_text_is_cut_as_if_there_were_no_others() -> None:
    search = cut_prompts([numbers(0, 5000)], Words(), 15, 120, 80, 0)
    alone, apart = (cut_prompts([numbers(6000, 9000)], Words(), 6, 120, 80, 0, None, o) for o in ((), [search.tokens]))
    assert apart.tokens.tolist() == alone.tokens.tolist()


def test_what_others_leave_may_be_too_little() -> None:
    text = [numbers(0, 1000)]
    search = cut_prompts(text, Words(), 4, 120, 80, 0)
    with pytest.raises(TooLittleText, match=r"validation.count asks for 2 .* holds 1 of that length beside .*\(800 of"):
        cut_prompts(text, Words(), 2, 120, 80, 0, None, [search.tokens], "validation.count")


def test_one_document_many_times_is_counted() -> None:
    prompts = cut_prompts([numbers(0, 105)] * 50, Words(), 20, 60, 40, 0)
    assert (num_repeats(prompts.tokens), prompts.supply) == (19, Supply(50, 1, 5250, 0))


def test_windows_that_repeat_others_come_last() -> None:
    prompts = cut_prompts([numbers(0, 10)] * 90 + [numbers(10, 50)], Words(), 5, 6, 4, 0)
    assert num_repeats(prompts.tokens) == 0


class Tagged(Words):
    """As `Words`, with begin token 7777 and end token 8888; the tokenizer may put them around texts itself."""

    bos_token_id, eos_token_id, eos_token = 7777, 8888, "</s>"

    def __init__(self, opens: bool, closes: bool, chat_template: str | None = None) -> None:
        super().__init__((7777,) if opens else ())
        self.closing = [8888] if closes else []
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        ids = super().__call__(text, add_special_tokens)["input_ids"]
        return {"input_ids": ids + (self.closing if add_special_tokens else [])}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [{7777: "<s>", 8888: "</s>"}.get(i, f"word{i}") for i in ids]


def specials(prompts: PromptTokens) -> set[tuple[tuple[int, int], ...]]:
    """Where prompts have the begin or the end token: (position, token) pairs of each."""
    return {tuple((at, int(t)) for at, t in enumerate(row) if t in (7777, 8888)) for row in prompts.tokens}


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("text", ["{}", "7777 {}", "7777 {} 8888", "{} 8888 {}", "7777 7777 {} 8888 7777 {}"])
def test_a_prompt_has_the_begin_token_once_and_the_end_token_never(opens: bool, closes: bool, text: str) -> None:
    text = text.format(numbers(0, 50), numbers(50, 100))
    prompts = cut_prompts([text], Tagged(opens, closes), 5, 6, 4, 0)
    begins = opens or text.startswith("7777")
    assert specials(prompts) == {((0, 7777),) if begins else ()}


def test_a_text_with_end_tokens_holds_several_documents() -> None:
    text = f"{numbers(0, 15)} 8888 {numbers(100, 115)}"
    prompts = cut_prompts([text], Tagged(opens=False, closes=False), 2, 6, 4, 0)
    assert sorted(prompts.tokens[:, 0].tolist()) == [0, 100]


def test_an_end_token_that_the_chat_template_writes_ends_a_turn_and_stays() -> None:
    text = f"{numbers(0, 5)} 8888 {numbers(100, 104)}"
    prompts = cut_prompts([text], Tagged(False, False, "{{ message }}</s>"), 1, 6, 4, 0)
    assert prompts.tokens.tolist() == [[0, 1, 2, 3, 4, 8888, 100, 101, 102, 103]]


@pytest.mark.parametrize(("closes", "text", "said"), [(True, "{}", "ends texts with </s>"), (False, "7777 {}", "<s>")])
def test_what_is_cut_otherwise_than_the_text_has_it_is_noted(closes: bool, text: str, said: str) -> None:
    prompts = cut_prompts([text.format(numbers(0, 50))], Tagged(True, closes), 2, 6, 4, 0)
    assert said in " ".join(prompts.notes)


def test_a_plain_text_is_cut_without_notes() -> None:
    assert cut_prompts([numbers(0, 50)], Tagged(True, False), 2, 6, 4, 0).notes == ()


def test_prompts_as_short_as_the_opening_are_refused() -> None:
    with pytest.raises(ValueError, match="hold nothing of the text"):
        cut_prompts([numbers(0, 50)], Words((7777, 7778)), 2, 1, 1, 0)


def test_tokens_without_an_embedding_are_named() -> None:
    with pytest.raises(ValueError, match=r"98 \('word98'\), 99 \('word99'\), where the model has 98 rows"):
        cut_prompts([numbers(0, 100)], Tagged(False, False), 5, 6, 4, 0, 98)
