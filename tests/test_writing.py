"""What models write, as text: pieces, margins, and which prompts are worth reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny import replica, with_reference, write_model

from dtmsearch.core.evaluation import PromptTokens
from dtmsearch.core.plan import Plan
from dtmsearch.core.variant import BASE, Variant
from dtmsearch.model.replica.samples import pieces
from dtmsearch.workflows.validate import telling_prompts


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    assert pieces(Bytes(), list(b"x"), list("aé".encode())) == ["a", "", "é"]


def test_bytes_that_are_no_text_come_marked_with_the_last_token() -> None:
    assert pieces(Bytes(), [], [*b"ab", 0xFF]) == ["a", "b", "\N{REPLACEMENT CHARACTER}"]


def test_the_least_and_the_most_robust_prompts_are_read() -> None:
    assert telling_prompts(np.array([5, 100, 0, 7, 9, 50, 3, 99, 98, 60], np.int32)) == [2, 6, 0, 4, 5, 8, 7, 1]


def test_of_few_prompts_each_is_read_once() -> None:
    assert sorted(telling_prompts(np.array([3, 1], np.int32))) == [0, 1]


def test_the_dense_plan_writes_the_base_models_text_again(tmp_path: Path) -> None:
    model = replica(write_model(tmp_path))
    reference = with_reference(model)
    for continuation in model.continuations(BASE, reference.id, [4, 1]):
        assert continuation.own.tokens == tuple(reference.continuation[continuation.prompt].tolist())
        assert continuation.own == continuation.base


def test_a_compressed_model_writes_what_it_generates(tmp_path: Path) -> None:
    model = replica(write_model(tmp_path))
    reference = with_reference(model)
    plan = Plan.uniform(model.manifest().components, "int2-channel")
    (written,) = model.continuations(Variant(plan), reference.id, [2])
    generated = model.generate(plan, PromptTokens(reference.text[2:3], reference.prompt_tokens))
    assert written.own.tokens == tuple(generated[0].tolist()) != written.base.tokens
