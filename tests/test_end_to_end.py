"""The commands as a stranger types them, in processes of their own: the demo, searches side by side, one plan measured
again, the same from Python."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gate import Gate
from processes import (
    PATIENCE_SECONDS,
    Driver,
    Ended,
    Rows,
    dtmsearch,
    forked,
    last_status,
    num_recorded,
    rows,
    tiny_search,
    without_ray,
)
from transformers import PreTrainedTokenizerFast

import dtmsearch as dtm
from dtmsearch.store.store import ResultStore

pytestmark = pytest.mark.timeout(4 * PATIENCE_SECONDS)

METRICS = ("fdt_mean", "fdt_p25", "fdt_p50", "fdt_p75", "sdt_mean", "dppl", "ppl", "kl")
MEASURED = (*METRICS, "fdt", "sdt", "dppl_list", "ppl_list", "kl_list")


# The demo.


@dataclass(frozen=True)
class Demo:
    folder: Path
    said: Ended

    @property
    def following(self) -> list[list[str]]:
        """The arguments of the commands that it gives to go on with."""
        lines = self.said.out.partition("Next:")[2].splitlines()
        return [shlex.split(line, comments=True)[1:] for line in lines if line.strip().startswith("dtmsearch ")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    return Demo(folder, dtmsearch("demo", cwd=folder))


def test_the_demo_finishes(demo: Demo) -> None:
    assert (demo.said.code, "run demo: finished" in demo.said.out) == (0, True), demo.said


def test_the_demo_gives_a_verdict(demo: Demo) -> None:
    assert re.search(r"^On \d+ held-out prompts the plan \(", demo.said.out, re.MULTILINE), demo.said


def test_the_demo_says_where_its_store_is(demo: Demo) -> None:
    assert f"The store is {demo.folder / 'dtm-store'}" in demo.said.out


def test_the_demo_shows_its_plan(demo: Demo) -> None:
    assert re.search(r"^  layer +0\n  q ", demo.said.out, re.MULTILINE), demo.said


def test_the_demo_s_plan_is_better_than_the_best_uniform_one_of_its_size(demo: Demo) -> None:
    """As docs/screens.md shows; its texts are files that nothing else changes."""
    assert ": better than the best uniform plan of at most its size" in demo.said.out


def test_the_commands_after_the_demo_work(demo: Demo) -> None:
    report, _, export = demo.following
    for arguments in (report, [*export, "--no-check"]):
        assert dtmsearch(*arguments, cwd=demo.folder).code == 0
    assert (demo.folder / "demo.html").is_file() and (demo.folder / "demo-model" / "config.json").is_file()


def test_the_demo_again_is_already_complete_without_ray(demo: Demo) -> None:
    said = without_ray("demo", cwd=demo.folder)
    assert (said.code, "run demo: already complete" in said.out) == (0, True), said


# One search on other replicas, by another strategy, from Python.


def from_python(file: str, place: str) -> int:
    summary = dtm.run(dtm.load(Path(file)), store=place, where=dtm.Where(replicas=2))
    store = dtm.open_store(place)
    steps = dtm.query(store, "SELECT count(*) AS steps FROM steps").to_pylist()
    assert summary.final_plan is not None
    sys.stdout.write(
        json.dumps([summary.status, summary.final_plan.schemes, steps, [run.run for run in dtm.ls(store)]])
    )
    return 0


@dataclass(frozen=True)
class Pair:
    """Beam search of width 1 on one replica without Ray, and greedy search from Python on two, each in its own
    store."""

    folder: Path
    beam: Ended
    greedy: Ended

    @property
    def beam_store(self) -> Path:
        return self.folder / "beam"

    @property
    def greedy_store(self) -> Path:
        return self.folder / "greedy"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    beam = tiny_search(folder, search__width=1, search__stop={"share": 0.3})
    greedy = tiny_search(
        folder, run="greedy", search__strategy="greedy", search__width=None, search__stop={"share": 0.3}
    )
    with ThreadPoolExecutor() as pool:
        first = pool.submit(dtmsearch, "run", beam, "--store", folder / "beam", "--in-process")
        second = pool.submit(forked, from_python, str(greedy), str(folder / "greedy"))
    return Pair(folder, first.result(), second.result())


def plan_rows(store: Path, run: str) -> Rows:
    record = ResultStore(store).run(run)
    assert record is not None
    return [row for row in rows(store, "plans") if row["plan_id"] == record.final_plan_id]


def measured(store: Path) -> dict[str, list[Any]]:
    return {row["evaluation_id"]: [row[name] for name in MEASURED] for row in rows(store, "evaluations")}


def test_python_has_the_verbs_of_the_command(pair: Pair) -> None:
    plan = {row["component"]: row["scheme"] for row in plan_rows(pair.greedy_store, "greedy")}
    steps = [{"steps": len(rows(pair.greedy_store, "steps"))}]
    assert json.loads(pair.greedy.out) == ["finished", plan, steps, ["greedy"]], pair.greedy


def test_greedy_is_a_beam_of_width_one(pair: Pair) -> None:
    assert plan_rows(pair.greedy_store, "greedy") == plan_rows(pair.beam_store, "tiny") != []


def test_one_replica_and_two_measure_the_same_bit_by_bit(pair: Pair) -> None:
    assert measured(pair.greedy_store) == measured(pair.beam_store) != {}


# One plan measured again.


@dataclass(frozen=True)
class Evaluated:
    """What the run found on its held-out prompts, by label, and what `evaluate` says of these plans there."""

    run: dict[str, dict[str, Any]]
    by_scheme: dict[str, Any]
    by_run: dict[str, Any]
    by_file: dict[str, Any]


@pytest.fixture(scope="module")
def evaluated(pair: Pair) -> Evaluated:
    file = pair.folder / "tiny.yaml"
    plan_file = pair.folder / "plan.json"
    found = plan_rows(pair.beam_store, "tiny")
    record = ResultStore(pair.beam_store).run("tiny")
    assert record is not None
    schemes = {row["component"]: row["scheme"] for row in found}
    plan_file.write_text(json.dumps({"model": "model", "manifest_id": record.manifest_id, "schemes": schemes}))

    # What the run reports on, as texts of their own.
    reported = [
        row for row in rows(pair.beam_store, "prompts") if row["reference_id"] == record.validation_reference_id
    ]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pair.folder / "model")
    for row in reported:
        text = tokenizer.decode(row["tokens"] + row["human_continuation"])
        (pair.folder / f"held-out-{row['prompt']}.txt").write_text(text)
    held_out = ["--set", "prompts.files=[held-out-*.txt]", "--set", f"prompts.count={len(reported)}"]

    def evaluate(plan: str, store: Path) -> dict[str, Any]:
        where = ("--store", store, "--in-process")
        said = dtmsearch("evaluate", file, "--plan", plan, *held_out, *where, "--format", "json")
        assert said.code == 0, said
        values: dict[str, Any] = json.loads(said.out)
        return values

    with ThreadPoolExecutor() as pool:
        by_scheme = pool.submit(evaluate, "uniform:int4-channel", pair.folder / "by-scheme")
        by_file = pool.submit(evaluate, str(plan_file), pair.folder / "by-file")
        by_run = pool.submit(evaluate, "tiny", pair.beam_store)
    validation = [row for row in rows(pair.beam_store, "evaluations", "tiny") if row["purpose"] == "validation"]
    # The plan that the run ended with may be a uniform one, and what the search found another.
    labels = {row["plan_id"]: row["label"].replace("plan", "found") for row in validation}
    labels[record.final_plan_id] = "plan"
    by_label = {labels[row["plan_id"]]: {name: row[name] for name in METRICS} for row in validation}
    return Evaluated(by_label, by_scheme.result(), by_run.result(), by_file.result())


def metrics(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values["summary"][name] for name in METRICS}


def test_a_uniform_plan_measured_again_gives_the_run_s_values(evaluated: Evaluated) -> None:
    assert metrics(evaluated.by_scheme) == pytest.approx(evaluated.run["uniform:int4-channel"], rel=1e-5)


def test_a_plan_file_made_from_the_table_gives_the_run_s_values(evaluated: Evaluated) -> None:
    assert metrics(evaluated.by_file) == pytest.approx(evaluated.run["plan"], rel=1e-5)


def test_a_run_s_plan_is_known_from_the_run(evaluated: Evaluated) -> None:
    assert metrics(evaluated.by_run) == pytest.approx(evaluated.run["plan"], rel=1e-5)


# Two runs of one store at once.


@dataclass(frozen=True)
class Beside:
    """Two runs of one search in one store, over the toy model, at work at once; the first was started twice, stopped,
    and resumed."""

    store: Path
    refused: Ended
    changed: Ended
    stopped: Driver
    stopped_status: str
    other: Driver
    resumed: tuple[int, str]


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    folder = tmp_path_factory.mktemp("beside")
    store = folder / "store"
    first, second = (tiny_search(folder, run=run) for run in ("tiny", "other"))
    gate = Gate(folder / "gate")
    # After the first round both wait (each takes what the other has measured), so that the stop finds one at work.
    gate.bound("components", 1)
    where = ("--store", store, "--in-process")
    with (
        Driver(folder / "first.log", "run", first, *where, gate=gate, toy=True) as one,
        Driver(folder / "b.log", "run", second, *where, gate=gate, toy=True) as two,
    ):
        one.until(lambda: is_on_record(store))
        refused = dtmsearch("run", first, *where)
        one.until(lambda: num_recorded(store) > 0)
        dtm.stop("tiny", str(store))
        one.wait()
        gate.open()
        status = last_status(store)
        changed = dtmsearch("run", first, "--set", "search.width=3", *where)
        two.wait()
        with Driver(folder / "resumed.log", "resume", "tiny", *where, gate=gate, toy=True) as third:
            resumed = third.wait(), third.output
        yield Beside(store, refused, changed, one, status, two, resumed)


def is_on_record(store: Path) -> bool:
    return ResultStore(store).run("tiny") is not None


def test_a_second_driver_is_refused(beside: Beside) -> None:
    says = "run tiny is being worked on by process" in beside.refused.err and "Traceback" not in beside.refused.err
    assert (beside.refused.code, says) == (1, True), beside.refused


def test_stop_from_another_process_stops_the_run(beside: Beside) -> None:
    assert (beside.stopped.wait(), beside.stopped_status) == (3, "stopped"), beside.stopped.output


def test_a_stopped_run_says_how_to_go_on(beside: Beside) -> None:
    assert f"To continue: dtmsearch resume tiny --store {beside.store}" in beside.stopped.output


def test_another_search_under_the_same_name_is_refused(beside: Beside) -> None:
    assert (beside.changed.code, "search.width: 2 -> 3" in beside.changed.err) == (2, True), beside.changed


def test_another_name_is_offered(beside: Beside) -> None:
    assert "--set run=tiny-2" in beside.changed.err


def test_a_run_beside_another_finishes(beside: Beside) -> None:
    assert beside.other.wait() == 0, beside.other.output


def test_the_stopped_run_finishes_with_the_other_s_plan(beside: Beside) -> None:
    assert plan_rows(beside.store, "tiny") == plan_rows(beside.store, "other") != [], beside.resumed


def test_runs_of_one_store_use_each_other_s_evaluations(beside: Beside) -> None:
    assert "other" in {row["reused_from"] for row in rows(beside.store, "evaluations", "tiny")}
