"""What a dry run foretells, against what the search then does; a replica in the place of a pool of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fakes import evaluate
from inprocess import InProcess, run_here
from processes import rows, tiny_search
from tiny import llama_config, replica, write_model

from dtmsearch.config import load
from dtmsearch.console.model_text import estimate_text
from dtmsearch.core.evaluation import Outcome, Speed
from dtmsearch.errors import UserError
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.store.store import ResultStore
from dtmsearch.workflows import estimate as module
from dtmsearch.workflows.build import space_of
from dtmsearch.workflows.estimate import Estimate, estimate
from dtmsearch.workflows.run import run

SPEED = Speed(
    layers_seconds=4.0,
    first_layer_seconds=4.0,
    last_layer_seconds=2.0,
    compress_seconds=10.0,
    head_seconds=1.0,
    text_head_factor=2.0,
    generation_seconds=30.0,
    memory_bytes=2**30,
    states_kept="device",
)


class Two(InProcess):
    num_replicas = 2
    speed = SPEED

    def measure_speed(self, count: int, prompt_tokens: int, continuation_tokens: int) -> Speed:
        return self.speed


def foretold(file: Path, **changes: Any) -> Estimate:
    class Timed(Two):
        speed = replace(SPEED, **changes)

    return estimate(load(str(file)), evaluator=lambda *opening: cast(ModelEvaluator, Timed(*opening)))


class ByFormula(InProcess):
    """Evaluations by a formula: how many a search makes does not depend on what a model makes of its plans."""

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        now, self._waiting = self._waiting, []
        return [evaluate(request) for request in now]


def searched_by_formula(file: Path, store: Path) -> None:
    run(load(str(file)), str(store), evaluator=lambda *opening: cast(ModelEvaluator, ByFormula(*opening)))


def short_search(folder: Path, layers: int, search: dict[str, Any]) -> Path:
    """The tiny search of a model of fewer layers: what is counted here does not depend on how many there are."""
    file = tiny_search(folder, search=search)
    write_model(folder / "model", llama_config(num_hidden_layers=layers))
    return file


@pytest.mark.parametrize(
    ("strategy", "within"),
    [("probe", 1.0), ("greedy", 1.2), ("sensitivity", 1.1), ("knapsack", 1.0), ("auto", 8.0)],
)
def test_evaluations_are_those_that_the_search_makes(strategy: str, within: float, tmp_path: Path) -> None:
    # A first slope tells `auto` whether there is anything to gain by rounds: with random weights there is not.
    stop = {"share": 0.4} if strategy in ("probe", "greedy") else {"bits_per_weight": 6.5}
    search = {"strategy": strategy, "schemes": ["int4-channel", "int8-channel"], "stop": stop}
    search |= {} if strategy == "probe" else {"rank_by": "kl"}
    file = short_search(tmp_path, 2, search)
    expected = foretold(file).evaluations
    (run_here if strategy == "auto" else searched_by_formula)(file, tmp_path / "store")  # `auto` goes by prices
    made = sum(row["purpose"] == "search" for row in rows(tmp_path / "store", "evaluations"))
    assert made / within <= expected <= made * within


# Searches whose plans have different rivals.
VALIDATED = {
    "bits, two widths": {"strategy": "knapsack", "rank_by": "kl", "stop": {"bits_per_weight": 6.5}},
    "share, two widths": {"strategy": "greedy", "stop": {"share": 0.4}},
    "everything under one scheme": {"strategy": "greedy", "schemes": ["int4-g8"], "stop": {"share": 1.0}},
    "no smaller uniform plan": {"strategy": "greedy", "schemes": ["w8a8"], "stop": {"components": 2}},
    "two families": {
        "strategy": "knapsack",
        "rank_by": "kl",
        "schemes": ["int4-g8", "nf4"],
        "stop": {"bits_per_weight": 6.5},
    },
    "kept FDT": {"strategy": "greedy", "stop": {"share": 0.4, "min_fdt": 1.0, "min_fdt_prompts": 8}},
    "pruning": {"strategy": "sparsity", "rounds": [20, 10], "prune": "magnitude"},
}


@pytest.mark.parametrize("search", VALIDATED.values(), ids=VALIDATED)
def test_held_out_evaluations_are_those_that_the_search_makes(search: dict[str, Any], tmp_path: Path) -> None:
    schemes = {} if search["strategy"] == "sparsity" else {"schemes": ["int4-channel", "int8-channel"]}
    file = short_search(tmp_path, 3, schemes | search)  # of two, plans are farther from the size that is expected
    searched_by_formula(file, tmp_path / "store")
    results, kept = ResultStore(tmp_path / "store").run("tiny"), rows(tmp_path / "store", "evaluations")
    assert results is not None
    own = results.min_fdt_reference_id
    held_out = [row for row in kept if row["purpose"] != "search" and row["reference_id"] != own]
    made = sum(row["num_prompts"] for row in held_out)
    loaded = load(str(file))
    space = space_of(loaded, replica(tmp_path / "model").manifest())
    # One plan more or less, on a half of the six prompts, follows from what the search comes to.
    assert abs(module._validated_prompts(loaded, space, 6) - made) <= 3, made


def test_prices_are_counted_a_backward_pass_as_two(tmp_path: Path) -> None:
    search = {"strategy": "fisher", "rank_by": "kl", "schemes": ["int4-channel", "int8-channel"]}
    stop = {"bits_per_weight": 6.5}
    less, more = (
        foretold(tiny_search(tmp_path, search=search | {"fisher": {"samples": count}, "stop": stop}))
        for count in (40, 50)
    )
    assert more.evaluations == less.evaluations
    assert more.tokens - less.tokens == 10 * 3 * 22
    assert more.operations > less.operations
    assert more.search_seconds > less.search_seconds


class Unpriceable(Two):
    def unpriceable(self, components: Sequence[str]) -> str:
        return "the model's layers lie in several processes"


def foretold_without_prices(file: Path) -> Estimate:
    return estimate(load(str(file)), evaluator=lambda *opening: cast(ModelEvaluator, Unpriceable(*opening)))


def test_where_prices_cannot_be_had_auto_is_foretold_to_probe(tmp_path: Path) -> None:
    search = {"strategy": "auto", "rank_by": "kl", "schemes": ["int4-channel", "int8-channel"]}
    file = tiny_search(tmp_path, search=search | {"stop": {"bits_per_weight": 6.5}})
    components = len(replica(tmp_path / "model").manifest().components)
    assert foretold(file).evaluations < components <= foretold_without_prices(file).evaluations


def test_a_dry_run_refuses_prices_that_cannot_be_had_as_the_search_does(tmp_path: Path) -> None:
    search = {"strategy": "fisher", "rank_by": "kl", "schemes": ["int4-channel", "int8-channel"]}
    file = tiny_search(tmp_path, search=search | {"stop": {"bits_per_weight": 6.5}})
    with pytest.raises(UserError, match=r"several processes\. Use auto or sensitivity"):
        foretold_without_prices(file)


def test_a_probe_costs_its_layers_and_heads(tmp_path: Path) -> None:
    file = tiny_search(tmp_path, search={"strategy": "probe", "schemes": ["int8-channel"]})
    found = foretold(file)
    assert found.tokens == found.evaluations * 8 * 22
    # Candidates of the first layer run for 4 s, those of the last for 2, half of them each; the head for 1; 8 prompts.
    assert found.evaluation_seconds == pytest.approx((3.0 + 1.0) * 8)
    assert found.search_seconds == pytest.approx(found.evaluations * found.evaluation_seconds / 2)
    # The reference is generated; a probe comes to no plan, so that nothing runs over held-out text.
    assert found.other_seconds == pytest.approx(8 * 30)


def test_validation_runs_whole_plans_over_held_out_text(tmp_path: Path) -> None:
    file = tiny_search(tmp_path, search={"strategy": "greedy", "schemes": ["drop"], "stop": {"components": 1}})
    # Both references are generated. One half of six prompts is for the plan and its rival, a uniform plan; the base, a
    # uniform plan and the plan run over the other.
    found = foretold(file)
    assert found.other_seconds == pytest.approx((8 + 6) * 30 + (3 * 2 + 3 * 3) * (2 * (4 + 1) + 1 + 1) / 2)


def test_whole_plans_run_through_all_layers_and_are_compressed_anew(tmp_path: Path) -> None:
    search = {"strategy": "spdy", "schemes": ["int4-channel"], "rank_by": "kl", "stop": {"share": 0.4}}
    file = tiny_search(tmp_path, search=search)
    quick, slow = (foretold(file, compress_seconds=seconds) for seconds in (0.0, 10.0))
    assert slow.evaluation_seconds - quick.evaluation_seconds == pytest.approx(10.0)
    assert quick.evaluation_seconds == pytest.approx((4.0 + 2.0) * 8, rel=0.01)


def test_what_is_foretold_is_said(tmp_path: Path) -> None:
    text = estimate_text(foretold(tiny_search(tmp_path)))
    assert "1.00 GiB a replica, 2 replicas" in text and "of search" in text


def test_the_time_until_replicas_answer_is_counted_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((100.0, 107.0))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    found = foretold(tiny_search(tmp_path))
    assert found.start_seconds == 7.0 and "7 s until replicas answer" in estimate_text(found)


TRAINED: dict[str, Any] = {
    "strategy": "sparsity",
    "rounds": [20, 10],
    "recovery": {"files": ["text.txt"], "masked_steps": 3, "unmasked_steps": 1, "batch_tokens": 512},
}


def test_training_takes_three_forward_passes_a_step_in_every_round(tmp_path: Path) -> None:
    file = tiny_search(tmp_path, search=TRAINED)
    prompts = load(str(file)).prompts
    row_tokens = prompts.prompt_tokens + prompts.continuation_tokens
    assert foretold(file).training_seconds == pytest.approx(2 * 4 * 512 * 3 * 5.0 / row_tokens)


def test_a_fit_takes_three_forward_passes_of_its_text_in_every_round(tmp_path: Path) -> None:
    fitted = {"files": ["text.txt"], "repair_tokens": 4096, "masked_steps": 0, "unmasked_steps": 0}
    search = {"strategy": "floating", "drop": ["mlp"], "stop": {"blocks": 2}, "floating": {"rounds": 2}}
    file = tiny_search(tmp_path, search=search | {"recovery": fitted})
    prompts = load(str(file)).prompts
    row_tokens = prompts.prompt_tokens + prompts.continuation_tokens
    assert foretold(file).training_seconds == pytest.approx(2 * 4096 * 3 * 5.0 / row_tokens)


@pytest.mark.parametrize("more", [{"distill": 0.5}, {"distill_hidden": 1.0}, {"checkpointing": True}])
def test_a_teacher_and_activations_made_anew_take_a_forward_pass_more(tmp_path: Path, more: dict[str, Any]) -> None:
    plain, with_more = (
        foretold(tiny_search(tmp_path, search=TRAINED | {"recovery": TRAINED["recovery"] | further})).training_seconds
        for further in ({}, more)
    )
    assert with_more == pytest.approx(plain * 4 / 3)


def test_the_models_of_every_round_are_validated(tmp_path: Path) -> None:
    trained = load(str(tiny_search(tmp_path, search=TRAINED)))
    pruned = load(str(tiny_search(tmp_path, search={"strategy": "sparsity", "rounds": [20, 10]})))
    assert (module._num_milestones(trained), module._num_milestones(pruned)) == (3, 1)
