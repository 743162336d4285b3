"""A run's calibration in the store: made once, found again by other runs and after a kill, as it was."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from gate import Gate
from processes import PATIENCE_SECONDS, Driver, Ended, dtmsearch, num_recorded, rows, tiny_search
from tiny import replica

from dtmsearch import config
from dtmsearch.analysis.sql import query
from dtmsearch.core import schemes
from dtmsearch.core.calibration import Calibration, InputStatistics, PackedMatrix, WeightError
from dtmsearch.core.plan import Plan
from dtmsearch.core.schemes import parse_scheme
from dtmsearch.model.replica.replica import Replica
from dtmsearch.search.evaluator import ModelEvaluator
from dtmsearch.search.protocols import Silent
from dtmsearch.store.codecs import calibrations
from dtmsearch.store.codecs.calibrations import weight_errors_table
from dtmsearch.store.store import ResultStore, RunWriter
from dtmsearch.workflows.calibrate import Calibrating
from dtmsearch.workflows.session import Session

SCHEMES = ("wanda-0.5", "gptq-int3-g8", "int4-g8+wanda-0.5", "int4-g8+sparsegpt-0.5")


@dataclass
class OneReplica:
    """What `Calibrating` asks of a pool, from one replica in this process; `asked` lists the work that it did."""

    replica: Replica
    asked: list[str] = field(default_factory=list)
    given: dict[tuple[str, str], PackedMatrix] = field(default_factory=dict)
    calibration: Calibration | None = None

    def cut_calibration(self, *arguments: Any) -> Calibration:
        return self.replica.cut_calibration(*arguments)

    def gather_statistics(self, calibration: Calibration) -> InputStatistics:
        self.asked.append("statistics")
        return self.replica.gather_statistics(calibration)

    def use_calibration(self, calibration: Calibration, statistics: InputStatistics) -> None:
        self.calibration = calibration
        self.replica.use_calibration(calibration, statistics)

    def solve(self, calibration_id: str, parts: Sequence[Sequence[tuple[str, str]]]) -> Iterator[list[PackedMatrix]]:
        for part in parts:
            self.asked.append(f"{len(part)} matrices")
            yield self.replica.solve(calibration_id, part)

    def weight_errors(self, *arguments: Any) -> list[WeightError]:
        self.asked.append("errors")
        return self.replica.weight_errors(*arguments)

    def use_solved(self, calibration_id: str, matrices: Sequence[PackedMatrix]) -> None:
        self.given |= {(packed.component, packed.scheme): packed for packed in matrices}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrating")
    tiny_search(folder)
    return folder


@dataclass(frozen=True)
class World:
    calibrating: Calibrating
    pool: OneReplica
    results: ResultStore
    writer: RunWriter


def world(folder: Path, writer: RunWriter, results: ResultStore, **changes: Any) -> World:
    file = config.load(tiny_search(folder, search__schemes=list(SCHEMES), **changes))
    pool = OneReplica(replica(folder / "model"))
    manifest = pool.replica.manifest()
    session = Session(file, results, writer, cast(ModelEvaluator, pool), manifest, Silent())
    return World(Calibrating(session), pool, results, writer)


def arrays(matrices: dict[tuple[str, str], PackedMatrix]) -> dict[tuple[str, str], list[Any]]:
    return {
        pair: [
            m.shape,
            m.bits,
            m.block,
            m.scale_dtype,
            *(getattr(m, n).tolist() for n in ("codes", "scales", "zeros", "mask")),
        ]
        for pair, m in sorted(matrices.items())
    }


def test_what_is_made_once_is_found_again(folder: Path, tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    asked, given, ids = [], [], []
    for run in ("first", "second"):
        with results.writer(run) as writer:
            here = world(folder, writer, results)
            components = here.pool.replica.manifest().components
            ids.append(here.calibrating.for_schemes(components, SCHEMES))
            asked.append(here.pool.asked)
            given.append(arrays(here.pool.given))
    assert asked == [["statistics", *["14 matrices"] * 2], []]
    assert (given[0] == given[1], len(given[0]), ids[0] == ids[1]) == (True, 28, True)


def test_errors_of_weights_are_recorded_and_found_by_the_run_alone(folder: Path, tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    errors, asked = [], []
    for _ in range(2):
        with results.writer("run") as writer:
            here = world(folder, writer, results)
            components = here.pool.replica.manifest().components
            errors.append(here.calibrating.errors(components, ("int4-g8", "wanda-0.5")))
            asked.append(here.pool.asked)
    assert (errors[0] == errors[1], len(errors[0]), asked) == (True, 28, [["statistics", "errors"], []])


def with_version(scheme: str, version: int, patch: pytest.MonkeyPatch) -> None:
    """The arithmetic of a scheme's family, as if it were of that version."""
    family = parse_scheme(scheme).family
    patch.setitem(schemes._FAMILIES, family, replace(schemes._FAMILIES[family], version=version))


def test_errors_measured_by_another_version_of_a_scheme_are_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, asked, versions = ResultStore(tmp_path), [], (7, 8, 8)
    for version in versions:
        with_version("int4-g8", version, monkeypatch)
        with results.writer("run") as writer:
            here = world(folder, writer, results)
            here.calibrating.errors(here.pool.replica.manifest().components, ("int4-g8",))
            asked.append(here.pool.asked)
    assert asked == [["errors"], ["errors"], []]


def test_errors_by_another_version_of_the_calibration_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, of_inputs, plain = (
        ResultStore(tmp_path),
        WeightError("a", "wanda-0.5", 0.5, 0.25),
        WeightError("b", "drop", 1),
    )
    with results.writer("run") as writer:
        writer.add([of_inputs, plain])
        assert writer.read(WeightError) == [of_inputs, plain]
        monkeypatch.setattr(calibrations, "CALIBRATION_VERSION", 99)
        assert writer.read(WeightError) == [plain]


def test_errors_of_a_store_that_kept_no_versions_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultStore(tmp_path)
    older = weight_errors_table("run", [WeightError("a", "int4-g8", 0.5)]).drop_columns(["scheme_version"])
    with results.writer("run") as writer:
        monkeypatch.setattr(calibrations, "weight_errors_table", lambda *_: older)
        writer.add([])
    with results.writer("run") as writer:
        assert writer.read(WeightError) == []


def test_a_mixture_of_rounding_and_gptq_is_priced_by_the_errors_of_outputs(folder: Path, tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with results.writer("run") as writer:
        here = world(folder, writer, results)
        components = here.pool.replica.manifest().components[:2]
        names, schemes = [c.name for c in components], ["int4-g8", "gptq-int4-g8"]
        found = here.calibrating.errors(components, schemes)
        measured = here.pool.replica.weight_errors(names, schemes, here.calibrating.id, True)
    assert found == {(e.component, e.scheme): e.weighted_by_hessian for e in measured}


def test_errors_of_pruning_are_recorded(folder: Path, tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    found, asked = [], []
    for _ in range(2):
        with results.writer("run") as writer:
            here = world(folder, writer, results)
            found.append(here.calibrating.pruning_errors(here.pool.replica.manifest().components))
            asked.append(here.pool.asked)
    assert (found[0] == found[1], asked) == (True, [["statistics", "errors"], []])


def test_statistics_come_back_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with results.writer("run") as writer:
        here = world(folder, writer, results)
        calibration_id = here.calibrating.id
    recorded = results.statistics(calibration_id)
    assert recorded is not None and here.pool.calibration is not None
    made = replica(folder / "model").gather_statistics(here.pool.calibration)
    assert {n: v.tolist() for n, v in recorded.mean_squares.items()} == {
        n: v.tolist() for n, v in made.mean_squares.items()
    }


def test_only_what_is_missing_is_solved(folder: Path, tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with results.writer("run") as writer:
        here = world(folder, writer, results)
        components = here.pool.replica.manifest().components
        for plan in (Plan.of({components[0].name: "gptq-int3-g8"}), Plan.uniform(components[:3], "gptq-int3-g8")):
            here.calibrating.for_plans([plan])
    assert here.pool.asked == ["statistics", "1 matrices", "2 matrices"]


def test_plans_that_need_no_calibration_get_none(folder: Path, tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with results.writer("run") as writer:
        here = world(folder, writer, results)
        found = here.calibrating.for_plans([Plan(), Plan.of({"model.layers.0.mlp.up_proj": "int4-g32+magnitude-0.5"})])
    assert (found, here.pool.asked) == ("", [])


def test_the_prompts_own_text_calibrates_unless_the_file_says_otherwise(folder: Path, tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with results.writer("run") as writer:
        here = world(folder, writer, results)
        assert here.calibrating.id
    prompts, _ = here.pool.replica.cut_prompts([(folder / "text.txt").read_text()], 8, 10, 12, 0)
    assert here.pool.calibration is not None
    assert here.pool.calibration.tokens.tolist() == prompts.tokens.tolist()


def test_a_calibration_section_says_otherwise(folder: Path, tmp_path: Path) -> None:
    results = ResultStore(tmp_path)
    with results.writer("run") as writer:
        here = world(folder, writer, results, calibration={"count": 5, "tokens": 30, "seed": 7})
        assert here.calibrating.id
    assert here.pool.calibration is not None
    assert here.pool.calibration.tokens.shape == (5, 30)


def test_of_two_that_solve_at_once_the_first_counts(folder: Path, tmp_path: Path) -> None:
    first, second = (PackedMatrix("c", "gptq-int8-tensor", (1, 1), 8, 1, "float16", *_bytes(n)) for n in (1, 2))
    results = ResultStore(tmp_path)
    with results.writer("a") as a, results.writer("b") as b:
        a.share_parts("calibration", [first])
        b.share_parts("calibration", [second])
    assert results.matrices("calibration", ["c"])["c", "gptq-int8-tensor"].codes.tolist() == [1]


def _bytes(code: int) -> list[Any]:
    return [np.array([code], np.uint8), *[np.empty(0, np.uint8)] * 3]


def test_a_calibration_text_that_is_not_there_is_said_first(folder: Path) -> None:
    file = tiny_search(folder, calibration={"files": ["nowhere.txt"]})
    done = dtmsearch("run", file, "--store", folder / "unused")
    assert (done.code, "no prompt file 'nowhere.txt'" in done.err) == (2, True), done


# In processes of their own.


@dataclass(frozen=True)
class Killed:
    store: Path
    resumed: Ended
    made_before: list[Any]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A search over calibrated schemes whose driver was killed in the middle, and resumed."""
    folder = tmp_path_factory.mktemp("killed")
    store = folder / "store"
    changes = {"schemes": list(SCHEMES), "width": 1, "stop": {"components": 1}, "components": {"include": ["*.0.*"]}}
    file = tiny_search(folder, **{f"search__{key}": value for key, value in changes.items()})
    gate = Gate(folder / "gate")
    gate.bound("evaluations", 6)
    with Driver(folder / "log", "run", file, "--store", store, "--in-process", gate=gate) as driver:
        driver.until(lambda: num_recorded(store) > 5)
        driver.signal(signal.SIGKILL)
        driver.wait()
    before = made(store)
    return Killed(store, dtmsearch("resume", "tiny", "--store", store, "--replicas", "1"), before)


def made(store: Path) -> list[Any]:
    """Segments of what calibration has made, with what is in them."""
    results = ResultStore(store)
    return [(s.path, s.size) for name in ("statistics", "matrices") for s in results.segments.live(name)]


@pytest.mark.timeout(4 * PATIENCE_SECONDS)
def test_a_search_over_calibrated_schemes_outlasts_a_kill(killed: Killed) -> None:
    assert (killed.resumed.code, "run tiny: finished" in killed.resumed.out) == (0, True), killed.resumed


def test_nothing_is_gathered_or_solved_again(killed: Killed) -> None:
    """What the resumed search adds are rivals of its verdict: uniform plans of the same families."""
    added = {row["scheme"] for row in rows(killed.store, "matrices")} - {"gptq-int3-g8", "sparsegpt-0.5"}
    assert (
        made(killed.store)[: len(killed.made_before)] == killed.made_before,
        all(re.fullmatch(r"gptq-int[2-8]-(tensor|channel|g\d+)(-asym)?", scheme) for scheme in added),
    ) == (True, True), added


def test_calibrated_plans_are_validated(killed: Killed) -> None:
    validated = [row for row in rows(killed.store, "evaluations", "tiny") if row["purpose"] == "validation"]
    found = {row["label"]: row["status"] for row in validated}
    assert found | {f"uniform:{scheme}": "ok" for scheme in SCHEMES} | {"plan": "ok"} == found


def test_solved_matrices_can_be_asked_for(killed: Killed) -> None:
    sql = "SELECT scheme, count(*) AS number FROM matrices GROUP BY scheme ORDER BY scheme LIMIT 1"
    assert query(ResultStore(killed.store), sql).to_pylist() == [{"scheme": "gptq-int3-g8", "number": 7}]
