from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from fakes import toy_components

from dtmsearch.core.evaluation import EvalFailure, EvalResult, Outcome
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.search.baselines import (
    best_rival,
    better_uniform,
    law_remarks,
    may_take_its_place,
    uniform_rivals,
)
from dtmsearch.search.space import SearchSpace

SPACE = SearchSpace(
    toy_components(), ("int3-channel", "int4-channel", "int8-channel"), budget=Budget(bits_per_weight=5.0)
)
PLANS = {
    "uniform:int3-channel": SPACE.uniform("int3-channel"),
    "uniform:int4-channel": SPACE.uniform("int4-channel"),
    "uniform:int8-channel": SPACE.uniform("int8-channel"),
    "base": Plan(),
    "plan": SPACE.uniform("int4-channel").with_(
        next(e for e in SPACE.perturbations(Plan()) if e.scheme == "int8-channel" and "k_proj" in e.component)
    ),
}


def result(kl: float, sdt: int = 10) -> EvalResult:
    num = np.full(8, sdt, np.int32)
    return EvalResult("id", 100 - num, num, np.ones(8, np.float32), np.full(8, kl, np.float32))


def outcomes(**kl: float) -> Mapping[str, Outcome]:
    values = {"int3": 0.5, "int4": 0.2, "int8": 0.01, "base": 0.0, "plan": 0.1} | kl
    return {label: result(values[label.partition(":")[2].partition("-")[0] or label]) for label in PLANS}


def test_a_plan_that_beats_them_stays() -> None:
    assert better_uniform(SPACE, PLANS, outcomes(plan=0.19), "kl") is None


@pytest.mark.parametrize("kl", [0.2, 0.21])
def test_a_plan_that_does_not_beat_a_uniform_one_gives_way(kl: float) -> None:
    assert better_uniform(SPACE, PLANS, outcomes(plan=kl), "kl") == "uniform:int4-channel"


def test_the_best_of_the_uniform_plans_is_taken() -> None:
    found = better_uniform(SPACE, PLANS, outcomes(int3=0.15, plan=0.3), "kl")
    assert found == "uniform:int3-channel"


def test_larger_uniform_plans_are_no_rivals() -> None:
    assert better_uniform(SPACE, PLANS, outcomes(int8=0.0), "kl") is None


def test_a_smaller_uniform_plan_outside_the_budget_is_no_rival() -> None:
    space = SearchSpace(toy_components(), ("magnitude-0.3", "magnitude-0.7"), budget=Budget(sparsity=0.5))
    plan = space.uniform("magnitude-0.7")
    # A mask of three tenths costs more than what is left out at seven tenths; what counts here is the budget.
    plans = {"uniform:magnitude-0.3": space.uniform("magnitude-0.3"), "plan": plan}
    measured = {"uniform:magnitude-0.3": result(0.01), "plan": result(0.5)}
    assert better_uniform(space, plans, measured, "kl") is None


def test_a_plan_that_could_not_be_measured_gives_way() -> None:
    measured = {**outcomes(), "plan": EvalFailure("id", "nonfinite", "not a number")}
    assert better_uniform(SPACE, PLANS, measured, "kl") == "uniform:int4-channel"


def test_a_plan_on_the_square_root_law_needs_no_remark() -> None:
    assert (
        law_remarks(SPACE, PLANS, {**outcomes(), "uniform:int4-channel": result(0.1), "plan": result(0.1)}, 100) == []
    )


def test_outcomes_of_what_a_search_came_to_between_need_no_plan() -> None:
    measured = {**outcomes(), "uniform:int4-channel": result(0.1), "plan": result(0.1), "round-1:20.0%": result(0.2)}
    assert law_remarks(SPACE, PLANS, measured, 100) == []


def test_a_plan_that_diverges_more_than_its_kl_says_is_flagged() -> None:
    measured = {label: result(0.4, sdt=18) for label in PLANS} | {"plan": result(0.4, sdt=40)}
    (remark,) = law_remarks(SPACE, PLANS, measured, 100)
    assert remark.startswith("the plan's share of divergent tokens is 0.63 x sqrt(KL), that of uniform plans 0.28")


def six_bits() -> tuple[SearchSpace, Plan]:
    """A search by tensors, and a plan of 6 bits."""
    space = SearchSpace(toy_components(), ("int6-tensor", "int8-tensor"), budget=Budget(bits_per_weight=6.5))
    return space, space.uniform("int6-tensor")


def test_rivals_have_all_granularities_and_the_largest_width_that_fits() -> None:
    space, plan = six_bits()
    assert {"int5-channel", "int5-channel-asym", "int5-g32", "int5-g32-asym", "int6-tensor-asym"} <= set(
        uniform_rivals(space, plan)
    )


def test_rivals_store_at_most_one_percent_more_than_the_plan() -> None:
    space, plan = six_bits()
    most = 1.01 * space.size(plan).stored_bits
    assert max(space.size(space.uniform(scheme)).stored_bits for scheme in uniform_rivals(space, plan)) <= most
    larger = space.size(space.uniform("int5-g16")).stored_bits / space.size(plan).stored_bits
    assert larger == pytest.approx(1.0, abs=0.01)  # five bits and a scale of 16 for every 16 weights
    own = SearchSpace(toy_components(), ("int6-tensor", "int8-g16"), budget=Budget(bits_per_weight=6.5))
    assert "int5-g16" in uniform_rivals(own, plan)


def test_rivals_are_of_the_families_that_the_search_uses() -> None:
    space = SearchSpace(toy_components(), ("nf4", "gptq-int4-g32", "magnitude-0.5"))
    found = uniform_rivals(space, space.uniform("nf4"))
    assert "fp4" in found and any(scheme.startswith("gptq-int") for scheme in found)
    assert "magnitude-0.5" not in found and not any(scheme.startswith("int") for scheme in found)
    assert sum(scheme.startswith("magnitude-") for scheme in found) == 1


def test_there_are_only_so_many_rivals_some_of_each_family() -> None:
    space = SearchSpace(toy_components(), ("int4-g32", "gptq-int4-g32", "nf4", "wanda-0.5", "int4-g32+wanda-0.5"))
    found = uniform_rivals(space, space.uniform("int8-channel"))
    assert len(found) == 12
    assert {"nf4", "fp4"} & set(found) and any("wanda" in scheme for scheme in found)


def test_the_best_rival_is_the_one_with_the_best_value_whatever_its_size() -> None:
    space, plan = six_bits()
    plans = {f"uniform:{s}": space.uniform(s) for s in ("int5-channel", "int5-g32", "int8-tensor")} | {"plan": plan}
    found = {label: result(kl) for label, kl in zip(plans, (0.136, 0.2, 0.001, 0.156), strict=True)}
    assert best_rival(space, plans, found, "kl") == "uniform:int5-channel"


def test_only_what_the_search_could_have_come_to_takes_the_plans_place() -> None:
    space, plan = six_bits()
    assert may_take_its_place(space, plan, space.uniform("int8-tensor"))
    assert not may_take_its_place(space, plan, space.uniform("int5-channel"))
    assert not may_take_its_place(space, plan, space.uniform("int4-tensor"))
