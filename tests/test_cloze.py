"""Multiple-choice questions made of text, what models answer, and the study `tasks` that rests on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TEXT, measuring, write_model

from dtmsearch.core.cloze import CHOICES, KINDS, SPAN, answers_of, questions_of
from dtmsearch.core.plan import Plan
from dtmsearch.studies import tasks
from dtmsearch.studies.evidence import Measured
from dtmsearch.studies.tasks import Asked, agreement, concluded
from dtmsearch.workflows.asking import nats_of

CONTEXT = 10


def windows(count: int = 12, tokens: int = 258) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(0).integers(tokens, size=(count, CONTEXT + 4 * SPAN)).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_choice_is_what_the_text_has_and_no_other_is(kind: Any) -> None:
    text = windows()
    asked = questions_of(kind, text, CONTEXT)
    assert asked.num_questions == 12
    for window, question in zip(text, asked.rows.reshape(12, CHOICES, -1), strict=True):
        whole = "".join(chr(token) for token in window)
        right, *wrong = ("".join(chr(token) for token in row) for row in question)
        assert right in whole
        assert {row[:CONTEXT] for row in wrong} == {right[:CONTEXT]}
        assert right not in wrong


def test_a_question_whose_wrong_choice_is_the_right_one_is_left_out() -> None:
    text = windows()
    text[3, CONTEXT + SPAN : CONTEXT + 2 * SPAN] = text[3, CONTEXT : CONTEXT + SPAN]
    rows = questions_of("near", text, CONTEXT).rows.reshape(11, CHOICES, -1)
    assert [row.tolist() for row in rows[:, 0, CONTEXT:]] == [
        text[at, CONTEXT : CONTEXT + SPAN].tolist() for at in range(12) if at != 3
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_a_single_token_asks_nothing(kind: Any) -> None:
    assert questions_of(kind, np.full_like(windows(), 7), CONTEXT).num_questions == 0


def test_rare_words_stand_beside_words_as_rare() -> None:
    text = windows(tokens=40)
    text[:, CONTEXT + 3] = 50 + np.arange(12)  # once each
    rows = questions_of("word", text, CONTEXT).rows.reshape(12, CHOICES, -1)
    assert rows[:, 0, -1].tolist() == list(range(50, 62))
    assert set(rows[:, :, -1].flatten().tolist()) <= set(range(50, 62))


def test_likelihoods_of_choices_are_those_of_a_plain_pass(tmp_path: Path) -> None:
    model, _ = measuring(write_model(tmp_path))
    asked = questions_of("passage", windows(6), CONTEXT)
    found = nats_of(model, asked, Plan())
    import torch

    rows = torch.from_numpy(asked.rows).long()
    with torch.inference_mode():
        logits = model._body.model(rows).logits[:, CONTEXT - 1 : -1].float().log_softmax(2)
    wanted = -logits.gather(2, rows[:, CONTEXT:, None]).squeeze(2).mean(1)
    assert found == pytest.approx(wanted.numpy(), rel=1e-4)
    assert answers_of(found).tolist() == wanted.reshape(-1, CHOICES).argmin(1).tolist()


def plans(order: list[int], num: int = 200) -> list[Asked]:
    """Plans whose losses rise in every metric, and whose answers are worse in an order."""
    random = np.random.default_rng(0)
    found = []
    for place, harm in enumerate(order):
        flipped = (np.arange(num) < 10 * harm).astype(np.float64)
        losses = {name: 1.0 + place + 0.1 * random.random(40) for name in ("fdt", "sdt", "kl", "dppl", "ppl")}
        row = Measured({"bits_per_weight": 4.0})
        found.append(Asked(row, losses, dict.fromkeys(KINDS, 1.0 - flipped), dict.fromkeys(KINDS, flipped)))
    return found


def test_a_metric_that_orders_plans_as_their_answers_do_agrees_wholly() -> None:
    same, reverse = plans([1, 2, 3, 4, 5]), plans([5, 4, 3, 2, 1])
    assert agreement(same, "kl", [plan.flipped["word"] for plan in same])[0] == 1.0
    assert agreement(reverse, "kl", [plan.flipped["word"] for plan in reverse])[0] == -1.0


def test_what_is_said_names_the_base_model_and_the_metrics_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_RESAMPLES", 10)
    base = dict.fromkeys(KINDS, np.array([0] * 150 + [1] * 50))
    findings = concluded(plans([1, 2, 3, 4, 5]), base)
    assert "what follows (easy) 0.75" in findings.said[0]
    assert "1.00 [" in findings.said[2]
    assert [row[0] for row in findings.tables[0].rows] == ["FDT", "SDT", "KL", "DPPL", "PPL"]


def test_the_plan_that_changes_nothing_changes_no_answer(tmp_path: Path) -> None:
    model, _ = measuring(write_model(tmp_path))
    prompts, _ = model.cut_prompts([TEXT], 8, CONTEXT, 4 * SPAN, 0)
    asked = questions_of("near", prompts.tokens, CONTEXT)
    ruined = Plan.uniform(model.manifest().components, "int2-tensor")
    first, again, other = (answers_of(nats_of(model, asked, plan)) for plan in (Plan(), Plan(), ruined))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
