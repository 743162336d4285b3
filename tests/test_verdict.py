"""What is said of a plan on held-out prompts, from rows alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dtmsearch.analysis.verdict import NoiseFloor, ValidationRow, noise_sentence, rival_of, unusable, verdict
from dtmsearch.core.metrics import Summary
from dtmsearch.core.statistics import PairedDifference

VALUES = Summary(64, 15.0, 10.0, 15.0, 20.0, 5.0, 1.5, 10.4, 0.15)


def row(label: str, bits: float, **values: float) -> ValidationRow:
    return ValidationRow(label, label, 8, bits, 1.0, replace(VALUES, **values), None)  # type: ignore[arg-type]


def difference(mean: float, half: float) -> PairedDifference:
    return PairedDifference(mean, mean - half, mean + half, 0.95)


PLAN = row("plan", 6.0, kl=0.156)
BASE = row("base", 16.0, kl=0.0, sdt_mean=0.0)


def rival(scheme: str, bits: float, **values: float) -> ValidationRow:
    """Told apart in KL, not in FDT."""
    found = row(f"uniform:{scheme}", bits, **values)
    assert found.summary is not None and found.summary.kl is not None
    return replace(found, kl_vs_plan=difference(0.156 - found.summary.kl, 0.005), fdt_vs_plan=difference(0.4, 1.0))


def test_the_rival_is_the_best_uniform_plan_of_at_most_the_plans_size_not_the_nearest() -> None:
    rows = [PLAN, BASE, rival("int6-tensor", 6.0, kl=0.9), rival("int5-channel", 5.21, kl=0.136)]
    found = rival_of(rows, "kl")
    assert found is not None and found.uniform_scheme == "int5-channel"
    assert "worse than the best uniform plan of at most its size, int5-channel (5.21 bits)" in verdict(rows, "kl")


def test_llama_cpp_s_own_mixture_is_a_rival_too() -> None:
    preset = replace(row("preset:Q4_K_M", 5.9, kl=0.12), kl_vs_plan=difference(0.036, 0.005))
    said = verdict([PLAN, BASE, rival("gguf-Q4_K", 5.3, kl=0.136), preset], "kl")
    assert "worse than the best known plan of at most its size, llama.cpp's mixture Q4_K_M (5.90 bits), with" in said


def test_a_mixture_that_took_the_place_of_what_was_found_says_so() -> None:
    plan = replace(PLAN, measured_as="preset:Q4_K_M")
    said = verdict([plan, rival("int5-channel", 5.21, kl=0.2), row("found", 6.0, kl=0.3)], "kl")
    assert "It is llama.cpp's mixture Q4_K_M: what the search found did no better (6.00 bits per weight" in said


@pytest.mark.parametrize(("bits", "counts"), [(6.059, True), (6.061, False)])
def test_a_rival_may_be_one_percent_larger_and_no_more(bits: float, counts: bool) -> None:
    assert (rival_of([PLAN, rival("int6-g128", bits, kl=0.1)], "kl") is not None) == counts


def test_the_base_model_and_what_the_search_found_are_no_rivals() -> None:
    assert rival_of([PLAN, row("base", 3.0), row("found", 5.0), row("round-1:20.0%", 5.0)], "kl") is None


def test_rivals_of_older_runs_count() -> None:
    found = rival_of([PLAN, row("uniform-nearest:int5-channel", 5.2)], "kl")
    assert found is not None and found.uniform_scheme == "int5-channel"


def test_a_rival_that_could_not_be_measured_is_the_last_choice() -> None:
    failed = replace(row("uniform:int6-channel", 6.0), summary=None, failure="nonfinite: prompt 3")
    assert rival_of([PLAN, failed, rival("int4-channel", 4.2, kl=0.9)], "kl") is not failed
    assert "could not be measured (nonfinite: prompt 3)" in verdict([PLAN, failed], "kl")


@pytest.mark.parametrize(
    ("kl", "words"), [(0.2, "better than"), (0.1, "worse than"), (0.158, "not distinguishable from")]
)
def test_the_verdict_is_in_the_metric_that_ranks_with_fdt_beside_it(kl: float, words: str) -> None:
    said = verdict([PLAN, rival("int5-channel", 5.21, kl=kl)], "kl")
    assert f"has a KL of 0.1560 nats per token: {words} the best uniform plan" in said
    assert (
        "its FDT of 15.0 is not distinguishable from 15.0 (difference +0.4 tokens, 95% interval -0.6 to +1.4)" in said
    )


def test_the_verdict_names_figures_and_interval() -> None:
    other = replace(row("uniform:int5-channel", 5.21, fdt_mean=10.0), fdt_vs_plan=difference(5.0, 1.0))
    assert verdict([PLAN, other], "fdt") == (
        "On 64 held-out prompts the plan (6.00 bits per weight) first diverges after 15.0 tokens on average: better "
        "than the best uniform plan of at most its size, int5-channel (5.21 bits), with 10.0 (difference +5.0 tokens, "
        "95% interval +4.0 to +6.0)."
    )


def test_a_trained_plan_beside_a_rival_that_was_not_says_so() -> None:
    trained = replace(PLAN, weights_id="w")
    said = verdict([trained, rival("int5-channel", 5.21, kl=0.3)], "kl")
    assert "int5-channel (5.21 bits, not trained, as the plan's weights were), with" in said
    assert "not trained" not in verdict([PLAN, rival("int5-channel", 5.21, kl=0.3)], "kl")
    both = replace(rival("int5-channel", 5.21, kl=0.3), weights_id="w")
    assert "not trained" not in verdict([trained, both], "kl")


def test_too_few_prompts_are_said_of_fdt_too() -> None:
    unknown = PairedDifference(0.4, -math.inf, math.inf, 0.95)
    said = verdict([PLAN, replace(rival("int5-channel", 5.21, kl=0.2), fdt_vs_plan=unknown)], "kl")
    assert "its FDT is 15.0 beside 15.0, on too few prompts to compare (difference +0.4 tokens)" in said


def test_one_prompt_is_no_prompts() -> None:
    assert verdict([row("plan", 6.0, num_prompts=1)], "kl").startswith("On 1 held-out prompt the plan")


def test_the_verdict_says_when_other_metrics_disagree() -> None:
    other = replace(
        row("uniform:int5-channel", 5.21),
        fdt_vs_plan=difference(5.0, 1.0),
        sdt_vs_plan=difference(10.0, 1.0),
        kl_vs_plan=difference(0.25, 0.01),
    )
    assert "but its SDT worse (+10.0) and KL worse (+0.250)" in verdict([PLAN, other], "fdt")


def test_too_few_prompts_are_said() -> None:
    unknown = PairedDifference(0.05, -math.inf, math.inf, 0.95)
    other = replace(rival("int5-channel", 5.21, kl=0.1), kl_vs_plan=unknown, fdt_vs_plan=unknown)
    said = verdict([PLAN, other], "kl")
    assert ": too few prompts to say whether it is better or worse than the best uniform plan" in said
    assert "inf" not in said


def test_without_a_uniform_plan_of_its_size_a_plan_is_called_neither_better_nor_worse() -> None:
    said = verdict([PLAN, BASE, rival("int8-channel", 8.1, kl=0.01)], "kl")
    assert "no known plan of at most its size was measured, so it is called neither better nor worse" in said


def test_a_ruined_plan_is_unusable_however_it_does_against_others() -> None:
    plan = row("plan", 2.0, fdt_mean=0.5, ppl=67.0, kl=2.0)
    better = replace(rival("int2-channel", 2.0, ppl=90.0, kl=3.0), kl_vs_plan=difference(-1.0, 0.1))
    said = verdict([plan, BASE, better], "kl")
    assert said.startswith("The plan is unusable (PPL 67 against 10.4 of the base model, FDT 0.5).")
    assert "better than the best uniform plan of at most its size, int2-channel (2.00 bits, unusable)" in said


@pytest.mark.parametrize(("ppl", "ruined"), [(20.7, False), (20.9, True)])
def test_unusable_is_a_bit_a_token_worse_at_human_text(ppl: float, ruined: bool) -> None:
    assert (unusable(row("plan", 4.0, ppl=ppl), BASE, 64) is not None) == ruined


@pytest.mark.parametrize(("sdt", "ruined"), [(32.0, False), (33.0, True)])
def test_unusable_is_another_choice_at_more_than_half_of_the_positions(sdt: float, ruined: bool) -> None:
    assert (unusable(row("plan", 4.0, sdt_mean=sdt), None, 64) is not None) == ruined


def test_a_uniform_plan_that_took_the_place_of_what_was_found_says_so() -> None:
    said = verdict([PLAN, rival("int5-channel", 5.21, kl=0.2), row("found", 6.0, kl=0.3)], "kl")
    assert "better than the best uniform plan" in said
    assert "It is a uniform plan: what the search found did no better (6.00 bits per weight, KL 0.3000" in said


@pytest.mark.parametrize(
    ("mean", "words"),
    [(2.0, "it diverges more than that"), (0.5, "not distinguishable from that")],
)
def test_the_noise_is_told_like_for_like(mean: float, words: str) -> None:
    noise = NoiseFloor(40.0, 0.46, 30.0, 0.46 + mean, difference(-10.0, 20.0), difference(mean, 1.0))
    said = noise_sentence(noise)
    assert said.startswith("Noise, with no position left out: the base model's single pass against its own cached")
    assert words in said
