"""A search that drops and cuts blocks in rounds and trains after each: which plans it goes through, that it goes on
after it was killed, and what is exported."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from exports import in_process
from inprocess import InProcess
from processes import PATIENCE_SECONDS, forked, rows, tiny_search
from safetensors.torch import load_file
from test_cut_resume import recorded

from dtmsearch import config
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.config import SearchFile, parse
from dtmsearch.core.components import Component
from dtmsearch.core.evaluation import EvalRequest, EvalResult, Outcome
from dtmsearch.core.plan import Budget, Plan
from dtmsearch.core.strategy_settings import FloatingSettings
from dtmsearch.errors import UserError
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.protocols import TrainRequest
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.floating import Floating
from dtmsearch.search.strategies.task import Task
from dtmsearch.workflows.export import export
from dtmsearch.workflows.run import run

MLPS = tuple(Component(f"model.layers.{i}.mlp", i, "mlp", (1, 64)) for i in range(6))
MATRICES = tuple(Component(f"model.layers.{i}.mlp.up_proj", i, "up", (8, 8)) for i in range(6))


def harm(request: EvalRequest) -> float:
    """What is dropped hurts by its layer; half as much for every training."""
    return sum(1.0 + int(name.split(".")[2]) for name in request.plan.dropped) / 2.0 ** len(request.weights_id)


def answered(request: EvalRequest) -> EvalResult:
    count = request.prompts[1] - request.prompts[0]
    loss, none = np.full(count, harm(request), np.float32), np.zeros(count, np.int32)
    return EvalResult(request.id, none, none, np.exp(loss), kl=loss, ppl=np.exp(loss))


def searched(strategy: Floating) -> tuple[list[TrainRequest], list[EvalRequest]]:
    """The trainings and the evaluations that a strategy asks for; each training adds a letter to the weights' name."""
    trained: list[TrainRequest] = []
    asked: list[EvalRequest] = []
    while not strategy.done:
        if (request := strategy.training()) is not None:
            trained.append(request)
            strategy.tell_trained(f"{request.weights_id}w")
            continue
        for ask in strategy.ask():
            asked.append(ask.request)
            strategy.tell(ask.request.id, answered(ask.request))
    return trained, asked


def rounds(number: int, trains: bool = True, **stages: int) -> Floating:
    space = SearchSpace(MATRICES, (), budget=Budget(parameters=0.5), blocks=MLPS)

    def request_for(plan: Plan, parent: Plan) -> EvalRequest:
        return EvalRequest(plan, "r", (0, 16), ("kl",), parent)

    return Floating(
        Task(space, request_for, "kl"), FloatingSettings(**{"prompts": 4, "rounds": number} | stages), trains
    )


@pytest.mark.parametrize("stages", [{}, {"prompts": 8, "first_prompts": 2, "exchange_prompts": 12}])
def test_every_round_goes_as_far_and_goes_on_from_what_was_trained(stages: dict[str, int]) -> None:
    strategy = rounds(3, **stages)
    trained, asked = searched(strategy)
    first, second, third = ({f"model.layers.{i}.mlp" for i in range(left)} for left in (1, 2, 3))
    assert [(t.number, set(t.plan.dropped), t.weights_id) for t in trained] == [
        (0, first, ""), (1, second, "w"), (2, third, "ww"),
    ]  # fmt: skip
    over = [request for request in asked if request.weights_id == "w"]
    assert all(first <= request.plan.dropped for request in over)  # what was trained at zero is not put back
    finals = {r.weights_id for r in asked if r.prompts[1] == 16 and len(r.plan.dropped) == 3}
    assert finals == {"ww", "www"}  # what a round compares last is over the weights that it began with
    models = [(m.label, len(m.plan.dropped), m.weights_id) for m in strategy.milestones]
    assert models == [
        ("round-1", 1, ""), ("round-1:trained", 1, "w"), ("round-2", 2, "w"), ("round-2:trained", 2, "ww"),
        ("round-3", 3, "ww"), ("round-3:trained", 3, "www"),
    ]  # fmt: skip
    assert strategy.best == strategy.milestones[-1].plan
    assert strategy.decisions[-1].score == pytest.approx(6.0 / 8.0)


def test_without_training_nothing_is_another_search_than_before() -> None:
    strategy = rounds(1, trains=False)
    trained, asked = searched(strategy)
    assert not trained and not strategy.milestones and {request.weights_id for request in asked} == {""}
    assert strategy.best is not None and len(strategy.best.dropped) == 3


def test_a_round_that_has_come_far_enough_is_trained_as_it_is() -> None:
    trained, _ = searched(rounds(5))  # of three blocks: two rounds have none of their own
    assert [len(request.plan.dropped) for request in trained] == [1, 2, 2, 3, 3]


SEARCH = {
    "strategy": "floating",
    "rank_by": "kl",
    "drop": ["attention"],
    "cut": ["channels-0.25-ziplm-repair", "channels-0.5-wanda-repair", "heads-1:2-wanda"],
    "stop": {"parameters": 0.7},
    "floating": {"rounds": 2, "prompts": 4},
    "recovery": {"files": ["train.txt"], "masked_steps": 6, "unmasked_steps": 0, "batch_tokens": 64,
                 "sequence_tokens": 16, "checkpoint_steps": 2, "lr": 0.001},
}  # fmt: skip


class Mortal(InProcess):
    """Kills its process once it has measured, or begun to train, so many times; 0: never."""

    def __init__(self, file: SearchFile, where: PoolSettings, polls: int, trainings: int) -> None:
        super().__init__(file, where)
        self._left = {"poll": polls, "train": trainings}

    def _count(self, what: str) -> None:
        self._left[what] -= 1
        if self._left[what] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def train(self, job: Path, stop_requested: Callable[[], bool]) -> int:
        self._count("train")
        return super().train(job, stop_requested)

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        self._count("poll")
        return super().poll(timeout_seconds)


def run_mortal(file: str, store: str, polls: str, trainings: str) -> int:
    def evaluator(own: SearchFile, where: PoolSettings) -> ModelEvaluator:
        return cast(ModelEvaluator, Mortal(own, where, int(polls), int(trainings)))

    run(config.load(file), store, evaluator=evaluator)
    return 0


def weights(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("weights/*.safetensors")}


@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_rounds_that_are_killed_go_on_to_the_same_plan_over_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    file, killed, undisturbed = tiny_search(tmp_path, search=SEARCH, prompts__count=8), *(tmp_path / n for n in "ku")
    deaths = [(3, 0), (0, 1), (2, 0), (0, 1)]
    codes = [forked(run_mortal, str(file), str(killed), *map(str, death)).code for death in deaths]
    assert codes == [-signal.SIGKILL] * len(deaths)
    assert len(rows(killed, "trainings")) == 1  # the last death was at the beginning of the second
    assert forked(run_mortal, str(file), str(killed), "0", "0").code == 0
    assert forked(run_mortal, str(file), str(undisturbed), "0", "0").code == 0
    assert recorded(killed) == recorded(undisturbed)
    assert weights(killed) == weights(undisturbed) and len(weights(killed)) == 2
    first, second = rows(killed, "trainings")
    assert (first["from_weights_id"], second["from_weights_id"]) == ("", first["weights_id"])
    labels = [row["label"] for row in rows(killed, "evaluations") if row["purpose"] == "validation"]
    assert {"round-1", "round-1:trained", "round-2"} <= set(labels)
    made = export("tiny", "dense", tmp_path / "out", str(killed))
    assert made.check is not None and made.check.equal
    assert made.size.parameters <= 0.7
    before, after = (
        sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
        for folder in (tmp_path / "model", tmp_path / "out")
    )
    assert before - after == made.size.removed_weights
    with pytest.raises(UserError, match=r"--even rounds a plan over the base model's weights"):
        export("tiny", "dense", tmp_path / "even", str(killed), even=True)


def test_rounds_may_be_repaired_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step: in seconds, and what is exported are the fitted weights."""
    in_process(monkeypatch)
    recovery = SEARCH["recovery"] | {"masked_steps": 0, "repair_tokens": 512}  # type: ignore[operator]
    file = tiny_search(tmp_path, search=SEARCH | {"recovery": recovery}, prompts__count=8)
    store = tmp_path / "store"
    run(config.load(file), str(store), evaluator=lambda own, where: cast(ModelEvaluator, InProcess(own, where)))
    assert [(row["steps"], row["tokens"]) for row in rows(store, "trainings")] == [(0, 0), (0, 0)]
    assert len(weights(store)) == 2
    made = export("tiny", "dense", tmp_path / "out", str(store))
    assert made.check is not None and made.check.equal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recovery": None}, r"floating\.rounds: rounds differ from steps by the training after each: give recovery"),
        ({"recovery": SEARCH["recovery"] | {"unmasked_steps": 2}}, "2 would let blocks grow again"),  # type: ignore[operator]
        ({"cut": ["experts-0.25-reap"]}, r"experts-0\.25-reap and recovery: training holds at zero"),
        ({"strategy": "auto", "floating": None, "rank_by": "kl"}, r"search\.recovery is a key of sparsity, floating"),
    ],
)
def test_rounds_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = tiny_search(tmp_path, search=SEARCH | changes)
    with pytest.raises(UserError, match=message):
        parse(file.read_text(), "search.yaml", tmp_path)
