"""Names that other packages can add to."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import request_for, toy_components

from dtmsearch.config import parse
from dtmsearch.core.registry import Registry
from dtmsearch.errors import UserError
from dtmsearch.search.space import SearchSpace
from dtmsearch.search.strategies.probe import Probe
from dtmsearch.search.strategies.strategy_registry import STRATEGIES, StrategyType, make_strategy


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package, as pip leaves it, whose entry point names a strategy."""
    (tmp_path / "other_package.py").write_text(
        "from dtmsearch.search.strategies.strategy_registry import StrategyType\n"
        "from dtmsearch.search.strategies.probe import Probe\n"
        "STRATEGY = StrategyType(lambda inputs: Probe(inputs.space, inputs.request_for, inputs.options['by']))\n"
    )
    information = tmp_path / "other_package-1.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.5\n")
    (information / "entry_points.txt").write_text("[dtmsearch.strategies]\nelsewhere = other_package:STRATEGY\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(STRATEGIES, "_points", None)


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
    text = search_file("{strategy: elsewhere, options: {by: sdt}, schemes: [nf4]}")
    assert parse(text, "search.yaml", Path()).search.options == {"by": "sdt"}


@pytest.mark.usefixtures("package")
def test_the_strategy_of_an_installed_package_is_made() -> None:
    space = SearchSpace(toy_components(), ("nf4",))
    made = make_strategy("elsewhere", space, request_for, options={"by": "sdt"})
    assert (type(made), made._rank_by) == (Probe, "sdt")  # type: ignore[attr-defined]


@pytest.mark.usefixtures("package")
def test_an_entry_knows_the_version_of_its_package() -> None:
    assert STRATEGIES.version_of("elsewhere") == "other-package==1.5"


def test_a_built_in_strategy_takes_no_options() -> None:
    with pytest.raises(UserError, match="options are for strategies of other packages"):
        parse(search_file("{strategy: probe, options: {by: sdt}, schemes: [nf4]}"), "search.yaml", Path())


def test_a_strategy_can_be_added_in_a_script() -> None:
    STRATEGIES.add("in-a-script", StrategyType(lambda inputs: Probe(inputs.space, inputs.request_for)))
    assert "in-a-script" in list(STRATEGIES)
