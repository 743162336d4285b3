"""The pool over real Ray actors, some of which die: every request is answered once, whatever happens to replicas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from contracts import EvaluatorContract
from fakes import evaluate, toy_components
from local_ray import start_ray
from ray.exceptions import RayTaskError

from dtmsearch.cluster.connect import connect
from dtmsearch.cluster.health import Health
from dtmsearch.cluster.pool import ReplicaPool
from dtmsearch.cluster.pool_settings import PoolSettings
from dtmsearch.cluster.replicas import _reason, _whole
from dtmsearch.core.evaluation import EvalFailure, EvalRequest, EvalResult, ModelSpec, Outcome
from dtmsearch.core.plan import Perturbation, Plan
from dtmsearch.errors import ClusterUnreachable, LibraryMissing, ReplicasFailed, UserError

# Ray leaves the sockets and files of its own processes to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the actors find `scripted`
        start_ray(num_cpus=8)  # room for pools beside each other
    yield
    ray.shutdown()


def pool_of(orders: str, notes: list[str] | None = None, replicas: int = 2, health: Health = Health()) -> ReplicaPool:
    settings = PoolSettings(replicas=replicas, cpus_per_replica=1.0)
    on_note = (notes if notes is not None else []).append
    return ReplicaPool(ModelSpec(orders), settings, on_note, replica_class="scripted:Scripted", health=health)


def requests(
    schemes: tuple[str, ...] = ("int8-channel", "int4-g32"), reference_id: str = "toy-reference"
) -> list[EvalRequest]:
    plans = [Plan().with_(Perturbation(c.name, scheme)) for c in toy_components(8) for scheme in schemes]
    return [EvalRequest(plan, reference_id, (0, 8), ("kl", "ppl")) for plan in plans]


def answers(pool: ReplicaPool, asked: list[EvalRequest]) -> list[Outcome]:
    pool.manifest()
    pool.submit(asked)
    arrived: list[Outcome] = []
    while len(arrived) < len(asked):
        arrived += pool.poll(1.0)
    return arrived


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deaths")


@pytest.fixture(scope="module")
def mortal(deaths: Path) -> Iterator[ReplicaPool]:
    with pool_of(f"die-once={deaths}") as pool:
        pool.manifest()
        yield pool


def at_work(pool: ReplicaPool, number: int) -> None:
    """Wait for so many replicas."""
    pool.manifest()
    while pool.num_at_work < number:
        pool.poll(0.1)


class TestRayPool(EvaluatorContract):
    """With a replica killed in the middle of each test."""

    @pytest.fixture
    def evaluator(self, mortal: ReplicaPool, deaths: Path) -> ReplicaPool:
        """A pool of which nothing is asked any more, and one of whose replicas dies over the next request."""
        (deaths / "die-once").unlink(missing_ok=True)
        return mortal


@pytest.fixture(scope="module")
def healthy() -> Iterator[ReplicaPool]:
    """A pool to which nothing happens; every test asks it and takes all of the answers."""
    with pool_of("seconds=0.01") as pool:
        pool.manifest()
        yield pool


def test_every_request_is_answered_once(healthy: ReplicaPool) -> None:
    arrived = answers(healthy, requests())
    assert sorted(o.request_id for o in arrived) == sorted(r.id for r in requests())


def test_answers_are_the_replicas_own(healthy: ReplicaPool) -> None:
    expected = {r.id: evaluate(r).fdt.tolist() for r in requests()}
    arrived = answers(healthy, requests())
    assert {o.request_id: o.fdt.tolist() for o in arrived if isinstance(o, EvalResult)} == expected


@dataclass(frozen=True)
class Watched:
    """A pool with something wrong: what arrived for what was asked, and what it said."""

    arrived: list[Outcome]
    asked: list[EvalRequest]
    notes: list[str]


@pytest.fixture(scope="module")
def bereft(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A pool of which a replica died over its first request."""
    notes: list[str] = []
    with pool_of(f"die-once={tmp_path_factory.mktemp('dies')} seconds=0.01", notes) as pool:
        return Watched(answers(pool, requests()), requests(), notes)


def test_a_replica_that_dies_loses_no_request(bereft: Watched) -> None:
    assert len(bereft.arrived) == len(bereft.asked)
    assert all(isinstance(outcome, EvalResult) for outcome in bereft.arrived)


def test_a_lost_replica_is_named_with_its_reason(bereft: Watched) -> None:
    assert any("was lost and is replaced" in note for note in bereft.notes)


@pytest.fixture(scope="module")
def struck() -> Watched:
    """A pool whose last request kills every replica that takes it."""
    killer = EvalRequest(Plan.of({toy_components(8)[4].name: "int2-tensor"}), "toy-reference", (0, 8), ("kl", "ppl"))
    with pool_of("die-on=int2-tensor seconds=0.01") as pool:
        return Watched(answers(pool, [*requests(), killer]), [*requests(), killer], [])


def test_only_the_request_that_kills_replicas_fails(struck: Watched) -> None:
    assert [o.request_id for o in struck.arrived if isinstance(o, EvalFailure)] == [struck.asked[-1].id]


def test_a_request_that_kills_replicas_says_how_many(struck: Watched) -> None:
    (failure,) = [outcome for outcome in struck.arrived if isinstance(outcome, EvalFailure)]
    assert (failure.provenance.attempts, failure.kind) == (3, "replica_lost")


def test_a_replica_that_does_not_start_is_replaced(tmp_path: Path) -> None:
    with pool_of(f"bad-start={tmp_path}") as pool:
        arrived = answers(pool, requests())
    assert len(arrived) == len(requests())


def test_replicas_that_never_start_end_the_search_with_their_reason() -> None:
    with pytest.raises(ReplicasFailed, match="the disk is on fire"), pool_of("broken") as pool:
        pool.manifest()


def raised_by_a_replica(error: Exception) -> RayTaskError:
    return RayTaskError("load", "Traceback (most recent call last):\n  in load\nKeyError: 'layer'", error)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "AssertionError"),
        (RuntimeError("\n \n"), "RuntimeError"),
        (KeyError("layer"), "KeyError: 'layer'"),
        (UserError("no model"), "no model"),
        (RayTaskError("load", "Traceback\nKeyError: 'layer'", None), "KeyError: 'layer'"),
    ],
)
def test_why_a_replica_was_lost_is_one_line_whatever_it_raised(error: Exception, reason: str) -> None:
    assert _reason(raised_by_a_replica(error)) == reason


def test_what_a_replica_raised_is_said_whole() -> None:
    said = "the weights are damaged\nfirst: " + "x" * 400
    assert said in _whole(raised_by_a_replica(RuntimeError(said)))


def test_a_users_mistake_comes_back_as_itself() -> None:
    with pytest.raises(ValueError, match="no model at all"), pool_of("mistake") as pool:
        pool.manifest()


def test_a_library_that_a_replica_lacks_ends_the_search_and_is_no_failure_of_a_plan() -> None:
    with pytest.raises(LibraryMissing, match=r"^on .+: no quantizer here"), pool_of("lacking") as pool:
        answers(pool, requests())


def test_a_replica_with_another_model_is_dismissed_by_its_canary(tmp_path: Path) -> None:
    notes: list[str] = []
    with pool_of(f"liar={tmp_path}", notes) as pool:
        pool.manifest()
        prompts, _ = pool.cut_prompts([""], 4, 4, 4, 0)
        pool.use(pool.make_reference(prompts))
        answers(pool, requests())
    assert any("diverges on 100.0% of the reference" in note for note in notes)


def test_two_replicas_that_start_with_the_same_other_model_end_the_search() -> None:
    with pytest.raises(ReplicasFailed, match=r"find the same of the base model, .* diverges on 100\.0%"):
        watched("liars", [])


def watched(orders: str, notes: list[str], health: Health = Health()) -> tuple[list[Outcome], list[EvalRequest]]:
    """Requests against a reference that replicas have taken, so that canaries can be sent; and their outcomes."""
    with pool_of(f"{orders} seconds=0.01", notes, health=health) as pool:
        pool.manifest()
        prompts, _ = pool.cut_prompts([""], 8, 4, 100, 0)
        reference = pool.make_reference(prompts)
        pool.use(reference)
        asked = requests(reference_id=reference.id)
        return answers(pool, asked), asked


@pytest.fixture(scope="module")
def deceived(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A pool of which a replica turned wrong after some requests."""
    notes: list[str] = []
    arrived, asked = watched(f"wrong-once={tmp_path_factory.mktemp('wrong')} after=5", notes)
    return Watched(arrived, asked, notes)


def test_wrong_numbers_reach_nobody(deceived: Watched) -> None:
    right = {r.id: evaluate(r).fdt.tolist() for r in deceived.asked}
    assert {o.request_id: o.fdt.tolist() for o in deceived.arrived if isinstance(o, EvalResult)} == right


def test_a_replica_that_turns_wrong_is_dismissed_with_what_no_canary_verified(deceived: Watched) -> None:
    assert any("its canary is off by" in note and "measured again" in note for note in deceived.notes)


def test_wrong_numbers_cost_no_request_an_attempt(deceived: Watched) -> None:
    assert {outcome.provenance.attempts for outcome in deceived.arrived} == {1}


def test_a_search_whose_replicas_all_turn_wrong_ends_with_the_reason() -> None:
    with pytest.raises(ReplicasFailed, match=r"find the same of the base model, .* its canary is off by 9\.0%"):
        watched("wrong-on=int4-g32", [])


def test_a_search_whose_replicas_are_all_lost_over_their_canary_ends_with_the_reason() -> None:
    with pytest.raises(
        ReplicasFailed, match=r"in a row were wrong, or lost over their canary; the last: .*of another mode"
    ):
        watched("check-fails", [])


def test_a_replica_that_hangs_loses_no_request(tmp_path: Path) -> None:
    notes: list[str] = []
    arrived, asked = watched(f"hang-once={tmp_path} after=5", notes, Health(floor_seconds=0.3))
    assert (sorted(o.request_id for o in arrived), any("no answer for" in note for note in notes)) == (
        sorted(r.id for r in asked),
        True,
    )


def test_a_guess_that_is_submitted_later_is_answered_once(healthy: ReplicaPool) -> None:
    guessed, real = requests()[:8], requests()[4:16]
    healthy.submit_guesses(guessed)
    healthy.submit(real)
    arrived: list[Outcome] = []
    while len(arrived) < 16:
        arrived += healthy.poll(1.0)
    arrived += healthy.poll(0.3)
    assert sorted(o.request_id for o in arrived) == sorted(r.id for r in requests()[:16])


def test_a_second_reference_reaches_replicas_that_still_take_the_first(healthy: ReplicaPool) -> None:
    for seed in (0, 1):
        prompts, _ = healthy.cut_prompts([""], 4, 4, 4, seed)
        healthy.use(healthy.make_reference(prompts))
    assert len(answers(healthy, requests())) == len(requests())


def test_speed_is_measured_on_all_replicas_at_once(tmp_path: Path) -> None:
    with pool_of(f"fast={tmp_path}") as pool:
        at_work(pool, 2)
        speed = pool.measure_speed(8, 100, 100)
    assert (speed.head_seconds, speed.text_head_factor, speed.memory_bytes) == (2.0, 2.0, 3)


def test_speed_is_that_of_the_replicas_that_are_left(tmp_path: Path) -> None:
    with pool_of(f"die-once={tmp_path}") as pool:
        at_work(pool, 2)
        assert pool.measure_speed(8, 100, 100).head_seconds == 3.0


def test_gpus_that_are_not_there_are_a_users_mistake() -> None:
    settings = PoolSettings(gpus_per_replica=1.0)
    with pytest.raises(ValueError, match="asks for 1 GPUs, but this machine has 0"):
        ReplicaPool(ModelSpec(""), settings, replica_class="scripted:Scripted")


def test_an_address_where_nobody_listens_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterUnreachable, match="no Ray cluster at"):
        connect("127.0.0.1:9")
