"""The studies `sampling` and `speculative`: a tiny model whose samples share their noise, and planted divergences."""

from __future__ import annotations

from pathlib import Path
from typing import cast
from zlib import crc32

import numpy as np
import pytest
from fakes import toy_manifest
from inprocess import here
from tiny import TEXT, llama_config, write_model
from toy import ToyModel

from dtmsearch.core.evaluation import EvalRequest, EvalResult
from dtmsearch.core.metric_registry import METRICS, PromptOutputs
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.studies.catalogue import Answer, make, study_of
from dtmsearch.studies.sampling import most_divergence
from dtmsearch.studies.speculative import speedup
from dtmsearch.studies.study import search_files

LENGTH = 100


def test_shared_noise_parts_no_sample_of_the_plan_that_changes_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "model", llama_config(num_hidden_layers=2))
    (tmp_path / "text.txt").write_text(TEXT)
    small = ("prompts.count=8", "prompts.prompt_tokens=10", "prompts.continuation_tokens=20", "search.options.mixed=2")
    small += ("search.schemes=[int8-channel, int4-channel, int3-g64]",)
    texts = [str(tmp_path / "text.txt")]
    only = ("greedy", "t0.8-k50-p0.95")
    searches = search_files(study_of("sampling"), str(tmp_path / "model"), texts, (), small, only)
    found = make(study_of("sampling"), searches, str(tmp_path / "store"), evaluator=here).findings
    assert found.said[0].startswith("The plan that changes nothing diverges nowhere")
    assert [row[0] for row in found.tables[0].rows] == list(only)
    assert {row[2] for row in found.tables[0].rows} == {"20.0 of 20"}
    points = found.pictures[0].rows
    # Of few tokens the share is off what is expected by some.
    assert all(point["share"] < most_divergence(point["variation"]) + 0.15 for point in points)
    assert np.mean([point["share"] / point["variation"] for point in points]) > 0.8


def rate_of(request: EvalRequest) -> float:
    """How often a plan's tokens diverge: the narrower its schemes and the more of them, the oftener."""
    bits = [int(scheme[3]) for _, scheme in request.plan.entries if scheme.startswith("int")]
    return sum(0.05 * (9 - width) for width in bits) / len(toy_manifest(2).components)


def planted(request: EvalRequest, in_bursts: bool) -> EvalResult:
    """What metrics make of divergences by chance, alone or four in a row."""
    rate = rate_of(request) / (4 if in_bursts else 1)
    seeds = [(crc32(request.plan.id.encode()), prompt) for prompt in range(*request.prompts)]
    diverged = np.array([np.random.default_rng(seed).random(LENGTH) < rate for seed in seeds])
    if in_bursts:
        diverged = np.logical_or.reduce([np.roll(diverged, by, axis=1) for by in range(4)])
    kl = (diverged.astype(np.float32) + rate) * 0.1 if rate else np.zeros(diverged.shape, np.float32)
    outputs = PromptOutputs(diverged, kl, kl, kl, overlap=(~diverged).astype(np.float32))
    own = {name: METRICS[name].of_prompts(outputs) for name in ("fdt", "sdt", "dppl", *request.extra_metrics)}
    found = {name: own.pop(name, None) for name in ("fdt", "sdt", "dppl", "kl", "ppl")}
    return EvalResult(request.id, **found, others={k: v.astype(np.float32) for k, v in own.items()})  # type: ignore[arg-type]


def drafts(tmp_path: Path, in_bursts: bool, *labels: str) -> Answer:
    """The study `speculative` of the toy model, or parts of it."""
    texts = [tmp_path / "text.txt", tmp_path / "held-out.txt"]
    for number, file in enumerate(texts):
        file.write_text(f"text {number} that nobody reads, long enough to hold all prompts\n" * 400)
    small = (
        *("prompts.count=64", "prompts.prompt_tokens=10", f"prompts.continuation_tokens={LENGTH}"),
        "validation.count=16",
    )
    if "by-kl" in labels:
        small += ("search.evolution.generations=2",)
    study = study_of("speculative")
    searches = search_files(study, "toy", [str(texts[0])], [str(texts[1])], small, labels)

    def opened(*_: object) -> ModelEvaluator:
        model = ToyModel()
        model._answer = lambda request: planted(request, in_bursts)
        return cast(ModelEvaluator, model)

    return make(study, searches, str(tmp_path / "store"), evaluator=opened)


@pytest.mark.parametrize(("in_bursts", "low", "high"), [(False, 0.85, 1.2), (True, 2.0, 99.0)])
def test_divergences_that_come_in_bursts_are_told(tmp_path: Path, in_bursts: bool, low: float, high: float) -> None:
    said = drafts(tmp_path, in_bursts, "greedy").findings.said[0]
    assert low < float(said.partition("median ")[2].partition(",")[0]) < high


def test_drafts_of_one_token_accept_what_does_not_diverge(tmp_path: Path) -> None:
    table = drafts(tmp_path, False, "greedy").findings.tables[0]
    strongest = dict(zip(table.columns, table.rows[-1], strict=True))
    assert float(strongest["of 1"]) == pytest.approx(0.7, abs=0.04)  # 3 bits everywhere: 30% diverge
    assert float(strongest["of 2"]) == pytest.approx(0.7 + 0.7**2, abs=0.05)


def test_one_search_by_accepted_tokens_and_by_kl_are_held_against_each_other(tmp_path: Path) -> None:
    findings = drafts(tmp_path, False, "by-accepted", "by-kl").findings
    assert "found by KL at the same size" in findings.said[0]
    assert [row[0] for row in findings.tables[0].rows][::2] == ["by-accepted", "by-kl"]


def test_a_draft_pays_by_what_is_accepted_over_what_it_costs() -> None:
    assert speedup(4.0, 4, 0.25) == pytest.approx(5 / 2)
    assert speedup(0.0, 4, 0.25) == pytest.approx(1 / 2)
