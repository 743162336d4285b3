"""Studies: each on models whose answer is known, because the difference was planted or there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fakes import chance, evaluate
from toy import ToyModel

from dtmsearch import config
from dtmsearch.cli import main
from dtmsearch.core.evaluation import EvalRequest, EvalResult
from dtmsearch.core.statistics import kendall_tau, wilson_interval
from dtmsearch.errors import UserError
from dtmsearch.report.study_page import study_page
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.studies.catalogue import STUDIES, Answer, make, study_of
from dtmsearch.studies.study import search_files

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


def made(tmp_path: Path, name: str, answering: Answering, *overrides: str, texts: int = 1) -> Answer:
    """A study of the toy model, which answers by `answering`."""
    files = [tmp_path / f"text{number}.txt" for number in range(texts)]
    for file in files:
        file.write_text("a text that nobody reads, long enough to hold all prompts\n" * 400)
    study = study_of(name)
    small = ("prompts.prompt_tokens=10", f"prompts.continuation_tokens={LENGTH}")
    searches = search_files(study, "toy", [str(file) for file in files], (), (*small, *overrides))

    def opened(*_: object) -> ModelEvaluator:
        model = ToyModel()
        model._answer = answering
        return cast(ModelEvaluator, model)

    return make(study, searches, str(tmp_path / "store"), evaluator=opened)


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
