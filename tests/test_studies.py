"""Studies: each on models whose answer is known, because the difference was planted or there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fakes import chance, evaluate, toy_components
from safetensors.torch import load_file, save_file
from tiny import write_model
from toy import ToyModel

import dtmsearch as dtm
from dtmsearch import config
from dtmsearch.analysis.named_queries import QUESTIONS
from dtmsearch.analysis.sql import query
from dtmsearch.cli import main
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, ModelSpec, Outcome, Provenance
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.core.statistics import kendall_tau, wilson_interval
from dtmsearch.errors import UserError
from dtmsearch.report.study_page import study_page
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.store.store import ResultStore
from dtmsearch.studies.bound import same_perplexity
from dtmsearch.studies.catalogue import STUDIES, Answer, study_of
from dtmsearch.studies.prompt_numbers import STATISTICS, agreement, prompts_needed
from dtmsearch.studies.square_root import constant_of
from dtmsearch.studies.study import search_files
from dtmsearch.workflows.weight_shapes import weight_shapes

Answering = Callable[[EvalRequest], EvalResult]
LENGTH = 100


def result(request: EvalRequest, harms: np.ndarray[Any, Any]) -> EvalResult:
    """What a plan of these harms [num_prompts] would measure."""
    nats = harms.astype(np.float32)
    fdt = np.floor(LENGTH * np.exp(-10 * harms)).astype(np.int32)
    asked = request.extra_metrics
    others = {name: nats for name in asked if name not in ("kl", "ppl")}
    return EvalResult(
        request.id,
        fdt=fdt,
        sdt=(LENGTH - fdt).astype(np.int32),
        dppl=np.exp(nats),
        kl=nats if "kl" in asked else None,
        ppl=np.exp(nats) if "ppl" in asked else None,
        others=others,
    )


def prompts_of(request: EvalRequest) -> list[int]:
    return list(range(*request.prompts))


def made(
    tmp_path: Path,
    name: str,
    answering: Answering,
    *overrides: str,
    texts: int = 1,
    parts: Sequence[str] = (),
    toy: type[ToyModel] = ToyModel,
) -> Answer:
    """A study of the toy model, which answers by `answering`."""
    files = [tmp_path / f"text{number}.txt" for number in range(texts)]
    for file in files:
        file.write_text("a text that nobody reads, long enough to hold all prompts\n" * 400)
    small = ("prompts.prompt_tokens=10", f"prompts.continuation_tokens={LENGTH}", *overrides)

    def opened(*_: object) -> ModelEvaluator:
        model = toy()
        model._answer = answering
        return cast(ModelEvaluator, model)

    return dtm.study(name, "toy", files, tmp_path / "store", overrides=small, parts=parts, evaluator=opened)


def shown(answer: Answer, table: int = 0) -> dict[str, tuple[str, ...]]:
    """First cell -> the other cells of a table."""
    return {row[0]: row[1:] for row in answer.findings.tables[table].rows}


def masked(harm_of_magnitude: float) -> Answering:
    """Components whose small weights do that harm, and random ones one that is drawn around 0.05."""

    def answering(request: EvalRequest) -> EvalResult:
        ((component, scheme),) = request.plan.entries
        drawn = [0.05 * (0.5 + chance(component, scheme, prompt)) for prompt in prompts_of(request)]
        same = [harm_of_magnitude * (0.5 + chance(component, prompt)) for prompt in prompts_of(request)]
        return result(request, np.array(drawn if scheme.startswith("random") else same))

    return answering


def test_discriminability_finds_a_planted_difference(tmp_path: Path) -> None:
    answer = made(tmp_path, "discriminability", masked(0.01), "prompts.count=64")
    assert shown(answer)["KL"][0].startswith("1.000") and shown(answer)["FDT"][0].startswith("1.000")


def test_discriminability_does_not_tell_what_does_the_same_harm(tmp_path: Path) -> None:
    answer = made(tmp_path, "discriminability", masked(0.05), "prompts.count=64")
    low, high = map(float, shown(answer)["KL"][0].partition("[")[2].rstrip("]").split(","))
    assert low < 0.5 < high


def test_a_mask_is_drawn_anew_for_every_block_of_prompts(tmp_path: Path) -> None:
    asked: list[tuple[str, tuple[int, int]]] = []

    def answering(request: EvalRequest) -> EvalResult:
        asked.append((request.plan.entries[0][1], request.prompts))
        return evaluate(request)

    made(tmp_path, "discriminability", answering, "prompts.count=16", "search.metrics=[kl]")
    assert set(asked) == {
        ("magnitude-0.001", (0, 16)),
        ("random-0.001-s0", (0, 8)),
        ("random-0.001-s1", (8, 16)),
    }


def test_several_masks_of_a_block_are_compared_on_its_prompts(tmp_path: Path) -> None:
    asked: list[tuple[str, tuple[int, int]]] = []

    def answering(request: EvalRequest) -> EvalResult:
        scheme = request.plan.entries[0][1]
        asked.append((scheme, request.prompts))
        # Of the two masks of each block the second does less harm than the removal of small weights.
        harm = {"magnitude-0.001": 0.02, "random-0.001-s0": 0.05, "random-0.001-s2": 0.05}.get(scheme, 0.01)
        return result(request, np.full(len(prompts_of(request)), harm))

    answer = made(tmp_path, "discriminability", answering, "prompts.count=16", "search.options={masks: 2}")
    assert ("random-0.001-s1", (0, 8)) in asked and ("random-0.001-s2", (8, 16)) in asked
    assert shown(answer)["KL"][0].startswith("0.500") and "with 2 masks" in answer.findings.tables[0].note


@pytest.mark.parametrize(
    ("lost", "masks", "num_prompts", "blocks"), [((0,), 1, 32, 3), ((0, 1, 2), 1, 32, 1), ((1, 2), 2, 32, 2)]
)
def test_blocks_whose_masks_were_measured_are_compared_whatever_others_lost(
    tmp_path: Path, lost: tuple[int, ...], masks: int, num_prompts: int, blocks: int
) -> None:
    """The masks `lost` failed with one component."""
    first = toy_components()[0].name

    def answering(request: EvalRequest) -> Outcome:
        ((component, scheme),) = request.plan.entries
        if component == first and scheme in {f"random-0.001-s{mask}" for mask in lost}:
            return EvalFailure(request.id, "nonfinite", "lost")
        return masked(0.01)(request)

    overrides = (f"prompts.count={num_prompts}", f"search.options={{masks: {masks}}}")
    answer = made(tmp_path, "discriminability", cast(Answering, answering), *overrides)
    assert f" {len(toy_components()) * blocks * masks:,} comparisons" in answer.findings.said[0]


def test_without_a_block_whose_masks_were_measured_nothing_is_compared(tmp_path: Path) -> None:
    def answering(request: EvalRequest) -> Outcome:
        if request.plan.entries[0][1].startswith("random"):
            return EvalFailure(request.id, "nonfinite", "lost")
        return evaluate(request)

    with pytest.raises(UserError, match="no block of prompts on which every component was measured"):
        made(tmp_path, "discriminability", cast(Answering, answering), "prompts.count=16")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_s_file_is_one_that_run_takes(name: str) -> None:
    for label, file in search_files(study_of(name), "some/model", ["a.txt", "b.txt"]):
        assert config.parse(file.to_yaml(), "written", Path.cwd()) == file
        assert file.run.startswith(f"{name}-model") and file.run.endswith(label)


def test_a_study_that_is_made_measures_nothing_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def answering(request: EvalRequest) -> EvalResult:
        asked.append(request.id)
        return masked(0.01)(request)

    first = made(tmp_path, "discriminability", answering, "prompts.count=16")
    number = len(asked)
    again = made(tmp_path, "discriminability", answering, "prompts.count=16")
    assert (len(asked), again.findings) == (number, first.findings)


def test_a_study_s_page_holds_its_sentences_and_draws_its_pictures(tmp_path: Path) -> None:
    answer = made(tmp_path, "discriminability", masked(0.01), "prompts.count=16")
    text, figures = study_page("A title", "A question?", answer.findings, answer.runs, "store")
    assert answer.findings.said[0].split(":")[0] in text.replace("&#39;", "'")
    assert [figure.name for figure in figures] == [picture.name for picture in answer.findings.pictures]
    assert all(figure.spec["layer"] for figure in figures)


def test_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--list", "--format", "json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == list(STUDIES)


def test_an_unknown_study_is_a_user_s_mistake() -> None:
    with pytest.raises(UserError, match="did you mean discriminability"):
        study_of("discriminabilty")


def test_held_out_text_is_refused_where_no_plan_is_judged() -> None:
    with pytest.raises(UserError, match="judges no plan"):
        search_files(study_of("discriminability"), "m", ["a.txt"], ["b.txt"])


def test_too_few_prompts_to_conclude_anything_are_refused_before_any_is_measured() -> None:
    with pytest.raises(UserError, match="study prompts needs 16 prompts at least, got 15"):
        search_files(study_of("prompts"), "m", ["a.txt"], (), ["prompts.count=15"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("search.options.blok=4", "did you mean 'block'"),
        ("search.options.block=0", "a whole number from 1 on"),
        ("search.options.block=64", "less than one block"),
        ("search.schemes=[int8-channel]", "tells a scheme from random pruning"),
    ],
)
def test_mistakes_in_a_study_s_options_are_the_user_s(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(tmp_path, "discriminability", evaluate, "prompts.count=16", change)


def test_wilson_s_interval_is_the_published_one() -> None:
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_kendall_s_tau_counts_pairs_and_ties() -> None:
    assert kendall_tau(np.array([1, 2, 3, 4]), np.array([1, 2, 4, 3])) == pytest.approx(4 / 6)
    assert kendall_tau(np.array([1, 2, 3]), np.array([3, 2, 1])) == -1.0
    assert kendall_tau(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(2 / np.sqrt(2 * 3))


def by_component(request: EvalRequest) -> EvalResult:
    """Harm adds up over components: each a drawn one, more for fewer bits, on every prompt a noisy part of it."""
    harms = np.zeros(len(prompts_of(request)))
    for component, scheme in request.plan.entries:
        bits = parse_scheme(scheme).bits or 4
        harm = 0.4 * (0.02 + chance(component)) * 4.0 ** (2 - bits)
        harms += harm * np.array([0.5 + chance(component, prompt) for prompt in prompts_of(request)])
    return result(request, harms)


def test_the_ladder_holds_the_bound_wherever_it_holds(tmp_path: Path) -> None:
    def answering(request: EvalRequest) -> EvalResult:
        found = by_component(request)
        least = 2.0 ** (found.sdt / LENGTH)  # the least DPPL that the bound allows
        return EvalResult(found.request_id, found.fdt, found.sdt, least.astype(np.float32), found.kl, None)

    answer = made(tmp_path, "bound", answering, "prompts.count=8", "search.metrics=[kl]")
    assert "holds on every one" in answer.findings.said[0]
    assert {row[-1] for row in answer.findings.tables[0].rows} == {"1.000"}


def test_a_broken_bound_is_said(tmp_path: Path) -> None:
    answer = made(tmp_path, "bound", by_component, "prompts.count=8", "search.metrics=[kl]")
    assert "is broken on" in answer.findings.said[0]


def test_plans_that_diverge_nowhere_have_a_bound_and_no_picture(tmp_path: Path) -> None:
    def answering(request: EvalRequest) -> EvalResult:
        zeros = np.zeros(len(prompts_of(request)))
        return replace(result(request, zeros), dppl=np.exp(zeros + 1).astype(np.float32))

    findings = made(tmp_path, "bound", answering, "prompts.count=16").findings
    assert "No plan diverged" in findings.said[-1] and not findings.pictures


def test_two_models_of_one_perplexity_differ_in_every_token() -> None:
    text = np.random.default_rng(3).integers(7, size=200)
    found = same_perplexity(text, 7)
    assert found.divergent == 200
    assert found.perplexities[0] == pytest.approx(found.perplexities[1], rel=1e-6)
    assert np.abs(found.logits - found.others).max() < 1e-5


def test_the_constant_of_the_square_root_is_that_of_gaussian_moves() -> None:
    """Logits of two likely tokens among many, moved by chance: divergence over sqrt(KL) as the density says."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(40_000, 8)) * 1.5
    moved = logits + 0.03 * random.normal(size=logits.shape)
    top = np.sort(logits, axis=1)
    ties = ((top[:, -1] - top[:, -2]) < 0.05).mean() / 0.05
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (logits, moved))
    p = np.exp(log_p)
    kl = (p * (log_p - log_q)).sum(axis=1).mean()
    share = (logits.argmax(axis=1) != moved.argmax(axis=1)).mean()
    predicted = constant_of(ties, 1.0 - (p * p).sum(axis=1).mean())
    assert share / np.sqrt(kl) == pytest.approx(predicted, rel=0.08)


def test_the_square_root_finds_a_planted_constant(tmp_path: Path) -> None:
    def answering(request: EvalRequest) -> EvalResult:
        harms = by_component(request).kl
        assert harms is not None
        sdt = np.round(LENGTH * 0.3 * np.sqrt(harms)).astype(np.int32)
        others = {"tie_density": np.full(len(sdt), 0.3, np.float32), "uncertainty": np.full(len(sdt), 0.5, np.float32)}
        return EvalResult(request.id, LENGTH - sdt, sdt, np.exp(harms), harms, None, others=others)

    answer = made(tmp_path, "square-root", answering, "prompts.count=16")
    assert answer.findings.said[0].startswith("Predicted from the base model alone: 0.339 [0.339, 0.339]")
    assert abs(float(answer.findings.said[1].partition(" is ")[2].split()[0]) - 0.3) < 0.02


def test_more_prompts_settle_a_ranking_that_there_is(tmp_path: Path) -> None:
    answer = made(tmp_path, "prompts", by_component, "prompts.count=64", "model.path=toy")
    points = {p["prompts"]: p["tau"] for p in answer.findings.pictures[0].rows if p["statistic"] == "KL"}
    assert points[32] > 0.8 and points[32] >= points[8] - 0.05


class Unordered(ToyModel):
    """Answers in an order of each reference's own, as several replicas may."""

    def submit(self, requests: Sequence[EvalRequest]) -> None:
        super().submit(sorted(requests, key=lambda request: chance(request.reference_id, request.plan.id)))


def test_components_are_ranked_alike_at_all_lengths_whatever_came_first(tmp_path: Path) -> None:
    def answering(request: EvalRequest) -> EvalResult:
        ((component, _),) = request.plan.entries
        return result(request, np.full(len(prompts_of(request)), 0.01 * (1 + chance(component))))

    lengths = ("half-continuation", "quarter-prompt")
    answer = made(tmp_path, "prompts", answering, "prompts.count=16", parts=lengths, toy=Unordered)
    between = next(t for t in answer.findings.tables if t.title.startswith("Rankings by KL on all prompts"))
    assert [row[1:] for row in between.rows] == [("1.00", "1.00"), ("1.00", "1.00")]


def test_a_ranking_that_there_is_not_needs_endless_prompts(tmp_path: Path) -> None:
    def answering(request: EvalRequest) -> EvalResult:
        return result(request, 0.01 * np.array([1 + chance(request.plan.id, p) for p in prompts_of(request)]))

    answer = made(tmp_path, "prompts", answering, "prompts.count=64")
    kl = next(row for row in answer.findings.tables[0].rows if row[0] == "KL")
    assert abs(float(kl[-2].split()[0])) < 0.5


def test_a_statistic_that_stands_at_its_limit_is_said_to_rank_nothing(tmp_path: Path) -> None:
    def answering(request: EvalRequest) -> EvalResult:
        found = by_component(request)
        return replace(found, fdt=np.full(len(found.fdt), LENGTH, np.int32), sdt=np.zeros(len(found.sdt), np.int32))

    answer = made(tmp_path, "prompts", answering, "prompts.count=32", parts=["main"])
    assert "is ranked by SDT or FDT mean or FDT 75th percentile" in answer.findings.said[0]
    assert {row[0]: row[-1] for row in answer.findings.tables[0].rows}["FDT mean"] == "- [-, -]"


def test_a_statistic_that_tells_one_component_from_all_others_ranks_nothing() -> None:
    """Two draws of prompts always agree on that one: a tau of 1 would be of no ranking."""
    losses = np.zeros((40, 16))
    losses[3] = 1.0
    assert np.isnan(agreement(losses, STATISTICS["SDT"][1], 8)).all()
    losses[:20] = 1.0
    assert (agreement(losses, STATISTICS["SDT"][1], 8) == 1.0).all()


def test_prompts_needed_are_those_that_two_noisy_rankings_agree_on() -> None:
    random = np.random.default_rng(0)
    truth, noise, agrees = random.normal(size=(200, 1)), 3.0, []
    for prompts in (20, round(prompts_needed(0.6, 20, 0.75))):
        halves = [truth[:, 0] + noise * random.normal(size=(200, prompts)).mean(axis=1) for _ in range(2)]
        agrees.append(kendall_tau(*halves))
    needed = prompts_needed(agrees[0], 20, 0.75)
    halves = [truth[:, 0] + noise * random.normal(size=(200, round(needed))).mean(axis=1) for _ in range(2)]
    assert kendall_tau(*halves) == pytest.approx(0.75, abs=0.05)


def test_a_plan_for_another_text_costs_where_texts_want_other_components(tmp_path: Path) -> None:
    """Prompts take turns: even ones are hurt by the first half of the components, odd ones by the rest."""

    def answering(request: EvalRequest) -> EvalResult:
        harms = np.zeros(len(prompts_of(request)))
        for component, scheme in request.plan.entries:
            hurts = 0 if "layers.0" in component else 1
            weight = 1.0 if scheme.startswith("int2") else 0.05
            harms += np.array([weight * (1.0 if prompt % 2 == hurts else 0.01) for prompt in prompts_of(request)])
        return result(request, 0.1 * harms)

    answer = made(tmp_path, "domains", answering, "prompts.count=32", texts=2)
    regret = {plan: [float(cell.split()[0]) for cell in cells] for plan, cells in shown(answer).items()}
    assert regret["text0"][0] == regret["text1"][1] == 1.0
    assert regret["text0"][1] > 1.3 and regret["text1"][0] > 1.3


def test_a_plan_holds_on_another_text_of_the_same_kind(tmp_path: Path) -> None:
    answer = made(tmp_path, "domains", by_component, "prompts.count=32", texts=2)
    assert float(shown(answer)["text0"][1].split()[0]) == pytest.approx(1.0, abs=0.05)


def test_what_a_metric_costs_is_told_apart_from_what_is_done_once(tmp_path: Path) -> None:
    seen: set[tuple[str, ...]] = set()

    def answering(request: EvalRequest) -> EvalResult:
        seconds = 1.0 + ("kl" in request.extra_metrics) + 2.0 * ("ppl" in request.extra_metrics)
        once = 0.0 if request.extra_metrics in seen else 5.0
        seen.add(request.extra_metrics)
        return replace(by_component(request), provenance=Provenance(wall_seconds=seconds + once))

    small = "search.schemes=[int8-channel, int6-channel, int4-channel]"
    answer = made(tmp_path, "metric-cost", answering, "prompts.count=8", small)
    assert {name: (cells[2], cells[3]) for name, cells in shown(answer).items()} == {
        "FDT, SDT, DPPL": ("1.00", "5.000"),
        "with KL": ("2.00", "5.000"),
        "with PPL": ("3.00", "5.000"),
        "with KL and PPL": ("4.00", "5.000"),
    }


def test_what_other_runs_measured_is_not_timed(tmp_path: Path) -> None:
    """Rows that a run takes over from others of its store have the seconds of those, beside other work."""

    def answering(request: EvalRequest) -> EvalResult:
        return replace(by_component(request), provenance=Provenance(wall_seconds=1.0))

    small = "search.schemes=[int8-channel, int6-channel, int4-channel]"
    alone = made(tmp_path, "metric-cost", answering, "prompts.count=8", small, "run=first")
    with pytest.raises(UserError, match="name a new store by --store"):
        made(tmp_path, "metric-cost", answering, "prompts.count=8", small, "run=second")
    assert "a model of 0.0 million" in alone.findings.said[0]


def test_the_order_by_a_metric_that_sees_the_harm_comes_to_the_better_plan(tmp_path: Path) -> None:
    """PPL is drawn by chance here: its order is another, and its plan worse."""

    def answering(request: EvalRequest) -> EvalResult:
        found = by_component(request)
        return replace(found, ppl=np.array([1 + chance(request.plan.id, p) for p in prompts_of(request)], np.float32))

    fine = ("search.schemes=[int4-channel]", "prompts.count=32", "validation.count=8", "search.options={percent: 50}")
    answer = made(tmp_path, "quantization-order", answering, *fine, parts=["order"])
    kl = {row[0]: float(row[-1].split()[0]) for row in answer.findings.tables[0].rows}
    assert kl["KL"] < kl["PPL"] and kl["KL"] == min(kl.values())
    assert "not surely worse than KL's (in KL) from 8 prompts" in answer.findings.said[1]


def test_rounds_are_held_beside_each_other_on_held_out_prompts(tmp_path: Path) -> None:
    def answering(request: EvalRequest) -> EvalResult:
        pruned = [parse_scheme(scheme).pruned_share * (0.1 + chance(name)) for name, scheme in request.plan.entries]
        return result(request, np.full(len(prompts_of(request)), 0.1 * sum(share**2 for share in pruned)))

    rounds = "search.rounds=[20, 20]"
    few = ("prompts.count=8", "validation.count=8", rounds)
    answer = made(tmp_path, "sparsity-rounds", answering, *few, parts=["uniform", "fdt75"])
    table = answer.findings.tables[0]
    assert [row[:3] for row in table.rows] == [
        ("20%", "fdt75", "no"),
        ("20%", "uniform", "no"),
        ("40%", "fdt75", "no"),
        ("40%", "uniform", "no"),
    ]


def test_the_rows_of_every_study_can_be_asked_for_by_name(tmp_path: Path) -> None:
    """As one question, for each takes a process."""
    made(tmp_path, "prompts", by_component, "prompts.count=16", parts=["main"])
    counts = [f'(SELECT count(*) FROM ({QUESTIONS[f"study-{name}"].sql})) AS "{name}"' for name in STUDIES]
    sql = f"SELECT {', '.join(counts)}".replace(":run", "'prompts-toy'")
    (rows,) = query(ResultStore(str(tmp_path / "store")), sql).to_pylist()
    assert rows["prompts"] == 6 and rows["bound"] == 6 and rows["quantization-order"] == 6


def test_outliers_are_found_where_they_were_planted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    (planted,) = [name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight")]
    tensors[planted][0, 0] = 50.0
    save_file(tensors, path, {"format": "pt"})
    shapes = weight_shapes(ModelSpec(str(folder), dtype="float32"), np.arange(12, dtype=np.int32).reshape(2, 6))
    worst = [
        max(shapes, key=lambda name: getattr(shapes[name], field)) for field in ("kurtosis", "weights_over_median")
    ]
    assert worst == [planted.removesuffix(".weight")] * 2
    assert all(shape.inputs_over_median >= 1.0 for shape in shapes.values())
