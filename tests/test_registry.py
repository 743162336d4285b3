"""Names that other packages can add to."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from fakes import request_for, run_search, toy_components

from dtmsearch.config import parse
from dtmsearch.core.plan import Budget
from dtmsearch.core.plugins import Registry
from dtmsearch.errors import UserError
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.probe import Probe
from dtmsearch.search.strategies.strategy_registry import STRATEGIES, StrategyType, make_strategy

PACKAGE = Path(__file__).parent / "plugins" / "dtmsearch-random"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of a strategy in a package of its own, as pip leaves it."""
    information = tmp_path / "dtmsearch_random-0.1.0.dist-info"
    information.mkdir()
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    (points,) = project["entry-points"]["dtmsearch.strategies"].items()
    (information / "entry_points.txt").write_text(f"[dtmsearch.strategies]\n{points[0]} = {points[1]}\n")
    monkeypatch.syspath_prepend(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)


def search_file(search: str) -> str:
    return f"run: a\nmodel: {{path: m}}\nprompts: {{files: [t.txt]}}\nsearch: {search}\n"


def test_a_name_is_nobody_s_twice() -> None:
    registry: Registry[int] = Registry("dtmsearch.nothing", "number")
    registry.add("one", 1)
    with pytest.raises(UserError, match="there is a number 'one' already"):
        registry.add("one", 2)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match="no strategy 'probes'; did you mean probe"):
        STRATEGIES["probes"]


@pytest.mark.usefixtures("package")
def test_a_search_file_takes_the_strategy_of_an_installed_package_with_options_of_its_own() -> None:
    text = search_file("{strategy: random, options: {plans: 5}, schemes: [nf4]}")
    assert parse(text, "search.yaml", Path()).search.options == {"plans": 5}


@pytest.mark.usefixtures("package")
def test_the_strategy_of_an_installed_package_searches_within_its_budget() -> None:
    space = SearchSpace(toy_components(), ("int8-channel", "int4-g32"), budget=Budget(bits_per_weight=6.0))
    found = run_search(make_strategy("random", space, request_for, "kl", options={"plans": 5}))
    assert found is not None and space.size(found).bits_per_weight <= 6.0


@pytest.mark.usefixtures("package")
def test_a_mistake_in_its_options_is_the_user_s() -> None:
    with pytest.raises(UserError, match="plans is the only one, got plan"):
        make_strategy("random", SearchSpace(toy_components(), ("nf4",)), request_for, options={"plan": 5})


def test_a_built_in_strategy_takes_no_options() -> None:
    with pytest.raises(UserError, match="options are for strategies of other packages"):
        parse(search_file("{strategy: probe, options: {by: sdt}, schemes: [nf4]}"), "search.yaml", Path())


def test_a_strategy_can_be_added_in_a_script() -> None:
    STRATEGIES.add("in-a-script", StrategyType(Probe))
    assert "in-a-script" in list(STRATEGIES)
