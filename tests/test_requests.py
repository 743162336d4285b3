"""Requests: their identity, and how they cross a process border."""

from __future__ import annotations

import pickle
from contextlib import nullcontext

import numpy as np
import pytest

from dtmsearch.core.evaluation import METRICS_VERSION, EvalRequest, Reference, check_agreement
from dtmsearch.core.identity import identity
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan
from dtmsearch.errors import UserError

PLAN = Plan.of({"layers.0.q": "int8-channel"})
CALIBRATED = Plan.of({"layers.0.q": "gptq-int4-g128"})
START = ['reference "ü"', [0, 8], ["kl", "ppl"], METRICS_VERSION]


@pytest.mark.parametrize(
    ("plan", "calibration_id", "weights_id", "members"),
    [
        (PLAN, "", "", [{"schemes": {"rounding": 2}}]),
        (PLAN, "calibration", "", [{"schemes": {"rounding": 2}}]),
        (Plan(), "calibration", "", []),
        (Plan.of({"lm_head": "int8-channel"}), "", "", [{"schemes": {"head": 2, "rounding": 2}}]),
        (CALIBRATED, "calibration", "", ["calibration", {"schemes": {"gptq": 2}}]),
        (
            Plan.of({"layers.0.a": "wanda-0.5", "layers.0.b": "nf4"}),
            "calibration",
            "trained",
            ["calibration", {"weights": "trained"}],
        ),
    ],
)
def test_an_identity_is_that_of_what_determines_the_value(
    plan: Plan, calibration_id: str, weights_id: str, members: list[object]
) -> None:
    request = EvalRequest(plan, str(START[0]), (0, 8), ("ppl", "kl"), Plan(), calibration_id, weights_id)
    assert request.id == identity([plan.id, *START, *members])


@pytest.mark.parametrize("head", ["head", "output_projection", "lm_head.decoder", "model.embed_in"])
def test_divergences_of_plans_that_change_the_head_are_anew_and_nothing_else(head: str) -> None:
    """Whatever the head is called."""
    plan = Plan.of({head: "int8-channel"})
    request = EvalRequest(plan, str(START[0]), (0, 8), ("ppl", "kl"))
    assert request.id == identity([plan.id, *START, {"schemes": {"head": 2, "rounding": 2}}])
    without = EvalRequest(plan, str(START[0]), (0, 8), ("ppl",))
    rest = [START[0], [0, 8], ["ppl"], METRICS_VERSION]
    assert without.id == identity([plan.id, *rest, {"schemes": {"rounding": 2}}])


def test_a_request_comes_out_of_another_process_as_it_went_in() -> None:
    request = EvalRequest(PLAN, "reference", (0, 8), (), Plan.of({"layers.1.q": "nf4"}))
    assert request.changed and request.plan.schemes
    again = pickle.loads(pickle.dumps(request))
    assert (again, again.id, again.changed, again.plan.schemes) == (
        request,
        request.id,
        request.changed,
        {"layers.0.q": "int8-channel"},
    )


@pytest.mark.parametrize(("differing", "refused"), [(0, False), (10, False), (11, True), (100, True)])
def test_a_base_model_must_agree_with_itself_on_nine_tokens_of_ten(differing: int, refused: bool) -> None:
    agrees = (np.arange(100) >= differing).reshape(10, 10)
    tokens = np.zeros((10, 20), np.int32)
    reference = Reference("r", "m", NumericMode("bfloat16", "cpu", "sdpa"), tokens, tokens[:, :10], agrees, ())
    remedy = r"in bfloat16 .* model\.dtype: float32"
    with pytest.raises(UserError, match=remedy) if refused else nullcontext():
        check_agreement(reference)
