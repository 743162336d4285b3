"""What a run's summary says, and that it claims no more than was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import toy_components, toy_manifest
from reported import make_probe_run

from dtmsearch.analysis.pareto_runs import candidates
from dtmsearch.analysis.summary import RunSummary, runs_overview, summarize_run
from dtmsearch.console.run_text import overview_text, run_text
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome, Reference
from dtmsearch.core.metrics import summarize
from dtmsearch.core.numeric_mode import NumericMode
from dtmsearch.core.plan import Plan, plan_size
from dtmsearch.core.records import EvaluationRecord, Purpose, RunRecord, StepRecord, TrainingRecord
from dtmsearch.store.store import ResultStore, RunWriter

NUM_PROMPTS = 40
PLAN = Plan.of({c.name: "int4-g32" for c in toy_components()[:4]})
NEAREST = Plan.uniform(toy_components(), "int8-channel")
SEARCH, HELD_OUT = "search-reference", "held-out-reference"
RECORD = RunRecord("run", "finished", "", "/", "toy", SEARCH, HELD_OUT, PLAN.id, 1e9, 1e9 + 60, "0.1.0")


def result(request: EvalRequest, fdt: float, sdt: float = 10.0, kl: float | None = None) -> EvalResult:
    """Values around the given means, prompt by prompt the same wave."""
    wave = np.arange(NUM_PROMPTS) % 5 - 2
    return EvalResult(
        request.id,
        fdt=np.round(fdt + wave).astype(np.int32),
        sdt=np.round(sdt + wave).astype(np.int32),
        dppl=np.full(NUM_PROMPTS, 1.5, np.float32),
        kl=None if kl is None else (kl * (1 + wave / 10)).astype(np.float32),
    )


def request(plan: Plan, reference: str = HELD_OUT) -> EvalRequest:
    return EvalRequest(plan, reference, (0, NUM_PROMPTS))


def record(plan: Plan, label: str | None, outcome: Outcome, purpose: Purpose = "validation") -> EvaluationRecord:
    reference = HELD_OUT if purpose == "validation" else SEARCH
    return EvaluationRecord(request(plan, reference), outcome, purpose, label=label)


def write(place: Path, *records: EvaluationRecord, run: RunRecord = RECORD, steps: tuple[StepRecord, ...] = ()) -> None:
    with ResultStore(place).writer("run") as writer:
        fill(writer, *records, run=run, steps=steps)


def fill(writer: RunWriter, *records: EvaluationRecord, run: RunRecord, steps: tuple[StepRecord, ...]) -> None:
    writer.put_run(run)
    writer.put_components(toy_manifest(), toy_components())
    writer.append(records)
    writer.decide(steps)


def summary_of(place: Path, *records: EvaluationRecord) -> RunSummary:
    write(place, *records)
    return summarize_run(ResultStore(place), "run")


def measured(plan: Plan, label: str, fdt: float, sdt: float = 10.0, kl: float | None = None) -> EvaluationRecord:
    return record(plan, label, result(request(plan), fdt, sdt, kl))


def step(number: int, plan: Plan = PLAN) -> StepRecord:
    return StepRecord(number, plan.id, None, 90.0, number + 1, 0.25, 12.0, 0.0, 6 * number, 3.5)


def test_a_plans_fdt_is_that_on_all_prompts_not_that_of_a_block(tmp_path: Path) -> None:
    whole = request(PLAN, SEARCH)
    block = replace(whole, prompts=(0, 10))
    part = result(block, 20.0)
    part = replace(part, fdt=part.fdt[:10], sdt=part.sdt[:10], dppl=part.dppl[:10])
    records = [EvaluationRecord(block, part, "race", 0), EvaluationRecord(whole, result(whole, 50.0), "search", 0)]
    write(tmp_path, *records, steps=(step(0),))
    assert runs_overview(ResultStore(tmp_path))[0].fdt == 50.0


def test_the_verdict_speaks_the_metric_that_the_search_ranks_by(tmp_path: Path) -> None:
    small = Plan.uniform(toy_components(), "int4-g32")
    records = measured(PLAN, "plan", 60, kl=0.5), measured(small, "uniform:int4-g32", 50, kl=0.25)
    write(tmp_path, *records, run=replace(RECORD, config="search: {rank_by: kl}"))
    found = summarize_run(ResultStore(tmp_path), "run")
    assert (found.rank_by, found.rival) == ("kl", "uniform:int4-g32")
    assert "has a KL of 0.500 nats per token: worse than" in found.verdict


def test_a_failed_plan_makes_no_claim(tmp_path: Path) -> None:
    bad = measured(PLAN, "plan", 60)
    bad = replace(bad, outcome=EvalFailure(bad.request.id, "nonfinite", "prompt 3"))
    found = summary_of(tmp_path, bad, measured(NEAREST, "uniform:int8-channel", 50))
    assert "could not be measured" in found.verdict
    assert "nonfinite: prompt 3" in found.verdict


def held_out_reference() -> Reference:
    """The base model leaves its own continuation on every prompt at its second position."""
    agrees = np.ones((NUM_PROMPTS, 64), np.bool_)
    agrees[:, 1] = False
    tokens = np.zeros((NUM_PROMPTS, 70), np.int32)
    return Reference(HELD_OUT, "toy", NumericMode("float32", "cpu", "eager"), tokens, tokens[:, 6:], agrees, ())


def test_the_plan_and_the_base_model_are_held_against_the_noise_with_no_position_left_out(tmp_path: Path) -> None:
    plan = measured(PLAN, "plan", 60, sdt=3.0)
    assert isinstance(plan.outcome, EvalResult)
    counted = replace(
        plan.outcome, fdt_unmasked=np.ones(NUM_PROMPTS, np.int32), sdt_unmasked=plan.outcome.sdt.clip(min=0) + 1
    )
    write(tmp_path, replace(plan, outcome=counted))
    with ResultStore(tmp_path).writer("run") as writer:
        writer.share(held_out_reference())
    found = summarize_run(ResultStore(tmp_path), "run")
    assert found.noise is not None and found.noise.sdt_vs_base is not None
    assert (found.noise.sdt, found.noise.fdt, found.noise.plan_sdt) == (1.0, 1.0, 4.0)
    assert found.noise.sdt_vs_base.mean == 3.0
    assert "it diverges more than that" in found.verdict


def test_masked_values_alone_are_not_held_against_the_noise(tmp_path: Path) -> None:
    write(tmp_path, measured(PLAN, "plan", 60, sdt=3.0))
    with ResultStore(tmp_path).writer("run") as writer:
        writer.share(held_out_reference())
    found = summarize_run(ResultStore(tmp_path), "run")
    assert found.noise is not None and found.noise.sdt_vs_base is None
    assert "so they do not compare with it" in found.verdict


def test_plan_without_held_out_prompts_makes_no_claim(tmp_path: Path) -> None:
    write(tmp_path, run=replace(RECORD, validation_reference_id=None))
    assert summarize_run(ResultStore(tmp_path), "run").verdict.startswith("The plan was not measured on held-out")


def test_difference_is_the_plan_minus_the_other_paired_over_prompts(tmp_path: Path) -> None:
    plan = measured(PLAN, "plan", 60, sdt=7, kl=0.5)
    found = summary_of(tmp_path, plan, measured(NEAREST, "uniform:int8-channel", 50, sdt=9, kl=0.25))
    row = found.validation[1]
    assert row.fdt_vs_plan is not None and row.sdt_vs_plan is not None and row.kl_vs_plan is not None
    means = row.fdt_vs_plan.mean, row.sdt_vs_plan.mean, row.kl_vs_plan.mean
    assert means == (10.0, -2.0, pytest.approx(0.25))


def test_difference_of_what_was_not_measured_is_none(tmp_path: Path) -> None:
    found = summary_of(tmp_path, measured(PLAN, "plan", 60, kl=0.5), measured(NEAREST, "uniform:int8-channel", 50))
    assert found.validation[1].kl_vs_plan is None


def test_validation_holds_the_plan_first_then_others_from_large_to_small(tmp_path: Path) -> None:
    small = Plan.uniform(toy_components(), "int4-g32")
    found = summary_of(
        tmp_path,
        measured(small, "uniform:int4-g32", 30),
        measured(NEAREST, "uniform:int8-channel", 70),
        measured(PLAN, "plan", 50),
    )
    assert [row.label for row in found.validation] == ["plan", "uniform:int8-channel", "uniform:int4-g32"]


def test_validation_row_has_the_metrics_and_sizes(tmp_path: Path) -> None:
    plan = measured(PLAN, "plan", 60)
    (row,) = summary_of(tmp_path, plan).validation
    size = plan_size(PLAN, toy_components(), 16)
    assert isinstance(plan.outcome, EvalResult)
    assert row.summary == summarize(plan.outcome)
    assert (row.num_compressed, row.share, row.bits_per_weight) == (4, size.share, size.bits_per_weight)


def trained(place: Path) -> None:
    """A run whose plan was measured, trained, and measured again, by the search and on held-out prompts."""

    def measured(weights_id: str, fdt: float, purpose: Purpose, label: str | None) -> EvaluationRecord:
        asked = replace(request(PLAN, SEARCH if purpose == "search" else HELD_OUT), weights_id=weights_id)
        return EvaluationRecord(asked, result(asked, fdt), purpose, label=label)

    write(
        place,
        measured("", 10.0, "search", None),
        measured("trained", 20.0, "search", None),
        measured("", 10.0, "validation", "round-1"),
        measured("trained", 20.0, "validation", "plan"),
        measured("later", 30.0, "evaluate", "after"),
        steps=(StepRecord(0, PLAN.id, None, 5.0, 4, 0.5, 9.0, 0.0, 4, 12.5),),
    )
    with ResultStore(place).writer("run") as writer:
        writer.add([TrainingRecord(0, "training", PLAN.id, "", "trained", 1, 1, 1.0, (1.0,))])


def test_a_trained_plans_values_are_those_over_the_weights_that_it_ended_with(tmp_path: Path) -> None:
    trained(tmp_path)
    store = ResultStore(tmp_path)
    rows = {row.label: row.summary for row in summarize_run(store, "run").validation}
    assert {label: summary and summary.fdt_mean for label, summary in rows.items()} == {"plan": 20.0, "round-1": 10.0}
    assert runs_overview(store)[0].fdt == 20.0


def test_a_trained_plan_stands_once_on_the_front_as_it_ended(tmp_path: Path) -> None:
    trained(tmp_path)
    assert [c.fdt_mean for c in candidates(ResultStore(tmp_path))] == [20.0]


def test_final_plan_is_put_together_again(tmp_path: Path) -> None:
    assert summary_of(tmp_path, measured(PLAN, "plan", 60)).final_plan == PLAN


def test_a_run_says_whether_its_plan_can_be_written_at_its_size(tmp_path: Path) -> None:
    asymmetric = Plan.of({c.name: "int3-g64-asym" for c in toy_components()[:4]})
    write(tmp_path, measured(asymmetric, "plan", 50), run=replace(RECORD, final_plan_id=asymmetric.id))
    said = summarize_run(ResultStore(tmp_path), RECORD.run).written
    assert said is not None and said.startswith("no export writes it at its size, 3.30 bits per weight")


@pytest.mark.parametrize("kept", [{"transposed": True}, {"stacked": True}], ids=str)
def test_an_export_of_linear_layers_is_not_told_to_write_what_is_none(tmp_path: Path, kept: dict[str, bool]) -> None:
    components = tuple(replace(component, **kept) for component in toy_components())
    with ResultStore(tmp_path).writer(RECORD.run) as writer:
        writer.put_run(RECORD)
        writer.put_components(replace(toy_manifest(), components=components), components)
        writer.append([measured(PLAN, "plan", 50)])
    said = summarize_run(ResultStore(tmp_path), RECORD.run).written
    assert said is not None and "compressed-tensors (transformers)" not in said


def test_evaluations_are_those_of_the_search_and_failures_count_by_kind(tmp_path: Path) -> None:
    plans = [Plan.of({c.name: "nf4"}) for c in toy_components()[:3]]
    asked = [request(plan, SEARCH) for plan in plans]
    outcomes = [
        result(asked[0], 50),
        EvalFailure(asked[1].id, "out_of_memory", ""),
        EvalFailure(asked[2].id, "out_of_memory", ""),
    ]
    searched = [record(plan, None, outcome, "search") for plan, outcome in zip(plans, outcomes, strict=True)]
    found = summary_of(tmp_path, *searched, measured(PLAN, "plan", 60))
    assert (found.num_evaluations, found.failures) == (3, {"out_of_memory": 2})


def test_run_without_a_driver_that_counts_as_running_is_interrupted(tmp_path: Path) -> None:
    run = replace(RECORD, status="running", final_plan_id=None, finished_at=None)
    store = ResultStore(tmp_path)
    with store.writer("run") as writer:
        fill(writer, run=run, steps=())
        during = summarize_run(store, "run").interrupted
    assert (during, summarize_run(store, "run").interrupted) == (False, True)


def test_unknown_run_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"no run 'runn' .* it holds: run$"):
        summarize_run(ResultStore(tmp_path), "runn")


def test_overview_shows_the_last_decision(tmp_path: Path) -> None:
    searched = record(PLAN, None, result(request(PLAN, SEARCH), 55), "search")
    write(tmp_path, searched, steps=(step(0), step(1)))
    (line,) = runs_overview(ResultStore(tmp_path))
    assert (line.run, line.status, line.model, line.num_evaluations) == ("run", "finished", "toy", 1)
    assert (line.last_step, line.share, line.bits_per_weight, line.score, line.fdt) == (1, 0.25, 12.0, 90.0, 55.0)


def test_overview_gives_a_probe_no_size_as_if_it_had_a_plan(tmp_path: Path) -> None:
    (run,) = runs_overview(make_probe_run(tmp_path))
    assert run.last_step is not None
    assert (run.bits_per_weight, run.share, run.score, run.fdt) == (None, None, None, None)


def test_overview_names_the_value_on_held_out_prompts_beside_that_of_the_search(tmp_path: Path) -> None:
    records = [
        record(PLAN, None, result(request(PLAN, SEARCH), 55, kl=0.25), "search"),
        measured(PLAN, "plan", 60, kl=0.5),
    ]
    write(
        tmp_path, *records, run=replace(RECORD, config="search: {rank_by: kl}"), steps=(replace(step(0), score=0.25),)
    )
    (line,) = runs_overview(ResultStore(tmp_path))
    assert (line.rank_by, line.score, line.held_out) == ("kl", 0.25, pytest.approx(0.5))
    shown = overview_text([line])
    assert "KL 0.2500" in shown and "KL 0.5000" in shown


def test_the_verdict_in_brief_is_one_sentence_with_its_interval(tmp_path: Path) -> None:
    small = Plan.uniform(toy_components(), "int4-g32")
    records = measured(PLAN, "plan", 60, kl=0.5), measured(small, "uniform:int4-g32", 50, kl=0.25)
    write(tmp_path, *records, run=replace(RECORD, config="search: {rank_by: kl}"))
    found = summarize_run(ResultStore(tmp_path), "run")
    assert found.verdict.startswith(found.verdict_in_brief.rstrip(".").split("; its FDT")[0])
    assert "95% interval" in found.verdict_in_brief and "its FDT of" not in found.verdict_in_brief
    assert found.verdict_in_brief in run_text(found) and found.verdict in run_text(found, long=True)


def test_overview_of_a_run_that_has_decided_nothing_leaves_it_open(tmp_path: Path) -> None:
    write(tmp_path)
    (line,) = runs_overview(ResultStore(tmp_path))
    assert (line.last_step, line.share, line.score, line.fdt) == (None, None, None, None)


def test_the_rival_is_chosen_by_the_prompts_to_choose_by_and_reported_on_the_others(tmp_path: Path) -> None:
    schemes = ("int3-channel", "int4-channel")
    plans = {f"uniform:{scheme}": Plan.uniform(toy_components(), scheme) for scheme in schemes}
    chosen = []
    for (label, plan), fdt in zip(plans.items(), (55.0, 50.0), strict=True):
        asked = request(plan, "choice-reference")
        chosen.append(EvaluationRecord(asked, result(asked, fdt), "choice", label=label))
    reported = [measured(plan, label, fdt) for (label, plan), fdt in zip(plans.items(), (40.0, 45.0), strict=True)]
    run = replace(RECORD, choice_reference_id="choice-reference")
    write(tmp_path, measured(PLAN, "plan", 60), *chosen, *reported, run=run)
    found = summarize_run(ResultStore(tmp_path), "run")
    assert found.rival == "uniform:int3-channel"
    assert "with 40.00 (difference +20.00 tokens" in found.verdict
