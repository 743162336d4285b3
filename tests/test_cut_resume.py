"""A search that cuts blocks, killed while units are solved for and while it measures: the same command goes on, with
the units that were recorded, to the same plan. So does one that takes experts of mixtures."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from inprocess import InProcess
from processes import CIRCUMSTANCES, PATIENCE_SECONDS, Rows, forked, rows, tiny_search
from test_expert_widths import mixtral
from tiny import write_model

from dtmsearch import config
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.config import SearchFile
from dtmsearch.core.calibration import PackedMatrix
from dtmsearch.core.evaluation import Outcome
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.workflows.run import run

pytestmark = pytest.mark.timeout(4 * PATIENCE_SECONDS)

SEARCH = {
    "strategy": "auto",
    "rank_by": "kl",
    "schemes": [],
    "cut": ["channels-0.25-ziplm-repair", "channels-0.5-wanda-repair", "heads-1:2-wanda"],
    "stop": {"parameters": 0.8},
}
OF_EXPERTS = SEARCH | {
    "schemes": ["int4-g16"],
    "cut": ["experts-0.25-reap", "experts-0.5-reap"],
    "stop": {"size_mb": 0.06},
}


class Mortal(InProcess):
    """Kills its process once it has solved, or measured, so many times; 0: never."""

    def __init__(self, file: SearchFile, where: PoolSettings, solves: int, polls: int) -> None:
        super().__init__(file, where)
        self._left = {"solve": solves, "poll": polls}

    def _count(self, what: str) -> None:
        self._left[what] -= 1
        if self._left[what] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def solve(
        self, calibration_id: str, parts: Sequence[Sequence[tuple[str, str]]]
    ) -> Iterator[Sequence[PackedMatrix]]:
        for part in super().solve(calibration_id, parts):
            self._count("solve")
            yield part

    def poll(self, timeout_seconds: float) -> list[Outcome]:
        self._count("poll")
        return super().poll(timeout_seconds)


def run_mortal(file: str, store: str, solves: str, polls: str) -> int:
    def evaluator(own: SearchFile, where: PoolSettings) -> ModelEvaluator:
        return cast(ModelEvaluator, Mortal(own, where, int(solves), int(polls)))

    run(config.load(file), store, evaluator=evaluator)
    return 0


def recorded(store: Path) -> tuple[str, Rows, Rows]:
    """The plan, the evaluations by their identities, and the steps, without the circumstances."""
    evaluations = sorted(rows(store, "evaluations", without=CIRCUMSTANCES), key=lambda row: str(row["evaluation_id"]))
    return rows(store, "runs")[-1]["final_plan_id"], evaluations, rows(store, "steps", without=("wall_seconds",))


@pytest.mark.parametrize("search", [SEARCH, OF_EXPERTS], ids=["channels and heads", "experts"])
def test_a_search_with_cut_that_is_killed_goes_on_to_the_same_plan(tmp_path: Path, search: dict[str, Any]) -> None:
    file = tiny_search(tmp_path, search=search, prompts__count=16)
    if search is OF_EXPERTS:
        write_model(tmp_path / "model", mixtral())
    deaths = [(2, 0), (0, 1), (0, 4)]
    codes = [forked(run_mortal, str(file), str(tmp_path / "killed"), *map(str, death)).code for death in deaths]
    assert codes == [-signal.SIGKILL] * len(deaths)
    assert forked(run_mortal, str(file), str(tmp_path / "killed"), "0", "0").code == 0
    assert forked(run_mortal, str(file), str(tmp_path / "undisturbed"), "0", "0").code == 0
    assert recorded(tmp_path / "killed") == recorded(tmp_path / "undisturbed")
