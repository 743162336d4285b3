"""Metrics by name: the built-in ones, and one of an installed package (tests/plugins/dtmsearch-top5)."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from inprocess import run_here
from tiny import TEXT, replica, result, with_reference, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dtmsearch as dtm
from dtmsearch.analysis.verdict import ValidationRow, verdict
from dtmsearch.config import parse
from dtmsearch.console.run_text import validation_table
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, Speed, combine
from dtmsearch.core.metric_registry import ALWAYS, BUILT_IN, METRICS, Metric, mean_of_positions
from dtmsearch.core.metrics import rank_key, summarize
from dtmsearch.core.plan import Plan
from dtmsearch.core.records import EvaluationRecord
from dtmsearch.core.statistics import PairedDifference
from dtmsearch.errors import UserError
from dtmsearch.report.facts import gather
from dtmsearch.search.strategies.generator import mean_loss
from dtmsearch.search.strategies.racing import Racing
from dtmsearch.store.codecs.evaluations import evaluations_table, outcomes, summary_of, with_metric
from dtmsearch.store.codecs.plans import PlanFigures
from dtmsearch.workflows.estimate import candidate_seconds
from dtmsearch.workflows.lookup import UNIFORM

PACKAGE = Path(__file__).parent / "plugins" / "dtmsearch-top5"
SCHEME = "int3-g16"


@pytest.fixture
def top5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example of a metric in a package of its own, as pip leaves it."""
    information = tmp_path / "site" / "dtmsearch_top5-0.1.0.dist-info"
    information.mkdir(parents=True)
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    ((name, point),) = project["entry-points"]["dtmsearch.metrics"].items()
    (information / "entry_points.txt").write_text(f"[dtmsearch.metrics]\n{name} = {point}\n")
    monkeypatch.syspath_prepend(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    yield
    METRICS.remove("top5")
    sys.modules.pop("dtmsearch_top5", None)


@pytest.fixture
def added() -> Iterator[list[str]]:
    """Names of metrics that a test adds, which are gone after it."""
    names: list[str] = []
    yield names
    for name in names:
        METRICS.remove(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def search_file(search: str) -> str:
    return f"run: a\nmodel: {{path: m}}\nprompts: {{files: [t.txt]}}\nsearch: {search}\n"


def a_result(top5: float, num_prompts: int = 4) -> EvalResult:
    nothing = np.zeros(num_prompts, np.int32)
    values = np.full(num_prompts, top5, np.float32)
    return EvalResult("id", nothing, nothing, np.ones(num_prompts, np.float32), others={"top5": values})


def test_what_is_measured_always_and_on_request_comes_from_the_registry() -> None:
    assert [(name, METRICS[name].name) for name in METRICS if name in BUILT_IN] == [(name, name) for name in BUILT_IN]
    assert set(ALWAYS) < set(BUILT_IN)


def test_losses_are_less_where_a_plan_is_better() -> None:
    values = np.array([1.0, np.e], np.float32)
    assert METRICS["fdt"].losses(values).tolist() == [-1.0, -float(np.float32(np.e))]
    assert METRICS["dppl"].losses(values).tolist() == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(("metric", "bounded"), [("fdt", True), ("sdt", True), ("kl", True), ("ppl", False)])
def test_losses_from_zero_need_a_bound_that_is_none_of_logarithms(metric: str, bounded: bool) -> None:
    assert (METRICS[metric].loss_from_zero(100) is not None) == bounded


def test_a_name_that_is_no_column_s_name_is_refused() -> None:
    with pytest.raises(UserError, match="small letters, digits and _, such as top5, got 'Top-5'"):
        Metric("Top-5", lambda outputs: outputs.nll[:, 0])


@pytest.mark.usefixtures("top5")
def test_a_search_file_ranks_by_the_metric_of_an_installed_package() -> None:
    search = parse(search_file("{rank_by: top5, metrics: [kl], schemes: [nf4]}"), "search.yaml", Path()).search
    assert (search.rank_by, search.metrics) == ("top5", ("kl",))


def test_an_unknown_metric_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match="no metric 'klx'; did you mean kl"):
        parse(search_file("{rank_by: klx, schemes: [nf4]}"), "search.yaml", Path())


@pytest.mark.parametrize("metric", ["starts8", "clear8", "tie_density", "uncertainty"])
def test_what_is_neither_better_nor_worse_ranks_no_search(metric: str) -> None:
    with pytest.raises(UserError, match=f"of which more or less is better, got {metric}: measure it beside"):
        parse(search_file(f"{{rank_by: {metric}, schemes: [nf4]}}"), "search.yaml", Path())


@pytest.mark.usefixtures("top5")
def test_the_metric_of_a_package_is_part_of_an_evaluation_s_identity_with_its_version() -> None:
    request = EvalRequest(Plan.of({"a": "nf4"}), "reference", (0, 8), ("top5",))
    before = request.id
    METRICS.remove("top5")
    METRICS.add("top5", Metric("top5", lambda outputs: mean_of_positions(outputs.nll), version=2))
    assert EvalRequest(request.plan, "reference", (0, 8), ("top5",)).id != before


def test_identities_with_this_package_s_own_metrics_are_what_they_were() -> None:
    plan = Plan.of({"model.layers.0.mlp.up_proj": "int8-channel"})
    request = EvalRequest(plan, "reference", (0, 8), ("kl", "ppl"))
    assert request.id == EvalRequest(request.plan, "reference", (0, 8), ("ppl", "kl")).id
    assert request.id == "a081e798c7e9462fcae596c487a6b3ad"  # as version 0.1.0 has it


@pytest.mark.usefixtures("top5")
def test_top5_agreement_is_that_of_the_two_models_logits(model: Path) -> None:
    ours = replica(model)
    reference = with_reference(ours)
    plan = Plan.uniform(ours.manifest().components, SCHEME)
    measured = result(ours.evaluate([EvalRequest(plan, reference.id, (0, 6), ("top5",))])[0])
    tokens = torch.from_numpy(np.concatenate([reference.text[:, :10], reference.continuation], axis=1)).long()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = base(tokens).logits[:, 9:-1].topk(5).indices
        found = dtm.apply(plan, base)(tokens).logits[:, 9:-1].topk(5).indices
    shares = [
        [len(set(a) & set(b)) / 5 for a, b in zip(*rows, strict=True)]
        for rows in zip(found.tolist(), expected.tolist(), strict=True)
    ]
    np.testing.assert_allclose(measured.metrics["top5"], np.mean(shares, axis=1), rtol=1e-6)


@pytest.mark.usefixtures("top5")
def test_the_base_model_agrees_with_itself_and_other_metrics_stay_the_same(model: Path) -> None:
    ours = replica(model)
    reference = with_reference(ours)
    plain, beside = (
        result(ours.evaluate([EvalRequest(Plan(), reference.id, (0, 6), metrics)])[0])
        for metrics in (("kl",), ("kl", "top5"))
    )
    assert beside.others["top5"].tolist() == [1.0] * 6
    assert plain.kl is not None and beside.kl is not None and plain.kl.tolist() == beside.kl.tolist()


@pytest.mark.usefixtures("top5")
def test_more_agreement_ranks_first() -> None:
    better, worse = summarize(a_result(0.9)), summarize(a_result(0.8))
    assert rank_key(better, "top5") < rank_key(worse, "top5")
    assert mean_loss(a_result(0.9), "top5") < mean_loss(a_result(0.8), "top5")


@pytest.mark.usefixtures("top5")
def test_results_of_ranges_join_up() -> None:
    joined = combine("id", [a_result(0.5, 2), a_result(1.0, 2)])
    assert joined.metrics["top5"].tolist() == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.usefixtures("top5")
def test_a_bounded_metric_of_a_package_races() -> None:
    losses = Racing("top5", 1, 0.99, 100).loss_of(np.array([1.0, 0.25], np.float32))
    assert losses.tolist() == [0.0, 0.75]


@pytest.mark.usefixtures("top5")
def test_its_values_come_back_from_their_rows() -> None:
    request = EvalRequest(Plan.of({"a": "nf4"}), "reference", (0, 4), ("top5",))
    found, failed = a_result(0.75), EvalFailure(request.id, "invalid", "no")
    records = [EvaluationRecord(request, outcome, "search") for outcome in (found, failed)]
    rows = evaluations_table("run", records, [PlanFigures(1, 1.0, 4.0)] * 2, "1").combine_chunks()
    back = next(outcomes(rows.to_batches()[0]))
    assert isinstance(back, EvalResult) and back.others["top5"].tolist() == [0.75] * 4
    assert summary_of(rows.to_pylist()[0]) == summarize(found)
    shown = with_metric(rows, "top5").select(["top5", "top5_list"])
    assert shown.to_pylist() == [{"top5": 0.75, "top5_list": [0.75] * 4}, {"top5": None, "top5_list": None}]


@pytest.mark.usefixtures("top5")
def test_a_verdict_speaks_of_the_metric_that_a_search_ranked_by() -> None:
    def row(label: str, top5: float, difference: PairedDifference | None) -> ValidationRow:
        vs = {} if difference is None else {"top5": difference}
        return ValidationRow(label, label, 3, 4.0, 1.0, summarize(a_result(top5)), None, others_vs_plan=vs)

    rows = [row("plan", 0.9, None), row("uniform:int4-g32", 0.8, PairedDifference(0.1, 0.05, 0.15, 0.95))]
    said = verdict(rows, "top5", 100)
    assert "has a top-5 agreement of 0.900: better than the best uniform plan" in said
    assert "+0.100 [+0.050, +0.150]" in validation_table(rows, "top5")


@pytest.mark.usefixtures("top5")
def test_a_metric_that_needs_the_base_model_costs_its_head_once_more() -> None:
    speed = Speed(1.0, 1.0, 0.5, 0.1, 0.25, 1.0, 1.0, 1, "device")
    assert candidate_seconds(speed, 1.0, 4, ("top5",)) == candidate_seconds(speed, 1.0, 4, ("kl",))


def test_a_metric_that_makes_no_number_for_each_position_is_told_so(model: Path, added: list[str]) -> None:
    def whole(logits: torch.Tensor, base_logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return logits

    added.append("logits")
    METRICS.add("logits", Metric("logits", lambda outputs: outputs.nll[:, 0], at_positions=whole))
    ours = replica(model)
    reference = with_reference(ours)
    (outcome,) = ours.evaluate([EvalRequest(Plan(), reference.id, (0, 6), ("logits",))])
    assert isinstance(outcome, EvalFailure) and outcome.kind == "invalid"
    assert re.fullmatch(r"metric logits made \[\d+, 258\] of \d+ positions, wanted .* as many", outcome.message)


@pytest.mark.parametrize(
    ("made", "said"), [(lambda o: o.nll, "[6, 12], wanted [6]"), (lambda o: o.nll[:2, 0], "[2], wanted [6]")]
)
def test_a_metric_that_makes_no_number_for_each_prompt_is_told_so(
    model: Path, added: list[str], made: object, said: str
) -> None:
    added.append("odd")
    METRICS.add("odd", Metric("odd", made))  # type: ignore[arg-type]
    ours = replica(model)
    reference = with_reference(ours)
    (outcome,) = ours.evaluate([EvalRequest(Plan(), reference.id, (0, 6), ("odd",))])
    assert (
        isinstance(outcome, EvalFailure)
        and outcome.message == f"metric odd made an array of {said}: a number for each prompt"
    )


def test_a_value_that_is_no_number_is_a_failure(model: Path, added: list[str]) -> None:
    added.append("infinite")
    METRICS.add("infinite", Metric("infinite", lambda outputs: np.full(len(outputs.nll), np.nan)))
    ours = replica(model)
    reference = with_reference(ours)
    (outcome,) = ours.evaluate([EvalRequest(Plan(), reference.id, (0, 6), ("infinite",))])
    assert isinstance(outcome, EvalFailure) and outcome.kind == "nonfinite"
    assert outcome.message == "metric infinite is no finite number on 6 of 6 prompts"


@pytest.mark.usefixtures("top5")
def test_a_model_in_memory_is_measured_by_it(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = dtm.measure(
        loaded, tokenizer, TEXT, UNIFORM + SCHEME, count=4, prompt_tokens=8, continuation_tokens=8, metrics=["top5"]
    )
    assert found.per_prompt["top5"].to_numpy().mean() == pytest.approx(found.summary.value("top5"))


@pytest.mark.usefixtures("top5")
def test_a_whole_search_ranks_by_it_and_its_store_is_asked_for_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "held_out.txt").write_text(TEXT[::-1])
    file = tmp_path / "search.yaml"
    file.write_text(
        f"run: ranked\nmodel: {{path: {model}, dtype: float32}}\n"
        "prompts: {files: [text.txt], count: 8, prompt_tokens: 8, continuation_tokens: 8}\n"
        "validation: {files: [held_out.txt], count: 8}\n"
        "search: {strategy: greedy, rank_by: top5, schemes: [int2-g16], stop: {components: 2}}\n"
    )
    run_here(file, tmp_path / "store")
    store = dtm.open_store(tmp_path / "store")
    found = store.query(
        "SELECT e.top5, e.top5_list, s.score FROM steps s JOIN evaluations e ON e.plan_id = s.plan_id "
        "AND e.purpose = 'search' ORDER BY s.step"
    )
    assert isinstance(found, pa.Table) and found["top5"].to_pylist() == found["score"].to_pylist()
    assert [np.mean(values) for values in found["top5_list"].to_pylist()] == pytest.approx(found["score"].to_pylist())
    assert "has a top-5 agreement of" in store.open_run("ranked").verdict
    facts = gather(store, "ranked")
    assert facts.metrics[0] == "top5" and all("top5" in row for row in facts.path)


def test_top1_is_the_share_of_human_text_that_the_model_chooses(model: Path) -> None:
    ours = replica(model)
    reference = with_reference(ours)
    (outcome,) = ours.evaluate([EvalRequest(Plan(), reference.id, (0, 6), ("top1",))])
    tokens = torch.from_numpy(reference.text).long()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits[:, :-1]
    logits[..., list(reference.suppressed)] = -torch.inf
    agrees = (logits.argmax(dim=-1) == tokens[:, 1:]).double().mean(dim=1)
    assert isinstance(outcome, EvalResult)
    assert outcome.others["top1"].tolist() == pytest.approx(agrees.tolist(), abs=1e-6)


def test_ties_and_uncertainty_are_those_of_the_models_own_distribution() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0], [2.0, 1.0, 0.0]])
    ties, uncertainty = METRICS["tie_density"].at_positions, METRICS["uncertainty"].at_positions
    assert ties is not None and uncertainty is not None
    assert ties(logits, logits, None).tolist() == [4.0, 0.0]  # one within a quarter of a nat
    expected = 1.0 - logits.softmax(dim=1).square().sum(dim=1)
    assert uncertainty(logits, logits, None).tolist() == pytest.approx(expected.tolist())


def test_metrics_for_studies_are_in_no_list() -> None:
    assert "top1" in METRICS and "top1" not in list(METRICS)
