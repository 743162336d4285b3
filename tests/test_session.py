"""What every driver of replicas does before it measures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import MODE, toy_manifest

from dtmsearch.core.evaluation import PromptTokens, Reference
from dtmsearch.errors import UserError
from dtmsearch.workflows.session import Session

NOBODY: Any = None
TOKENS = np.zeros((4, 10), np.int32)


def session_of(results: Any, notes: list[str]) -> Session:
    observer: Any = SimpleNamespace(on_note=notes.append)
    return Session(NOBODY, results, NOBODY, NOBODY, toy_manifest(), observer)


def test_a_reference_of_a_base_model_that_disagrees_with_itself_is_refused_where_it_is_recorded_already() -> None:
    recorded = Reference("id", "toy", MODE, TOKENS, TOKENS[:, 5:], np.zeros((4, 5), np.bool_), ())
    results: Any = SimpleNamespace(reference=lambda _id: recorded)
    with pytest.raises(UserError, match=r"chooses only 0\.0% of the 20 tokens"):
        session_of(results, []).reference((PromptTokens(TOKENS, 5), "id"))


def test_what_prompts_leave_out_of_a_text_is_noted() -> None:
    recorded = Reference("id", "toy", MODE, TOKENS, TOKENS[:, 5:], np.ones((4, 5), np.bool_), ())
    results: Any = SimpleNamespace(reference=lambda _id: recorded)
    notes: list[str] = []
    session_of(results, notes).reference((PromptTokens(TOKENS, 5, ("without </s>",)), "id"))
    assert notes == ["without </s>"]
