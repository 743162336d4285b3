"""Real nodes: `ray start` processes of their own with tokens on, driven by `submit`; and nodes that come and go."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
from fakes import toy_components
from held import HELD_FILE
from processes import (
    COMMAND,
    PATIENCE_SECONDS,
    Ended,
    environment,
    fork_for_ray,
    forking_python,
    num_recorded,
    tiny_search,
)
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from tiny import TEXT, replica, result, values, with_reference, write_model

from dtmsearch.cluster import placement
from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.core.components import ModelManifest
from dtmsearch.core.evaluation import EvalRequest, EvalResult, ModelSpec, Outcome, Reference
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.store.store import ResultStore

# Ray leaves the sockets and files of its own processes to the garbage collector.
pytestmark = [
    pytest.mark.timeout(4 * PATIENCE_SECONDS),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

TOKEN = "0123456789abcdef" * 4
# What a user's processes have, before nodes that come and go change it in this one.
_OWN = environment()
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def node(log: Path, *options: str) -> Iterator[None]:
    """A node of a cluster, as `ray start` makes it; it ends with the block."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                forking_python(),
                RAY,
                "start",
                "--block",
                "--num-cpus=1",
                f"--dashboard-agent-listen-port={free_port()}",
                *options,
            ],
            stdout=stream,
            stderr=stream,
            env=with_token(),
            start_new_session=True,
        )
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), lambda: log.read_text())
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def with_token(token: str | None = TOKEN) -> dict[str, str]:
    """The environment of a user who has a token, or none."""
    own = {key: value for key, value in _OWN.items() if not key.startswith("RAY_A")}
    # The commands of this environment first: a job's driver is whatever `python` is on the nodes' path.
    own["PATH"] = os.pathsep.join((str(Path(forking_python()).parent), str(Path(sys.executable).parent), own["PATH"]))
    return own | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token is not None else own


def wait_for(happened: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


# Submitted searches on two nodes.


@dataclass(frozen=True)
class TwoNodes:
    """A cluster, and a small search that was submitted to it, and then once more."""

    folder: Path
    dashboard: str
    address: str
    first: Ended
    again: Ended

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def submit(self, token: str | None = TOKEN) -> Ended:
        return submit(self.folder, self.dashboard, token)


def little_search(folder: Path) -> Path:
    return tiny_search(folder, search__width=1, search__stop={"components": 2})


def submit(folder: Path, dashboard: str, token: str | None = TOKEN) -> Ended:
    command = [
        "submit",
        str(little_search(folder)),
        "--address",
        dashboard,
        "--store",
        str(folder / "store"),
        "--follow",
    ]
    return run_command(command, token)


def run_command(arguments: list[str], token: str | None = TOKEN) -> Ended:
    done = subprocess.run(
        [forking_python(), COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=with_token(token),
        timeout=PATIENCE_SECONDS,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[TwoNodes]]:
    """Begun with this file's first test: it is mostly waiting, during which nodes come and go in others."""
    folder = tmp_path_factory.mktemp("nodes")
    little_search(folder)
    forking_python()  # its start has another environment for a while, and this process has one for all its threads
    with ExitStack() as nodes, ThreadPoolExecutor(1) as beside:
        yield beside.submit(submitted_twice, folder, nodes)


def submitted_twice(folder: Path, nodes: ExitStack) -> TwoNodes:
    port, dashboard, client = free_port(), free_port(), free_port()
    address, url = f"{socket.gethostbyname(socket.gethostname())}:{port}", f"http://127.0.0.1:{dashboard}"
    # A short path: Ray's sockets lie below it.
    ray_folder = nodes.enter_context(tempfile.TemporaryDirectory(prefix="dtm-", ignore_cleanup_errors=True))
    head = [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    head += [f"--ray-client-server-port={client}", f"--temp-dir={ray_folder}", "--head"]
    nodes.enter_context(node(folder / "head.log", *head))
    nodes.enter_context(node(folder / "second.log", f"--address={address}"))
    return TwoNodes(folder, url, address, submit(folder, url), submit(folder, url))


@pytest.fixture(scope="module")
def two_nodes(submitted: Future[TwoNodes]) -> TwoNodes:
    return submitted.result()


# Nodes that come and go.


@pytest.fixture(scope="module")
def cluster(submitted: Future[TwoNodes]) -> Iterator[Cluster]:
    """A cluster of one node, to which each test adds another and takes it away again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the actors find `scripted`
        patch.setattr(placement, "_COUNT_SECONDS", 0.1)
        # A node that is gone is noticed soon; one that is only slow has ten seconds for an answer.
        patch.setenv("RAY_health_check_initial_delay_ms", "500")
        patch.setenv("RAY_health_check_period_ms", "200")
        fork_for_ray()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        ray.init(cluster.address, namespace="dtmsearch", log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def test_replicas_join_with_a_node_and_leave_with_it(cluster: Cluster) -> None:
    """What the lost node's replica held is measured again, and no replica waits for its return."""
    plans = [Plan().with_(Perturbation(c.name, s)) for c in toy_components(8) for s in ("int8-channel", "int4-g32")]
    asked = [EvalRequest(plan, "toy-reference", (0, 8), ("kl", "ppl")) for plan in plans]
    arrived: list[Outcome] = []
    with ReplicaPool(
        ModelSpec("seconds=0.2"), PoolSettings(), lambda note: None, replica_class="scripted:Scripted"
    ) as pool:
        pool.manifest()
        before = pool.num_at_work
        second = cluster.add_node(num_cpus=1)
        pool.submit(asked)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while pool.num_at_work < 2 and time.monotonic() < deadline:
            arrived += pool.poll(0.1)
        joined = pool.num_at_work
        cluster.remove_node(second, allow_graceful=False)
        while len(arrived) < len(asked) and time.monotonic() < deadline:
            arrived += pool.poll(0.1)
        while pool.num_replicas > 1 and time.monotonic() < deadline:
            pool.poll(0.1)
        left = pool.num_replicas
    answered = sorted(o.request_id for o in arrived if isinstance(o, EvalResult)) == sorted(r.id for r in asked)
    assert (before, joined, left, answered) == (1, 2, 1, True)


# Replicas that are larger than a node.


@dataclass
class Spread:
    """What became of a replica on two nodes: of its wait while there was one, its reference and its evaluations, and
    those after one of its processes was killed."""

    waited: bool
    nodes: set[str]
    reference: Reference
    before: list[Outcome]
    after: list[Outcome]
    notes: list[str]


@pytest.fixture(scope="module")
def spread_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("spread"))


def some_requests(reference: Reference, manifest: ModelManifest) -> list[EvalRequest]:
    names = [component.name for component in manifest.components]
    parent = Plan.of({names[0]: "int4-g16"})
    plans = [Plan.of({**parent.schemes, name: "int3-g16"}) for name in names[1::6]]
    return [EvalRequest(plan, reference.id, (0, 6), ("kl",), parent) for plan in plans]


def gathered(pool: ReplicaPool, requests: list[EvalRequest]) -> list[Outcome]:
    """The outcomes of requests, in their order."""
    pool.submit(requests)
    return awaited(pool, requests)


def awaited(pool: ReplicaPool, requests: list[EvalRequest]) -> list[Outcome]:
    arrived: dict[str, Outcome] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(arrived) < len(requests) and time.monotonic() < deadline:
        arrived |= {outcome.request_id: outcome for outcome in pool.poll(0.1)}
    return [arrived[request.id] for request in requests]


def test_a_replica_through_which_weights_pass_that_is_killed_amid_a_pass_loses_nothing(
    cluster: Cluster, spread_model: Path
) -> None:
    notes: list[str] = []
    settings = PoolSettings(address=cluster.address, replicas=1, cpus_per_replica=1.0, weights="streamed")
    spec, held = ModelSpec(str(spread_model), dtype="float32"), spread_model / HELD_FILE
    with ReplicaPool(spec, settings, notes.append, replica_class="held:Held") as pool:
        manifest = pool.manifest()
        prompts, _ = pool.cut_prompts([TEXT], 6, 10, 12, 0)
        reference = pool.make_reference(prompts)
        pool.use(reference)
        requests = some_requests(reference, manifest)
        pool.submit(requests)
        while not held.is_file():
            assert pool.poll(0.1) == []
        os.kill(int(held.read_text()), signal.SIGKILL)
        outcomes = awaited(pool, requests)
    alone = replica(spread_model)
    with_reference(alone)
    assert [values(outcome) for outcome in outcomes] == [values(outcome) for outcome in alone.evaluate(requests)]
    assert max(result(outcome).provenance.attempts for outcome in outcomes) == 2
    assert [note for note in notes if "was lost and is replaced" in note]


@pytest.fixture(scope="module")
def spread(cluster: Cluster, spread_model: Path) -> Iterator[Spread]:
    notes: list[str] = []
    settings = PoolSettings(address=cluster.address, replicas=1, cpus_per_replica=1.0, nodes_per_replica=2)
    with ReplicaPool(ModelSpec(str(spread_model), dtype="float32"), settings, notes.append) as pool:
        waited = not ray.wait([pool._replicas.members[0].host.placed], timeout=1.0)[0]
        second = cluster.add_node(num_cpus=1)
        manifest = pool.manifest()
        prompts, _ = pool.cut_prompts([TEXT], 6, 10, 12, 0)
        reference = pool.make_reference(prompts)
        pool.use(reference)
        requests = some_requests(reference, manifest)
        before = gathered(pool, requests)
        host = pool._replicas.members[0].host
        placed = set(placement_group_table(host.group)["bundles_to_node_id"].values())
        os.kill(ray.get(host.others[0].where.remote())[1], signal.SIGKILL)
        again = [replace(request, prompts=(0, 5)) for request in requests]
        yield Spread(waited, placed, reference, before, gathered(pool, again), notes)
    cluster.remove_node(second)


def test_a_replica_on_two_nodes_waits_until_it_can_have_both(spread: Spread) -> None:
    assert (spread.waited, len(spread.nodes)) == (True, 2)


def test_a_replica_on_two_nodes_measures_what_one_process_measures(spread: Spread, spread_model: Path) -> None:
    alone = replica(spread_model)
    with_reference(alone)
    expected = alone.evaluate(some_requests(spread.reference, alone.manifest()))
    assert [values(outcome) for outcome in spread.before] == [values(outcome) for outcome in expected]


def test_with_one_stage_the_replica_is_lost_and_another_goes_on(spread: Spread, spread_model: Path) -> None:
    alone = replica(spread_model)
    with_reference(alone)
    again = [replace(r, prompts=(0, 5)) for r in some_requests(spread.reference, alone.manifest())]
    assert [values(outcome) for outcome in spread.after] == [values(outcome) for outcome in alone.evaluate(again)]
    assert max(result(outcome).provenance.attempts for outcome in spread.after) == 2
    assert [note for note in spread.notes if "replica-0" in note and "was lost and is replaced" in note]


# What became of the submitted searches.


def test_a_submitted_search_finishes_and_says_its_plan(two_nodes: TwoNodes) -> None:
    assert (two_nodes.first.code, "run tiny: finished" in two_nodes.first.out) == (0, True), two_nodes.first


def test_a_finished_search_is_complete_when_it_is_submitted_again(two_nodes: TwoNodes) -> None:
    done = (two_nodes.again.code, "run tiny: already complete" in two_nodes.again.out)
    assert (*done, "submitted job tiny~2" in two_nodes.again.err) == (0, True, True), two_nodes.again


def test_a_submitted_search_s_driver_writes_the_store(two_nodes: TwoNodes) -> None:
    assert num_recorded(two_nodes.store) > 0


def test_a_submitted_search_ran_from_what_was_sent(two_nodes: TwoNodes) -> None:
    record = ResultStore(two_nodes.store).run("tiny")
    assert record is not None and "working_dir_files" in record.config_folder


def test_without_a_token_a_user_is_told_where_to_get_it(two_nodes: TwoNodes) -> None:
    said = two_nodes.submit(token=None)
    assert (said.code, "lets nobody in without its token. Set RAY_AUTH_MODE=token" in said.err) == (5, True), said


def test_another_token_is_not_accepted(two_nodes: TwoNodes) -> None:
    said = two_nodes.submit(token=TOKEN[::-1])
    assert (said.code, "does not accept this token" in said.err) == (5, True), said
