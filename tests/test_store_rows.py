"""Records and their rows in the store: what goes in comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from contracts import make_record, make_request
from fakes import MODE, evaluate, toy_components, toy_manifest
from hypothesis import given
from hypothesis import strategies as st
from reported import make_run

from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Outcome, Provenance, Reference
from dtmsearch.core.metrics import summarize
from dtmsearch.core.plan import Plan, plan_size
from dtmsearch.core.records import EvaluationRecord, RunRecord, StepRecord
from dtmsearch.store.codecs import evaluations as evaluation_table
from dtmsearch.store.codecs import tables
from dtmsearch.store.codecs.evaluations import evaluations_table, summary_of
from dtmsearch.store.codecs.plans import PlanFigures, PlanRows, plan_of
from dtmsearch.store.store import ResultStore

TEXT = st.text('aZ0_. "\\\n\x00\u00e9\u4e2d\U0001f600', max_size=8)
MICROSECONDS = st.integers(0, 2**51).map(lambda us: us / 1_000_000)
FINITE = st.floats(allow_nan=False)


@given(
    st.lists(
        st.builds(
            RunRecord,
            run=TEXT,
            status=st.sampled_from(["running", "finished", "stopped", "failed"]),
            config=TEXT,
            config_folder=TEXT,
            manifest_id=st.none() | TEXT,
            reference_id=st.none() | TEXT,
            validation_reference_id=st.none() | TEXT,
            final_plan_id=st.none() | TEXT,
            created_at=MICROSECONDS,
            finished_at=st.none() | MICROSECONDS,
            version=TEXT,
            message=st.none() | TEXT,
        ),
        unique_by=lambda record: record.run,
    )
)
def test_run_records_come_back_from_their_rows(records: list[RunRecord]) -> None:
    in_order = sorted(records, key=lambda record: (record.created_at, record.run))
    assert tables.run_records(tables.runs_table(records)) == in_order


@given(
    st.lists(
        st.builds(
            StepRecord,
            step=st.integers(0, 2**31 - 1),
            plan_id=TEXT,
            perturbation=st.none() | TEXT,
            score=FINITE,
            num_compressed=st.integers(0, 2**31 - 1),
            share=FINITE,
            bits_per_weight=FINITE,
            sparsity=FINITE,
            evaluations=st.integers(0, 2**63 - 1),
            wall_seconds=FINITE,
        ),
        unique_by=lambda record: record.step,
    )
)
def test_step_records_come_back_from_their_rows(steps: list[StepRecord]) -> None:
    assert tables.step_records(tables.steps_table("run", steps)) == sorted(steps, key=lambda step: step.step)


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    provenance = Provenance(
        *(draw(TEXT), draw(TEXT), draw(st.integers(1, 9)), draw(FINITE), draw(st.integers(0, 2**62))),
        *(draw(MICROSECONDS), draw(TEXT)),
    )
    request_id = draw(TEXT)
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["replica_lost", "out_of_memory", "nonfinite", "invalid"]))
        return EvalFailure(request_id, kind, draw(TEXT), provenance)
    counts = st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3).map(lambda v: np.array(v, np.int32))
    floats = st.lists(st.floats(1.0, width=32), min_size=3, max_size=3).map(lambda v: np.array(v, np.float32))
    metrics = [draw(counts), draw(counts), draw(floats), draw(st.none() | floats), draw(st.none() | floats)]
    return EvalResult(request_id, *metrics, provenance, draw(st.none() | counts), draw(st.none() | counts))


def canonical(outcome: Outcome) -> tuple[object, ...]:
    if isinstance(outcome, EvalFailure):
        return (outcome,)
    arrays = (outcome.fdt, outcome.sdt, outcome.dppl, outcome.kl, outcome.ppl)
    arrays += (outcome.fdt_unmasked, outcome.sdt_unmasked)
    return (outcome.request_id, *(None if a is None else (a.dtype, a.tolist()) for a in arrays), outcome.provenance)


@given(st.lists(outcomes(), max_size=4))
def test_outcomes_come_back_from_their_rows(found: list[Outcome]) -> None:
    figures = PlanFigures(0, 0.0, 16.0)
    records = [EvaluationRecord(_RequestOf(o), o, "search") for o in found]  # type: ignore[arg-type]
    rows = evaluations_table("run", records, [figures] * len(found), "0.1.0")
    back = [outcome for batch in rows.to_batches() for outcome in evaluation_table.outcomes(batch)]
    assert [canonical(o) for o in back] == [canonical(o) for o in found]


class _RequestOf:
    """A request with the id of an outcome."""

    plan, parent, reference_id, prompts, weights_id = Plan(), Plan(), "reference", (0, 3), ""
    extra_metrics, calibrated_by = ("kl", "ppl"), ""

    def __init__(self, outcome: Outcome) -> None:
        self.id = outcome.request_id


@given(st.data())
def test_reference_comes_back_from_its_rows(data: st.DataObject) -> None:
    prompts, tokens, length = (data.draw(st.integers(1, 4)) for _ in range(3))
    token = st.integers(0, 2**31 - 1)

    def matrix(columns: int, values: st.SearchStrategy[Any], dtype: type) -> np.ndarray[Any, Any]:
        row = st.lists(values, min_size=columns, max_size=columns)
        return np.array(data.draw(st.lists(row, min_size=prompts, max_size=prompts)), dtype)

    reference = Reference(
        "id",
        "manifest",
        MODE,
        matrix(tokens + length, token, np.int32),
        matrix(length, token, np.int32),
        matrix(length, st.booleans(), np.bool_),
        tuple(data.draw(st.lists(token, max_size=3))),
    )
    back = tables.reference_of(tables.prompts_table(reference))
    for name in ("text", "continuation", "agrees", "base_agreement"):
        np.testing.assert_array_equal(getattr(back, name), getattr(reference, name), strict=True)
    for name in ("id", "manifest_id", "mode", "suppressed", "prompt_tokens"):
        assert getattr(back, name) == getattr(reference, name)


def test_components_come_back_from_their_rows() -> None:
    assert tables.components_of(tables.components_table(toy_manifest(), toy_components())) == toy_components()


SCHEMES = st.sampled_from(["dense", "int8-channel", "int4-g32-asym", "nf4", "llm-int8"])
PLANS = st.fixed_dictionaries({c.name: SCHEMES for c in (*toy_components(), *toy_manifest().others)}).map(Plan.of)


@given(st.lists(PLANS, max_size=4))
def test_figures_are_those_of_the_plan_over_the_searched_components(plans: list[Plan]) -> None:
    searched = toy_components()[1:]
    expected = [plan_size(plan, searched, 16) for plan in plans]
    found = PlanRows(toy_manifest(), searched).figures(plans)
    assert [(f.num_compressed, f.share, f.bits_per_weight) for f in found] == [
        (size.num_compressed, size.share, size.bits_per_weight) for size in expected
    ]


@given(st.lists(PLANS, max_size=4, unique_by=lambda plan: plan.id))
def test_plans_come_back_from_their_rows(plans: list[Plan]) -> None:
    rows = PlanRows(toy_manifest(), toy_components()).table(plans)
    assert [plan_of(rows.filter(pa.compute.equal(rows["plan_id"], p.id))) for p in plans] == plans


def test_failure_has_no_values() -> None:
    failure = EvalFailure(make_request(0).id, "out_of_memory", "no room")
    rows = evaluations_table("run", [make_record(0, failure)], [PlanFigures(1, 0.5, 8.0)], "0.1.0")
    measured = ["fdt_mean", "fdt_p50", "sdt_mean", "dppl", "ppl", "kl", "fdt", "sdt", "dppl_list", "kl_list"]
    assert rows.select(measured).to_pylist() == [dict.fromkeys(measured)]


def test_aggregates_are_those_of_the_metrics() -> None:
    outcome = evaluate(make_request(3))
    rows = evaluations_table("run", [make_record(3)], [PlanFigures(1, 0.5, 8.0)], "0.1.0")
    assert summary_of(rows.to_pylist()[0]) == summarize(outcome)


def test_a_row_holds_every_input_of_its_identity() -> None:
    plan, prompts = Plan.of({"a": "wanda-0.5"}), (0, 8)
    request = EvalRequest(plan, "reference", prompts, ("ppl", "kl"), calibration_id="text", weights_id="trained")
    record = EvaluationRecord(request, EvalFailure(request.id, "invalid", ""), "search")
    (row,) = evaluations_table("run", [record], [PlanFigures(1, 0.5, 8.0)], "0.1.0").to_pylist()
    extra, by = tuple(row["extra_metrics"]), row["calibration_id"]
    asked = (row["reference_id"], (0, row["num_prompts"]), extra, Plan(), by, row["weights_id"])
    assert EvalRequest(plan, *asked).id == row["evaluation_id"]


def test_a_plan_without_calibrated_schemes_has_no_calibration_in_its_row() -> None:
    request = EvalRequest(Plan.of({"a": "nf4"}), "reference", (0, 8), calibration_id="text")
    record = EvaluationRecord(request, EvalFailure(request.id, "invalid", ""), "search")
    (row,) = evaluations_table("run", [record], [PlanFigures(1, 0.5, 8.0)], "0.1.0").to_pylist()
    assert row["calibration_id"] is None


def test_component_and_scheme_name_a_plan_of_one_component_only() -> None:
    one, two = Plan.of({"a": "nf4"}), Plan.of({"a": "nf4", "b": "nf4"})
    requests = [EvalRequest(plan, "reference", (0, 8)) for plan in (Plan(), one, two)]
    records = [EvaluationRecord(r, EvalFailure(r.id, "invalid", ""), "search") for r in requests]
    rows = evaluations_table("run", records, [PlanFigures(0, 0.0, 16.0)] * 3, "0.1.0")
    assert rows.select(["component", "scheme"]).to_pylist() == [
        {"component": None, "scheme": None},
        {"component": "a", "scheme": "nf4"},
        {"component": None, "scheme": None},
    ]


def test_segments_from_before_a_column_was_added_are_read_with_nulls_in_it(tmp_path: Path) -> None:
    make_run(tmp_path)
    (path,) = (tmp_path / "evaluations" / "toy").glob("*.parquet")
    before = pq.read_table(path).drop_columns(["weights_id"])
    pq.write_table(before, path, write_page_checksum=True)
    opened_again = ResultStore(tmp_path)
    rows = opened_again.table("evaluations")
    assert rows["weights_id"].null_count == len(rows) and rows.drop_columns(["weights_id"]).equals(before)
    assert opened_again.notes == []


def test_components_from_before_it_was_written_how_the_model_keeps_them_are_read(tmp_path: Path) -> None:
    make_run(tmp_path)
    for path in (tmp_path / "components").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["transposed", "stacked"]), path, write_page_checksum=True)
    found = tables.components_of(ResultStore(tmp_path).table("components"))
    assert found and not any(component.transposed or component.stacked for component in found)
