"""A search's last act: what is chosen on held-out prompts is reported on others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from fakes import FakeEvaluator, MemoryLog, toy_components, toy_manifest

from dtmsearch.config import SearchFile, parse
from dtmsearch.core.evaluation import EvalRequest, EvalResult, PromptTokens, Reference
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.search.baselines import uniform_rivals
from dtmsearch.search.protocols import Silent
from dtmsearch.search.space import SearchSpace
from dtmsearch.workflows.session import Session
from dtmsearch.workflows.text_windows import halves
from dtmsearch.workflows.validate import Judged, Validation, is_anything_chosen

SPACE = SearchSpace(toy_components(), ("int4-channel", "int8-channel"), budget=Budget(bits_per_weight=6.0))
PLAN = SPACE.uniform("int4-channel").with_(
    next(e for e in SPACE.perturbations(Plan()) if e.scheme == "int8-channel" and "k_proj" in e.component)
)
FILE = parse(
    """
run: toy
model: {path: model}
prompts: {files: [text.txt]}
search: {rank_by: kl, schemes: [int4-channel, int8-channel], stop: {bits_per_weight: 6.0}}
""",
    "toy.yaml",
    SimpleNamespace(),  # type: ignore[arg-type]
)
NUM_PROMPTS = 8


def reference(name: str) -> Reference:
    tokens = np.zeros((NUM_PROMPTS, 4), np.int32)
    mode = NumericMode("float32", "cpu", "sdpa", False, "float32")
    return Reference(name, toy_manifest().id, mode, tokens, tokens[:, 2:], np.ones((NUM_PROMPTS, 2), np.bool_), ())


CHOICE, REPORT = reference("choice"), reference("report")


def answer(request: EvalRequest) -> EvalResult:
    """The found plan is worse than the uniform one by the prompts to choose by, and better on the others."""
    luck = 1 if request.reference_id == CHOICE.id else -1
    kl = 0.3 + (0.1 * luck if request.plan.id == PLAN.id else 0.0)
    zeros = np.zeros(NUM_PROMPTS, np.int32)
    return EvalResult(request.id, zeros, zeros, np.ones(NUM_PROMPTS, np.float32), np.full(NUM_PROMPTS, kl, np.float32))


def keeping(min_fdt: float) -> SearchFile:
    stop = FILE.search.stop.model_copy(update={"min_fdt": min_fdt})
    return FILE.model_copy(update={"search": FILE.search.model_copy(update={"stop": stop})})


def judged(choice: Reference | None, log: MemoryLog, file: SearchFile = FILE) -> Judged:
    pool: Any = FakeEvaluator(answer, per_poll=8)
    nobody: Any = None
    session = Session(file, nobody, cast(Any, log), pool, toy_manifest(), Silent())
    validation = Validation(session, SPACE, choice, REPORT, ())
    calibrating: Any = SimpleNamespace(for_plans=lambda _: "")
    return validation.judge(PLAN, calibrating)


def test_a_plan_gives_way_by_other_prompts_than_it_is_reported_on() -> None:
    found = judged(CHOICE, MemoryLog())
    assert found.plan == SPACE.uniform("int4-channel")
    assert found.outcome.request_id == EvalRequest(found.plan, REPORT.id, (0, 8), ("kl", "ppl")).id


def test_what_is_reported_is_recorded_as_validation_and_the_rest_as_choice() -> None:
    log = MemoryLog()
    judged(CHOICE, log)
    purposes = {(record.purpose, record.request.reference_id) for record in log.records}
    assert purposes == {("choice", "choice"), ("validation", "report")}


def test_only_the_plan_and_its_rivals_are_measured_to_choose() -> None:
    log = MemoryLog()
    judged(CHOICE, log)
    plans = {record.request.plan.id for record in log.records if record.purpose == "choice"}
    assert plans == {PLAN.id, *(SPACE.uniform(s).id for s in (*uniform_rivals(SPACE, PLAN), "int4-channel"))}


def test_of_the_rivals_the_chosen_one_alone_is_reported_and_it_is_no_larger_than_what_takes_the_plans_place() -> None:
    log = MemoryLog()
    final = judged(CHOICE, log).plan
    others = {
        record.label: record.request.plan
        for record in log.records
        if record.purpose == "validation"
        and record.label not in ("plan", "base", "uniform:int4-channel", "uniform:int8-channel")
    }
    ((label, plan),) = others.items()
    assert label in {f"uniform:{s}" for s in uniform_rivals(SPACE, PLAN)}
    assert SPACE.size(plan).stored_bits <= 1.01 * SPACE.size(final).stored_bits


def test_without_prompts_to_choose_by_all_rivals_are_reported() -> None:
    log = MemoryLog()
    judged(None, log)
    assert {f"uniform:{s}" for s in uniform_rivals(SPACE, PLAN)} <= {record.label for record in log.records}


def test_nothing_gives_way_without_prompts_to_choose_by() -> None:
    assert judged(None, MemoryLog()).plan == PLAN


def test_a_plan_below_every_uniform_one_gives_way_to_none() -> None:
    assert is_anything_chosen(FILE, SPACE, PLAN, ())
    assert not is_anything_chosen(FILE, SPACE, Plan.of({c.name: "drop" for c in toy_components()}), ())


def test_a_plan_that_keeps_an_fdt_gives_way_to_none_but_its_rival_is_chosen() -> None:
    log = MemoryLog()
    found = judged(CHOICE, log, keeping(min_fdt=50.0))
    plans = {record.request.plan.id for record in log.records if record.purpose == "choice"}
    assert (found.plan, PLAN.id in plans, len(plans) > 0) == (PLAN, False, True)


def prompts(*rows: int) -> PromptTokens:
    return PromptTokens(np.array([[row] * 4 for row in rows], np.int32), 2)


def parts(*rows: int) -> list[list[int]] | None:
    found = halves(prompts(*rows))
    return None if found is None else [part.tokens[:, 0].tolist() for part in found]


def test_halves_share_no_prompt() -> None:
    assert parts(1, 2, 3, 4, 5) == [[1, 2], [3, 4, 5]]


def test_prompts_that_repeat_each_other_are_in_one_half() -> None:
    assert parts(1, 2, 3, 1, 1, 3) == [[1, 1, 1], [2, 3, 3]]


def test_one_prompt_many_times_has_no_halves() -> None:
    assert (parts(1, 1, 1, 1), parts(1)) == (None, None)
