from __future__ import annotations

import pytest
from fakes import FakeEvaluator, evaluate, failing, request_for, run_search, toy_components

from dtmsearch.core.metrics import METRICS, summarize
from dtmsearch.core.plan import Plan
from dtmsearch.errors import SearchFailed
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.probe import Probe
from dtmsearch.search.strategies.task import Task


def test_every_perturbation_is_measured_alone() -> None:
    space = SearchSpace(toy_components(), ("nf4", "int8-channel"))
    assert [dict(ask.request.plan.entries) for ask in Probe(Task(space, request_for)).ask()] == [
        {component.name: scheme} for component in toy_components() for scheme in ("nf4", "int8-channel")
    ]


@pytest.mark.parametrize("metric", METRICS)
def test_decisions_are_the_perturbations_in_order_of_rank(metric: str) -> None:
    space = SearchSpace(toy_components(), ("int4-g32",))
    probe = Probe(Task(space, request_for, metric))
    run_search(probe)
    alone = [request_for(Plan().with_(edge), Plan()) for edge in space.perturbations(Plan())]
    scores = sorted((summarize(evaluate(request)).value(metric) for request in alone), reverse=metric == "fdt")
    assert [decision.score for decision in probe.decisions] == scores


def test_a_probe_chooses_no_plan() -> None:
    assert run_search(Probe(Task(SearchSpace(toy_components(), ("nf4",)), request_for))) is None


def test_steps_are_ranks() -> None:
    probe = Probe(Task(SearchSpace(toy_components(), ("nf4",)), request_for))
    run_search(probe)
    assert [decision.step for decision in probe.decisions] == list(range(6))


def test_tied_components_are_probed_together() -> None:
    space = SearchSpace(toy_components(1), ("nf4",), tied=(("q", "k"),))
    assert [len(ask.request.plan) for ask in Probe(Task(space, request_for)).ask()] == [2, 1]


def test_a_failed_perturbation_gets_no_rank() -> None:
    probe = Probe(Task(SearchSpace(toy_components(), ("nf4",)), request_for))
    run_search(probe, FakeEvaluator(failing({"1.mlp": "out_of_memory"})))
    assert len(probe.decisions) == 5


def test_a_probe_whose_every_perturbation_fails_says_so() -> None:
    probe = Probe(Task(SearchSpace(toy_components(), ("nf4",)), request_for))
    with pytest.raises(SearchFailed, match="6 nonfinite"):
        run_search(probe, FakeEvaluator(failing({"layers": "nonfinite"})))
