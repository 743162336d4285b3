"""What machines hear of a search: JSON lines that name run and request, and Ray's metrics."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
from contracts import make_request
from fakes import evaluate, request_for, run_search, toy_components

from dtmsearch.cli import main
from dtmsearch.cluster import prometheus as metrics_module
from dtmsearch.cluster.prometheus import Metrics
from dtmsearch.console.progress import LoggedProgress
from dtmsearch.core.evaluation import EvalFailure, Provenance
from dtmsearch.core.plan import Budget
from dtmsearch.core.strategy_settings import TreeSettings
from dtmsearch.logs import json_lines, naming
from dtmsearch.search.protocols import Progress
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.beam import Beam
from dtmsearch.search.strategies.task import Task

LOG = logging.getLogger("dtmsearch.test")


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_line_names_its_run_and_its_request() -> None:
    stream = io.StringIO()
    with json_lines(stream), naming("mine"):
        LOG.info("evaluation", extra={"request": "r-1", "replica": "replica-0"})
        LOG.warning("a replica was lost")
    said = [(line["event"], line["run"], line["request"], line.get("replica")) for line in lines(stream)]
    assert said == [("evaluation", "mine", "r-1", "replica-0"), ("a replica was lost", "mine", None, None)]


def test_an_exception_stays_on_its_line() -> None:
    stream = io.StringIO()
    with json_lines(stream):
        try:
            raise ValueError("two\nlines")
        except ValueError:
            LOG.exception("failed")
    assert "ValueError: two\nlines" in lines(stream)[0]["exception"]


def test_the_log_is_as_before_after_the_block() -> None:
    stream = io.StringIO()
    with json_lines(stream):
        pass
    LOG.error("nobody hears this in JSON")
    assert (stream.getvalue(), logging.getLogger("dtmsearch").handlers) == ("", [])


def test_a_decision_is_a_line_with_its_plan_and_its_values() -> None:
    stream = io.StringIO()
    beam = Beam(
        Task(SearchSpace(toy_components(), ("nf4",), budget=Budget(components=1)), request_for), TreeSettings(width=1)
    )
    run_search(beam)
    with json_lines(stream):
        LoggedProgress().on_decision(beam.decisions[0], replayed=False)
    (line,) = lines(stream)
    decision = beam.decisions[0]
    assert (line["event"], line["plan"], line["summary"]["fdt_mean"], line["size"]["num_compressed"]) == (
        "decision",
        decision.plan.id,
        decision.summary.fdt_mean,
        1,
    )


def test_progress_is_a_line_now_and_then() -> None:
    stream, now = io.StringIO(), [0.0]
    logged = LoggedProgress(clock=lambda: now[0])
    with json_lines(stream):
        for now[0] in (0.0, 1.0, 6.0):
            logged.on_progress(Progress(1, None, 10, 0, 3, 2.5, None))
    assert [line["evaluations"] for line in lines(stream)] == [10, 10]


def test_the_command_speaks_json_on_stderr_when_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "missing.yaml", "--log-format", "json"])
    assert json.loads(capsys.readouterr().err)["event"] == "error: no search file at missing.yaml"


class Recorded:
    """In the place of a metric of Ray: what it was told, by its name."""

    told: dict[str, list[tuple[float, dict[str, str]]]]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._values = self.told.setdefault(name, [])

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self._values.append((value, tags))

    set = inc


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[float, dict[str, str]]]]:
    Recorded.told = {}
    monkeypatch.setattr(metrics_module.metrics, "Counter", Recorded)
    monkeypatch.setattr(metrics_module.metrics, "Gauge", Recorded)
    return Recorded.told


def test_answers_are_counted_by_status(told: dict[str, Any]) -> None:
    failure = EvalFailure("r", "nonfinite", "logits are not finite", Provenance(tokens=7))
    Metrics("mine").answered([evaluate(make_request(1)), evaluate(make_request(2)), failure])
    counted = [(2, {"run": "mine", "status": "ok"}), (1, {"run": "mine", "status": "nonfinite"})]
    assert (told["dtmsearch_evaluations"], told["dtmsearch_tokens"][0][1]) == (counted, {"run": "mine"})


def test_utilisation_is_the_busy_share_of_those_at_work(told: dict[str, Any]) -> None:
    Metrics("mine").replicas(busy=3, idle=1, starting=4)
    assert told["dtmsearch_replica_utilisation"] == [(0.75, {"run": "mine"})]


def test_nothing_is_said_of_utilisation_while_nobody_is_at_work(told: dict[str, Any]) -> None:
    Metrics("mine").replicas(busy=0, idle=0, starting=4)
    assert told["dtmsearch_replica_utilisation"] == []
