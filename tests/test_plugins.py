"""Scheme families and export formats of other packages: the example in tests/plugins, as if pip had installed it. Once
pip does install the examples, to show what it leaves."""

from __future__ import annotations

import csv
import importlib
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exports import measured_plan
from fakes import toy_components
from tiny import replica, result, with_reference, write_model

from dtmsearch.cli import main
from dtmsearch.core import plugins, schemes
from dtmsearch.core.evaluation import EvalRequest
from dtmsearch.core.holders import scheme_facts
from dtmsearch.core.plan import Plan
from dtmsearch.core.prices import PriceRequest
from dtmsearch.core.schemes import SchemeFamily, parse_scheme
from dtmsearch.errors import UserError
from dtmsearch.export.formats import format_registry
from dtmsearch.search.baselines import uniform_rivals
from dtmsearch.search.space import SearchSpace

PACKAGE = Path(__file__).parent / "plugins" / "dtmsearch-ternary"
TERNARY = "ternary-g16"


def installed(site: Path, version: str = "0.1.0", schemes_point: str | None = None) -> None:
    """What pip leaves of the package beside its modules: its metadata, out of its pyproject.toml."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]
    if schemes_point is not None:
        points["dtmsearch.schemes"] = {"ternary": schemes_point}
    info = site / f"dtmsearch_ternary-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in own.items()) for group, own in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, with nothing left in this process of what a test loads from it."""
    monkeypatch.syspath_prepend(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    families, formats = dict(schemes._FAMILIES), dict(format_registry.FORMATS)
    parse_scheme.cache_clear()
    yield tmp_path / "site"
    for known, before in ((schemes._FAMILIES, families), (format_registry.FORMATS, formats)):
        known.clear()
        known.update(before)  # type: ignore[call-overload]
    parse_scheme.cache_clear()
    for name in [
        name for name in sys.modules if name.startswith(("dtmsearch_ternary", "dtmsearch_top5", "dtmsearch_random"))
    ]:
        del sys.modules[name]


@pytest.mark.process
def test_pip_installs_the_examples_and_every_entry_point_of_theirs_is_loaded(site: Path, tmp_path: Path) -> None:
    import subprocess  # at the top it would make processes of all tests here

    shutil.copytree(PACKAGE.parent, tmp_path / "sources")  # pip builds where the sources are
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--no-compile")
    sources = map(str, sorted((tmp_path / "sources").iterdir()))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(site), *sources]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.path.remove(str(PACKAGE))
    groups = (plugins.SCHEMES, plugins.FORMATS, plugins.STRATEGIES, plugins.METRICS)
    loaded = [(plugin.name, plugin.version) for group in groups for plugin in plugins.plugins(group)]
    assert loaded == [
        ("ternary", "dtmsearch-ternary 0.1.0"),
        ("plan-csv", "dtmsearch-ternary 0.1.0"),
        ("random", "dtmsearch-random 0.1.0"),
        ("top5", "dtmsearch-top5 0.1.0"),
    ]


def test_a_scheme_of_an_installed_package_is_known_by_its_name(site: Path) -> None:
    installed(site)
    assert (parse_scheme(TERNARY).family, parse_scheme(TERNARY).stored_bits((8, 64), 16)) == (
        "ternary",
        8 * 64 * 2 + 8 * 4 * 16,
    )


def test_a_scheme_of_an_installed_package_is_measured(site: Path, tmp_path: Path) -> None:
    installed(site)
    model = replica(write_model(tmp_path / "model"))
    reference = with_reference(model)
    plan = Plan.uniform(model.manifest().components, TERNARY)
    measured = result(model.evaluate([EvalRequest(plan, reference.id, (0, 6), ("kl",))])[0])
    assert measured.kl is not None and float(measured.kl.mean()) > 0
    standing = model._weights.original(plan.entries[0][0])
    made = model._weights.compressor.compress("", standing, parse_scheme(TERNARY))
    assert all(len(group.unique()) <= 3 for row in made for group in row.split(16))


def test_a_packages_version_is_part_of_an_evaluations_identity(site: Path, tmp_path: Path) -> None:
    installed(site)
    request = EvalRequest(Plan.of({"a": TERNARY}), "reference", (0, 8))
    assert request.plan.scheme_versions == {"ternary": "dtmsearch-ternary 0.1.0, 1"}


def test_a_packages_version_is_part_of_its_prices_identity(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(site)
    before = PriceRequest("reference", (0, 8), ("a",), (TERNARY, "int8-channel")).id
    monkeypatch.setattr("dtmsearch.core.prices.versions_of", lambda _: {"ternary": "dtmsearch-ternary 0.2.0, 1"})
    assert PriceRequest("reference", (0, 8), ("a",), (TERNARY, "int8-channel")).id != before


def test_schemes_lists_those_of_installed_packages(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed(site)
    assert main(["schemes"]) == 0
    assert "ternary-g64" in capsys.readouterr().out


def test_a_foreign_scheme_is_held_by_an_unquantized_checkpoint_alone(site: Path) -> None:
    installed(site)
    assert [held.holder for held in scheme_facts(TERNARY).held if held.obstacle is None] == ["dense (any)"]


def test_without_the_package_its_scheme_is_unknown(site: Path) -> None:
    with pytest.raises(UserError, match=f"unknown scheme '{TERNARY}'"):
        parse_scheme(TERNARY)


def test_a_package_that_cannot_be_loaded_is_named_once_its_scheme_is_asked_for(site: Path) -> None:
    installed(site, schemes_point="dtmsearch_ternary:NOTHING")
    assert parse_scheme("int4-g32").bits == 4
    with pytest.raises(UserError, match=r"ternary of dtmsearch-ternary 0.1.0 .* cannot be loaded"):
        parse_scheme(TERNARY)


def test_a_package_that_adds_something_else_is_named(site: Path) -> None:
    installed(site, schemes_point="dtmsearch_ternary:CODE_BITS")
    with pytest.raises(UserError, match="is int, wanted a SchemeFamily"):
        parse_scheme(TERNARY)


def test_a_family_can_be_added_in_a_script(site: Path) -> None:
    family = SchemeFamily(
        "halves",
        lambda name: schemes.Scheme(name, "halves", 8, "tensor") if name == "halves" else None,
        stored_bits=lambda scheme, shape, dense_bits: shape[0] * shape[1] * 8,
        make=lambda weight, scheme, mean_squares: weight / 2,
    )
    schemes.register(family)
    assert (parse_scheme("halves").own, Plan.of({"a": "halves"}).scheme_versions) == (family, {"halves": 1})


def test_a_family_of_a_package_has_uniform_rivals_of_its_own(site: Path) -> None:
    def parsed(name: str) -> schemes.Scheme | None:
        return schemes.Scheme(name, "halves", int(name[-1]), "channel") if name in ("half4", "half8") else None

    schemes.register(SchemeFamily("halves", parsed, uniform_lines=lambda scheme, grains: [("half4", "half8")]))
    space = SearchSpace(toy_components(), ("half4",))
    assert uniform_rivals(space, space.uniform("half8")) == ["half8"]


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(UserError, match="there is a scheme family 'rounding' already"):
        schemes.register(SchemeFamily("rounding", lambda name: None))


def test_a_family_that_makes_another_shape_is_told_so(site: Path) -> None:
    from dtmsearch.model.compress.compressor import Compressor

    schemes.register(
        SchemeFamily(
            "short",
            lambda name: schemes.Scheme(name, "short", 8, "tensor") if name == "short" else None,
            make=lambda weight, scheme, mean_squares: weight[:1],
        )
    )
    with pytest.raises(UserError, match=r"short made \[1, 4\] of a, wanted a tensor of \[2, 4\]"):
        Compressor().compress("a", torch.ones(2, 4), parse_scheme("short"))


def test_a_format_of_an_installed_package_writes_a_plan(site: Path, tmp_path: Path) -> None:
    installed(site)
    name = "model.layers.0.mlp.up_proj"
    measured = measured_plan(write_model(tmp_path / "model"), tmp_path / "store", {name: "int8-channel"})
    code = main(["export", "mine", "--to", "plan-csv", "--out", str(tmp_path / "out"), "--store", str(measured.store)])
    rows = list(csv.DictReader((tmp_path / "out" / "plan.csv").read_text().splitlines()))
    assert (code, [(row["component"], row["scheme"]) for row in rows]) == (0, [(name, "int8-channel")])


def test_an_unknown_format_is_a_usage_error(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "mine", "--to", "plan-csv", "--out", "out"]) == 2
    assert "compressed-tensors" in capsys.readouterr().err
